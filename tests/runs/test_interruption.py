"""SIGTERM and SIGINT end a run after its step, with a checkpoint; resumed, it is bit-identical to one left alone."""

import json
import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager, nullcontext

import pytest
from forks import ROOT, run_binary, run_program
from outcomes import assert_same, outcome
from thin import thin, train  # noqa: F401 (a fixture)

from mgn import training
from mgn.ops.errors import UserError
from mgn.runs import checkpoint, interruption

pytestmark = pytest.mark.usefixtures('thin')

KINDS = {'float32': (),
         'bfloat16, workers': ("train.precision = 'bfloat16'", 'workers = 2')}
LONG_KINDS = {f'{precision}, {workers}': (f"train.precision = '{precision}'", f'workers = {workers}')
              for precision in ('float32', 'bfloat16') for workers in (0, 2)}


@pytest.fixture(scope='module')
def uninterrupted(market, tmp_path_factory):
    """bindings → the folder of a run that nothing interrupted."""
    folders = {}

    def run(*bindings):
        if bindings not in folders:
            folders[bindings] = tmp_path_factory.mktemp('uninterrupted')
            train(market, folders[bindings], *bindings)
        return folders[bindings]
    return run


@contextmanager
def signalled(monkeypatch, name, call, number=signal.SIGTERM):
    """Call number `call` (from 0) of training.<name> is that in which a signal comes."""
    calls, real = [], getattr(training, name)

    def interrupted(*args, **kwargs):
        calls.append(0)
        if len(calls) == call + 1:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(training, name, interrupted)
        yield


@pytest.mark.parametrize('call, number, kind', [
    (0, signal.SIGTERM, 'float32'), (4, signal.SIGINT, 'bfloat16, workers'),
    *(pytest.param(call, signal.SIGTERM, kind, marks=pytest.mark.long) for call in (0, 4, 6) for kind in LONG_KINDS)])
def test_the_step_is_finished_and_saved_and_the_run_goes_on_bit_for_bit(market, tmp_path, monkeypatch, uninterrupted,
                                                                        capfd, kind, call, number):
    kind = {**KINDS, **LONG_KINDS}[kind]
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with signalled(monkeypatch, 'train_step', call, number), pytest.raises(SystemExit) as left:
        train(market, tmp_path, *kind)
    assert left.value.code == interruption.STATUS == 75
    assert f'{number.name}: the run ends after this step' in capfd.readouterr().err
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == call + 1
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(market, tmp_path, *kind)
    assert_same(outcome(tmp_path), outcome(uninterrupted(*kind)))


@pytest.mark.parametrize('name', ['evaluate', 'write_results', 'save_last', 'write_text'])
def test_wherever_a_signal_comes_the_run_goes_on_bit_for_bit(market, tmp_path, monkeypatch, uninterrupted, name):
    with signalled(monkeypatch, name, 1), pytest.raises(SystemExit) as left:
        train(market, tmp_path)
    assert left.value.code == 75
    train(market, tmp_path)
    assert_same(outcome(tmp_path), outcome(uninterrupted()))


def test_a_signal_that_ends_a_worker_too_leaves_a_checkpoint(market, tmp_path, monkeypatch, uninterrupted):
    real = training.load_batches

    def batches(*args):
        for number, batch in enumerate(real(*args)):
            if number == 3:  # as while the main process waits for this batch
                for process in (multiprocessing.active_children()[0].pid, os.getpid()):
                    os.kill(process, signal.SIGTERM)
                raise UserError('A data-loading worker died')
            yield batch
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(training, 'load_batches', batches)
        train(market, tmp_path, 'workers = 1')
    assert left.value.code == interruption.STATUS
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 4  # this process has made the batch itself
    train(market, tmp_path, 'workers = 1')
    assert_same(outcome(tmp_path), outcome(uninterrupted('workers = 1')))


def test_a_run_that_ends_in_its_first_evaluation_starts_anew(market, tmp_path, monkeypatch, uninterrupted):
    with signalled(monkeypatch, 'evaluate', 0), pytest.raises(SystemExit) as left:
        train(market, tmp_path)
    assert left.value.code == 75 and not list(tmp_path.glob('*.pth'))
    train(market, tmp_path)
    assert_same(outcome(tmp_path), outcome(uninterrupted()))


