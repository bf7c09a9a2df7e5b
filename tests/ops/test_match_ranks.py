"""Ranks of true matches against a pure Python loop that computes every canonical key and sorts."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from mining import examples
from rankings import METRICS, extremes, naive_key, naive_keys, naive_ranks, near_ties, problem, ranks_of

from mgn.ops import match_ranks, match_ranks_from_distance
from mgn.ops.ranking import keys, tiles


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('make', [near_ties, extremes, problem, lambda Q, G, D: problem(Q, G, D, levels=2)])
@pytest.mark.parametrize('D', [0, 1, 15, 16, 33, 129])
def test_keys_of_all_pairs_at_once_are_those_of_a_pure_python_loop(make, D, metric):
    """The oracle of these tests, bit for bit."""
    query, gallery, *_ = make(4, 12, D)
    expected = [[naive_key(*pair, metric) for pair in zip([q] * 12, gallery.tolist())] for q in query.tolist()]
    assert naive_keys(query, gallery, metric).tobytes() == np.array(expected).tobytes()


@pytest.mark.parametrize('Q, G', [(1, 1), (3, 2), (5, 31), (4, 33), (2, 129)])
@pytest.mark.parametrize('D', [1, 2, 15, 16, 17, 31, 33, 129])
@pytest.mark.parametrize('metric', METRICS)
def test_ranks_equal_the_naive_loop_at_every_size(ranking, metric, Q, G, D):
    args = problem(Q, G, D)
    assert ranks_of(*args, metric=metric) == naive_ranks(*args, metric=metric)


@pytest.mark.parametrize('D', [1, 2, 4, 33])
@pytest.mark.parametrize('levels', [1, 2, 3])
@pytest.mark.parametrize('metric', METRICS)
def test_ties_go_by_gallery_index(ranking, metric, D, levels):
    args = problem(7, 129, D, levels=levels)
    assert ranks_of(*args, metric=metric) == naive_ranks(*args, metric=metric)


@pytest.mark.parametrize('D', [3, 17, 33, 129, 1000])
@pytest.mark.parametrize('pids', [2, 10, 40])  # many matches a query, a few, one
@pytest.mark.parametrize('metric', METRICS)
def test_keys_apart_by_rounding_alone_are_ordered_by_the_canonical_sum(ranking, metric, D, pids):
    args = near_ties(4, 40, D, pids=pids)
    assert ranks_of(*args, metric=metric) == naive_ranks(*args, metric=metric)


@settings(deadline=None, derandomize=True, max_examples=examples(160),
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_ranks_equal_the_naive_loop_on_anything(ranking, data):
    Q, G, D = (data.draw(st.integers(low, high)) for low, high in ((0, 4), (0, 24), (1, 20)))
    quantised = st.sampled_from([-1.0, 0.0, 0.0, 1.0, 2.0])
    values = data.draw(st.sampled_from([quantised, st.floats(width=32, allow_nan=False, allow_infinity=False)]))
    query, gallery = (np.array(data.draw(st.lists(st.lists(values, min_size=D, max_size=D), min_size=n, max_size=n)),
                               np.float32).reshape(n, D) for n in (Q, G))
    ids = [data.draw(st.lists(st.integers(low, 2), min_size=n, max_size=n)) for low in (-1, 1) for n in (Q, G)]
    options = {'metric': data.draw(st.sampled_from(METRICS)), 'junk_pid': data.draw(st.sampled_from([-1, 0, None]))}
    assert ranks_of(query, gallery, *ids, **options) == naive_ranks(query, gallery, *ids, **options)


@settings(deadline=None, derandomize=True, max_examples=examples(40),
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2 ** 32 - 1), st.integers(1, 40), st.sampled_from([2, 5, 16]), st.sampled_from(METRICS))
def test_near_ties_equal_the_naive_loop(ranking, seed, D, pids, metric):
    args = near_ties(2, 16, D, seed, pids)
    assert ranks_of(*args, metric=metric) == naive_ranks(*args, metric=metric)


def test_duplicates_tie_by_gallery_index(ranking):
    features = np.random.default_rng(0).standard_normal((1, 2048)).astype(np.float32)
    gallery = np.repeat(features, 6, 0)
    assert ranks_of(features, gallery, [1], [2, 1, 2, 1, 1, 2], [0], [1] * 6) == [[2, 4, 5]]


def test_junk_takes_no_rank(ranking):
    gallery = np.array([[1, x] for x in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)], np.float32)
    pids, camids = [1, -1, 2, 1, 0, 1], [1, 2, 1, 2, 1, 3]  # own camera, junk, non-match, match, distractor, match
    assert ranks_of(gallery[:1], gallery, [1], pids, [1], camids) == [[2, 4]]
    assert ranks_of(gallery[:1], gallery, [1], pids, [1], camids, junk_pid=None) == [[3, 5]]
    assert ranks_of(gallery[:1], gallery, [1], pids, [1], camids, junk_pid=2) == [[2, 4]]
    assert ranks_of(gallery[:1], gallery, [1], pids, [1], camids, junk_pid=0) == [[3, 4]]


@pytest.mark.parametrize('junk_pid, ranks', [(-1, []), (None, [1, 3]), (5, [1, 3])])
def test_a_query_of_the_junk_id_has_no_match(junk_pid, ranks):
    gallery = np.array([[3, 0], [3, 1], [3, 2]], np.float32)
    assert ranks_of(gallery[:1], gallery, [-1], [-1, 4, -1], [1], [2, 2, 2], junk_pid=junk_pid) == [ranks]


def test_queries_without_a_match_have_no_ranks():
    query, gallery, *_ = problem(3, 4, 8)
    assert ranks_of(query, gallery, [9, 1, 2], [1, 1, 2, 3], [0, 0, 0], [0, 1, 0, 1])[::2] == [[], []]


def test_zero_vectors_have_key_0(ranking):
    query = np.array([[0, 0], [1, 0]], np.float32)
    gallery = np.array([[-1, 0], [0, 0], [1, 0], [0, 1]], np.float32)
    args = (query, gallery, [1, 1], [2, 1, 3, 1], [0, 0], [1, 1, 1, 1])
    assert ranks_of(*args) == naive_ranks(*args) == [[2, 4], [2, 3]]


@pytest.mark.parametrize('Q, G', [(0, 0), (0, 5), (5, 0)])
def test_no_query_or_no_gallery_gives_no_ranks(ranking, Q, G):
    result = match_ranks(*problem(Q, G, 8))
    assert result.offsets.tolist() == [0] * (Q + 1) and result.ranks.tolist() == [] and result.redecided == 0
    empty = match_ranks(np.empty((Q, 8), np.float32), np.empty((G, 8), np.float32), [1] * Q, [1] * G, [1] * Q, [2] * G)
    assert empty.offsets.tolist() == [0] * (Q + 1)


def test_features_of_width_0_all_tie(ranking):
    query, gallery = (np.empty((n, 0), np.float32) for n in (1, 3))
    assert ranks_of(query, gallery, [1], [2, 1, 1], [0], [1, 1, 1]) == [[2, 3]]


@pytest.mark.parametrize('levels', [None, 2])
def test_every_container_type_and_layout_gives_the_same_ranks(ranking, levels):
    query, gallery, *ids = problem(6, 65, 33, levels=levels)
    query, gallery = (x.astype(np.float16).astype(np.float32) for x in (query, gallery))
    expected = naive_ranks(query, gallery, *ids)
    for convert in (np.float32, np.float16):
        assert ranks_of(query.astype(convert), gallery.astype(convert), *ids) == expected
    strided = (np.asfortranarray(query), np.repeat(gallery, 2, 0)[::2])
    assert ranks_of(*strided, *ids) == expected
    assert ranks_of(query[:, ::-1], gallery[:, ::-1], *ids) == naive_ranks(query[:, ::-1], gallery[:, ::-1], *ids)
    tensors = [torch.from_numpy(x) for x in (query, gallery)]
    lists = [x.tolist() for x in ids]
    for q, g in (tensors, [x.half() for x in tensors], [x.T.contiguous().T for x in tensors],
                 [x.requires_grad_() for x in tensors]):
        assert ranks_of(q, g, *(torch.tensor(x) for x in lists)) == expected
        assert ranks_of(q, g, *lists) == expected
    assert ranks_of(tensors[0].half(), gallery, *(x.astype(np.int32) for x in ids)) == expected


@pytest.mark.parametrize('dtype', [np.float32, np.float16])
def test_a_gallery_in_a_file_gives_the_same_ranks(ranking, monkeypatch, tmp_path, dtype):
    """It is read in several parts."""
    query, gallery, *ids = problem(6, 900, 33)
    np.save(tmp_path / 'gallery.npy', gallery.astype(dtype))
    in_file = np.load(tmp_path / 'gallery.npy', mmap_mode='r')
    for module in (keys, tiles):
        monkeypatch.setattr(module, 'OPERANDS', 4 * 64 * 33)
    assert ranks_of(query, in_file, *ids) == naive_ranks(query, np.array(in_file, np.float32), *ids)


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('convert', [lambda x: x, torch.Tensor.half, torch.Tensor.bfloat16,
                                     lambda x: x.T.contiguous().T])
def test_keys_of_a_gallery_in_main_memory_or_of_another_type(device, monkeypatch, metric, convert):
    """Items come again and again, next to each other and apart, within a part of the pairs and beyond it."""
    rng = np.random.default_rng(0)
    query, gallery = (torch.from_numpy(x) for x in problem(7, 40, 33)[:2])
    gallery, read = convert(gallery), []
    apart = rng.integers(0, 40, 100)
    items = torch.from_numpy(np.concatenate((np.sort(apart), np.repeat(apart[:9], 3), apart, [5] * 60)))
    queries = torch.from_numpy(rng.integers(0, 7, len(items)))

    def on_device(gallery, parts, *args):
        read.extend(parts)
        return tiles.on_device(gallery, parts, *args)
    monkeypatch.setattr(keys, 'on_device', on_device)
    monkeypatch.setattr(keys, 'once', lambda device: 8 * 33 * 64)  # 64 pairs at a time
    comparison = keys.Comparison(query.to(device), gallery, metric == 'cosine', 'float32')
    got = keys.keys_of_pairs(comparison, queries.to(device), items.to(device))
    assert got.cpu().numpy().tobytes() == naive_keys(query, gallery.float(), metric)[queries, items].tobytes()
    assert bool(read) == (device != 'cpu' or not tiles.is_readable(gallery))
    assert not read or len(read) == 5 and len(torch.cat(read)) < 0.7 * len(items)
    assert all((part.diff() != 0).all() for part in read)
    assert len(keys.keys_of_pairs(comparison, queries[:0].to(device), items[:0].to(device))) == 0


def test_bfloat16_features_are_taken_as_they_are():
    query, gallery, *ids = problem(6, 65, 33)
    rounded = [torch.from_numpy(x).bfloat16() for x in (query, gallery)]
    assert ranks_of(*rounded, *ids) == naive_ranks(*(x.float().numpy() for x in rounded), *ids)


@pytest.mark.parametrize('make', [near_ties, problem])
def test_a_query_has_the_ranks_that_it_has_alone(make):
    query, gallery, query_pids, gallery_pids, query_camids, gallery_camids = make(9, 50, 129)
    together = ranks_of(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids)
    for q, ranks in enumerate(together):
        q = slice(q, q + 1)
        assert ranks_of(query[q], gallery, query_pids[q], gallery_pids, query_camids[q], gallery_camids) == [ranks]


def test_ranks_in_the_whole_gallery_follow_from_the_ranks_in_its_parts():
    """Counts of non-matches add over shards: the matches alone, and the matches with each half of the non-matches."""
    query, gallery, _, gallery_pids, _, gallery_camids = near_ties(1, 80, 33)
    gallery_camids = np.ones(80, int)
    match, first = gallery_pids == 1, np.arange(80) < 40
    shards = [match, match | first, match | ~first, np.full(80, True)]
    m, a, b, whole = (np.array(ranks_of(query, gallery[keep], [1], gallery_pids[keep], [0], gallery_camids[keep])[0])
                      for keep in shards)
    assert (whole == a + b - m).all() and (whole > m).any()


@pytest.mark.parametrize('exponents', [(1, -1), (-20, 30), (60, 0), (-60, 60)])
@pytest.mark.parametrize('make', [near_ties, problem])
def test_scaling_by_powers_of_two_changes_nothing(make, exponents):
    query, gallery, *ids = make(5, 60, 33)
    expected = match_ranks(query, gallery, *ids)
    scaled = [np.ldexp(x, e).astype(np.float32) for x, e in zip((query, gallery), exponents)]
    assert np.array_equal(match_ranks(*scaled, *ids).ranks, expected.ranks)


@pytest.mark.parametrize('scale', [3e38, 1e20, 1e-20, 1e-38, 1e-43])
@pytest.mark.parametrize('metric', METRICS)
def test_extreme_magnitudes_neither_overflow_nor_underflow(ranking, metric, scale):
    query, gallery, *ids = problem(3, 31, 17)
    args = [np.clip(x / 4 * scale, -3.4e38, 3.4e38).astype(np.float32) for x in (query, gallery)] + ids
    assert ranks_of(*args, metric=metric) == naive_ranks(*args, metric=metric)


def test_inputs_stay_as_they_were():
    args = near_ties(3, 20, 17)
    copies = [x.copy() for x in args]
    match_ranks(*args)
    assert all(np.array_equal(a, b) for a, b in zip(args, copies))


@pytest.mark.parametrize('which', [0, 1])
@pytest.mark.parametrize('convert', [lambda x: x.astype(np.float64), lambda x: torch.from_numpy(x).double(),
                                     lambda x: x.astype(np.int64), lambda x: x.tolist()])
def test_features_that_are_neither_float32_nor_half_are_refused_naming_the_cast(which, convert):
    args = list(problem(3, 4, 5))
    args[which] = convert(args[which])
    name = ('query', 'gallery')[which]
    with pytest.raises(ValueError, match=rf'{name} features must .*cast them, e\.g\. {name}\.astype'):
        match_ranks(*args)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('which', [0, 1])
def test_features_that_are_not_finite_are_named(ranking, which, value):
    args = list(problem(33, 33, 5))
    args[which][31, 4] = value
    name = ('query', 'gallery')[which]
    with pytest.raises(ValueError, match=f'{name} features must be finite, but row 31 has NaN or infinity'):
        match_ranks(*args)


@pytest.mark.parametrize('which, bad, message', [
    (0, np.zeros((3, 6), np.float32), 'query and gallery must have rows of one width'),
    (0, np.zeros(5, np.float32), 'query features'),
    (1, np.zeros((4, 5, 1), np.float32), 'gallery features'), (2, [1, 2], r'query_pids must have the shape \(3,\)'),
    (3, [1, 2, 3], r'gallery_pids must have the shape \(4,\)'), (4, [1.0, 2.0, 3.0], 'query_camids .*integer type'),
    (5, [[1], [2], [3], [4]], r'gallery_camids must have the shape \(4,\)'), (3, [], 'gallery_pids')])
def test_shapes_and_types_that_do_not_fit_are_named(which, bad, message):
    args = list(problem(3, 4, 5))
    args[which] = bad
    with pytest.raises(ValueError, match=message):
        match_ranks(*args)


@pytest.mark.parametrize('options, message', [({'metric': 'manhattan'}, "'cosine' or 'euclidean', not 'manhattan'"),
                                              ({'precision': 'float16'},
                                               "'auto' or 'float32' or 'tf32', not 'float16'")])
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        match_ranks(*problem(3, 4, 5), **options)


def test_ids_beyond_int64_are_refused():
    query, gallery, *ids = problem(3, 4, 5)
    ids[1] = np.array([1, 2, 3, 2 ** 64 - 1], np.uint64)  # as int64 it would be −1
    with pytest.raises(ValueError, match='gallery_pids must be below 2⁶³'):
        match_ranks(query, gallery, *ids)
    ids[1] = np.array([1, 2, 3, 2 ** 63 - 1], np.uint64)
    assert ranks_of(query, gallery, *ids) == naive_ranks(query, gallery, *ids)


@pytest.mark.parametrize('metric', METRICS)
def test_identical_features_everywhere(ranking, metric):
    query, gallery, *ids = problem(6, 300, 9)
    query[:], gallery[:] = 0.1, 0.1
    assert ranks_of(query, gallery, *ids, metric=metric) == naive_ranks(query, gallery, *ids, metric=metric)
    gallery[:] = 0.3
    assert ranks_of(query, gallery, *ids, metric=metric) == naive_ranks(query, gallery, *ids, metric=metric)


@pytest.mark.parametrize('metric', METRICS)
def test_one_camera_a_single_match_and_nothing_but_matches(ranking, metric):
    query, gallery, query_pids, gallery_pids, query_camids, gallery_camids = problem(6, 60, 9)
    one = [np.zeros(6, int), np.zeros(60, int)]
    assert ranks_of(query, gallery, query_pids, gallery_pids, *one, metric=metric) == [[]] * 6
    alone = np.where(np.arange(60) == 41, 1, 7)
    args = query, gallery, np.ones(6, int), alone, query_camids, gallery_camids + 5
    got = ranks_of(*args, metric=metric)
    assert got == naive_ranks(*args, metric=metric) and all(len(ranks) == 1 for ranks in got)
    args = query, gallery, np.ones(6, int), np.ones(60, int), query_camids, gallery_camids + 5
    assert ranks_of(*args, metric=metric) == [list(range(1, 61))] * 6


def test_calls_from_several_threads_do_not_disturb_each_other():
    problems = [problem(9, 400, 33, seed=seed) for seed in range(8)]
    expected = [ranks_of(*args) for args in problems]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda args: ranks_of(*args), problems * 4)) == expected * 4


@pytest.mark.parametrize('bad', [None, 3, ['a', 'b', 'c', 'd'], [2 ** 70] * 4, np.ones(4, complex)])
def test_what_is_no_list_of_ids_is_refused(bad):
    query, gallery, *ids = problem(3, 4, 5)
    ids[1] = bad
    with pytest.raises(ValueError, match=r'gallery_pids must have the shape \(4,\) and an integer type'):
        match_ranks(query, gallery, *ids)


@pytest.mark.parametrize('junk_pid', [2 ** 63, -1.0, 'x', True])
def test_what_is_no_id_is_no_junk_id(junk_pid):
    with pytest.raises(ValueError, match='junk_pid must be an integer'):
        match_ranks(*problem(3, 4, 5), junk_pid=junk_pid)


@pytest.mark.parametrize('metric', METRICS)
def test_a_compiled_caller_gets_the_same_ranks(device, metric):
    query, gallery, *ids = near_ties(5, 40, 9)
    query, gallery = torch.from_numpy(query).to(device), torch.from_numpy(gallery).to(device)

    def caller(query, gallery):
        query, gallery = query * 2, gallery * 2
        of_features = match_ranks(query, gallery, *ids, metric=metric)
        of_distances = match_ranks_from_distance(torch.cdist(query, gallery), *map(torch.from_numpy, ids))
        return *of_features, *of_distances
    expected = caller(query, gallery)
    got = torch.compile(caller, backend='aot_eager')(query, gallery)
    assert len(expected[1]) and all(np.array_equal(*pair) for pair in zip(got, expected))
