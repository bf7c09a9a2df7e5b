"""Runs the numbered cases of a row in forked processes, so that a crash or an endless loop is one more failure."""

import contextlib
import datetime
import fcntl
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.machine import cpu_model

CHUNK = 200           # cases of one process
STORED_EVERY = 5      # seconds
KEPT = 100            # different failures


class Row(NamedTuple):
    """A row of the table. A case is right where `case` returns; an exception, a crash or a time-out is a failure."""
    title: str
    cases: int                       # at full scale
    case: Callable                   # (rng, folder, number) → None
    prepare: Callable = lambda folder: None  # makes what all cases need, in a process of its own
    seconds: float = 30              # that a case may take
    memory: int = 0                  # bytes that a case may take beyond what its process holds; 0: any
    counts: int = 1                  # what one case counts for in the table, e.g. kills
    limit: float = 3600              # seconds for the row; what is left over runs with the next call
    fixed: str = ''                  # what these cases found in the past, and was fixed


def random_of(name, number):
    return np.random.default_rng((zlib.crc32(name.encode()), number))


def run_row(name, row, scale, store, limit=None):
    """Runs the cases that are left of a row. `store` is a file of {row: result}."""
    result = read(store).get(name) or {'done': 0, 'cases': 0, 'found': 0, 'failures': [], 'seconds': 0.0}
    result.update(cases=max(result['done'], round(row.cases * scale), 1), date=f'{datetime.date.today():%Y-%m-%d}',
                  machine=f'{cpu_model()}, {os.cpu_count()} cores', torch=torch.__version__)
    began = stored = time.monotonic()
    before, limit = result['seconds'], limit or row.limit
    with tempfile.TemporaryDirectory() as folder:
        if result['done'] < result['cases']:
            prepared(row, Path(folder))
        while result['done'] < result['cases'] and time.monotonic() - began < limit:
            numbers = range(result['done'], min(result['done'] + CHUNK, result['cases']))
            with contextlib.closing(outcomes(name, row, Path(folder), numbers)) as chunk:
                for number, failure in chunk:
                    result['done'] = number + 1
                    if failure:
                        note(result, number, failure)
                    result['seconds'] = before + time.monotonic() - began
                    if time.monotonic() - stored > STORED_EVERY:
                        write(store, name, result)
                        stored = time.monotonic()
                    if time.monotonic() - began > limit:
                        break
    write(store, name, result)
    return result


def prepared(row, folder):
    process = os.fork()
    if process == 0:
        screen = os.dup(2)
        silence()
        try:
            row.prepare(folder)
            os._exit(0)
        except BaseException:
            os.write(screen, traceback.format_exc().encode())
        finally:
            os._exit(1)
    if os.waitpid(process, 0)[1]:
        sys.exit('What the cases need could not be made; the error is above.')


def outcomes(name, row, folder, numbers):
    """Yields (number, failure or None) from a process of its own; it ends early at a crash or a case out of time."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        os.setsid()  # what the cases start ends with this group
        work(name, row, folder, numbers, writer)
    os.close(writer)
    try:
        with os.fdopen(reader, 'rb', buffering=0) as lines:
            for number in numbers:
                if not select.select([lines], [], [], row.seconds)[0]:
                    yield number, f'took more than {row.seconds} s'
                    return
                if not (line := lines.readline()):
                    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                    process = None
                    how = signal.Signals(-status).name if status < 0 else f'status {status}'
                    yield number, f'the process ended with {how}'
                    return
                failure = json.loads(line)
                yield number, failure
                if failure:  # it may have left anything behind
                    return
    finally:
        if process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)


def work(name, row, folder, numbers, writer):
    """Runs cases and reports each by a line; never returns."""
    silence()
    if row.memory:
        with open('/proc/self/statm') as sizes:
            held = int(sizes.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + row.memory, held + row.memory))
    try:
        for number in numbers:
            try:
                row.case(random_of(name, number), folder, number)
                failure = None
            except Exception as error:
                failure = told(error)
            os.write(writer, (json.dumps(failure) + '\n').encode())
            if failure:
                break
    finally:
        os._exit(0)


def silence():
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)


def told(error):
    """The exception in a line, with the innermost place in this project's files."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if re.search(r'/(mgn|tests|benchmarks)/(?!.*site-packages)', frame.filename)]
    place = ''
    if frames:
        place = f' at {re.sub(r".*/(?=(mgn|tests|benchmarks)/)", "", frames[-1].filename)}:{frames[-1].lineno}'
    message = ' '.join(str(error).split()) or (frames[-1].line if frames else '')
    return f'{type(error).__name__}: {message[:300]}{place}'


def note(result, number, failure):
    """Counts a failure; failures that differ in numbers and paths alone are one."""
    result['found'] += 1
    start, _, place = failure.rpartition(' at ')
    start = re.sub(r'^\w+: \S+ = .*?: ', '', start)  # a binding
    kind = re.sub(r'/\S+|\W?\d\S*', '…', start[:60]) + place
    for known in result['failures']:
        if known['kind'] == kind:
            known['count'] += 1
            return
    if len(result['failures']) < KEPT:
        result['failures'].append({'kind': kind, 'case': number, 'count': 1, 'message': failure})


def read(store):
    return json.loads(Path(store).read_text()) if os.path.exists(store) else {}


def write(store, name, result):
    """Stores the result of one row, {} to forget it; several calls may run rows side by side."""
    lock = os.open(os.path.dirname(os.path.abspath(store)), os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(f'{store}.new').write_text(json.dumps({**read(store), name: result}, indent=1, ensure_ascii=False) + '\n')
        os.replace(f'{store}.new', store)
    finally:
        os.close(lock)
