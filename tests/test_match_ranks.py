"""Ranks of true matches against a pure Python loop that computes every canonical key and sorts."""

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mgn.ops import match_ranks

MODULE = importlib.import_module('mgn.ops.match_ranks')  # mgn.ops gives the function of that name


def canonical_sum(terms):
    """16 interleaved partial sums, element i into sum i mod 16, then halved; Python floats are float64."""
    sums = [0.0] * 16
    for i, term in enumerate(terms):
        sums[i % 16] += term
    for half in (8, 4, 2, 1):
        sums = [sums[j] + sums[j + half] for j in range(half)]
    return sums[0]


def naive_key(q, g):
    norm_q, norm_g = (math.sqrt(canonical_sum([x * x for x in v])) for v in (q, g))
    if norm_q * norm_g == 0:
        return 0.0
    return -(canonical_sum([a * b for a, b in zip(q, g)]) / (norm_q * norm_g))


def naive_ranks(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, junk_pid=-1):
    query, gallery = ([[float(x) for x in row] for row in features] for features in (query, gallery))
    result = []
    for q, pid, camid in zip(query, query_pids, query_camids):
        ranked = []
        for index, g in enumerate(gallery):
            own_view = gallery_pids[index] == pid and gallery_camids[index] == camid
            if gallery_pids[index] != junk_pid and not own_view:
                ranked.append((naive_key(q, g), index))
        ranked.sort()
        result.append([rank for rank, (_, index) in enumerate(ranked, 1) if gallery_pids[index] == pid])
    return result


def ranks_of(*args, **options):
    offsets, ranks, _ = match_ranks(*args, **options)
    assert offsets.dtype == ranks.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(ranks)
    return [ranks[a:b].tolist() for a, b in zip(offsets, offsets[1:])]


def problem(Q, G, D, pids=5, cameras=3, seed=0, levels=None):
    """Random features and ids; with `levels`, features of few values, so that many keys are equal."""
    rng = np.random.default_rng(seed)
    query, gallery = (rng.standard_normal((n, D)) for n in (Q, G))
    if levels:
        query, gallery = (np.round(x * levels / 2) for x in (query, gallery))
    return (query.astype(np.float32), gallery.astype(np.float32), rng.integers(0, pids, Q), rng.integers(0, pids, G),
            rng.integers(0, cameras, Q), rng.integers(0, cameras, G))


