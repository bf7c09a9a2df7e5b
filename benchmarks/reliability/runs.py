"""Runs to which something happens: SIGKILL, signals, a full disk, workers and other processes that die."""

import ctypes
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kills
import torch
from conftest import write_market
from outcomes import assert_same, outcome
from thin import BINDINGS, fitting_schedule

from benchmarks.reliability import meddling
from benchmarks.reliability.driver import Row
from mgn.runs import checkpoint
from mgn.runs.folder import LOCK

ROOT = Path(__file__).parent.parent.parent
MEDDLING = Path(__file__).parent / 'meddling.py'
KILLS = 50             # of one case
SOON, AT_ONCE = 20, 1.5  # seconds: for the first signal; a second for the second one, and what a busy machine adds
STAGES = 'rerank = True', 'evaluate.k1 = 3', 'query_expansion = 2'


class Forked(multiprocessing.get_context('fork').Process):
    """A binary in a process forked from this one, which saves the imports."""

    def wait(self, seconds=None):
        self.join(seconds)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, seconds)
        return self.exitcode


def start(binary, folder, *bindings, meddle=None, environment={}):
    """Starts a binary in `folder`; its words go to the files out and err there."""
    process = Forked(target=within, args=(folder, environment, binary, meddle, *flags(bindings)))
    process.start()
    return process


