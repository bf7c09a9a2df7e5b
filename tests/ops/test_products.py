"""products, the CPU's own products: sums in the order that they promise, so the same bits in every tile."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from implementations import COMPILED, PRODUCTS
from mining import examples, random_features

from mgn.ops.ranking import product

KERNELS = torch.ops.mgn_cpu
KINDS = [pytest.param(kind, id=f'{kind[0]}-{COMPILED[kind[1]]}') for kind in PRODUCTS]  # (precision, set's number)
KINDS_OF = {precision: [kind for kind in KINDS if kind.values[0][0] == precision]
            for precision in ('float32', 'bfloat16', 'int16')}
HALVES = ('bfloat16', 0)
only_amx = pytest.mark.skipif(not KINDS_OF['bfloat16'], reason='this CPU has no AMX')


def products(query, items, kind, summed=None, norms=None, residuals=None):
    precision, options = kind[0], {'instruction_set': kind[1]}
    summed = summed or product.SUMMED[precision]
    dots = torch.full((len(query), len(items) + 3), torch.nan)[:, :len(items)]  # rows with room between them
    KERNELS.products(KERNELS.pack_queries(query, precision, **options), items, summed, dots, norms, residuals,
                     **options)
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


def halves(rows):
    """(n, D) → (2, n, ⌈D / 32⌉, 16, 2) float32: what bfloat16 takes of it, and of the rest; even and odd terms."""
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 32))
    high = rows.bfloat16().float()
    return torch.stack((high, (rows - high).bfloat16().float())).unflatten(2, (-1, 16, 2)).numpy()


def in_order_of_amx(query, items, summed):
    """The sums of split rows as Intel documents TDPBF16PS: products of bfloat16 are exact in float32."""
    (q_high, q_low), (high, low) = halves(query), halves(items)
    total = np.zeros((len(query), len(items)), np.float32)
    if q_high.shape[1] > 64:  # 2,048 terms are packed at a time
        return (in_order_of_amx(query[:, :2048], items[:, :2048], summed)
                + in_order_of_amx(query[:, 2048:], items[:, 2048:], summed))
    for first in range(0, q_high.shape[1], summed // 32):
        part = np.zeros_like(total)
        for k in range(first, min(first + summed // 32, q_high.shape[1])):
            for left, right in ((q_low, high), (q_high, high), (q_high, low)):
                sums = np.zeros((*total.shape, 2), np.float32)
                for pair in range(16):
                    sums += left[:, None, k, pair] * right[:, k, pair]
                part += sums[..., 0] + sums[..., 1]
        total += part
    return total


def few_bits(rng, *shape):
    return torch.zeros(shape).add_(torch.from_numpy(np.ldexp(rng.integers(-1000, 1001, shape),
                                                             rng.integers(-12, 1, shape))))


@pytest.mark.parametrize('kind', KINDS_OF['float32'])
@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_the_order_of_the_sums(kind, data):
    queries, items = (data.draw(st.sampled_from([0, 1, 5, 12, 13, 31, 64, 65, 100])) for _ in range(2))
    width, summed = data.draw(st.sampled_from([0, 1, 7, 16, 33, 200])), data.draw(st.sampled_from([1, 16, 50, 128]))
    gaps = data.draw(st.integers(0, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2 ** 32)))
    query, gallery = (few_bits(rng, rows, width + gaps) for rows in (queries, items))
    got = products(query[:, :width], gallery[:, gaps:], kind, summed)
    assert np.array_equal(got, in_order(query[:, :width].numpy(), gallery[:, gaps:].numpy(), summed))


@only_amx
@settings(max_examples=examples(40), deadline=None)
@given(data=st.data())
def test_the_order_of_the_sums_of_split_rows(data):
    queries, items = (data.draw(st.sampled_from([0, 1, 5, 16, 17, 31, 33, 65, 130])) for _ in range(2))
    width = data.draw(st.sampled_from([0, 1, 31, 32, 33, 100, 2048 + 40]))
    summed, gaps = data.draw(st.sampled_from([32, 1024])), data.draw(st.integers(0, 3))
    query, gallery = (random_features(n, width + gaps, seed=data.draw(st.integers(0, 99))) for n in (queries, items))
    got = products(query[:, :width], gallery[:, gaps:], HALVES, summed)
    assert np.array_equal(got, in_order_of_amx(query[:, :width], gallery[:, gaps:], summed))


@only_amx
@pytest.mark.parametrize('width', [1, 33, 256, 2048, 5000])
@pytest.mark.parametrize('power', [1, 9])
def test_residuals_are_what_halves_lose(width, power):
    rows = random_features(200, width).pow(power) * 2.0 ** torch.linspace(-60, 70, 200)[:, None]
    rows[7] = 0
    norms = rows.double().norm(dim=1)
    residuals, found = torch.full((2, 200), torch.nan, dtype=torch.float64)
    products(random_features(3, width), rows, HALVES, norms=found, residuals=residuals)
    known = product.in_range(norms)
    high, low = (torch.from_numpy(half).flatten(1)[:, :width].double() for half in halves(rows))
    lost = (rows - high - low).norm(dim=1) / norms + (low.norm(dim=1) / norms) ** 2 / 2
    assert known.any() and (~known).any() and (residuals[~known] == 0).all()
    assert (residuals[known] >= lost[known]).all() and (residuals[known] <= 1.02 * lost[known]).all()
    for x in (rows, rows.T.contiguous().T, rows[:0]):  # alone, readable as they lie or not
        assert torch.equal(product.operands(x, norms[:len(x)], 'bfloat16')[1], residuals[:len(x)])


def whole_steps(rows, kind):
    """(n, D) → steps (n, ⌈D / 64⌉) and how many each term is (n, ⌈D / 64⌉, 64), in the row's order; float64."""
    panels = KERNELS.pack_queries(rows, *kind).numpy()
    high = len(KERNELS.pack_queries(torch.zeros(1, 64), *kind)) // 66
    panels = panels.reshape(-(-len(rows) // high), -(-rows.shape[1] // 64), 66 * high)
    steps = panels[..., :2 * high].copy().view(np.float32).astype(float).swapaxes(1, 2)
    counts = panels[..., 2 * high:].reshape(*panels.shape[:2], 32, high, 2).transpose(0, 3, 1, 4, 2)  # first, second
    lanes = {12: 16, 6: 8}[high]  # a pair's second term comes a register after its first
    counts = counts.reshape(*counts.shape[:4], -1, lanes).swapaxes(3, 4).reshape(*counts.shape[:3], 64)
    return [array.reshape(-1, *array.shape[2:])[:len(rows)] for array in (steps, counts.astype(float))]


def awkward(rows, width):
    """Rows of every kind that steps have to fit: spread, equal terms, half steps, one large term, tiny ones, zeros."""
    x = random_features(rows, width)
    x[1::7] = 1.0
    x[2::7] = (x[2::7] * 2000).round() + 0.5
    x[3::7] = x[3::7].pow(9)
    x[4::7, ::64] = 3e4
    x[5::7] *= torch.where(torch.arange(width) < 64, 1e-30, 1.0)
    x[6::7] *= 0
    return x * 2.0 ** torch.linspace(-38, 40, rows)[:, None]


@pytest.mark.parametrize('kind', KINDS_OF['int16'])
@pytest.mark.parametrize('width', [1, 33, 64, 200, 2048, 5000])
def test_int16_rounds_to_whole_steps_whose_sums_are_exact(kind, width):
    rows = awkward(100, width)
    steps, counts = whole_steps(rows, kind)
    blocks = torch.nn.functional.pad(rows, (0, -width % 64)).double().reshape(100, -1, 64).numpy()
    norms = np.linalg.norm(blocks, axis=2)
    wanted, kept = np.maximum(norms / 46300, np.abs(blocks).max(2) / 32766), steps >= 2.0 ** -70
    assert (steps <= 1.00001 * wanted)[kept].all() and kept.mean() > 0.7 and (wanted[~kept] < 2.0 ** -69).all()
    assert (np.abs(counts) <= 32767).all() and (np.linalg.norm(counts, axis=2) ** 2 < 2 ** 31 - 1).all()
    error = np.abs(blocks - steps[..., None] * counts)
    # A count of up to 2¹⁵ is computed to within 2⁻⁹ before it is rounded.
    assert (error <= (0.503 * steps + ~kept * norms)[..., None]).all()
    found, residuals = torch.full((2, 100), torch.nan, dtype=torch.float64)
    got = products(rows, rows, kind, norms=found, residuals=residuals)
    terms = steps[:, None] * steps * np.einsum('qbk,gbk->qgb', counts, counts)
    roundings = (5 + width / 32) * 2.0 ** -24
    assert (np.abs(got.numpy() - terms.sum(2)) <= roundings * np.abs(terms).sum(2) + 2.0 ** -120).all()
    known = product.in_range(found).numpy()
    lost, residuals = np.linalg.norm(error, axis=(1, 2))[known] / found.numpy()[known], residuals.numpy()
    assert known.any() and (~known).any() and (residuals[~known] == 0).all()
    assert (residuals[known] >= lost).all() and (residuals[known] <= 1.02 * lost + 1e-9).all()
    assert np.median(lost) < 6e-5 and lost.max() < 2e-4  # √(64 / 12) / 46,300 of spread terms, at most 4 / 32,766
    for x in (rows, rows.T.contiguous().T, rows[:0]):  # alone, readable as they lie or not
        if kind[1] == 0:
            assert torch.equal(product.operands(x, found[:len(x)], 'int16')[1], torch.from_numpy(residuals[:len(x)]))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('queries, items, width', [(1, 300, 129), (700, 65, 40), (1100, 10, 5), (5, 70, 4096 + 300),
                                                   (13, 40, 2 * 4096)])
def test_a_pair_has_the_same_bits_in_every_tile_and_by_any_threads(kind, queries, items, width):
    query, gallery = random_features(queries, width), random_features(items, width, seed=1)
    whole, threads = products(query, gallery, kind), torch.get_num_threads()
    precision = kind[0]
    residuals = [product.operands(x, x.double().norm(dim=1), precision)[1] for x in (query, gallery)]
    bound = product.relative_error(precision, width, torch.device('cpu'), *residuals)
    bound = bound if residuals[0] is None else bound[:, None]
    error = (whole.double() - query.double() @ gallery.double().T).abs()
    assert (error <= bound * query.norm(dim=1)[:, None].double() * gallery.norm(dim=1).double()).all()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(products(query, gallery, kind), whole)
    finally:
        torch.set_num_threads(threads)
    for part in (slice(1, 2), slice(3, 9), slice(7, None)):
        assert torch.equal(products(query, gallery[part], kind), whole[:, part])
        assert torch.equal(products(query[part], gallery, kind), whole[part])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('items, width', [(1, 5), (65, 33), (200, 5000), (0, 4), (3, 0)])
def test_norms_on_the_way_are_the_canonical_ones(kind, items, width):
    for queries in (1, 1500):
        gallery = random_features(items, width) * 10.0 ** torch.arange(-20, 20, 40 / max(items, 1))[:items, None]
        gallery[1:2] *= 1e-22  # denormals
        norms, expected = torch.full((2, items), torch.nan, dtype=torch.float64)
        KERNELS.canonical_norms(gallery, expected)
        torch.set_flush_denormal(True)
        try:
            products(random_features(queries, width), gallery, kind, norms=norms)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(norms, expected)


@pytest.mark.parametrize('kind', KINDS)
def test_nan_and_infinity_reach_their_own_products_alone(kind):
    query, gallery = random_features(20, 40), random_features(70, 40, seed=1)
    query[3, 5], gallery[66, 39], gallery[2, 0] = torch.nan, torch.nan, torch.inf
    finite = products(query, gallery, kind).isfinite()
    expected = torch.ones(20, 70, dtype=torch.bool)
    expected[3], expected[:, 66], expected[:, 2] = False, False, False
    assert torch.equal(finite, expected)


def test_its_error_is_a_fraction_of_that_of_sums_in_any_order(monkeypatch):
    def error(kernels):
        monkeypatch.setattr(product, 'own_kernels', lambda device: kernels)
        return product.relative_error('float32', 2048, torch.device('cpu'))
    assert 12 * error(KERNELS) < error(None)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('items, summed, dots, message', [
    ((4, 5), 0, (7, 4), 'a number of terms'), ((4, 500), 64, (7, 4), 'elements'), ((4, 5), 64, (70, 4), 'elements'),
    ((4, 5), 64, (7, 5), 'matrix of shape'), ((4,), 64, (7, 4), 'features')])
def test_a_wrong_call_touches_no_memory(kind, items, summed, dots, message):
    precision, options = kind[0], {'instruction_set': kind[1]}
    panels = KERNELS.pack_queries(torch.zeros(7, 5), precision, **options)

    def call(items=(4, 5), summed=64, dots=(7, 4), norms=None, residuals=None):
        KERNELS.products(panels, torch.zeros(items), summed, torch.zeros(dots), norms, residuals, **options)
    with pytest.raises(RuntimeError, match=message):
        call(items, summed, dots)
    with pytest.raises(RuntimeError, match='rows of dots that do not overlap'):
        KERNELS.products(panels, torch.zeros(4, 5), 64, torch.zeros(1, 4).expand(7, 4), None, None, **options)
    short = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match='elements'):
        call(norms=short)
    with pytest.raises(RuntimeError, match='residuals are of bfloat16 and int16'):
        call(residuals=short)
    with pytest.raises(RuntimeError, match='expected float32, or bfloat16 or int16'):
        KERNELS.products(panels.double(), torch.zeros(4, 5), 64, torch.zeros(7, 4), None, None, **options)
    with pytest.raises(RuntimeError, match='expected float32, or bfloat16 or int16'):
        KERNELS.pack_queries(torch.zeros(7, 5), 'float16', **options)
    if precision != 'float32':
        with pytest.raises(RuntimeError, match='elements'):
            call(norms=torch.zeros(4, dtype=torch.float64), residuals=short)
        with pytest.raises(RuntimeError, match='multiple of (32|64), but got 80'):
            call(summed=80)
