"""products, the CPU's own float32 product: sums in the order that it promises, so the same bits in every tile."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from implementations import COMPILED
from mining import examples, random_features

from mgn.ops.ranking import product

KERNELS = torch.ops.mgn_cpu
SETS = [pytest.param(number, id=name) for number, name in enumerate(COMPILED)]


def products(query, items, summed=product.SUMMED, set=0, norms=None):
    dots = torch.full((len(query), len(items) + 3), torch.nan)[:, :len(items)]  # rows with room between them
    KERNELS.products(KERNELS.pack_queries(query, instruction_set=set), items, summed, dots, norms, instruction_set=set)
    return dots


def in_order(query, items, summed):
    """The products of rows with few bits, so that each product is exact and a sum is rounded once, fused or not."""
    total = np.zeros((len(query), len(items)), np.float32)
    for first in range(0, query.shape[1], summed):
        part = np.zeros_like(total)
        for k in range(first, min(first + summed, query.shape[1])):
            part += np.multiply.outer(query[:, k], items[:, k])
        total += part
    return total


def few_bits(rng, *shape):
    return torch.zeros(shape).add_(torch.from_numpy(np.ldexp(rng.integers(-1000, 1001, shape),
                                                             rng.integers(-12, 1, shape))))


@pytest.mark.parametrize('set', SETS)
@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_the_order_of_the_sums(set, data):
    queries, items = (data.draw(st.sampled_from([0, 1, 5, 12, 13, 31, 64, 65, 100])) for _ in range(2))
    width, summed = data.draw(st.sampled_from([0, 1, 7, 16, 33, 200])), data.draw(st.sampled_from([1, 16, 50, 128]))
    gaps = data.draw(st.integers(0, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2 ** 32)))
    query, gallery = (few_bits(rng, rows, width + gaps) for rows in (queries, items))
    got = products(query[:, :width], gallery[:, gaps:], summed, set)
    assert np.array_equal(got, in_order(query[:, :width].numpy(), gallery[:, gaps:].numpy(), summed))


@pytest.mark.parametrize('set', SETS)
@pytest.mark.parametrize('queries, items, width', [(1, 300, 129), (700, 65, 40), (1100, 10, 5), (5, 70, 4096 + 300),
                                                   (13, 40, 2 * 4096)])
def test_a_pair_has_the_same_bits_in_every_tile_and_by_any_threads(set, queries, items, width):
    query, gallery = random_features(queries, width), random_features(items, width, seed=1)
    whole, threads = products(query, gallery, set=set), torch.get_num_threads()
    bound = product.relative_error('float32', width, torch.device('cpu'))
    error = (whole.double() - query.double() @ gallery.double().T).abs()
    assert (error <= bound * query.norm(dim=1)[:, None].double() * gallery.norm(dim=1).double()).all()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(products(query, gallery, set=set), whole)
    finally:
        torch.set_num_threads(threads)
    for part in (slice(1, 2), slice(3, 9), slice(7, None)):
        assert torch.equal(products(query, gallery[part], set=set), whole[:, part])
        assert torch.equal(products(query[part], gallery, set=set), whole[part])


@pytest.mark.parametrize('set', SETS)
@pytest.mark.parametrize('items, width', [(1, 5), (65, 33), (200, 5000), (0, 4), (3, 0)])
def test_norms_on_the_way_are_the_canonical_ones(set, items, width):
    for queries in (1, 1500):
        gallery = random_features(items, width) * 10.0 ** torch.arange(-20, 20, 40 / max(items, 1))[:items, None]
        gallery[1:2] *= 1e-22  # denormals
        norms, expected = torch.full((2, items), torch.nan, dtype=torch.float64)
        KERNELS.canonical_norms(gallery, expected)
        torch.set_flush_denormal(True)
        try:
            products(random_features(queries, width), gallery, set=set, norms=norms)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(norms, expected)


@pytest.mark.parametrize('set', SETS)
def test_nan_and_infinity_reach_their_own_products_alone(set):
    query, gallery = random_features(20, 40), random_features(70, 40, seed=1)
    query[3, 5], gallery[66, 39], gallery[2, 0] = torch.nan, torch.nan, torch.inf
    finite = products(query, gallery, set=set).isfinite()
    expected = torch.ones(20, 70, dtype=torch.bool)
    expected[3], expected[:, 66], expected[:, 2] = False, False, False
    assert torch.equal(finite, expected)


def test_its_error_is_a_fraction_of_that_of_sums_in_any_order(monkeypatch):
    def error(kernels):
        monkeypatch.setattr(product, 'own_kernels', lambda device: kernels)
        return product.relative_error('float32', 2048, torch.device('cpu'))
    assert 12 * error(KERNELS) < error(None)


@pytest.mark.parametrize('set', SETS)
@pytest.mark.parametrize('items, summed, dots, message', [
    ((4, 5), 0, (7, 4), 'a number of terms'), ((4, 6), 9, (7, 4), 'elements'), ((4, 5), 9, (70, 4), 'elements'),
    ((4, 5), 9, (7, 5), 'matrix of shape'), ((4,), 9, (7, 4), 'features')])
def test_a_wrong_call_touches_no_memory(set, items, summed, dots, message):
    panels = KERNELS.pack_queries(torch.zeros(7, 5), instruction_set=set)
    with pytest.raises(RuntimeError, match=message):
        KERNELS.products(panels, torch.zeros(items), summed, torch.zeros(dots), None, instruction_set=set)
    with pytest.raises(RuntimeError, match='elements'):
        KERNELS.products(panels, torch.zeros(4, 5), 9, torch.zeros(7, 4), torch.zeros(3, dtype=torch.float64),
                         instruction_set=set)
