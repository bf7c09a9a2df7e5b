"""Random draws as functions of (seed, purpose, step, position): there is no generator whose state must be kept.

Workers, prefetching, devices and restarts therefore change no draw: the step number alone is enough to resume a run.
"""

import numpy as np

from mgn.ops.errors import UserError

# What a draw is for; two purposes never share a stream. The numbers are part of a run's reproducibility.
IDENTITY_ORDER, IDENTITY_IMAGES, AUGMENTATION, REPLACEMENT, AUTO_AUGMENT = range(5)


def generator(seed, purpose, *place):
    """A NumPy generator for one place of one run, e.g. generator(seed, AUGMENTATION, step, position).

    Raises UserError for a seed that is no integer from 0 to 2⁶⁴ − 1.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2 ** 64:
        raise UserError(f'A seed must be an integer from 0 to {2 ** 64 - 1}, but it is {seed!r}; bind another one, '
                        f'e.g. seed = 0')
    return np.random.default_rng((seed, purpose, *place))
