"""The binaries under torchrun: one process writes and logs, a lost one ends the others, any number of them resumes."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_market
from forks import run_binary
from outcomes import assert_same
from reports import data_of
from test_binaries import RECIPE, environment, metrics
from together import torchrun

import mgn
from mgn.ops.errors import UserError
from mgn.ops.metrics import METRICS
from mgn.runs import checkpoint, processes

PROJECT = Path(mgn.__file__).parent.parent
# mgn.train over a thin ResNet. KILL = 'number:call' or 'number:call:signal' sends that process a signal at that call of
# a step, unless torchrun has restarted it.
THIN_TRAIN = """
import os, runpy, signal, sys
sys.path.insert(0, TESTS)
from thin import ThinResNet
from mgn import model, training
from mgn.runs import processes
model.make_resnet = lambda backbone, imagenet: ThinResNet()
calls, real = [], training.train_step
number, call, sent = map(int, (os.environ.get('KILL', '-1:0') + ':9').split(':')[:3])

def step(*args):
    calls.append(0)
    if processes.number() == number and len(calls) == call and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        os.kill(os.getpid(), sent)
    return real(*args)

training.train_step = step
runpy.run_module('mgn.train', run_name='__main__', alter_sys=True)
""".replace('TESTS', repr(str(PROJECT / 'tests')))


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A user's folder with data, a recipe and one finished run of two processes."""
    home = tmp_path_factory.mktemp('several')
    write_market(home / 'data', identities=12)
    (home / 'my.gin').write_text(RECIPE.replace('P = 2', 'P = 6') + 'MGN.embedding_dim = 8\nworkers = 0\n')
    for name in ('train', 'eval', 'extract'):
        (home / f'thin_{name}.py').write_text(THIN_TRAIN.replace("'mgn.train'", f"'mgn.{name}'"))
    return home


def thin_train(home, processes, output_dir, *bindings, options=(), kill=None):
    flags = [f'--gin_bindings={binding}' for binding in (f"output_dir = '{output_dir}'", *bindings)]
    os.environ.pop('KILL', None)
    if kill:
        os.environ['KILL'] = kill
    try:
        if processes == 1:
            return run_binary('thin_train.py', '--gin_file=my.gin', *flags, cwd=home)
        return torchrun(processes, 'thin_train.py', '--gin_file=my.gin', *flags, options=options, cwd=home)
    finally:
        os.environ.pop('KILL', None)