def within(folder, environment, *arguments):
    for number, name in enumerate(('out', 'err'), 1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.update(environment)
    meddling.main(*arguments)


def start_anew(binary, folder, *bindings, meddle=None):
    """As start, from the interpreter's first step to its last one; without a phase to meddle with, the binary alone."""
    command = [MEDDLING, binary, json.dumps(meddle)] if meddle else ['-m', f'mgn.{binary}']
    paths = os.pathsep.join(map(str, (ROOT, ROOT / 'tests')))
    with open(folder / 'out', 'w') as out, open(folder / 'err', 'w') as err:
        return subprocess.Popen([sys.executable, *command, *flags(bindings)], cwd=folder, stdout=out, stderr=err,
                                env={**os.environ, 'PYTHONPATH': paths, 'OMP_NUM_THREADS': '1'})


def flags(bindings):
    return [f'--gin_bindings={binding}' for binding in bindings]


def bindings_of(binary, shared, folder):
    """What a binary is given; its outputs go into `folder`."""
    data = f"data_root = '{shared}/data'"
    if binary == 'train':
        return *BINDINGS, *fitting_schedule(*BINDINGS), data, f"output_dir = '{folder}'"
    weights = f"weights = '{shared}/run/best.pth'"
    if binary == 'eval':
        return data, weights, f"output_dir = '{folder}'", *STAGES
    return data, weights, f"features_dir = '{folder}/features'"


def prepare(folder):
    """An uninterrupted run, and what its checkpoint evaluates and extracts to."""
    write_market(folder / 'data')
    for binary in ('train', 'eval', 'extract'):
        where = folder / ('run' if binary == 'train' else binary)
        where.mkdir()
        status = start(binary, where, *bindings_of(binary, folder, where)).wait()
        assert status == 0, (where / 'err').read_text()


def spoken(folder):
    return (folder / 'out').read_text() + (folder / 'err').read_text()


def check_same(binary, shared, folder):
    """The binary's files are those of an undisturbed one."""
    if binary == 'train':
        one, other = outcome(folder), outcome(shared / 'run')
        for content in (one['last'], one['best'], other['last'], other['best']):
            content.pop('config')  # it names the folder
        assert_same(one, other)
    elif binary == 'eval':
        names = 'rank1', 'mAP', 'mINP'
        one, other = (json.loads((where / 'eval.json').read_text()) for where in (folder, shared / 'eval'))
        assert all(one[name] == other[name] for name in names) and one['rerank']['mAP'] == other['rerank']['mAP']
    else:
        for path in (shared / 'extract' / 'features').iterdir():
            if path.name != LOCK:  # which names a process
                assert (folder / 'features' / path.name).read_bytes() == path.read_bytes(), path.name
    if binary == 'train':  # which removes what an earlier call left when it was ended at once
        assert not list(folder.rglob('*.tmp'))


def fresh(folder, name):
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir()
    return folder / name


def finish(binary, shared, folder):
    """What was ended goes on to the end; what mgn.extract left has to be removed first, as it says."""
    if binary == 'extract' and (folder / 'features' / 'manifest.json').exists():
        return
    process = start(binary, folder, *bindings_of(binary, shared, folder))
    assert process.wait() == 0, f'the same command again: {spoken(folder)[-300:]}'
    check_same(binary, shared, folder)


# SIGKILL

def killed(rng, folder, number):
    torch.set_num_threads(1)
    kinds = list(kills.KINDS.values())
    writing = kills.survive(fresh(folder, 'kills'), KILLS, number, kinds[number % len(kinds)])
    assert writing >= KILLS / 2, f'only {writing} of {KILLS} kills came while a file was written'


# SIGINT and SIGTERM

PHASES = {'train': ('start', 'decoding', 'features', 'ranking', 'step', 'writing', 'results of training'),
          'eval': ('start', 'decoding', 'features', 'ranking', 're-ranking', 'results', 'writing'),
          'extract': ('start', 'decoding', 'features', 'writing')}
SIGNALS = [(binary, phase, number, twice) for binary, phases in PHASES.items() for phase, number, twice in
           itertools.product(phases, (signal.SIGINT, signal.SIGTERM), (False, True))]


def signalled(rng, folder, number):
    binary, phase, sent, twice = SIGNALS[number % len(SIGNALS)]
    run = fresh(folder, 'signalled')
    at = run / 'at'  # the phase's first call, or a later one where there are several
    call = int(rng.integers(3 if binary == 'train' else 2 if phase == 'decoding' else 1))
    meddle = None if phase == 'start' else ['wait', phase, call, str(at), 60 if twice else 1]
    process = start_anew(binary, run, *bindings_of(binary, folder, run), 'workers = 0', meddle=meddle)
    if phase == 'start':
        time.sleep(rng.uniform(0.05, 2))
    else:
        wait_for(at.exists, process, 60)
    for pause in (0.1, 0.9)[:1 + twice]:
        time.sleep(pause)
        last = time.monotonic()
        process.send_signal(sent)
    what = f'mgn.{binary}, {phase}, {sent.name} {"twice" if twice else "once"}'
    try:
        status = process.wait(SOON)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f'{what}: it had not ended after {SOON} s') from None
    seconds, err = time.monotonic() - last, (run / 'err').read_text()
    ended = {128 + sent, -sent}
    starting = phase in ('start', 'writing')  # a run's first file is written before its loop
    expected = ended if twice or binary != 'train' else {75, *(ended if starting else ())}
    if twice and phase != 'step':  # the first one may have ended it
        expected.add(75)
    assert status in expected, f'{what}: status {status}: {err[-300:]}'
    assert not twice or seconds < AT_ONCE, f'{what}: it ended after {seconds:.1f} s'
    assert 'Traceback' not in err and 'ignored in' not in err, f'{what}: {err[-250:]}'
    assert len(re.findall('SIG', err)) <= 1, f'{what}: {err[:250]}'
    assert twice or not list(run.rglob('*.tmp')), f'{what}: a temporary file is left'
    finish(binary, folder, fresh(folder, 'signalled') if phase == 'start' else run)


def wait_for(happened, process, seconds):
    until = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < until, 'it ended, or did not come to this phase'
        time.sleep(0.01)


# Full disk

def full(rng, folder, number):
    """A disk of random size; or a call that says that the disk is full."""
    torch.set_num_threads(1)
    binary, disk = ['train', 'train', 'extract', 'eval'][number % 4], own_disk(folder)
    run, meddle = fresh(disk, 'run'), None
    whole = sum(path.stat().st_size for path in (folder / {'train': 'run'}.get(binary, binary)).rglob('*.*'))
    if rng.random() < 0.6:
        resize(disk, int(rng.uniform(0, whole) + 8192))
    else:
        meddle = ['fail', ['os.fsync', 'os.replace'][rng.integers(2)], int(rng.integers(8 if binary == 'train' else 1))]
    said = fresh(folder, 'said')
    process = start(binary, said, *bindings_of(binary, folder, run), meddle=meddle)
    status, words = process.wait(), spoken(said)
    resize(disk, 2 ** 30)
    if status:
        error = words[words.find('error: '):]
        assert status == 1 and 'error: ' in words and 'Traceback' not in words, f'{binary}, {meddle}: {words[-300:]}'
        assert str(run) in error and re.search('[Ff]ree disk space', error), f'{binary}, {meddle}: {error[:300]}'
        assert not list(run.rglob('*.tmp')), f'{binary}, {meddle}: a temporary file is left'
        for path in run.glob('*.pth'):
            checkpoint.load(str(path))
    again = start(binary, said, *bindings_of(binary, folder, run)) if status or binary != 'extract' else None
    assert not again or again.wait() == 0, f'{binary}, {meddle}, the same command again: {spoken(said)[-300:]}'
    check_same(binary, folder, run)


