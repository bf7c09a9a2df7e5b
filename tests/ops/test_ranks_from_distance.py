"""Ranks from a matrix of distances against a loop that sorts; the stand-in for fast-reid's evaluate_rank against its
definition."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from forks import run_program
from hypothesis import HealthCheck, given, settings, strategies as st
from mining import examples
from rankings import problem

from mgn.ops import evaluate_rank, match_ranks, match_ranks_from_distance, retrieval_metrics
from mgn.ops.native import kernels


def naive_ranks(dist, query_pids, gallery_pids, query_camids, gallery_camids, junk_pid=-1):
    result = []
    for row, pid, camid in zip(dist, query_pids, query_camids):
        ranked = sorted((float(d), g) for g, d in enumerate(row)
                        if gallery_pids[g] != junk_pid and not (gallery_pids[g] == pid and gallery_camids[g] == camid))
        result.append([rank for rank, (_, g) in enumerate(ranked, 1) if gallery_pids[g] == pid])
    return result


def ranks_of(*args, **options):
    offsets, ranks, redecided = match_ranks_from_distance(*args, **options)
    assert offsets.dtype == ranks.dtype == np.int64 and redecided == 0
    return [ranks[a:b].tolist() for a, b in zip(offsets, offsets[1:])]


def distances(Q, G, dtype=np.float32, levels=None, seed=0):
    dist = np.random.default_rng(seed).standard_normal((Q, G))
    return (np.round(dist * levels) if levels else dist).astype(dtype), *problem(Q, G, 1, seed=seed)[2:]


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
@pytest.mark.parametrize('levels', [None, 2])
@pytest.mark.parametrize('Q, G', [(1, 1), (3, 15), (4, 17), (2, 33), (3, 129), (2, 2051)])
def test_ranks_equal_the_sorting_loop(ranking, dtype, levels, Q, G):
    args = distances(Q, G, dtype, levels)
    assert ranks_of(*args) == naive_ranks(*args)


@settings(deadline=None, derandomize=True, max_examples=examples(60),
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_ranks_equal_the_sorting_loop_on_anything(ranking, data):
    Q, G = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 30))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    values = data.draw(st.sampled_from([st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf]),
                                        st.floats(width=np.dtype(dtype).itemsize * 8, allow_nan=False)]))
    dist = np.array(data.draw(st.lists(st.lists(values, min_size=G, max_size=G), min_size=Q, max_size=Q)),
                    dtype).reshape(Q, G)
    ids = [data.draw(st.lists(st.integers(low, 2), min_size=n, max_size=n)) for low in (-1, 1) for n in (Q, G)]
    junk_pid = data.draw(st.sampled_from([-1, 0, None]))
    assert ranks_of(dist, *ids, junk_pid=junk_pid) == naive_ranks(dist, *ids, junk_pid=junk_pid)


@pytest.mark.parametrize('infinity', [np.inf, -np.inf])
def test_infinities_are_values(ranking, infinity):
    dist, *ids = distances(5, 300)
    dist[:, ::3] = infinity
    assert ranks_of(dist, *ids) == naive_ranks(dist, *ids)
    dist[:] = infinity
    assert ranks_of(dist, *ids) == naive_ranks(dist, *ids)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_containers_and_layouts(ranking, dtype):
    dist, *ids = distances(6, 90)
    dist = torch.from_numpy(dist).to(dtype)
    expected = naive_ranks(dist.double().numpy(), *ids)
    wide = torch.full((12, 200), torch.nan, dtype=dtype)
    wide[::2, 10:190:2] = dist
    for same in (dist, dist.T.contiguous().T, wide[::2, 10:190:2], dist.clone().requires_grad_(), dist.flip(1).flip(1)):
        assert ranks_of(same, *(torch.from_numpy(x) for x in ids)) == expected
    if dtype != torch.bfloat16:
        array = dist.numpy()
        frozen = array.copy()
        frozen.flags.writeable = False
        for same in (array, np.asfortranarray(array), array[:, ::-1].copy()[:, ::-1],
                     array.astype(array.dtype.newbyteorder()), frozen):
            assert ranks_of(same, *(x.astype(np.int32) for x in ids)) == expected


@pytest.mark.parametrize('dtype, unit', [(np.float32, 1e-44), (np.float64, 1e-322)])
def test_denormal_distances_are_values_while_torch_flushes_them(ranking, dtype, unit):
    dist, *ids = distances(20, 60)
    dist = (np.random.default_rng(1).integers(1, 2000, (20, 60)) * unit).astype(dtype)
    expected = naive_ranks(dist, *ids)
    torch.set_flush_denormal(True)
    try:
        got = ranks_of(dist, *ids)
        still = (torch.tensor([1e-44]) * 1).item() == 0
    finally:
        torch.set_flush_denormal(False)
    assert got == expected and still


def test_denormal_distances_are_values_on_every_thread():
    done = run_program("""
