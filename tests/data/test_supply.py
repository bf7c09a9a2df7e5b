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
from mgn.runs import checkpoint
from mgn.data.supply import died

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


@pytest.mark.parametrize('workers, damage', [(0, os.remove), (2, lambda path: os.truncate(path, 200)),
                                             pytest.param(2, os.remove, marks=pytest.mark.long)], ids=['removed', 'cut, workers', 'removed, workers'])
def test_files_that_go_bad_in_the_middle_are_told_and_replaced(tmp_path, monkeypatch, caplog, damage, workers):
    root = write_market(tmp_path / 'data', identities=60, images=4, size=(16, 8))
    bad = sorted((root / 'bounding_box_train').glob('*_000000_*'))[:2]  # of 240: two may be
    at_step(monkeypatch, 2, lambda: [damage(path) for path in bad])
    train(root, tmp_path / 'run', f'workers = {workers}', 'P = 30', 'total_steps = 24', 'train.evaluate_every = 99')
    told = [message for message in caplog.messages if 'unreadable image number' in message]
    assert len(told) == 2 and all(any(str(path) in message for message in told) for path in bad)
    assert checkpoint.load(str(tmp_path / 'run' / 'last.pth'))['step'] == 24


def test_more_files_that_go_bad_than_are_allowed_stop_the_run_behind_its_last_checkpoint(tmp_path, monkeypatch):
    root = write_market(tmp_path / 'data', identities=6, size=(16, 8))
    at_step(monkeypatch, 3, lambda: [os.remove(path) for path in (root / 'bounding_box_train').glob('*_000000_*')])
    with pytest.raises(ValueError, match='(?s)want at most 1% of 24 training images unreadable, got .*restore or remove') as raised:
        train(root, tmp_path / 'run')
    assert str(root) in str(raised.value)
    assert checkpoint.load(str(tmp_path / 'run' / 'last.pth'))['step'] in (2, 4, 6)


def test_a_worker_process_that_dies_is_replaced_and_nothing_changes(market, tmp_path, monkeypatch, caplog):
    train(market, tmp_path / 'untouched', 'workers = 2')
    at_step(monkeypatch, 0, lambda: [os.kill(child.pid, signal.SIGKILL) for child in multiprocessing.active_children()])
    train(market, tmp_path / 'run', 'workers = 2')
    assert any(re.match(r'worker death number 1, before batch \d; new ones take over: DataLoader worker .*pid', message) for message in caplog.messages)
    assert_same(outcome(tmp_path / 'run'), outcome(tmp_path / 'untouched'))


@pytest.mark.long  # each death is noticed within five seconds
def test_a_file_that_kills_every_worker_stops_the_run_and_stands_in_the_list(market, tmp_path, monkeypatch, caplog):
    real = images.decode

    def deadly(path):
        if '0003_c' in path and multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path)
    monkeypatch.setattr(images, 'decode', deadly)
    with pytest.raises(RuntimeError, match=r'(?s)want worker processes that live, got . deaths, 3 of them without a batch in between, .*0003_c.*look for a file'):
        train(market, tmp_path, 'workers = 1', 'train.evaluate_every = 99')
    assert len([message for message in caplog.messages if 'new ones take over' in message]) >= 2


def test_a_worker_process_that_dies_in_an_evaluation_is_replaced(market, tmp_path, monkeypatch, caplog):
    real, calls = features.normalise, []

    def normalise(batch):
        if not calls:
            [os.kill(child.pid, signal.SIGKILL) for child in multiprocessing.active_children()]
        calls.append(0)
        return real(batch)
    monkeypatch.setattr(features, 'normalise', normalise)
    train(market, tmp_path / 'run', 'workers = 1', 'total_steps = 1', 'Extractor.batch_size = 1')
    assert any(message.startswith('worker death number 1, before batch') for message in caplog.messages)


@pytest.mark.parametrize('told, workers, dead', [
    ('DataLoader worker (pid 3) is killed by signal: Killed. ', 1, True), ('DataLoader worker (pid(s) 3) exited unexpectedly', 2, True),
    ('Pin memory thread exited unexpectedly', 1, True), ('Caught RuntimeError in DataLoader worker process 0.\nOriginal …', 1, False),
    ('CUDA error', 1, False), ('DataLoader worker (pid 3) is killed', 0, False)])
def test_only_deaths_are_deaths(told, workers, dead):
    assert bool(died(RuntimeError(told), workers)) == dead and died(ConnectionResetError(), 1)
