"""Random draws as functions of (seed, purpose, step, position): there is no generator whose state must be kept.

Workers, prefetching, devices and restarts therefore change no draw: the step number alone is enough to resume a run.
"""

import numpy as np

# What a draw is for; two purposes never share a stream. The numbers are part of a run's reproducibility.
IDENTITY_ORDER, IDENTITY_IMAGES, AUGMENTATION, REPLACEMENT, AUTO_AUGMENT = range(5)


def generator(seed, purpose, *place):
    """A NumPy generator for one place of one run, e.g. generator(seed, AUGMENTATION, step, position)."""
    return np.random.default_rng((seed, purpose, *place))
