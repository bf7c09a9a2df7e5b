"""Faults in the middle of a run: files that vanish or are cut, worker processes that die. Others take their place."""

import multiprocessing
import os
import re
import signal

import pytest
from conftest import write_market
from outcomes import assert_same, outcome
from thin import thin, train  # noqa: F401 (a fixture)

from mgn import features, training
from mgn.data import images
from mgn.data.loader import death_message
from mgn.ops.errors import UserError
from mgn.runs import checkpoint

pytestmark = pytest.mark.usefixtures('thin')


def at_step(monkeypatch, call, what):
    """Does `what` in front of training's step number `call`."""
    calls, real = [], training.train_step

    def step(*args):
        if len(calls) == call:
            what()
        calls.append(0)
        return real(*args)
    monkeypatch.setattr(training, 'train_step', step)


@pytest.mark.parametrize('workers, damage', [
    pytest.param(0, os.remove, id='removed'),
    pytest.param(2, lambda path: os.truncate(path, 200), id='cut, workers'),
    pytest.param(2, os.remove, id='removed, workers', marks=pytest.mark.long)])
def test_files_that_go_bad_in_the_middle_are_reported_and_replaced(tmp_path, monkeypatch, caplog, damage, workers):
    root = write_market(tmp_path / 'data', identities=60, images=4, size=(16, 8))
    bad = sorted((root / 'bounding_box_train').glob('*_000000_*'))[:2]  # of 240: two may be
    at_step(monkeypatch, 2, lambda: [damage(path) for path in bad])
    train(root, tmp_path / 'run', f'workers = {workers}', 'P = 30', 'total_steps = 12', 'train.evaluate_every = 99',
          'input_size = (32, 16)')
    warnings = [message for message in caplog.messages if 'unreadable image number' in message]
    assert len(warnings) == 2 and all(any(str(path) in message for message in warnings) for path in bad)
    assert checkpoint.load(str(tmp_path / 'run' / 'last.pth'))['step'] == 12


def test_more_files_that_go_bad_than_are_allowed_stop_the_run_behind_its_last_checkpoint(tmp_path, monkeypatch):
    root = write_market(tmp_path / 'data', identities=6, size=(16, 8))
    at_step(monkeypatch, 3, lambda: [os.remove(path) for path in (root / 'bounding_box_train').glob('*_000000_*')])
    message = '(?s)At most 1% of the 24 training images may be unreadable, but .* are:.*Restore or remove'
    with pytest.raises(ValueError, match=message) as raised:
        train(root, tmp_path / 'run')
    assert str(root) in str(raised.value)
    assert checkpoint.load(str(tmp_path / 'run' / 'last.pth'))['step'] in (2, 4, 6)


def test_a_worker_process_that_dies_is_replaced_and_nothing_changes(market, tmp_path, monkeypatch, caplog):
    train(market, tmp_path / 'untouched', 'workers = 2')
    at_step(monkeypatch, 0, lambda: [os.kill(child.pid, signal.SIGKILL) for child in multiprocessing.active_children()])
    train(market, tmp_path / 'run', 'workers = 2')
    warning = r'data-loading workers died \(number 1, before batch \d\) and are restarted: DataLoader worker .*pid'
    assert any(re.match(warning, message) for message in caplog.messages)
    assert_same(outcome(tmp_path / 'run'), outcome(tmp_path / 'untouched'))


@pytest.mark.long  # each death is noticed within five seconds
def test_a_file_that_kills_every_worker_stops_the_run_and_stands_in_the_list(market, tmp_path, monkeypatch, caplog):
    real = images.Decoder.__call__

    def deadly(self, path):
        if '0003_c' in path and multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, path)
    monkeypatch.setattr(images.Decoder, '__call__', deadly)
    message = r'(?s)workers died 3 times in a row and . times in all, .*0003_c.*Look for a file'
    with pytest.raises(UserError, match=message):
        train(market, tmp_path, 'workers = 1', 'train.evaluate_every = 99')
    assert len([message for message in caplog.messages if 'and are restarted' in message]) >= 2


def test_a_worker_process_that_dies_in_an_evaluation_is_replaced(market, tmp_path, monkeypatch, caplog):
    real, calls = features.normalise, []

    def normalise(batch):
        if not calls:
            [os.kill(child.pid, signal.SIGKILL) for child in multiprocessing.active_children()]
        calls.append(0)
        return real(batch)
    monkeypatch.setattr(features, 'normalise', normalise)
    train(market, tmp_path / 'run', 'workers = 1', 'total_steps = 1', 'Extractor.batch_size = 1')
    assert any(message.startswith('data-loading workers died (number 1, before batch') for message in caplog.messages)


@pytest.mark.parametrize('message, workers, dead', [
    ('DataLoader worker (pid 3) is killed by signal: Killed. ', 1, True),
    ('DataLoader worker (pid(s) 3) exited unexpectedly', 2, True),
    ('Pin memory thread exited unexpectedly', 1, True),
    ('Caught RuntimeError in DataLoader worker process 0.\nOriginal …', 1, False),
    ('CUDA error', 1, False), ('DataLoader worker (pid 3) is killed', 0, False)])
def test_only_deaths_are_deaths(message, workers, dead):
    assert bool(death_message(RuntimeError(message), workers)) == dead and death_message(ConnectionResetError(), 1)
