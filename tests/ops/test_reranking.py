"""k-reciprocal re-ranking against the published formula, dense, on canonical keys of a pure Python loop."""

import functools
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from implementations import COMPILED, IMPLEMENTATIONS, run_as
from memory import only_linux, printed
from mining import examples
from rankings import (METRICS, clustered, extremes, naive_keys, near_ties, on_tensor_cores, problem,
                      published_distances, same)

from mgn.ops import k_reciprocal_ranks, match_ranks, match_ranks_from_distance, topk
from mgn.ops.arguments import PRECISIONS
from mgn.ops.ranking import nearest, ranks, reference, reranking

PARAMETERS = [(20, 6, 0.3), (5, 1, 0.3), (7, 3, 0.0), (4, 2, 1.0), (1, 1, 0.5), (3, 9, 0.9), (30, 6, 1e-9),
              (60, 30, 0.3)]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    return run_as(request.param, 'ranking.keys', monkeypatch, 'cpu')


def keys_and_squares(query, gallery, metric):
    features = np.concatenate((query, gallery))
    keys = naive_keys(features, features, metric)
    return keys, np.square(np.maximum(1 + keys, 0)) if metric == 'cosine' else keys


@functools.lru_cache(1000)
def naive_final(query, gallery, shapes, metric, k1, k2, lambda_value):
    """Of the bytes of the features; computed once for all implementations."""
    features = [np.frombuffer(of, np.float32).reshape(shape) for of, shape in zip((query, gallery), shapes)]
    return published_distances(*keys_and_squares(*features, metric), len(features[0]), k1, k2, lambda_value)


def naive(query, gallery, ids, k1, k2, lambda_value, metric='cosine', junk_pid=-1):
    final = naive_final(query.tobytes(), gallery.tobytes(), (query.shape, gallery.shape), metric, k1, k2, lambda_value)
    return match_ranks_from_distance(final, *ids, junk_pid=junk_pid)


def check(query, gallery, *ids, k1=20, k2=6, lambda_value=0.3, metric='cosine', junk_pid=-1):
    got = k_reciprocal_ranks(query, gallery, *ids, k1, k2, lambda_value, metric, junk_pid)
    expected = naive(query, gallery, ids, k1, k2, lambda_value, metric, junk_pid)
    assert np.array_equal(got.offsets, expected.offsets) and got.offsets.dtype == got.ranks.dtype == np.int64
    assert np.array_equal(got.ranks, expected.ranks)
    return got


@pytest.mark.parametrize('k1, k2, lambda_value', PARAMETERS)
@pytest.mark.parametrize('metric', METRICS)
def test_ranks_are_those_of_the_published_formula(implementation, metric, k1, k2, lambda_value):
    options = {'k1': k1, 'k2': k2, 'lambda_value': lambda_value, 'metric': metric}
    got = check(*problem(12, 60, 5, pids=6), **options)
    check(*problem(3, 30, 33, pids=3, levels=2), **options)
    plain = match_ranks(*problem(12, 60, 5, pids=6), metric)
    assert np.array_equal(got.ranks, plain.ranks) == (lambda_value == 1 or k1 == 1)


@pytest.mark.parametrize('make', [near_ties, extremes, lambda Q, G, D: problem(Q, G, D, levels=1)])
@pytest.mark.parametrize('lambda_value', [0, 0.3, 1])
@pytest.mark.parametrize('metric', METRICS)
def test_ties_near_ties_and_extremes(implementation, metric, lambda_value, make):
    for k1, k2 in ((5, 3), (20, 6), (5, 1)):
        check(*make(4, 50, 17), k1=k1, k2=k2, lambda_value=lambda_value, metric=metric)


