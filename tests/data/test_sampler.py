"""P identities × K images: every batch against the recipe in words, and as a pure function of seed and step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mgn.data.sampler import IdentitySampler


def check_identity(chosen, labels, camids, K):
    """The recipe for one identity, in words: `chosen` are its K sample indices."""
    first, rest = chosen[0], chosen[1:]
    assert len(chosen) == K
    same = [i for i in range(len(labels)) if labels[i] == labels[first]]
    other_cameras = [i for i in same if camids[i] != camids[first]]
    other_images = [i for i in same if i != first]
    allowed = other_cameras or other_images or [first]
    assert set(rest) <= set(allowed)
    if len(allowed) >= K - 1:
        assert len(set(rest)) == K - 1  # repeated only where there are too few


def groups(batch, K):
    return [batch[i:i + K] for i in range(0, len(batch), K)]


def make(images_per_identity, cameras, P, K, seed=0):
    labels = [label for label, n in enumerate(images_per_identity) for _ in range(n)]
    camids = [i % cameras + 1 for n in images_per_identity for i in range(n)]
    return labels, camids, IdentitySampler(labels, camids, P, K, seed)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_every_batch_follows_the_recipe(data):
    P, K = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 6))
    identities = data.draw(st.integers(P, 12))
    labels = list(range(identities)) + data.draw(st.lists(st.integers(0, identities - 1), max_size=40))
    labels = data.draw(st.permutations(labels))
    camids = [data.draw(st.integers(0, 3)) for _ in labels]
    sampler = IdentitySampler(labels, camids, P, K, data.draw(st.integers(0, 2 ** 40)))
    for step in range(2 * sampler.steps_per_epoch + 1):
        batch = sampler.batch(step)
        assert len(batch) == P * K and all(type(index) is int for index in batch)
        of_batch = [{labels[i] for i in group} for group in groups(batch, K)]
        assert all(len(pids) == 1 for pids in of_batch)
        assert len(set.union(*of_batch)) == P  # no identity twice
        for group in groups(batch, K):
            check_identity(group, labels, camids, K)


@pytest.mark.parametrize('identities, P', [(2, 2), (31, 2), (33, 4), (129, 16), (16, 16), (31, 16)])
def test_an_epoch_visits_floor_of_C_by_P_times_P_distinct_identities(identities, P):
    labels, _, sampler = make([2] * identities, 2, P, 2)
    assert sampler.steps_per_epoch == identities // P
    for epoch in range(3):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        visited = [labels[group[0]] for step in steps for group in groups(sampler.batch(step), 2)]
        assert len(visited) == len(set(visited)) == identities // P * P


def test_each_epoch_has_an_order_and_a_dropped_tail_of_its_own():
    labels, _, sampler = make([2] * 9, 2, 4, 2)
    orders = [tuple(labels[group[0]] for step in (2 * epoch, 2 * epoch + 1) for group in groups(sampler.batch(step), 2))
              for epoch in range(40)]
    assert len(set(orders)) == 40
    assert {label for order in orders for label in set(range(9)) - set(order)} == set(range(9))


def test_an_identity_gives_other_images_when_it_is_visited_again():
    labels, _, sampler = make([30, 30], 3, 2, 4)
    batches = {tuple(sorted(sampler.batch(step))) for step in range(50)}
    assert len(batches) == 50


def test_every_place_of_every_step_draws_for_itself():
    _, _, sampler = make([1000] * 6, 1, 3, 2)
    draws = [tuple(index % 1000 for index in group) for step in range(4) for group in groups(sampler.batch(step), 2)]
    assert len(set(draws)) == 12


def test_a_batch_is_a_pure_function_of_seed_and_step():
    one, other = (make([3, 1, 5, 4, 2, 7, 4], 3, 3, 4, seed=5)[2] for _ in range(2))
    expected = [one.batch(step) for step in range(20)]
    np.random.seed(1)
    assert [other.batch(step) for step in reversed(range(20))] == expected[::-1]
    assert [one.batch(step) for step in range(20)] == expected
    assert [make([3, 1, 5, 4, 2, 7, 4], 3, 3, 4, seed=6)[2].batch(step) for step in range(20)] != expected


@pytest.mark.parametrize('images, cameras, K', [(8, 4, 4), (6, 1, 3), (4, 2, 4), (3, 1, 4)])
def test_images_of_an_identity_are_drawn_uniformly(images, cameras, K):
    """Frequencies within 5 standard deviations; the seed is fixed, so the outcome is too."""
    _, camids, sampler = make([images, images], cameras, 2, K)
    draws = [group for step in range(1500) for group in groups(sampler.batch(step), K)]
    for label in range(2):
        first = Counter(group[0] for group in draws if group[0] // images == label)
        rest = Counter(i for group in draws if group[0] // images == label for i in group[1:])
        for counts, n in ((first, 1500), (rest, 1500 * (K - 1))):
            assert all(abs(counts[label * images + i] - n / images) < 5 * np.sqrt(n / images) for i in range(images))


def test_other_cameras_come_first_even_if_images_repeat_then():
    labels, camids = [0] * 6 + [1] * 2, [1, 1, 1, 1, 1, 2] + [1, 2]
    sampler = IdentitySampler(labels, camids, 2, 4, 0)
    for step in range(50):
        for first, *rest in groups(sampler.batch(step), 4):
            assert all(camids[i] != camids[first] for i in rest)


def test_one_image_is_repeated_K_times():
    _, _, sampler = make([1, 1, 1], 1, 3, 4)
    assert sorted(groups(sampler.batch(0), 4)) == [[0] * 4, [1] * 4, [2] * 4]


def test_too_few_identities_for_P_are_refused():
    with pytest.raises(ValueError, match='at least P=4 identities, found 3; lower P or add data'):
        make([4, 4, 4], 2, 4, 2)
    with pytest.raises(ValueError, match='found 0'):
        IdentitySampler([], [], 2, 2, 0)
