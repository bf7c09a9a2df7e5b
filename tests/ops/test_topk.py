"""The k nearest by features against a loop that computes every canonical key and sorts."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from implementations import IMPLEMENTATIONS, run_as
from memory import only_linux, printed
from mining import examples
from rankings import METRICS, by_torch, extremes, naive_keys, near_ties, on_tensor_cores, problem

from mgn.ops import topk, topk_from_distance
from mgn.ops.arguments import PRECISIONS
from mgn.ops.ranking import nearest, product
from mgn.ops.ranking.keys import Comparison, finite_norms

FIXTURES = {'deadline': None, 'derandomize': True, 'suppress_health_check': [HealthCheck.function_scoped_fixture]}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    return run_as(request.param, 'ranking.keys', monkeypatch, 'cpu')


def naive(query, gallery, k, metric='cosine', exclude_self=False):
    """(indices, keys) of each query by sorting pure Python numbers."""
    ranked = [sorted((key, j) for j, key in enumerate(row) if not exclude_self or j != i)[:k]
              for i, row in enumerate(naive_keys(query, gallery, metric).tolist())]
    return [[j for _, j in row] for row in ranked], [[key for key, _ in row] for row in ranked]


def check(query, gallery, k, metric='cosine', exclude_self=False, **options):
    distances, indices = topk(query, gallery, k, metric, exclude_self=exclude_self, **options)
    expected, keys = naive(query, gallery, k, metric, exclude_self)
    assert indices.tolist() == expected
    keys = np.array(keys, np.float64).reshape(distances.shape)
    assert np.array_equal(distances, np.maximum(1 + keys, 0) if metric == 'cosine' else np.sqrt(keys))


@pytest.mark.parametrize('G, k', [(1, 1), (1, 3), (2, 1), (31, 5), (33, 33), (33, 32), (129, 20), (129, 4096)])
@pytest.mark.parametrize('D', [1, 2, 17, 129])
@pytest.mark.parametrize('metric', METRICS)
def test_neighbours_equal_the_naive_loop_at_every_size(implementation, metric, D, G, k):
    query, gallery, *_ = problem(5, G, D)
    check(query, gallery, k, metric)


@pytest.mark.parametrize('make', [near_ties, extremes, lambda Q, G, D: problem(Q, G, D, levels=2)])
@pytest.mark.parametrize('k', [1, 7, 30])
@pytest.mark.parametrize('metric', METRICS)
def test_ties_near_ties_and_extremes(implementation, metric, k, make):
    query, gallery, *_ = make(5, 80, 33)
    check(query, gallery, k, metric)
    check(gallery, gallery, k, metric)
    check(gallery, gallery, k, metric, exclude_self=True)


def test_few_queries_are_compared_by_float32(monkeypatch):
    """Rounding the gallery takes longer than a faster product of few queries saves."""
    monkeypatch.setattr(nearest, 'FEW', 4)
    asked = []
    monkeypatch.setattr(product, 'available', lambda precision, device, width: asked.append(width) or 'float32')
    for queries in (4, 5):
        check(problem(queries, 20, 7)[0], problem(1, 20, 7)[1], 3)
    assert asked == [0, 7]


@settings(**FIXTURES, max_examples=examples(200))
@given(st.data())
def test_neighbours_equal_the_naive_loop_on_anything(implementation, data):
    Q, G, D, k = (data.draw(st.integers(low, high)) for low, high in ((0, 4), (0, 24), (1, 20), (1, 30)))
    quantised = st.sampled_from([-1.0, 0.0, 0.0, 1.0, 2.0])
    values = data.draw(st.sampled_from([quantised, st.floats(width=32, allow_nan=False, allow_infinity=False)]))
    query, gallery = (np.array(data.draw(st.lists(st.lists(values, min_size=D, max_size=D), min_size=n, max_size=n)),
                               np.float32).reshape(n, D) for n in (Q, G))
    metric, one, exclude_self = (data.draw(st.sampled_from(choices))
                                 for choices in (METRICS, [True, False], [True, False]))
    check(gallery if one else query, gallery, k, metric, one and exclude_self)


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('exclude_self', [False, True])
def test_identical_features_everywhere_are_taken_in_order(implementation, metric, exclude_self):
    features = np.full((150, 9), 0.1, np.float32)
    indices = topk(features, features, 40, metric, exclude_self=exclude_self).indices
    assert indices.tolist() == [[j for j in range(41) if not exclude_self or j != i][:40] for i in range(150)]


@pytest.mark.parametrize('metric', METRICS)
def test_more_ties_than_are_selected_and_some_that_are_nearer(implementation, metric):
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((150, 17)).astype(np.float32)
    gallery[rng.permutation(150)[:110]] = gallery[7]
    query = np.concatenate((gallery[7:8] + np.float32(0.01), rng.standard_normal((5, 17)).astype(np.float32),
                            gallery[7:8]))
    for k in (1, 50, 130):
        check(query, gallery, k, metric)
        check(gallery, gallery, k, metric, exclude_self=True)


@pytest.mark.parametrize('metric', METRICS)
def test_more_near_ties_than_are_selected_beside_the_query_itself(implementation, metric):
    rng = np.random.default_rng(0)
    row = rng.standard_normal(8).astype(np.float32)
    gallery = np.stack([rng.permutation(row) for _ in range(220)])
    # Equally near to all the others, but for rounding.
    gallery[:40] = np.abs(rng.standard_normal((40, 1))).astype(np.float32)
    for exclude_self in (False, True):
        check(gallery, gallery, 60, metric, exclude_self)


def test_zero_vectors_and_features_of_width_0(implementation):
    check(np.zeros((2, 4), np.float32), problem(1, 9, 4)[1], 5)
    check(problem(1, 9, 4)[1], np.zeros((30, 4), np.float32), 5)
    for metric in METRICS:
        assert topk(np.empty((2, 0), np.float32), np.empty((5, 0), np.float32), 3,
                    metric).indices.tolist() == [[0, 1, 2]] * 2


def clustered(Q=40, G=1500, D=64, seed=0):
    rng = np.random.default_rng(seed)
    centres, basis = rng.standard_normal((50, 8)), rng.standard_normal((8, D))
    query, gallery = ((centres[rng.integers(0, 50, n)] + rng.standard_normal((n, 8))) @ basis for n in (Q, G))
    gallery[rng.integers(0, G, 200)] = gallery[rng.integers(0, G, 200)]
    return query.astype(np.float32), gallery.astype(np.float32)


def same(a, b):
    return np.array_equal(a.indices, b.indices) and np.array_equal(a.distances, b.distances)


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('exclude_self', [False, True])
def test_tiles_threads_precision_and_taking_one_tensor_twice_change_nothing(monkeypatch, metric, exclude_self):
    query, gallery = clustered()
    few = gallery[:400]
    expected = topk(query, gallery, 25, metric), topk(few, few, 25, metric, exclude_self=exclude_self)
    on_tensor_cores(monkeypatch)

    def unchanged(**options):
        return same(topk(query, gallery, 25, metric, **options), expected[0]) and same(
            topk(few, few, 25, metric, exclude_self=exclude_self, **options), expected[1])
    for tile in ((100, 64), (64, 37), (999, 2000)):
        monkeypatch.setattr(nearest, 'tile_of', lambda query, *_: tile)
        assert unchanged()
    if not exclude_self:
        assert same(topk(few, few.copy(), 25, metric), expected[1])
    monkeypatch.setattr(nearest, 'STATE', 0)  # one block after the other, nothing twice
    assert unchanged()
    for precision in PRECISIONS:
        assert unchanged(precision=precision)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert unchanged()
    finally:
        torch.set_num_threads(threads)


def test_a_coarse_product_leaves_more_to_the_keys_and_changes_nothing(implementation, monkeypatch):
    query, gallery = clustered(20, 400)
    expected = naive(query, gallery, 10)[0]
    by_torch(monkeypatch, lambda q, g: q.bfloat16().float() @ g.bfloat16().float().T)
    monkeypatch.setattr(product, 'keeps_operands', lambda device: False)
    assert topk(query, gallery, 10).indices.tolist() == expected


def test_every_container_type_and_layout(implementation):
    query, gallery = (x.astype(np.float16).astype(np.float32) for x in problem(6, 65, 33)[:2])
    expected = naive(query, gallery, 9)[0]
    for q, g in ((query.astype(np.float16), gallery.astype(np.float16)),
                 (np.asfortranarray(query), np.repeat(gallery, 2, 0)[::2])):
        result = topk(q, g, 9)
        assert isinstance(result.indices, np.ndarray) and result.indices.tolist() == expected
        assert (result.distances.dtype, result.indices.dtype) == (np.float64, np.int64)
    query, gallery = torch.from_numpy(query), torch.from_numpy(gallery)
    for q, g in ((query, gallery), (query.half(), gallery.half()), (query.bfloat16().half(), gallery),
                 (query.requires_grad_(), gallery),
                 (query.detach().T.contiguous().T, gallery)):
        result = topk(q, g, 9)
        assert isinstance(result.indices, torch.Tensor) and not result.distances.requires_grad
        assert result.indices.tolist() == (expected if q.dtype == g.dtype else naive(q.float(), g, 9)[0])


@pytest.mark.parametrize('Q, G', [(0, 0), (0, 5), (5, 0)])
def test_no_query_or_no_gallery(implementation, Q, G):
    query, gallery = np.empty((Q, 8), np.float32), np.ones((G, 8), np.float32)
    assert topk(query, gallery, 3).indices.shape == (Q, min(3, G))
    assert topk(gallery[:1], gallery[:1], 3, exclude_self=False).indices.shape == (min(G, 1), min(G, 1))
    assert topk(gallery, gallery, 9, exclude_self=True).indices.shape == (G, max(G - 1, 0))
    assert topk_from_distance(np.empty((Q, G)), 3).indices.shape == (Q, min(3, G))


@pytest.mark.parametrize('k', [0, -1, 4097, 2.0, True, None, np.array([1, 2])])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match='k must be an integer from 1 to 4096, not '):
        topk(*problem(3, 4, 5)[:2], k)
    with pytest.raises(ValueError, match='k must be an integer from 1 to 4096, not '):
        topk_from_distance(np.zeros((3, 4)), k)


def test_bad_features_and_options_are_refused_by_name(implementation):
    query, gallery, *_ = problem(33, 33, 5)
    for args, message in (((query, gallery[:, :4], 3), 'must have rows of one width'),
                          ((query.astype(float), gallery, 3), 'query features must'),
                          ((query, gallery, 3, 'manhattan'), "not 'manhattan'"),
                          ((query, gallery, 3, 'cosine', 'int8'), "not 'int8'"),
                          ((query, gallery, 3, 'cosine', 'float32', True), 'same tensor for exclude_self=True')):
        with pytest.raises(ValueError, match=message):
            topk(*args)
    for which, name in ((0, 'query'), (1, 'gallery')):
        args = [query.copy(), gallery.copy()]
        args[which][31, 4] = np.nan
        with pytest.raises(ValueError, match=f'{name} features must be finite, but row 31 has NaN or infinity'):
            topk(*args, 3)


def test_features_that_are_never_negative_and_many_of_them_orthogonal(implementation):
    features = np.maximum(np.random.default_rng(0).standard_normal((200, 24)) - 1.3, 0).astype(np.float32)
    check(features[:5], features, 150)
    rows = torch.from_numpy(features)
    norms = finite_norms(rows, 'query')
    *_, far = nearest.nearest(Comparison(rows, rows, cosine=True, precision='float32'), norms, norms, 5, farthest=True)
    assert far.tolist() == [max(naive(features[i:i + 1], features, 200)[1][0]) for i in range(200)]


def test_products_may_err_in_both_ways_as_much_as_they_are_said_to(monkeypatch):
    """The nearest appears farther by the whole error, and the next nearer."""
    angles = np.array([0.1, 0.12, 2.0], np.float32)
    gallery = np.stack((np.cos(angles), np.sin(angles)), 1)
    by_torch(monkeypatch, lambda q, g: q @ g.T + torch.tensor([-0.0099, 0.0099, 0]))
    monkeypatch.setattr(product, 'relative_error', lambda *args: 0.01)
    assert topk(np.eye(1, 2, dtype=np.float32), gallery, 1).indices.tolist() == [[0]]


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_another_default_type_of_torch_changes_nothing(implementation, dtype):
    query, gallery, *_ = near_ties(5, 80, 33)
    dist = torch.from_numpy(query @ gallery.T)
    expected = topk(query, gallery, 9), topk_from_distance(dist, 9)
    torch.set_default_dtype(dtype)
    try:
        assert same(topk(query, gallery, 9), expected[0]) and same(topk_from_distance(dist, 9), expected[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_array_that_torch_cannot_look_at_is_still_one():
    gallery = problem(1, 40, 9)[1]
    for one in (gallery[::-1], gallery.astype('>f4')):
        assert topk(one, one, 5, exclude_self=True).indices.tolist() == naive(one, one, 5, exclude_self=True)[0]
    with pytest.raises(ValueError, match="exclude_self must be True or False, not 'no'"):
        topk(gallery, gallery, 5, exclude_self='no')


@pytest.mark.parametrize('metric', METRICS)
def test_a_compiled_caller_gets_the_same_bits(device, metric):
    query, gallery = (torch.from_numpy(x).to(device) for x in problem(5, 40, 9)[:2])

    def caller(query, gallery):
        query, gallery = query * 2, gallery * 2
        near, nearest_others = topk(query, gallery, 7, metric), topk(gallery, gallery, 60, metric, exclude_self=True)
        of_matrix = topk_from_distance(torch.cdist(query, gallery), 7)
        return near.indices * 2, near.distances + 1, *nearest_others, *of_matrix
    expected = caller(query, gallery)
    got = torch.compile(caller, backend='aot_eager')(query, gallery)
    assert len(got) == 6 and all(torch.equal(*pair) for pair in zip(got, expected))


MEMORY = '''
import sys
import numpy as np, torch
from mgn import ops
torch.set_num_threads(2)
Q, G, D, k, one = map(int, sys.argv[1:])
gallery = torch.from_numpy(np.random.default_rng(0).standard_normal((G, D), np.float32))
query = gallery if one else gallery[:Q].clone()
ops.topk(query[:99], gallery[:99], k)  # loads what there is to load
before = high_water(anew=True)
result = ops.topk(query, gallery, k)
entries = result.indices.numel()
print(high_water() - before, 2 ** 28 + 48 * (Q + G) + 46 * entries + 2 ** 30 * one)
'''


@pytest.mark.parametrize('case', [(2000, 20_000, 128, 30, 0), *(pytest.param(case, marks=pytest.mark.long) for case in (
    (1200, 6_000, 64, 4096, 0), (15_000, 15_000, 32, 100, 1), (40, 400_000, 4, 7, 0)))])
@only_linux
def test_memory_stays_within_its_bound(case):
    peak, bound = printed(MEMORY, *case)
    assert 0 < peak <= bound
