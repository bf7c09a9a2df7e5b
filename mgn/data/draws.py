"""Random draws as functions of (seed, purpose, step, position), so nothing needs a generator's state.

Workers, prefetching, devices and restarts therefore change no draw: a run is resumed from its step number alone.
"""

import numpy as np

# What a draw is for; two purposes never share a stream. The numbers are part of a run's reproducibility.
IDENTITY_ORDER, IDENTITY_IMAGES, AUGMENTATION, REPLACEMENT = range(4)


def generator(seed, purpose, *where):
    """A NumPy generator for one place of one run, e.g. generator(seed, AUGMENTATION, step, position).

    Raises ValueError for a seed that is not a non-negative integer.
    """
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f'want a seed that is a non-negative integer, got {seed!r}; bind seed, e.g. seed=0')
    return np.random.default_rng((seed, purpose, *where))
