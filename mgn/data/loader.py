"""Batches in order, made ahead by worker processes; unreadable images are counted."""

import re
import signal
import threading

from torch.utils.data import DataLoader

from mgn.ops.errors import UserError
from mgn.runs.log import logger

UNREADABLE_LIMIT = 0.01   # share of the training images beyond which a run stops


def load_batches(dataset, items, workers, device):
    """Yields the items of TrainBatches or TestBatches in order, made ahead by `workers` processes (0: none).

    Raises UserError where a batch cannot be made, and where a worker process has died.
    """
    loader = DataLoader(dataset, sampler=items, batch_size=None, num_workers=workers, pin_memory=device.type == 'cuda',
                        worker_init_fn=leave_signals)
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    # torch's handler would raise the error about a dead worker wherever the main process is, in the middle of a step.
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield from iterator
    except UserError as error:  # from a worker process it comes wrapped in the worker's traceback
        raise UserError(str(error).rsplit(f'\n{UserError.__module__}.UserError: ', 1)[-1]) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        message = (str(error).splitlines() or [repr(error)])[0]
        if not workers or isinstance(error, RuntimeError) and not re.match('DataLoader worker|Pin memory', message):
            raise
        raise UserError(f'A data-loading worker died: {message}. Look for lack of memory and for a file that crashes '
                        f'its decoder, which workers = 0 shows. A run goes on by the same command.') from error


def leave_signals(_):
    """Workers ignore the SIGINT that a terminal sends to every process: the main process ends them itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def count_unreadable(unreadable, new, images):
    """Adds this batch's unreadable images to {message: True}; UserError beyond UNREADABLE_LIMIT of the set."""
    for message in [message for message in dict.fromkeys(new) if message not in unreadable]:
        unreadable[message] = True
        logger.warning('unreadable image number %d, replaced by another image of its identity: %s', len(unreadable),
                       message)
    if len(unreadable) > UNREADABLE_LIMIT * images:
        raise UserError(f'At most {UNREADABLE_LIMIT:.0%} of the {images} training images may be unreadable, but '
                        f'{len(unreadable)} are:\n  ' + '\n  '.join(unreadable) + '\nRestore or remove them.')
