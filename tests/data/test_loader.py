"""Faults in the middle of a run: files that vanish or are cut are replaced; a worker process that dies ends it."""

import multiprocessing
import os
import signal

import pytest
import torch
from conftest import write_market
from outcomes import assert_same, outcome
from thin import thin, train  # noqa: F401 (a fixture)

from mgn import features, training
from mgn.data.loader import load_batches
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


def test_a_worker_process_that_dies_ends_the_run_in_a_sentence_and_the_same_command_goes_on(market, tmp_path,
                                                                                            monkeypatch):
    train(market, tmp_path / 'untouched', 'workers = 2')
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: [os.kill(child.pid, signal.SIGKILL) for child in multiprocessing.active_children()])
        with pytest.raises(UserError, match=r'A data-loading worker died: DataLoader worker .*pid.* Look for .*memory'):
            train(market, tmp_path / 'run', 'workers = 2', 'total_steps = 100')
    assert checkpoint.load(str(tmp_path / 'run' / 'last.pth'))['step'] >= 2
    train(market, tmp_path / 'run', 'workers = 2')
    assert_same(outcome(tmp_path / 'run'), outcome(tmp_path / 'untouched'))


def test_a_worker_process_that_dies_in_an_evaluation_ends_it_in_a_sentence(market, tmp_path, monkeypatch):
    real = features.normalise

    def normalise(batch):
        [os.kill(child.pid, signal.SIGKILL) for child in multiprocessing.active_children()]
        return real(batch)
    monkeypatch.setattr(features, 'normalise', normalise)
    with pytest.raises(UserError, match='A data-loading worker died'):
        train(market, tmp_path / 'run', 'workers = 1', 'total_steps = 1', 'Extractor.batch_size = 1')


@pytest.mark.parametrize('error, workers, dead', [
    (RuntimeError('DataLoader worker (pid 3) is killed by signal: Killed. '), 1, True),
    (RuntimeError('DataLoader worker (pid(s) 3) exited unexpectedly'), 2, True),
    (RuntimeError('Pin memory thread exited unexpectedly'), 1, True), (ConnectionResetError(), 1, True),
    (RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nOriginal …'), 1, False),
    (RuntimeError('CUDA error'), 1, False), (RuntimeError('DataLoader worker (pid 3) is killed'), 0, False)])
def test_only_deaths_are_deaths(monkeypatch, error, workers, dead):
    def loader(*_, **__):
        yield 1
        raise error
    monkeypatch.setattr('mgn.data.loader.DataLoader', loader)
    batches = load_batches([], range(3), workers, torch.device('cpu'))
    assert next(batches) == 1
    with pytest.raises(UserError if dead else RuntimeError, match='worker died' if dead else str(error)[:9]) as raised:
        next(batches)
    assert dead or raised.value is error


class Handlers:
    def __getitem__(self, step):
        return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_worker_processes_alone_ignore_what_a_terminal_sends_to_all():
    for workers in (0, 1):
        assert list(load_batches(Handlers(), range(2), workers, torch.device('cpu'))) == [workers > 0] * 2
