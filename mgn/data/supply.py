"""The batches of training and evaluation, in order: bad files are counted, and worker processes that die are replaced."""

import logging
import re

from mgn.data.images import batches

logger = logging.getLogger(__name__)

UNREADABLE_LIMIT = 0.01  # share of the training images beyond which a run stops
DEATHS_IN_A_ROW = 3      # of worker processes, with no batch in between
DEATHS = 20              # in all


def supply(dataset, items, workers, device):
    """The items of a range of TrainBatches or TestBatches; whatever dies on the way, each is the same."""
    deaths, in_a_row, item = 0, 0, items.start
    loader = batches(dataset, items, workers, device)
    while item < items.stop:
        try:
            batch, dead = next(loader), None
        except ValueError as error:  # raised in a worker process it comes with the traceback wrapped round it
            raise ValueError(str(error).rsplit('\nValueError: ', 1)[-1]) from None
        except (RuntimeError, ConnectionError, EOFError) as error:
            dead = died(error, workers)
            if not dead:
                raise
        if dead is None:
            yield batch
            in_a_row, item = 0, item + 1
            continue
        deaths, in_a_row = deaths + 1, in_a_row + 1
        if in_a_row == DEATHS_IN_A_ROW or deaths == DEATHS:
            files = '\n  '.join(dict.fromkeys(dataset.paths(item)))
            raise RuntimeError(f'want worker processes that live, got {deaths} deaths, {in_a_row} of them without a batch in between, the last: {dead}; '
                               f'the batch is of\n  {files}\nlook for a file that ends its decoder and for lack of memory; workers = 0 tells more')
        logger.warning('worker death number %d, before batch %d; new ones take over: %s', deaths, item, dead)
        del loader  # ends the others
        loader = batches(dataset, range(item, items.stop), workers, device)


def died(error, workers):
    """What torch says of a worker process that has died; None for any other error."""
    told = (str(error).splitlines() or [repr(error)])[0]
    return told if workers and (not isinstance(error, RuntimeError) or re.match('DataLoader worker|Pin memory thread', told)) else None


def count_unreadable(unreadable, new, images):
    """Adds this batch's unreadable images to {text: True}; ValueError beyond UNREADABLE_LIMIT of the set."""
    for text in new:
        if text not in unreadable:
            unreadable[text] = True
            logger.warning('unreadable image number %d, another of its identity takes its place: %s', len(unreadable), text)
    if len(unreadable) > UNREADABLE_LIMIT * images:
        raise ValueError(f'want at most {UNREADABLE_LIMIT:.0%} of {images} training images unreadable, got '
                         f'{len(unreadable)}:\n  ' + '\n  '.join(unreadable) + '\nrestore or remove them')