@settings(deadline=None, derandomize=True, max_examples=examples(200),
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_ranks_equal_the_published_formula_on_anything(implementation, data):
    Q, G, D = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (0, 12), (1, 5)))
    quantised = st.sampled_from([-1.0, 0.0, 0.0, 1.0, 2.0])
    values = data.draw(st.sampled_from([quantised, st.floats(-8, 8, width=32),
                                        st.floats(width=32, allow_nan=False, allow_infinity=False)]))
    query, gallery = (np.array(data.draw(st.lists(st.lists(values, min_size=D, max_size=D), min_size=n, max_size=n)),
                               np.float32).reshape(n, D) for n in (Q, G))
    ids = [data.draw(st.lists(st.integers(low, 2), min_size=n, max_size=n)) for low in (-1, 1) for n in (Q, G)]
    check(query, gallery, *ids, k1=data.draw(st.integers(1, 8)), k2=data.draw(st.integers(1, 8)),
          lambda_value=data.draw(st.sampled_from([0, 1e-12, 0.1, 0.3, 1])), metric=data.draw(st.sampled_from(METRICS)),
          junk_pid=data.draw(st.sampled_from([-1, 0, None])))


def test_pairs_that_went_by_key_are_counted_over_all_blocks_of_queries(monkeypatch):
    args = near_ties(5, 200, 17)
    expected = k_reciprocal_ranks(*args).redecided
    monkeypatch.setattr(reranking, 'tile_of', lambda query: (2048, 1))
    assert k_reciprocal_ranks(*args).redecided == expected > 100


@pytest.mark.parametrize('lambda_value', [1e-10, 1e-12, 1e-14, 1e-15, 1e-310])
@pytest.mark.parametrize('metric', METRICS)
def test_distances_that_a_small_lambda_rounds_to_one_number_tie(implementation, metric, lambda_value):
    query, gallery, *ids = problem(4, 120, 9, pids=4)
    check(query, gallery, *ids, k1=5, k2=2, lambda_value=lambda_value, metric=metric)


@pytest.mark.parametrize('lambda_value', [0, 0.3, 1])
@pytest.mark.parametrize('metric', METRICS)
def test_identical_features_everywhere(implementation, metric, lambda_value):
    query, gallery, *ids = problem(5, 70, 9)
    query[:], gallery[:] = 0.1, 0.1
    check(query, gallery, *ids, lambda_value=lambda_value, metric=metric)
    gallery[:] = 0.3
    check(query, gallery, *ids, lambda_value=lambda_value, metric=metric)
    query[:] = 0
    check(query, gallery, *ids, lambda_value=lambda_value, metric=metric)


def test_duplicates_tie_by_gallery_index(implementation):
    query, gallery, *ids = problem(6, 80, 9, pids=4)
    gallery[40:] = gallery[:40]
    query[3:] = gallery[:3]
    for metric in METRICS:
        check(query, gallery, *ids, k1=6, metric=metric)


@functools.cache
def dense(metric, lambda_value):
    """Query, gallery and their final distances: too many for a pure Python loop."""
    query, gallery, *_ = problem(3, 2100, 2)
    features = torch.from_numpy(np.concatenate((query, gallery)))
    owners, items = torch.cartesian_prod(*[torch.arange(2103)] * 2).T.contiguous()
    keys = torch.empty(2103 ** 2, dtype=torch.float64)
    reference.canonical_keys(features, features, owners, items, metric == 'cosine', keys)
    keys = keys.view(2103, 2103).numpy()
    return query, gallery, published_distances(keys, np.square(np.maximum(1 + keys, 0)) if metric == 'cosine' else keys,
                                               3, lambda_value=lambda_value)


@pytest.mark.parametrize('metric, lambda_value',
                         [('cosine', 0.3), pytest.param('euclidean', 0, marks=pytest.mark.long)])
def test_more_matches_than_are_compared_one_by_one_over_several_tiles(implementation, metric, lambda_value):
    query, gallery, final = dense(metric, lambda_value)
    ids = np.arange(3), np.arange(2100) % 4, np.zeros(3, int), np.arange(2100) % 300
    got = k_reciprocal_ranks(query, gallery, *ids, lambda_value=lambda_value, metric=metric)
    assert len(got.ranks) > 1500 and same(got, match_ranks_from_distance(final, *ids))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_another_default_type_of_torch_changes_nothing(implementation, dtype):
    args = near_ties(5, 60, 9)
    expected = k_reciprocal_ranks(*args)
    torch.set_default_dtype(dtype)
    try:
        got = k_reciprocal_ranks(*args)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(got, expected)