def own_disk(folder):
    """A small file system in main memory that this process alone sees. Needs to be root, or user namespaces."""
    disk = folder / 'disk'
    if not os.path.ismount(disk):
        disk.mkdir(exist_ok=True)
        libc, NEWNS, NEWUSER, PRIVATE = ctypes.CDLL(None, use_errno=True), 0x20000, 0x10000000, 0x44000
        for done in (libc.unshare(NEWNS if os.getuid() == 0 else NEWNS | NEWUSER),
                     libc.mount(b'none', b'/', None, PRIVATE, None),
                     libc.mount(b'tmpfs', bytes(disk), b'tmpfs', 0, b'size=1g')):
            assert done == 0, os.strerror(ctypes.get_errno())
    return disk


def resize(disk, size):
    """For disks that are full already the size stays."""
    REMOUNT = 32
    ctypes.CDLL(None).mount(b'tmpfs', bytes(disk), b'tmpfs', REMOUNT, f'size={size}'.encode())


# Worker processes and other processes that die

def worker_dies(rng, folder, number):
    run, said = fresh(folder, 'run of workers'), fresh(folder, 'said')
    numbers = sorted({int(n) for n in rng.integers(1, 90, rng.integers(1, 5))})
    seconds = [0, 0, 2][number % 3]
    process = start('train', said, *bindings_of('train', folder, run), 'workers = 2',
                    meddle=['workers', str(said / 'counter'), numbers, seconds])
    status, words = process.wait(), spoken(said)
    if status:
        assert not seconds and 'error: A data-loading worker died' in words and 'Traceback' not in words, words[-400:]
    finish('train', folder, run)


def process_dies(rng, folder, number):
    call = number // 2
    while not dies(folder, number % 2, call):  # there are fewer collectives
        call //= 2


def dies(folder, victim, call):
    """Whether there is a collective number `call` for the victim to die in."""
    run, processes = fresh(folder, 'run of two'), []
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    for rank in range(2):
        environment = {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost',
                       'MASTER_PORT': str(port)}
        processes.append(start('train', fresh(folder, f'said by {rank}'), *bindings_of('train', folder, run), 'P = 4',
                               'total_steps = 3', 'cosine.start = 2', meddle=['die', call] if rank == victim else None,
                               environment=environment))
    status = processes[victim].wait()
    try:
        survivor = processes[1 - victim].wait(SOON)
    except subprocess.TimeoutExpired:
        processes[1 - victim].kill()
        raise AssertionError(f'{SOON} s after the end of process {victim} the other one goes on') from None
    words = spoken(folder / f'said by {1 - victim}')
    if status == survivor == 0:
        return False
    assert status == -signal.SIGKILL and survivor == 1, f'collective {call}: status {survivor}: {words[-300:]}'
    assert 'lost its connection' in words and 'Traceback' not in words, f'collective {call}: {words[-300:]}'
    return True


ROWS = {
    'kills': Row('SIGKILL, most within the writing of a file', 20, killed, seconds=1800, counts=KILLS, limit=3 * 3600,
                 fixed='an older checkpoint left behind'),
    'signals': Row('SIGINT and SIGTERM, once and twice, in each phase of each binary', 2 * len(SIGNALS), signalled,
                   prepare, seconds=120, fixed='tracebacks; signals unheard in long calls and within imports; '
                   'temporary files left by SIGTERM'),
    'full disk': Row('a full disk', 300, full, prepare, seconds=120),
    'workers': Row('data-loading workers that die or are slow', 100, worker_dies, prepare, seconds=180),
    'processes': Row('one of two processes dies, in each collective', 400, process_dies, prepare, seconds=180),
}
