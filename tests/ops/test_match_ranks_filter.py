"""Nothing about the matrix product reaches the ranks: tiles, threads, precision, library, order of the gallery,
settings of torch."""

import json
import threading

import numpy as np
import pytest
import torch
from implementations import PRODUCTS
from memory import only_linux, printed
from rankings import (METRICS, by_torch, clustered, extremes, naive_ranks, near_ties, on_tensor_cores, problem,
                      ranks_of, same)

from mgn.ops import match_ranks
from mgn.ops.ranking import product, ranks, reference

MAKERS = [near_ties, problem, extremes]


@pytest.fixture(autouse=True)
def no_width_is_narrow(monkeypatch):
    monkeypatch.setattr(product, 'NARROW', {})


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('make', [*MAKERS, clustered])
def test_tiles_change_nothing(monkeypatch, make, metric):
    args = make(7, 60, 33)
    expected = match_ranks(*args, metric=metric)
    for tile in ((1, 1), (7, 3), (64, 5), (1000, 2)):
        monkeypatch.setattr(ranks, 'tile_of', lambda query: tile)
        assert same(match_ranks(*args, metric=metric), expected)


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('make', [near_ties, clustered])
def test_threads_change_nothing(make, metric):
    args = make() if make is clustered else make(11, 120, 33)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(match_ranks(*args, metric=metric))
    finally:
        torch.set_num_threads(threads)
    assert all(same(result, results[0]) for result in results)
    assert len({result.redecided for result in results}) == 1


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('make', [*MAKERS, clustered])
def test_precision_changes_nothing_but_what_goes_by_key(ranking, monkeypatch, make, metric):
    """Float32 products of the rounded operands err no more than tensor cores."""
    args = make(12, 900) if make is clustered else make(11, 300, 33)
    expected = match_ranks(*args, metric=metric, precision='float32')
    on_tensor_cores(monkeypatch)
    got = match_ranks(*args, metric=metric, precision='tf32')
    assert same(got, expected)
    if make is clustered:
        assert 2 * expected.redecided < got.redecided < len(args[0]) * len(args[1]) / 10