@pytest.mark.parametrize('Q, G', [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_no_query_or_no_gallery(implementation, Q, G):
    check(*problem(Q, G, 8, pids=1))


@pytest.mark.parametrize('metric', METRICS)
def test_tiles_threads_precision_and_implementation_change_nothing(monkeypatch, metric):
    args = clustered(40, 500, pids=40, copies=90)
    expected = k_reciprocal_ranks(*args, metric=metric)
    on_tensor_cores(monkeypatch)
    for tile in ((100, 64), (64, 37), (999, 2000)):
        for module in (nearest, ranks, reranking):
            monkeypatch.setattr(module, 'tile_of', lambda query, *_: tile)
        assert same(k_reciprocal_ranks(*args, metric=metric), expected)
    for precision in PRECISIONS:
        assert same(k_reciprocal_ranks(*args, metric=metric, precision=precision), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert same(k_reciprocal_ranks(*args, metric=metric), expected)
    finally:
        torch.set_num_threads(threads)
    for name in IMPLEMENTATIONS[1:]:
        run_as(name, 'ranking.keys', monkeypatch, 'cpu')
        assert same(k_reciprocal_ranks(*args, metric=metric), expected)


def test_every_container_type_and_layout_gives_the_same_ranks():
    query, gallery, *ids = clustered(20, 200, pids=40, copies=90)
    query, gallery = (x.astype(np.float16).astype(np.float32) for x in (query, gallery))
    expected = k_reciprocal_ranks(query, gallery, *ids)
    assert same(expected, naive(query, gallery, ids, 20, 6, 0.3))
    tensors = torch.from_numpy(query), torch.from_numpy(gallery)
    for q, g in ((query.astype(np.float16), gallery.astype(np.float16)),
                 (np.asfortranarray(query), np.repeat(gallery, 2, 0)[::2]), tensors,
                 (tensors[0].half(), tensors[1]), (tensors[0].requires_grad_(), tensors[1])):
        assert same(k_reciprocal_ranks(q, g, *(x.tolist() for x in ids)), expected)


@pytest.mark.skipif(not COMPILED, reason='nothing is compiled')
@pytest.mark.parametrize('items, k1, k2', [(40, 3, 2), (300, 20, 6), (30, 29, 30)])
def test_sparse_rows_of_kernels_and_references_are_the_same_bits(items, k1, k2):
    features = torch.from_numpy(clustered(0, items, pids=40, copies=90)[1])
    near = topk(features, features, max(k1 + 1, k2)).indices
    results = []
    for sparse in (torch.ops.mgn_cpu, reference):
        offsets, columns = sparse.reciprocal(near[:, :k1 + 1].contiguous(), round(k1 / 2) + 1)
        values = torch.from_numpy(np.random.default_rng(1).random(len(columns)))
        mean = sparse.mean_rows(offsets, columns, values, near[:, :k2].contiguous())
        of_gallery = sparse.transpose(*reranking.rows_between(mean, 9, items), items)
        results.append([offsets, columns, *mean, *of_gallery,
                        *sparse.overlap(*reranking.rows_between(mean, 0, 9), *of_gallery, items - 9)])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*results)) and len(results[0][-1]) > 9


@pytest.mark.skipif(not COMPILED, reason='nothing is compiled')
def test_negative_numbers_are_refused_by_the_operators_themselves():
    with pytest.raises(RuntimeError, match='expected a number of columns, but got -1'):
        torch.ops.mgn_cpu.transpose(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32),
                                    torch.zeros(0, dtype=torch.float64), -1)
    with pytest.raises(RuntimeError, match='expected a number of neighbours, but got -1'):
        torch.ops.mgn_cpu.reciprocal(torch.zeros(2, 1, dtype=torch.int64), -1)


@pytest.mark.skipif(importlib.util.find_spec('torchreid') is None,
                    reason='an optional comparison: make peers installs torchreid')