def near_ties(Q, G, D, seed=0, pids=3):
    """Queries of equal elements, gallery rows that permute one of three: keys equal but for the order of rounding."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((3, D)).astype(np.float32)
    gallery = np.stack([rng.permutation(rows[i % 3]) for i in range(G)])
    gallery[G // 2:] = gallery[rng.integers(0, G // 2, G - G // 2)]  # and exact duplicates
    query = np.repeat(rng.standard_normal((Q, 1)).astype(np.float32), D, 1)
    gallery_pids = rng.integers(0, pids, G)
    query_pids = gallery_pids[rng.integers(0, G, Q)]
    return query, gallery, query_pids, gallery_pids, rng.integers(0, 2, Q), rng.integers(1, 3, G)


@pytest.mark.parametrize('Q, G', [(1, 1), (3, 2), (5, 31), (4, 33), (2, 129)])
@pytest.mark.parametrize('D', [1, 2, 15, 16, 17, 31, 33, 129])
def test_ranks_equal_the_naive_loop_at_every_size(Q, G, D):
    args = problem(Q, G, D)
    assert ranks_of(*args) == naive_ranks(*args)


@pytest.mark.parametrize('D', [1, 2, 4, 33])
@pytest.mark.parametrize('levels', [1, 2, 3])
def test_ties_go_by_gallery_index(D, levels):
    args = problem(7, 129, D, levels=levels)
    assert ranks_of(*args) == naive_ranks(*args)


@pytest.mark.parametrize('D', [3, 17, 33, 129, 1000])
@pytest.mark.parametrize('pids', [2, 10, 40])  # many matches a query, a few, one
def test_keys_apart_by_rounding_alone_are_ordered_by_the_canonical_sum(D, pids):
    args = near_ties(4, 40, D, pids=pids)
    assert ranks_of(*args) == naive_ranks(*args)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.data())
def test_ranks_equal_the_naive_loop_on_anything(data):
    Q, G, D = (data.draw(st.integers(low, high)) for low, high in ((0, 4), (0, 24), (1, 20)))
    quantised = st.sampled_from([-1.0, 0.0, 0.0, 1.0, 2.0])
    values = data.draw(st.sampled_from([quantised, st.floats(width=32, allow_nan=False, allow_infinity=False)]))
    query, gallery = (np.array(data.draw(st.lists(st.lists(values, min_size=D, max_size=D), min_size=n, max_size=n)),
                               np.float32).reshape(n, D) for n in (Q, G))
    ids = [data.draw(st.lists(st.integers(low, 2), min_size=n, max_size=n)) for low in (-1, 1) for n in (Q, G)]
    junk_pid = data.draw(st.sampled_from([-1, 0, None]))
    assert ranks_of(query, gallery, *ids, junk_pid=junk_pid) == naive_ranks(query, gallery, *ids, junk_pid=junk_pid)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 2 ** 32 - 1), st.integers(1, 40), st.sampled_from([2, 5, 16]))
def test_near_ties_equal_the_naive_loop(seed, D, pids):
    args = near_ties(2, 16, D, seed, pids)
    assert ranks_of(*args) == naive_ranks(*args)


def test_duplicates_tie_by_gallery_index():
    features = np.random.default_rng(0).standard_normal((1, 2048)).astype(np.float32)
    gallery = np.repeat(features, 6, 0)
    assert ranks_of(features, gallery, [1], [2, 1, 2, 1, 1, 2], [0], [1] * 6) == [[2, 4, 5]]


def test_junk_takes_no_rank():
    gallery = np.array([[1, x] for x in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)], np.float32)
    pids, camids = [1, -1, 2, 1, 0, 1], [1, 2, 1, 2, 1, 3]  # own camera, junk, stranger, match, distractor, match
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


def test_zero_vectors_have_key_0():
    query = np.array([[0, 0], [1, 0]], np.float32)
    gallery = np.array([[-1, 0], [0, 0], [1, 0], [0, 1]], np.float32)
    args = (query, gallery, [1, 1], [2, 1, 3, 1], [0, 0], [1, 1, 1, 1])
    assert ranks_of(*args) == naive_ranks(*args) == [[2, 4], [2, 3]]


@pytest.mark.parametrize('Q, G', [(0, 0), (0, 5), (5, 0)])
def test_no_query_or_no_gallery_gives_no_ranks(Q, G):
    result = match_ranks(*problem(Q, G, 8))
    assert result.offsets.tolist() == [0] * (Q + 1) and result.ranks.tolist() == [] and result.redecided == 0
    empty = match_ranks(np.empty((Q, 8), np.float32), np.empty((G, 8), np.float32), [1] * Q, [1] * G, [1] * Q, [2] * G)
    assert empty.offsets.tolist() == [0] * (Q + 1)


def test_features_of_width_0_all_tie():
    query, gallery = (np.empty((n, 0), np.float32) for n in (1, 3))
    assert ranks_of(query, gallery, [1], [2, 1, 1], [0], [1, 1, 1]) == [[2, 3]]


@pytest.mark.parametrize('levels', [None, 2])
def test_every_container_type_and_layout_gives_the_same_ranks(levels):
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


def test_bfloat16_features_are_taken_as_they_are():
    query, gallery, *ids = problem(6, 65, 33)
    rounded = [torch.from_numpy(x).bfloat16() for x in (query, gallery)]
    assert ranks_of(*rounded, *ids) == naive_ranks(*(x.float().numpy() for x in rounded), *ids)


@pytest.mark.parametrize('rows', [1, 2, 3, 7, 100])
def test_chunks_of_queries_change_nothing(monkeypatch, rows):
    args = near_ties(7, 60, 33)
    expected = match_ranks(*args)
    monkeypatch.setattr(MODULE, 'CHUNK_BYTES', rows * 8 * 60)
    for got, want in zip(match_ranks(*args), expected):
        assert np.array_equal(got, want)


@pytest.mark.parametrize('make', [near_ties, problem])
def test_a_query_has_the_ranks_that_it_has_alone(make):
    query, gallery, query_pids, gallery_pids, query_camids, gallery_camids = make(9, 50, 129)
    together = ranks_of(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids)
    for q, ranks in enumerate(together):
        q = slice(q, q + 1)
        assert ranks_of(query[q], gallery, query_pids[q], gallery_pids, query_camids[q], gallery_camids) == [ranks]


def test_ranks_in_the_whole_gallery_follow_from_the_ranks_in_its_parts():
    """Strangers' counts add over shards: the matches alone, and the matches with each half of the strangers."""
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
def test_extreme_magnitudes_neither_overflow_nor_underflow(scale):
    query, gallery, *ids = problem(3, 31, 17)
    args = [np.clip(x / 4 * scale, -3.4e38, 3.4e38).astype(np.float32) for x in (query, gallery)] + ids
    assert ranks_of(*args) == naive_ranks(*args)


def test_denormal_features_count_even_while_torch_flushes_them():
    query, gallery, *ids = problem(4, 31, 17)
    args = [(x * np.float32(1e-40)).astype(np.float32) for x in (query, gallery)] + ids
    expected = naive_ranks(*args)
    torch.set_flush_denormal(True)
    try:
        got = ranks_of(*args)
    finally:
        torch.set_flush_denormal(False)
    assert got == expected


def test_what_the_matrix_product_leaves_open_is_counted():
    query = np.ones((1, 4), np.float32)
    gallery = np.array([[1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 0], [3, 3, 3, 3], [1, -1, 1, -1]], np.float32)
    args = (query, gallery, [1], [1, 2, 2, 2, 2], [0], [1] * 5)
    assert match_ranks(*args).redecided == 2  # parallel to the match; the other two are decided by the product
    assert match_ranks(*problem(20, 129, 33)).redecided == 0


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
    with pytest.raises(ValueError, match=rf'want {name} features .*cast, e\.g\. {name}\.astype'):
        match_ranks(*args)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('which', [0, 1])
def test_features_that_are_not_finite_are_named(which, value):
    args = list(problem(33, 33, 5))
    args[which][31, 4] = value
    name = ('query', 'gallery')[which]
    with pytest.raises(ValueError, match=f'want finite {name} features, got NaN or infinity in row 31'):
        match_ranks(*args)


@pytest.mark.parametrize('which, bad, message', [
    (0, np.zeros((3, 6), np.float32), 'query and gallery of one width'), (0, np.zeros(5, np.float32), 'query features'),
    (1, np.zeros((4, 5, 1), np.float32), 'gallery features'), (2, [1, 2], r'query_pids of shape \(3,\)'),
    (3, [1, 2, 3], r'gallery_pids of shape \(4,\)'), (4, [1.0, 2.0, 3.0], 'query_camids .*integer type'),
    (5, [[1], [2], [3], [4]], r'gallery_camids of shape \(4,\)'), (3, [], 'gallery_pids')])
def test_shapes_and_types_that_do_not_fit_are_named(which, bad, message):
    args = list(problem(3, 4, 5))
    args[which] = bad
    with pytest.raises(ValueError, match=message):
        match_ranks(*args)