import numpy as np, torch
from mgn.ops import match_ranks_from_distance, pairwise_distance
torch.set_num_threads(2)
torch.set_flush_denormal(True)
torch.ones(10 ** 6).add_(1)  # starts the second thread, which flushes from now on
bits = np.random.default_rng(0).integers(1, 2 ** 22, (300, 4000)).astype(np.int32)
ids = np.arange(300) % 3, np.arange(4000) % 3, np.zeros(300, int), np.ones(4000, int)
of_half = (bits >> 16 | 1).astype(np.int16)
for dist, values in (bits.view(np.float32), bits), (torch.from_numpy(of_half).view(torch.bfloat16), of_half):
    expected = match_ranks_from_distance(values.astype(float), *ids)[1]
    assert (match_ranks_from_distance(dist, *ids)[1] == expected).all()
x = torch.from_numpy(bits[:, :64]).view(torch.float32)
assert pairwise_distance(x, x[:1] * 0)[:, 0].count_nonzero() == 300
""", env={'OMP_NUM_THREADS': '2'})
    assert done.returncode == 0, done.stderr


def test_ids_spread_over_all_of_int64(ranking):
    ends = np.iinfo(np.int64)
    pids = np.array([ends.min, 5, ends.max, -7, 5, ends.max - 3 * 2 ** 16, ends.min + 3, 5 + 2 ** 16])
    args = distances(8, 8)[0], pids, pids, np.ones(8, int), np.zeros(8, int)
    for junk_pid in (-1, ends.min, ends.max):
        assert ranks_of(*args, junk_pid=junk_pid) == naive_ranks(*args, junk_pid=junk_pid)


def test_many_ties_of_many_matches(ranking):
    ids = [1, 1], np.ones(3000, int), [0, 0], np.arange(3000) % 2
    for dist in (np.zeros((2, 3000), np.float32), distances(2, 3000, levels=1)[0]):
        assert ranks_of(dist, *ids) == naive_ranks(dist, *ids)


@pytest.mark.parametrize('pid', [9, 1, -1])  # a non-match, an own one, junk
def test_a_nan_is_an_error_that_names_its_place(ranking, pid):
    for dtype, column in itertools.product((np.float16, np.float32, np.float64), (2060, 2099)):  # the last, too
        dist, query_pids, gallery_pids, *camids = distances(7, 2100, dtype)
        query_pids[3], gallery_pids[column], dist[3, column] = 1, pid, np.nan
        with pytest.raises(ValueError, match=f'row 3, column {column} is NaN'):
            match_ranks_from_distance(dist, query_pids, gallery_pids, *camids)
        with pytest.raises(ValueError, match=f'row 3, column {column} is NaN'):  # and where nothing is to be ranked
            match_ranks_from_distance(dist, query_pids + 100, gallery_pids, *camids)


@pytest.mark.parametrize('dist, message',
                         [(np.zeros((3, 4), int), 'floating-point'), (np.zeros(4), r'\(Q, G\)'),
                          (np.zeros((2, 4)), 'query_pids'),
                                           (np.zeros((3, 5)), 'gallery_pids'),
                                           (np.zeros((3, 4), np.longdouble), 'float128|longdouble'),
                                           (np.zeros((3, 4), complex), 'complex')])
def test_matrices_that_do_not_fit_are_refused(dist, message):
    with pytest.raises(ValueError, match=message):
        match_ranks_from_distance(dist, *problem(3, 4, 1)[2:])


def test_distances_of_features_give_the_ranks_of_features():
    query, gallery, *ids = problem(20, 200, 16)
    dist = np.linalg.norm(query[:, None].astype(np.float64) - gallery, axis=2)
    assert ranks_of(dist, *ids) == ranks_of(torch.cdist(*(torch.from_numpy(x).double() for x in (query, gallery))),
                                            *ids)
    features = match_ranks(query, gallery, *ids, metric='euclidean')
    assert np.array_equal(features.ranks, match_ranks_from_distance(dist, *ids).ranks)


def naive_evaluate(dist, q_pids, g_pids, q_camids, g_camids, max_rank):
    """As fast-reid's eval_market1501 defines it, with a stable sort."""
    curves, precisions, penalties = [], [], []
    for row, pid, camid in zip(dist, q_pids, q_camids):
        order = np.argsort(row, kind='stable')
        hits = [g_pids[g] == pid for g in order if g_pids[g] != pid or g_camids[g] != camid]
        if not any(hits):
            continue
        found = np.flatnonzero(hits)
        curves.append([k >= found[0] for k in range(max_rank)])
        precisions.append(np.mean((np.arange(len(found)) + 1) / (found + 1)))
        penalties.append(len(found) / (found[-1] + 1))
    return np.mean(curves, 0), precisions, penalties