def test_operands_keep_what_tf32_promises():
    x = torch.from_numpy(problem(50, 1, 40)[0]).mul(torch.logspace(-8, 8, 50)[:, None])
    rounded = product.operands(x, x.double().norm(dim=1), 'tf32')[0](slice(None))
    assert (rounded.view(torch.int32) & 0x1fff == 0).all()
    assert ((rounded - x).abs() <= 2.0 ** -11 * x.abs()).all() and ((rounded - x).abs() > 2.0 ** -12.5 * x.abs()).any()
    assert product.operands(x, None, 'float32')[0](slice(None)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize('kept', [True, False])
def test_what_operands_lose_is_measured_row_by_row(monkeypatch, kept):
    x = torch.from_numpy(problem(90, 1, 40)[0]).mul(torch.logspace(-11, 16, 90)[:, None])
    x[7], x[8], x[9] = 0, 3e38, 1e-41
    monkeypatch.setattr(product, 'OPERANDS', 40 * 32)  # three pieces
    monkeypatch.setattr(product, 'once', lambda device: 10 ** 6 if kept else 0)
    norms = x.double().norm(dim=1)
    operand, residual = product.operands(x, norms, 'tf32')
    for part in (slice(0, 90), slice(13, 57)):
        rounded = torch.empty_like(x[part])
        reference.round_to_tf32(x[part], norms[part], rounded, norms[part].clone())
        assert torch.equal(operand(part), rounded)
    lost = (operand(slice(0, 90)).double() - x.double()).norm(dim=1) / norms
    known = product.in_range(norms)
    assert known.any() and (~known).any() and (residual[~known] == 0).all()
    torch.testing.assert_close(residual[known], lost[known], rtol=1e-12, atol=0)


def test_rounded_rows_are_contiguous_whatever_their_strides(monkeypatch):
    monkeypatch.setattr(product, 'once', lambda device: 0)
    rows = torch.arange(40.0).unfold(0, 30, 1)  # 11 rows that overlap: a copy like them has their strides
    rounded = product.operands(rows, rows.double().norm(dim=1), 'tf32')[0](slice(None))
    assert rounded.is_contiguous() and torch.equal(rounded, rows) and not torch.empty_like(rows).is_contiguous()


@pytest.mark.parametrize('precision', ['tf32', *(precision for precision, number in PRODUCTS if number == 0)])
@pytest.mark.parametrize('width', [1, 7, 256, 2048])
def test_products_err_less_than_they_are_said_to(monkeypatch, precision, width):
    if precision == 'tf32':
        on_tensor_cores(monkeypatch)
    rng = np.random.default_rng(width)
    one_in_64 = np.arange(width) % 64 == 0  # of which int16 loses next to nothing, so that its roundings count
    for make in (lambda n: rng.standard_normal((n, width)), lambda n: rng.random((n, width)),
                 lambda n: rng.standard_normal((n, width)) ** 9, lambda n: rng.random((n, 1)) * one_in_64):
        features = (torch.from_numpy(make(n).astype(np.float32)) for n in (40, 300))
        known = (rows[product.in_range(rows.double().norm(dim=1))] for rows in features)
        assert (error_of(*known, precision) <= 1).all()


def error_of(q, g, precision):
    """(q, n): the errors of products, in parts of what is said to bound them."""
    norms = q.double().norm(dim=1), g.double().norm(dim=1)
    (q_operand, q_residual), (g_operand, g_residual) = (
        product.operands(*pair, precision) for pair in zip((q, g), norms))
    with product.exact_float32():
        got = product.products_of(q_operand(slice(None)), precision, torch.empty(40 * 300))(g_operand(slice(None)))[0]
    bound = product.relative_error(precision, q.shape[1], q.device, q_residual, g_residual) * norms[0]
    return (got.double() - q.double() @ g.double().T).abs() / bound[:, None] / norms[1]


def truncating(step, extra):
    """q @ gᵀ of a tensor core: `step` products at a time, and their sum so far, are cut to 2^−(23 + extra) of the
    largest of them and added; the sum is cut to 24 bits."""
    def cut(values, exponents):
        return np.ldexp(np.trunc(np.ldexp(values, -exponents)), exponents)

    def exponent(values):
        return np.where(values == 0, -1000, np.frexp(values)[1] - 1)

    def products(q, g):
        q, g = q.double().numpy(), g.double().numpy()
        sums = np.zeros((len(q), len(g)))
        for first in range(0, q.shape[1], step):
            terms = q[:, None, first:first + step] * g[None, :, first:first + step]
            terms = np.concatenate((sums[..., None], terms), 2)
            sums = cut(terms, exponent(terms).max(2, keepdims=True) - 23 - extra).sum(2)
            sums = cut(sums, exponent(sums) - 23)
        return torch.from_numpy(sums).float()
    return products


def adversaries(width, extra):
    """Rows whose products are 1, then just too small for the unit: every term is lost, and all errors have one sign."""
    small = np.sqrt((2 - 2.0 ** -6) * 2.0 ** (-24 - extra))
    rows = np.full((6, width), small, np.float32)
    rows[:, 0] = 1
    rows[1::2, 0] = -1  # the sum grows towards 0
    rows[2:4, 1::2] = 0
    rows[4:] *= np.float32(0.9)
    return torch.from_numpy(rows)


TENSOR_CORES = [(4, 0), (8, 1), (16, 2)]  # V100, A100, H100: Fasi et al., "Numerical behavior of NVIDIA tensor cores"


@pytest.mark.parametrize('step, extra', TENSOR_CORES)
@pytest.mark.parametrize('width', [5, 64, 2048])
def test_truncating_tensor_cores_err_less_than_products_are_said_to(monkeypatch, width, step, extra):
    on_tensor_cores(monkeypatch, truncating(step, extra))
    rows = adversaries(width, extra)
    others = torch.from_numpy(np.random.default_rng(0).random((20, width)).astype(np.float32))
    errors = error_of(torch.cat((rows, others[:5])), torch.cat((rows, others)), 'tf32')
    assert errors.max() <= 1
    if width == 2048 and step == 4:  # the rows are as bad as they are meant to be
        assert errors.max() > 0.2


@pytest.mark.parametrize('step, extra', TENSOR_CORES)
@pytest.mark.parametrize('metric', METRICS)
def test_truncating_tensor_cores_change_no_rank(monkeypatch, metric, step, extra):
    query, gallery, *ids = clustered(12, 300, 32)
    rows = adversaries(32, extra).numpy()
    query[:6], gallery[:60] = rows, np.repeat(rows, 10, 0)
    args = query, gallery, *ids
    expected = match_ranks(*args, metric=metric)
    on_tensor_cores(monkeypatch, truncating(step, extra))
    assert same(match_ranks(*args, metric=metric, precision='tf32'), expected)


@pytest.mark.parametrize('metric', METRICS)
def test_every_gemm_gives_the_same_ranks(monkeypatch, metric):
    args = clustered()
    expected = match_ranks(*args, metric=metric)
    for way in (None, lambda q, g: (q.double() @ g.double().T).float(),
                lambda q, g: torch.einsum('qd,gd->qg', q.flip(1), g.flip(1))):
        by_torch(monkeypatch, way)
        got = match_ranks(*args, metric=metric)
        assert same(got, expected) and got.redecided > 0


@pytest.mark.parametrize('metric', METRICS)
def test_order_of_the_gallery_changes_only_ties(metric):
    query, gallery, query_pids, gallery_pids, query_camids, gallery_camids = problem(20, 300, 17)
    expected = match_ranks(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric=metric)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(300)
        got = match_ranks(query, gallery[order], query_pids, gallery_pids[order], query_camids, gallery_camids[order],
                          metric=metric)
        assert same(got, expected)


@pytest.mark.parametrize('make', MAKERS)
def test_settings_of_torch_change_nothing_and_are_restored(make):
    args = make(9, 300, 64)
    expected = match_ranks(*args)
    assert ranks_of(*args) == naive_ranks(*args)
    torch.set_float32_matmul_precision('medium')
    try:
        assert same(match_ranks(*args), expected)
        assert torch.get_float32_matmul_precision() == 'medium'
        assert torch.backends.mkldnn.matmul.fp32_precision == 'bf16'
    finally:
        torch.set_float32_matmul_precision('highest')
    with torch.autocast('cpu', dtype=torch.bfloat16), torch.inference_mode():
        assert same(match_ranks(*args), expected)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    torch.set_default_dtype(torch.float64)
    product.keeps_operands.cache_clear()  # the probe is of float32 nevertheless
    try:
        assert same(match_ranks(*args), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('metric', METRICS)
def test_denormal_features_count_even_while_torch_flushes_them(ranking, metric):
    for make in (extremes,
                 lambda *size: [x * np.float32(1e-40) if x.dtype == np.float32 else x for x in problem(*size)]):
        args = make(4, 31, 17)
        expected = naive_ranks(*args, metric=metric)
        torch.set_flush_denormal(True)
        try:
            got = ranks_of(*args, metric=metric)
        finally:
            torch.set_flush_denormal(False)
        assert got == expected


def test_torch_multiplies_in_exact_float32_whatever_it_was_told(monkeypatch):
    asked = []

    def products(query, items):
        asked.append((torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision,
                      torch.is_autocast_enabled('cpu'), torch.is_autocast_enabled('cuda')))
        return query @ items.T
    by_torch(monkeypatch, products)
    torch.backends.fp32_precision = 'tf32'
    try:
        with torch.autocast('cpu', dtype=torch.bfloat16):
            match_ranks(*problem(3, 40, 5))
    finally:
        torch.backends.fp32_precision = 'none'
    assert asked and set(asked) == {('ieee', 'ieee', False, False)}


def test_what_was_inherited_is_inherited_again():
    torch.backends.fp32_precision = 'tf32'
    try:
        match_ranks(*problem(3, 40, 5))
        torch.backends.fp32_precision = 'ieee'
        assert torch.backends.mkldnn.matmul.fp32_precision == torch.backends.cuda.matmul.fp32_precision == 'ieee'
    finally:
        torch.backends.fp32_precision = 'none'


@pytest.fixture
def forgetful():
    """forgetful() lets products be probed anew, as they are after the test."""
    def forget():
        product.keeps_operands.cache_clear()
        product.rounds_sums.cache_clear()
    yield forget
    forget()


def coarse(q, g):
    return q.bfloat16().float() @ g.bfloat16().float().T


@pytest.mark.parametrize('gemm, keeps, rounds, error', [
    (lambda q, g: q @ g.T, True, True, 2.0 ** -18), (coarse, False, True, 2.0 ** -6),
    *((truncating(*unit), True, False, 2.0 ** -16) for unit in TENSOR_CORES)])
def test_products_that_drop_bits_or_truncate_are_found_out(monkeypatch, forgetful, gemm, keeps, rounds, error):
    args, device = clustered(12, 300), torch.device('cpu')
    expected = match_ranks(*args, precision='float32')
    forgetful()
    by_torch(monkeypatch, gemm)
    monkeypatch.setattr(product, 'probe_size', lambda device: 128)
    got = match_ranks(*args)
    assert product.keeps_operands(device) == keeps and product.rounds_sums(device) == rounds
    assert 0.95 * error < product.relative_error('float32', 64, device) < 1.1 * error
    assert same(got, expected) and got.redecided >= expected.redecided + (not keeps)


def test_what_the_matrix_product_leaves_open_is_counted(ranking):
    query = np.ones((1, 4), np.float32)
    gallery = np.array([[1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 0], [3, 3, 3, 3], [1, -1, 1, -1]], np.float32)
    args = (query, gallery, [1], [1, 2, 2, 2, 2], [0], [1] * 5)
    assert match_ranks(*args).redecided == 2  # parallel to the match; the other two are decided by the product
    assert match_ranks(*problem(20, 129, 33), precision='float32').redecided == 0


@pytest.mark.parametrize('metric', METRICS)
def test_a_match_out_of_the_filters_range_and_nonmatches_out_of_it(ranking, metric):
    query, gallery, *ids = problem(5, 80, 9, pids=4)
    gallery[::7] *= np.float32(1e25)
    query[1] *= np.float32(1e-30)
    query[2] *= np.float32(1e30)
    args = query, gallery, *ids
    assert ranks_of(*args, metric=metric) == naive_ranks(*args, metric=metric)


def test_more_matches_than_are_compared_one_by_one(ranking):
    query, gallery, *_ = problem(3, 1300, 2, levels=9)
    ids = np.arange(3), np.arange(1300) % 3, np.zeros(3, int), np.arange(1300) % 300
    for metric in METRICS:
        assert ranks_of(query, gallery, *ids, metric=metric) == naive_ranks(query, gallery, *ids, metric=metric)


MEMORY = '''
import json, sys
import numpy as np, torch
from mgn import ops
torch.set_num_threads(2)
Q, G, D, dtype, precision = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
gallery = torch.empty(G, D, dtype=getattr(torch, dtype))
for part in gallery.split(4096):
    part.copy_(torch.from_numpy(rng.standard_normal(part.shape, np.float32)))
query = gallery[rng.integers(0, G, Q)]
ids = [rng.integers(0, 1 + G // 25, n) for n in (Q, G)] + [rng.integers(0, 6, n) for n in (Q, G)]
few = [array[:9] for array in ids]
ops.match_ranks(query[:9], gallery[:9], *few, precision=precision)  # loads what there is to load
before = high_water(anew=True)
result = ops.match_ranks(query, gallery, *ids, precision=precision)
peak = high_water() - before
print(peak, 2 ** 28 + 32 * (Q + G + len(result.ranks)), len(result.ranks))
'''


@pytest.mark.parametrize('case', [
    (2500, 20_000, 512, 'float16', 'float32'),
    *(pytest.param(case, marks=pytest.mark.long) for case in (
        (3000, 40_000, 128, 'float32', 'float32'), (30_000, 30_000, 16, 'bfloat16', 'tf32'),
        (40, 2_000_000, 4, 'float32', 'float32'), (64, 300, 100_000, 'float16', 'float32'),
        (7000, 6000, 4096, 'float16', 'float32')))])
@only_linux
def test_memory_stays_within_its_bound(case):
    peak, bound, matches = printed(MEMORY, json.dumps(case))
    assert 0 < peak <= bound and matches > 0


def test_a_thread_waits_while_another_has_changed_the_settings():
    """Else the second would restore what the first had set."""
    def change():
        with product.exact_float32():
            pass
    second, before = threading.Thread(target=change), torch.backends.cuda.matmul.fp32_precision
    with product.exact_float32():
        second.start()
        second.join(0.2)
        assert second.is_alive()
    second.join(20)
    assert not second.is_alive() and torch.backends.cuda.matmul.fp32_precision == before
