"""The training batches, in order: bad files are counted, and worker processes that die are replaced."""

import logging

from mgn.images import batches

logger = logging.getLogger(__name__)

UNREADABLE_LIMIT = 0.01  # share of the training images beyond which a run stops
DEATHS_LIMIT = 3         # of worker processes, with no batch in between


def supply(train_batches, steps, workers, device):
    """The items `steps` of TrainBatches; whatever dies on the way, each is the same."""
    deaths, step = 0, steps.start
    loader = batches(train_batches, steps, workers, device)
    while step < steps.stop:
        try:
            batch = next(loader)
        except ValueError as error:  # raised in a worker process it comes with the traceback wrapped round it
            raise ValueError(str(error).rsplit('\nValueError: ', 1)[-1]) from None
        except RuntimeError as error:
            if 'DataLoader worker' not in str(error):
                raise
            deaths += 1
            what = str(error).splitlines()[0]
            if deaths == DEATHS_LIMIT:
                batch = train_batches.sampler.batch(step)
                files = '\n  '.join(dict.fromkeys(train_batches.samples[batch[position]].path for position in train_batches.positions))
                raise RuntimeError(f'want worker processes that live, got {deaths} deaths without a batch in between, the last: {what}; the batch '
                                   f'is of\n  {files}\nlook for a file that ends its decoder and for lack of memory; workers = 0 tells more') from None
            logger.warning('a worker process died before step %d, new ones take over: %s', step, what)
            loader = None  # ends the others
            loader = batches(train_batches, range(step, steps.stop), workers, device)
            continue
        deaths, step = 0, step + 1
        yield batch


def count_unreadable(unreadable, new, images):
    """Adds this batch's unreadable images to {text: True}; ValueError beyond UNREADABLE_LIMIT of the set."""
    for text in new:
        if text not in unreadable:
            unreadable[text] = True
            logger.warning('unreadable image number %d, another of its identity takes its place: %s', len(unreadable), text)
    if len(unreadable) > UNREADABLE_LIMIT * images:
        raise ValueError(f'want at most {UNREADABLE_LIMIT:.0%} of {images} training images unreadable, got '
                         f'{len(unreadable)}:\n  ' + '\n  '.join(unreadable) + '\nrestore or remove them')
