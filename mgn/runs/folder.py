"""A folder that one command at a time writes to. Training resumes from the newest intact checkpoint in it."""

import contextlib
import fcntl
import math
import os
import re
import socket

from mgn.ops.errors import UserError
from mgn.runs import checkpoint as checkpoints
from mgn.runs.files import writing
from mgn.runs.log import logger

LOCK = 'run.lock'


@contextlib.contextmanager
def locked(folder, binding='output_dir'):
    """Makes the folder that a binding names, if necessary, and locks it.

    UserError where another command has it, also on another machine.

    The lock belongs to the process and ends with it; the file alone means nothing, but has to stay in its place.
    Temporary files that a killed command left are removed.
    """
    path = os.path.join(folder, LOCK)
    with writing(path, f'Bind another {binding}.'):
        os.makedirs(folder, exist_ok=True)
        file = open(path, 'ab+', buffering=0)
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # worker processes do not inherit this kind of lock
        except (BlockingIOError, PermissionError):
            holder = os.fsdecode(os.pread(file.fileno(), 999, 0)) or 'another process'
            raise UserError(f'Another command is writing to {binding} {folder}: {holder}. Wait for it, end it, or bind '
                            f'another {binding}.') from None
        except OSError as error:
            logger.warning('%s cannot be locked (%s): let no other command write there', folder, error)
        with writing(path, f'Free disk space or bind another {binding}.'):
            file.truncate(0)
            file.write(f'process {os.getpid()} on {socket.gethostname()}'.encode())
        for entry in [*os.scandir(folder)]:
            if re.search(r'\.(pth|jsonl|json|gin)\.\d+\.tmp$', entry.name) and entry.is_file():
                os.remove(entry)
        yield


def newest(output_dir, resume):
    """(path, content) of last.pth, or of the newest intact step_<n>.pth if that one is damaged or missing.

    None for a fresh run. Damaged checkpoints are renamed to ….damaged. Raises UserError where a run would be
    overwritten, or where every checkpoint is damaged.
    """
    last, best, metrics = (os.path.join(output_dir, name) for name in ('last.pth', 'best.pth', 'metrics.jsonl'))
    candidates = [path for path in (last, *reversed(older(output_dir).values())) if os.path.isfile(path)]
    if candidates and not resume:
        raise UserError(f'train.resume = False needs an output_dir without a run, but there is {candidates[0]}. '
                        f'Bind another output_dir, or train.resume = True.')
    damaged = {}
    for path in candidates:
        try:
            content = checkpoints.load(path)
        except checkpoints.Damaged as error:
            damaged[path] = error
        else:
            for damaged_path, error in damaged.items():
                set_aside(damaged_path, error)
            return path, content
    if damaged:
        raise UserError('All checkpoints of this run are damaged:\n  ' + '\n  '.join(map(str, damaged.values()))
                        + '\nBring one back, or bind another output_dir.')
    for remains in (best, metrics):
        if os.path.exists(remains) and os.path.getsize(remains):
            raise UserError(f'There is {remains} without a last.pth to resume from. '
                            f'Move it, or bind another output_dir.')
    return None


def set_aside(path, error):
    os.replace(path, f'{path}.damaged')
    logger.warning('a damaged checkpoint was renamed to %s.damaged and is ignored: %s', path, error)


def save_last(output_dir, content, keep_last, previous):
    """Writes last.pth; the one that was there becomes step_<previous>.pth, and keep_last of those are kept.

    previous: its step; None where it is not to be kept.
    """
    keep_as = os.path.join(output_dir, f'step_{previous}.pth') if keep_last > 0 and previous is not None else None
    checkpoints.save(os.path.join(output_dir, 'last.pth'), content, keep_as)
    remove_older(output_dir, content['step'], keep_last)


def remove_older(output_dir, step, keep_last):
    """Removes all step_<n>.pth from before `step` but the last keep_last of them."""
    passed = [path for n, path in older(output_dir).items() if n < step]
    for path in passed[:max(len(passed) - keep_last, 0)]:
        os.remove(path)


def older(output_dir):
    """{n: path of step_<n>.pth}, ascending."""
    files = [file for file in os.scandir(output_dir) if re.fullmatch(r'step_\d+\.pth', file.name) and file.is_file()]
    return dict(sorted((int(file.name[5:-4]), file.path) for file in files))


def best_so_far(output_dir):
    """The mAP of best.pth, or -1 if there is none; a damaged one is renamed to best.pth.damaged."""
    path, mAP = os.path.join(output_dir, 'best.pth'), None
    try:
        mAP = checkpoints.load(path).get('mAP') if os.path.isfile(path) else None
    except checkpoints.Damaged as error:
        set_aside(path, error)
    return mAP if mAP is not None and math.isfinite(mAP) else -1.0