@pytest.mark.parametrize('k1, k2, lambda_value', PARAMETERS)
@pytest.mark.parametrize('metric', METRICS)
def test_the_published_formula_gives_the_numbers_of_torchreid_and_fast_reid(k1, k2, lambda_value, metric):
    from benchmarks.peers import fastreid_re_ranking, torchreid_re_ranking
    query, gallery, *_ = problem(12, 70, 5)
    distances = np.sqrt(keys_and_squares(query, gallery, metric)[1]).astype(np.float32)
    given = distances[:12, 12:], distances[:12, :12], distances[12:, 12:]
    expected = published_distances(*keys_and_squares(query, gallery, metric), 12, k1, k2, lambda_value)
    for theirs in (torchreid_re_ranking(), fastreid_re_ranking()):
        np.testing.assert_allclose(theirs(*given, k1, k2, lambda_value), expected, atol=1e-5)


@pytest.mark.parametrize('options, message', [
    ({'k1': 0}, 'k1 must be an integer from 1 to 2147483647, not 0'), ({'k1': 10 ** 19}, 'k1 must'),
    ({'k1': 2.0}, 'k1 must'), ({'k2': 0}, 'k2 must'), ({'k2': True}, 'k2 must'),
    ({'lambda_value': -0.1}, 'lambda_value must be a finite number from 0 to 1, not -0.1'),
    ({'lambda_value': float('nan')}, 'lambda_value must'),
    ({'lambda_value': None}, 'lambda_value must')])
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        k_reciprocal_ranks(*problem(3, 4, 5), **options)


@pytest.mark.parametrize('options, message',
                         [({'metric': 'manhattan'}, "not 'manhattan'"), ({'precision': 'int8'}, "not 'int8'"),
                                              ({'junk_pid': 1.5}, 'junk_pid must')])
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        k_reciprocal_ranks(*problem(3, 4, 5), **options)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_not_finite_is_named(implementation, value):
    for which, name in ((0, 'query'), (1, 'gallery')):
        args = list(problem(33, 40, 5))
        args[which][31, 4] = value
        with pytest.raises(ValueError, match=f'{name} features must be finite, but row 31 has NaN or infinity'):
            k_reciprocal_ranks(*args)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='gallery_pids'):
        k_reciprocal_ranks(*problem(3, 4, 5)[:3], [1], [0] * 3, [0] * 4)


def test_a_compiled_caller_gets_the_same_bits(device):
    query, gallery, *ids = problem(5, 40, 9)
    features = [torch.from_numpy(x).to(device) for x in (query, gallery)]

    def caller(query, gallery):
        return k_reciprocal_ranks(query * 2, gallery * 2, *ids)
    expected, got = caller(*features), torch.compile(caller, backend='aot_eager')(*features)
    assert len(expected[1]) and all(np.array_equal(*pair) for pair in zip(got, expected))


MEMORY = '''
import sys
import numpy as np, torch
from mgn import ops
torch.set_num_threads(2)
Q, G, D = map(int, sys.argv[1:])
rng = np.random.default_rng(0)
pids = [rng.integers(0, 1 + G // 25, n) for n in (Q, G)]
basis = rng.standard_normal((16, D), np.float32)
centres = rng.standard_normal((1 + G // 25, 16), np.float32)
query, gallery = ((centres[of] + 0.5 * rng.standard_normal((len(of), 16), np.float32)) @ basis for of in pids)
args = query, gallery, *pids, rng.integers(0, 6, Q), rng.integers(0, 6, G)
ops.k_reciprocal_ranks(*(x[:99] for x in args))  # loads what there is to load
before = high_water(anew=True)
ops.k_reciprocal_ranks(*args)
print(high_water() - before, 2 ** 28 + (10_000 + 4 * D) * (Q + G))
'''


@pytest.mark.parametrize('case', [(300, 12_000, 32), pytest.param((1000, 9_000, 256), marks=pytest.mark.long),
                                  pytest.param((300, 15_000, 32), marks=pytest.mark.long)])
@only_linux
def test_memory_stays_far_below_a_square_matrix(case):
    peak, bound = printed(MEMORY, *case)
    assert 0 < peak <= bound < 4 * (case[0] + case[1]) ** 2
