"""Batches in order, loaded ahead by worker processes: dead workers are restarted, unreadable images are counted."""

import re
import signal
import threading

from torch.utils.data import DataLoader

from mgn.ops.errors import UserError
from mgn.runs.log import logger

UNREADABLE_LIMIT = 0.01   # share of the training images beyond which a run stops
MAX_DEATHS_IN_A_ROW = 3   # of worker processes, with no batch in between
MAX_DEATHS = 20           # in all


def load_batches(dataset, items, workers, device):
    """Yields every item of a range of TrainBatches or TestBatches once, in order, and restarts dead workers.

    Raises UserError where workers die again and again, and where a batch cannot be made.
    """
    deaths, in_a_row, item = 0, 0, items.start
    while True:
        try:
            for batch in start_workers(dataset, range(item, items.stop), workers, device):
                yield batch
                in_a_row, item = 0, item + 1
            return
        except UserError as error:  # from a worker process it comes wrapped in the worker's traceback
            raise UserError(str(error).rsplit(f'\n{UserError.__module__}.UserError: ', 1)[-1]) from None
        except (RuntimeError, ConnectionError, EOFError) as error:
            death = death_message(error, workers)
            if death is None:
                raise
        deaths, in_a_row = deaths + 1, in_a_row + 1
        if in_a_row == MAX_DEATHS_IN_A_ROW or deaths == MAX_DEATHS:
            files = '\n  '.join(dict.fromkeys(dataset.paths(item)))
            raise UserError(f'Data-loading workers died {in_a_row} times in a row and {deaths} times in all, the last '
                            f'time with: {death}. The batch consists of\n  {files}\nLook for a file that crashes its '
                            f'decoder and for lack of memory; workers = 0 shows more.')
        logger.warning('data-loading workers died (number %d, before batch %d) and are restarted: %s',
                       deaths, item, death)


def start_workers(dataset, items, workers, device):
    """An iterator over the items of TrainBatches or TestBatches, made ahead by `workers` processes (0: none).

    Raises RuntimeError in place of an item where a worker process has died.
    """
    loader = DataLoader(dataset, sampler=items, batch_size=None, num_workers=workers, pin_memory=device.type == 'cuda',
                        worker_init_fn=leave_signals)
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    # torch's handler would raise that RuntimeError wherever the main process is, in the middle of a step.
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return iterator


def leave_signals(_):
    """Workers ignore the SIGINT that a terminal sends to every process: the main process ends them itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)


def death_message(error, workers):
    """What torch says about a worker process that has died; None for any other error."""
    message = (str(error).splitlines() or [repr(error)])[0]
    of_torch = not isinstance(error, RuntimeError) or re.match('DataLoader worker|Pin memory thread', message)
    return message if workers and of_torch else None


def count_unreadable(unreadable, new, images):
    """Adds this batch's unreadable images to {message: True}; UserError beyond UNREADABLE_LIMIT of the set."""
    for message in new:
        if message not in unreadable:
            unreadable[message] = True
            logger.warning('unreadable image number %d, replaced by another image of its identity: %s',
                           len(unreadable), message)
    if len(unreadable) > UNREADABLE_LIMIT * images:
        raise UserError(f'At most {UNREADABLE_LIMIT:.0%} of the {images} training images may be unreadable, but '
                        f'{len(unreadable)} are:\n  ' + '\n  '.join(unreadable) + '\nRestore or remove them.')