@pytest.mark.parametrize('levels', [None, 3])
@pytest.mark.parametrize('G', [30, 200])
def test_evaluate_rank_gives_the_numbers_of_its_definition(levels, G):
    dist, *ids = distances(40, G, levels=levels)
    ids[1][:5] = -1  # nothing special here
    ids[0][:3] = -1
    for max_rank in (1, 20, 50):
        got = evaluate_rank(dist, *ids, max_rank=max_rank)
        for values, expected in zip(got, naive_evaluate(dist, *ids, min(max_rank, G))):
            assert values.dtype == np.float32 and isinstance(values, np.ndarray)
            assert values.tolist() == pytest.approx(list(expected), rel=1e-6)
    assert all(np.array_equal(*pair)
               for pair in zip(got, evaluate_rank(torch.from_numpy(dist), *ids, 50, False, False)))
    metrics = retrieval_metrics(*match_ranks_from_distance(dist, *ids, junk_pid=None)[:2])
    assert (got[0][[0, 4, 9]].tolist() == pytest.approx([metrics[f'rank{k}'] for k in (1, 5, 10)], rel=1e-6)
            and got[1].mean() == pytest.approx(metrics['mAP'], rel=1e-5) and got[2].mean()
            == pytest.approx(metrics['mINP'], rel=1e-5))


def test_evaluate_rank_leaves_out_queries_without_a_match():
    dist, *_ = distances(3, 4)
    cmc, precision, penalty = evaluate_rank(dist, [1, 7, 2], [1, 2, 3, 1], [0, 0, 0], [1, 0, 1, 1])
    assert cmc.shape == (4,) and precision.shape == penalty.shape == (1,)
    with pytest.raises(ValueError, match='but none has'):
        evaluate_rank(dist, [7, 7, 7], [1, 2, 3, 1], [0, 0, 0], [1, 0, 1, 1])
    with pytest.raises(ValueError, match='max_rank must be an integer from 1 .*, not 0'):
        evaluate_rank(dist, [1, 7, 2], [1, 2, 3, 1], [0, 0, 0], [1, 0, 1, 1], max_rank=0)
    assert evaluate_rank(dist.tolist(), [1, 7, 2], [1, 2, 3, 1], [0, 0, 0],
                         [1, 0, 1, 1])[1].tolist() == precision.tolist()
    with pytest.raises(ValueError, match='use_metric_cuhk03=False'):
        evaluate_rank(dist, [1, 7, 2], [1, 2, 3, 1], [0, 0, 0], [1, 0, 1, 1], use_metric_cuhk03=True)


@pytest.mark.skipif(importlib.util.find_spec('fastreid') is None,
                    reason='an optional comparison: make peers installs fast-reid')
def test_numbers_equal_fast_reids():
    from benchmarks.peers import fastreid_evaluate_rank
    for seed in range(5):
        dist, *ids = distances(50, 400, seed=seed)
        for use_cython in (True, False):
            for got, expected in zip(evaluate_rank(dist, *ids), fastreid_evaluate_rank(use_cython)(dist, *ids)):
                np.testing.assert_allclose(got, expected, rtol=2e-6)


@pytest.mark.skipif(importlib.util.find_spec('torchreid') is None,
                    reason='an optional comparison: make peers installs torchreid')
def test_numbers_equal_torchreids():
    from benchmarks.peers import torchreid_evaluate_rank
    for seed in range(3):
        dist, *ids = distances(50, 400, seed=seed)
        cmc, precision, _ = evaluate_rank(dist, *ids)
        expected_cmc, expected_map = torchreid_evaluate_rank()(dist, *ids)
        np.testing.assert_allclose(cmc, expected_cmc, rtol=2e-6)
        assert precision.mean() == pytest.approx(expected_map, rel=1e-6)


def test_junk_that_does_not_ascend_leads_to_no_foreign_memory():
    """A wrong call of the private kernel, which mgn.ops never makes."""
    matches = torch.tensor([0, 1]), torch.zeros(1, dtype=torch.float64), torch.tensor([0])
    order, end, junk = torch.arange(3000), torch.tensor([1]), torch.tensor([2500, 2600, 2700, -50_000_000])
    steps = torch.zeros(1, dtype=torch.int64)
    count_in_distances = kernels(torch.device('cpu')).count_in_distances
    row = count_in_distances(torch.ones(1, 3000), matches, (order, end - 1, end, junk), steps)
    assert row == -1 and steps.item() == 0