def test_an_evaluation_is_aborted_at_once(market, tmp_path, monkeypatch):
    written, real = [], training.write_results
    monkeypatch.setattr(training, 'write_results', lambda *args: (written.append(0), real(*args)))
    with signalled(monkeypatch, 'evaluate', 1), pytest.raises(SystemExit):
        train(market, tmp_path)
    assert len(written) == 1 and checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 4
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'mAP' in line] == [0]


def test_a_signal_that_comes_before_an_evaluation_keeps_it_from_beginning():
    with interruption.Interruption() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.asked()
        with pytest.raises(SystemExit), interrupted.at_once():
            raise AssertionError('it has begun')


def test_a_signal_without_a_reader_of_its_message_is_one_all_the_same(monkeypatch):
    def broken(*_):
        raise BrokenPipeError
    with interruption.Interruption() as interrupted, monkeypatch.context() as patch:
        patch.setattr(os, 'write', broken)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted.asked()


def test_signals_that_are_ignored_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.Interruption() as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupted.asked() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('under_torchrun, after, ended', [(False, 0.0, False), (False, 1.0, True), (True, 1.0, False),
                                                          (True, 3.0, True)])
def test_a_signal_soon_after_the_first_is_the_same_one_sent_on(monkeypatch, under_torchrun, after, ended):
    def end(status):
        raise InterruptedError(status)
    monkeypatch.setattr(os, '_exit', end)
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    if under_torchrun:
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'run')
    with interruption.Interruption() as interrupted:
        interrupted.handle(signal.SIGTERM, None)
        interrupted.since -= after
        with pytest.raises(InterruptedError, match='143') if ended else nullcontext():
            interrupted.handle(signal.SIGTERM, None)


def test_a_worker_that_inherits_the_handler_notes_nothing():
    with interruption.Interruption() as interrupted:
        interrupted.process += 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted.noted is None


def test_outside_the_main_thread_signals_are_left_to_the_program():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with interruption.Interruption():
            found.append(signal.getsignal(signal.SIGTERM))
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


# A step that takes long: the first signal waits for its end, the second does not.
PROGRAM = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from thin import ThinResNet, train
from mgn import command_line, model, training
model.make_resnet = lambda backbone, imagenet: ThinResNet()
real, signals = training.train_step, {signals}

def step(*args):
    for number in signals:
        os.kill(os.getpid(), number)
        time.sleep(0.5)
    print('signals sent', flush=True)
    return real(*args)

training.train_step = step
sys.argv = ['mgn.train']
command_line.run(lambda files, bindings: train({data!r}, {folder!r}))
"""


@pytest.mark.parametrize('signals, status', [
    ([15], 75), ([2, 2], 130),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (([2], 75), ([15, 15], 143), ([15, 2], 130)))])
def test_the_status_tells_an_interrupted_run_and_the_second_signal_ends_it_at_once(market, tmp_path, signals, status):
    program = PROGRAM.format(root=str(ROOT), tests=str(ROOT / 'tests'), signals=signals, data=str(market),
                             folder=str(tmp_path / 'run'))
    ended = run_binary(program=program)
    assert ended.returncode == status, ended.stderr
    assert ('signals sent' in ended.stdout) == (status == 75)
    assert ('ended after step 1, which last.pth holds; the same command resumes' in ended.stdout) == (status == 75)
    assert checkpoint.load(str(tmp_path / 'run' / 'last.pth'))['step'] == (1 if status == 75 else 0)


# What a binary does that is no run takes long.
BINARY = """
import os, sys, threading, time
sys.path[:0] = [{root!r}]
from mgn import command_line

def send():
    time.sleep(0.5)
    os.kill(os.getpid(), {number})

def work(files, bindings):
    threading.Thread(target=send, daemon=True).start()
    try:
        time.sleep(60)
    finally:
        print('put in order', flush=True)

sys.argv = ['mgn.eval']
command_line.run(work)
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_binary_that_is_no_run_ends_at_once_and_removes_what_is_temporary(number):
    ended = run_program(BINARY.format(root=str(ROOT), number=int(number)))
    assert (ended.returncode, ended.stderr, ended.stdout) == (128 + number, '', 'put in order\n')


def test_a_step_that_last_holds_already_is_not_saved_again(market, tmp_path, monkeypatch):
    with signalled(monkeypatch, 'save_last', 1), pytest.raises(SystemExit):
        train(market, tmp_path)
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 2
    assert [path.name for path in tmp_path.glob('step_*.pth')] == ['step_0.pth']
