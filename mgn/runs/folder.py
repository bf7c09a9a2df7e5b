"""The folder of a run: one run at a time writes there, its newest checkpoint that is whole is gone on from, some older ones are kept."""

import contextlib
import errno
import glob
import json
import logging
import os
import re
import socket

from mgn.runs import checkpoint as checkpoints

logger = logging.getLogger(__name__)

LOCK = 'run.lock'
HELD = (errno.EACCES, errno.EAGAIN)
_held = set()


@contextlib.contextmanager
def locked(output_dir):
    """Makes the folder where there is none, and holds it: ValueError where another run does, also on another machine.

    The lock is the system's, so it ends with its process; the file alone means nothing. What a killed run was writing is removed.
    Gives a function that raises ValueError where the lock file has been removed since.
    """
    path, folder = os.path.join(output_dir, LOCK), os.path.realpath(output_dir)
    if folder in _held:  # to the system, threads of a process are one
        raise refused(output_dir, 'this very process')
    try:
        os.makedirs(output_dir, exist_ok=True)
        file = open(path, 'a+')
    except OSError as error:
        raise OSError(f'want to write to output_dir, got: {error}; bind another output_dir') from error
    with file:
        try:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: the workers that it forks do not have it
        except ImportError:
            pass
        except OSError as error:
            if error.errno in HELD:
                raise refused(output_dir, holder(file)) from None
            logger.warning('%s cannot be locked (%s): let no other run write there', output_dir, error)
        _held.add(folder)
        try:
            file.truncate(0)
            write_text_to(file, json.dumps({'process': os.getpid(), 'machine': socket.gethostname()}))
            for left in glob.glob(os.path.join(glob.escape(output_dir), '*.tmp')):
                if re.search(r'\.\d+\.tmp$', left):
                    os.remove(left)

            def check():
                if not os.path.exists(path) or not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    raise ValueError(f'want {path} as long as this run writes there, found it removed or replaced, so that another run may write there '
                                     f'too; leave it in place, and start one run again')
            yield check
        finally:
            _held.discard(folder)


def write_text_to(file, text):
    try:
        file.write(text)
        file.flush()
    except OSError as error:
        raise OSError(f'want to write {file.name}, got: {error}; free disk space or bind another output_dir') from error


def refused(output_dir, who):
    return ValueError(f'want an output_dir that no other run writes to, got {output_dir}, where {who} is training; wait for it, end it, or bind '
                      f'another output_dir')


def holder(file):
    file.seek(0)
    try:
        owner = json.load(file)
        return f'process {owner["process"]} on {owner["machine"]}'
    except (ValueError, KeyError, TypeError):  # it is being written
        return 'another process'


def newest(output_dir, resume):
    """(path, content) of last.pth, or where that is damaged or missing of the newest step_<n>.pth that is whole; None for a fresh run.

    Damaged ones are renamed to ….damaged. Raises ValueError where a run would be overwritten, or every checkpoint is damaged.
    """
    last, best, metrics = (os.path.join(output_dir, name) for name in ('last.pth', 'best.pth', 'metrics.jsonl'))
    candidates = [path for path in (last, *reversed(older(output_dir))) if os.path.isfile(path)]
    if candidates and not resume:
        raise ValueError(f'want an output_dir without a run, as train.resume = False, got {candidates[0]}; '
                         f'bind another output_dir or train.resume = True')
    damaged = {}
    for path in candidates:
        try:
            content = checkpoints.load(path)
        except checkpoints.Damaged as error:
            damaged[path] = str(error)
            continue
        for odd, what in damaged.items():
            os.replace(odd, f'{odd}.damaged')
            logger.warning('a damaged checkpoint is left out and renamed to %s.damaged: %s', odd, what)
        return path, content
    if damaged:
        raise ValueError('want a checkpoint to go on from, got damaged ones alone:\n  ' + '\n  '.join(damaged.values())
                         + '\nbring one back, or bind another output_dir')
    for left in (best, metrics):
        if os.path.exists(left) and os.path.getsize(left):
            raise ValueError(f'want an empty output_dir or a run to go on with, got {left} without last.pth; '
                             f'move it or bind another output_dir')
    return None


def save(output_dir, content, keep_last, previous):
    """Writes last.pth, atomically; the one there, of step `previous`, becomes step_<previous>.pth, and keep_last of those stay.

    previous: None where last.pth is not to be kept.
    """
    last = os.path.join(output_dir, 'last.pth')
    keeps = keep_last > 0 and previous is not None
    checkpoints.save(last, content, os.path.join(output_dir, f'step_{previous}.pth') if keeps else None)
    passed = [path for path in older(output_dir) if step_of(path) < content['step']]
    for path in passed[:max(len(passed) - keep_last, 0)]:
        os.remove(path)


def older(output_dir):
    """Paths of all step_<n>.pth, ascending."""
    paths = glob.glob(os.path.join(glob.escape(output_dir), 'step_*.pth'))
    return sorted((path for path in paths if step_of(path) is not None and os.path.isfile(path)), key=step_of)


def step_of(path):
    found = re.fullmatch(r'step_(\d+)\.pth', os.path.basename(path))
    return int(found[1]) if found else None


def last_good(output_dir):
    path = os.path.join(output_dir, 'last.pth')
    if not os.path.exists(path):
        return 'there is no checkpoint yet'
    return f'the last good checkpoint is {path}, of step {checkpoints.load(path)["step"]}'
