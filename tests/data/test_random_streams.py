"""Random draws as functions of (seed, purpose, where)."""

import numpy as np
import pytest
import torch

from mgn.data import random_streams

PURPOSES = (random_streams.IDENTITY_ORDER, random_streams.IDENTITY_IMAGES, random_streams.AUGMENTATION,
            random_streams.REPLACEMENT)


def test_the_numbers_of_the_purposes_stay_as_runs_were_made_with_them():
    assert PURPOSES == (0, 1, 2, 3)


@pytest.mark.parametrize('where', [(), (0,), (3, 5), (18000, 63)])
def test_a_draw_depends_on_its_arguments_alone(where):
    expected = np.random.default_rng((7, random_streams.AUGMENTATION, *where)).random(33)
    np.random.seed(0)
    random_streams.generator(7, random_streams.AUGMENTATION, *where).random(5)
    assert (random_streams.generator(7, random_streams.AUGMENTATION, *where).random(33) == expected).all()


def test_no_two_places_of_a_run_share_a_stream():
    places = [(seed, random_streams.IDENTITY_ORDER, epoch) for seed in (0, 1, 2) for epoch in range(20)]
    places += [(seed, purpose, step, position) for seed in (0, 1, 2) for purpose in PURPOSES[1:]
               for step in range(20) for position in range(20)]
    values = {random_streams.generator(*place).integers(2 ** 63) for place in places}
    assert len(values) == len(places)


def test_large_seeds_are_taken():
    seeds = 2 ** 64 - 1, 2 ** 63, 0
    assert len({random_streams.generator(seed, random_streams.AUGMENTATION, 0).random() for seed in seeds}) == 3
    assert all(torch.manual_seed(seed) for seed in seeds)