def running(home, program, *bindings):
    """torchrun with two processes of a program in the folder home that trains long, once it has made three steps."""
    flags = [f'--gin_bindings={binding}' for binding in ('total_steps = 100000', *bindings)]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', program,
               '--gin_file=my.gin', *flags]
    process = subprocess.Popen(command, cwd=home, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    for line in process.stdout:
        if 'step 3:' in line:
            break
    return process


@pytest.fixture(scope='module')
def trained(home):
    run = thin_train(home, 2, 'two')
    assert run.returncode == 0, run.stderr
    return home / 'two', run


def test_process_0_alone_writes_and_speaks(trained):
    folder, run = trained
    assert {'last.pth', 'best.pth', 'config.gin', 'metrics.jsonl', 'eval.json'} <= set(os.listdir(folder))
    assert not list(folder.glob('*.tmp'))
    assert [(line['step'], 'mAP' in line) for line in metrics(folder)] == [
        (0, True), *((step, False) for step in range(1, 6)), (5, True)]
    for step in range(1, 6):
        assert len(re.findall(rf' I step {step}: loss ', run.stdout)) == 1
    assert len(re.findall('training on cpu in each of 2 processes', run.stdout)) == 1
    assert len(re.findall('12 identities and 48 images to train', run.stdout)) == 1
    assert len(re.findall('checkpoints, metrics and configuration are in', run.stdout)) == 1
    assert 'Warning' not in run.stdout + run.stderr
    assert json.loads((folder / 'eval.json').read_text())['processes'] == 2


def test_a_killed_process_ends_the_others_and_torchrun_starts_all_anew_from_the_last_checkpoint(trained, home):
    folder, _ = trained
    run = thin_train(home, 2, 'again', options=['--max-restarts=1'], kill='1:5')
    assert run.returncode == 0, run.stderr
    assert 'from step 3 to 5' in run.stdout and re.search('exitcode *: -9', run.stderr)
    assert len(re.findall('error: ', run.stdout + run.stderr)) <= 1  # lost connection, if torchrun was slower
    one, other = (torch.load(run / 'last.pth') for run in (folder, home / 'again'))
    assert one['step'] == other['step'] == 5
    assert all(torch.equal(value, other['model'][name]) for name, value in one['model'].items())
    timings = {'images_per_s', 'data_wait'}
    assert [{name: line[name] for name in line.keys() - timings} for line in metrics(home / 'again')] == [
        {name: line[name] for name in line.keys() - timings} for line in metrics(folder)]


@pytest.mark.long
def test_a_signal_to_one_process_ends_all_after_the_same_step(trained, home):
    folder, _ = trained
    run = thin_train(home, 2, 'signalled', kill='1:2:15')
    message = 'a signal to another process: ended after step 2, which last.pth holds'
    assert run.returncode != 0 and run.stdout.count(message) == 1, run.stderr
    assert re.search('exitcode *: 75', run.stderr)
    assert 'Traceback (most recent call last):\n  File "mgn' not in run.stderr
    assert torch.load(home / 'signalled' / 'last.pth')['step'] == 2
    assert thin_train(home, 2, 'signalled').returncode == 0
    one, other = (checkpoint.load(str(run / 'last.pth'))['optimizer'] for run in (folder, home / 'signalled'))
    assert_same(one, other)


# Each batch takes the only worker long, so that a signal finds the processes waiting for one.
SLOW_BATCHES = """
import time
from mgn.data.images import TrainBatches
load = TrainBatches.__getitem__

def slowly(batches, step):
    time.sleep(0.5)
    return load(batches, step)

TrainBatches.__getitem__ = slowly
"""


@pytest.mark.long
def test_a_signal_to_all_processes_and_their_workers_leaves_a_checkpoint(home):
    """As from a scheduler: to torchrun, what it has started, and what loads data for that."""
    (home / 'slow_train.py').write_text(SLOW_BATCHES + THIN_TRAIN)
    process = running(home, 'slow_train.py', "output_dir = 'all'", 'workers = 1', 'train.checkpoint_every = 100000')
    listing = subprocess.run(['pgrep', '-f', 'slow_train.py'], capture_output=True, text=True, check=True)
    for pid in map(int, listing.stdout.split()):
        os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert torch.load(home / 'all' / 'last.pth')['step'] > 3


@pytest.mark.long
def test_machines_that_count_their_restarts_differently_meet_again(home):
    """Two torchruns, as of two machines: where a process dies its own counts a restart, the other one does not."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    env = {**environment(), 'OMP_NUM_THREADS': '1', 'KILL': '1:4'}
    command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc-per-node=1', '--rdzv-backend=c10d',
               '--rdzv-id=x', f'--rdzv-endpoint=localhost:{port}', '--max-restarts=1', 'thin_train.py',
               '--gin_file=my.gin', "--gin_bindings=output_dir = 'machines'"]
    runs = [subprocess.Popen(command, cwd=home, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for _ in range(2)]
    try:
        outputs = [run.communicate(timeout=150)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert 'from step 0 to 5' in ''.join(outputs) and 'from step 3 to 5' in ''.join(outputs)
    assert torch.load(home / 'machines' / 'last.pth')['step'] == 5


@pytest.mark.parametrize('processes', [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_run_resumes_with_another_number_of_processes(trained, home, processes):
    folder, _ = trained
    other = shutil.copytree(folder, home / f'other{processes}')
    run = thin_train(home, processes, other.name, 'total_steps = 7')
    assert run.returncode == 0, run.stderr
    several = ' in each of 3 processes' if processes == 3 else ''
    assert f'training on cpu{several} from step 5 to 7' in run.stdout
    assert [line['step'] for line in metrics(other)] == [0, 1, 2, 3, 4, 5, 5, 6, 7, 7]
    assert metrics(other)[:7] == metrics(folder)


def test_one_process_evaluates_to_the_measures_of_several(trained, home):
    folder, _ = trained
    run = run_binary('thin_eval.py', f"--gin_bindings=weights = '{folder / 'last.pth'}'",
                     "--gin_bindings=output_dir = 'alone'", cwd=home)
    assert run.returncode == 0, run.stderr
    one, several = (json.loads((path / 'eval.json').read_text()) for path in (home / 'alone', folder))
    assert (one['processes'], several['processes'], several['step']) == (1, 2, 5)
    assert {name: one[name] for name in METRICS} == pytest.approx({name: several[name] for name in METRICS}, abs=1e-4)


MISTAKES = [
    (["data_root = 'nowhere'"], 'looked into.*nowhere .no such folder'),
    (['P = 4'], 'P = 4, the identities of a batch, is no multiple of the 3 processes'),
    (["device = 'cuda:0'"], "3 processes need the device 'cuda' or 'cpu', found 'cuda:0'"),
]


@pytest.mark.parametrize('variables, says', [
    ({}, 'process without RANK says: .*RANK'),
    ({'RANK': '1', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': 'none'}, 'process 1 says: invalid literal')])
def test_a_process_that_no_torchrun_has_started_is_told_so(monkeypatch, variables, says):
    for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in {'WORLD_SIZE': '2', **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f'The processes of WORLD_SIZE = 2 did not find each other; {says}.*Start all'):
        processes.join()


def test_a_lost_connection_is_told_from_other_errors(monkeypatch):
    monkeypatch.setattr(processes, 'count', lambda: 2)
    monkeypatch.setattr(processes, 'number', lambda: 0)
    nccl = "NCCL error in: here\nLast error:\nCuda failure 2 'out of memory'"  # the reason comes last
    for error in '[gloo/transport/tcp/pair.cc:554] Connection closed by peer', nccl, 'ncclRemoteError: gone':
        message = processes.lost(RuntimeError(error))
        assert message.startswith('Process 0 of 2 lost its connection to the others, or its GPU failed '
                                  f'({" ".join(error.split())}). torchrun names the one that ended.')
        assert message.endswith('training resumes from last.pth.')
    assert processes.lost(RuntimeError('shapes differ')) is processes.lost(ValueError('gloo')) is None


@pytest.mark.long
@pytest.mark.parametrize('bindings, message', MISTAKES)
def test_a_mistake_of_all_is_reported_once(home, bindings, message):
    run = thin_train(home, 3, 'mistaken', *bindings)  # which process reports it is left to chance
    assert run.returncode != 0
    assert len(re.findall('error: ', run.stderr)) == 1 and re.search(message, run.stderr, re.DOTALL)


@pytest.mark.long
def test_a_mistake_of_one_process_is_reported_once(home, tmp_path):
    """Images of one identity that cannot be read are in the part of one process."""
    write_market(tmp_path / 'data', identities=6)
    for path in (tmp_path / 'data' / 'bounding_box_train').glob('0006_*'):
        path.write_bytes(b'no image')
    run = thin_train(home, 2, 'unreadable', f"data_root = '{tmp_path / 'data'}'")
    assert run.returncode != 0
    assert len(re.findall('error: ', run.stderr)) == 1 and 'No image of identity 6 can be read' in run.stderr


def evaluate(folder, weights, *bindings, processes=1, name='eval'):
    folder.mkdir(exist_ok=True)
    home = weights.parent.parent
    flags = [f'--gin_bindings={binding}' for binding in (f"weights = '{weights}'", f"data_root = '{home / 'data'}'",
                                                         *bindings)]
    start = functools.partial(torchrun, processes) if processes > 1 else run_binary
    run = start(str(home / f'thin_{name}.py'), *flags, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run, json.loads((folder / 'eval.json').read_text()) if name == 'eval' else None


@pytest.fixture
def weights(trained):
    return trained[0] / 'last.pth'


MORE = 'query_expansion = 2', 'rerank = True', 'evaluate.k1 = 3'


def same_figures(results, others):
    for stage in (None, 'query_expansion', 'rerank'):
        one, other = (figures[stage] if stage else figures for figures in (results, others))
        assert {name: one[name] for name in METRICS} == pytest.approx({name: other[name] for name in METRICS}, abs=1e-4)


@pytest.mark.parametrize('readers', [1, pytest.param(2, marks=pytest.mark.long)])
def test_features_are_extracted_by_several_processes_and_evaluated_by_any_number(weights, tmp_path, readers):
    _, alone = evaluate(tmp_path / 'alone', weights, *MORE)
    features = tmp_path / 'features'
    evaluate(tmp_path, weights, f"features_dir = '{features}'", processes=2, name='extract')
    array = np.load(features / 'gallery_features.npy')
    assert array.shape == (10, 24) and np.allclose(np.linalg.norm(array, axis=1), 1, atol=1e-6)
    _, stored = evaluate(tmp_path / 'stored', weights, *MORE, f"features_dir = '{features}'", processes=readers)
    same_figures(alone, stored)
    assert (alone['processes'], stored['processes']) == (1, readers)
    assert stored['features_dir'] == str(features)


@pytest.mark.long
def test_several_processes_evaluate_images_with_query_expansion_and_re_ranking(weights, tmp_path):
    _, alone = evaluate(tmp_path / 'alone', weights, *MORE)
    run, several = evaluate(tmp_path / 'several', weights, *MORE, 'evaluate_checkpoint.report = True',
                            f"compare = '{weights}'", processes=3)
    page = data_of(tmp_path / 'several' / 'report.html')
    assert page['notices'] == [] and page['compare']['ap'] == page['queries']['ap']
    assert len(re.findall('rank10', run.stdout)) == 1
    assert several['processes'] == 3
    same_figures(alone, several)


@pytest.mark.long
def test_a_stopped_process_is_ended_by_torchrun_within_a_minute(home):
    """As test_a_killed_process…, by a signal from outside."""
    process = running(home, 'thin_train.py', "output_dir = 'stopped'")
    listing = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True, check=True)
    children = listing.stdout.split()
    began = time.monotonic()
    os.kill(int(children[0]), signal.SIGKILL)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert len(re.findall('error: ', rest)) <= 1
