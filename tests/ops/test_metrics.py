"""Ranks of true matches → Rank-k, mAP (both definitions), mINP, against a naive loop."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mgn.ops import METRICS, retrieval_metrics
from mgn.ops.metrics import FORMULAS, first_rank


def metrics(ranks_per_query):
    offsets = np.cumsum([0, *map(len, ranks_per_query)])
    return retrieval_metrics(offsets, np.array([r for ranks in ranks_per_query for r in ranks], np.int64))


def naive_metrics(ranks_per_query):
    sums = {'rank1': 0.0, 'rank5': 0.0, 'rank10': 0.0, 'mAP': 0.0, 'mAP_trapezoid': 0.0, 'mINP': 0.0}
    matched = [ranks for ranks in ranks_per_query if ranks]
    for ranks in matched:
        m = len(ranks)
        for k in (1, 5, 10):
            sums[f'rank{k}'] += any(r <= k for r in ranks)
        for i, r in enumerate(ranks, 1):
            sums['mAP'] += i / r / m
            before = 1 if r == 1 else (i - 1) / (r - 1)
            sums['mAP_trapezoid'] += (i / r + before) / 2 / m
        sums['mINP'] += m / ranks[-1]
    return {name: value / len(matched) for name, value in sums.items()}


def average_precision_from_a_list(ranks):
    """AP from a list of relevant and irrelevant items, as information retrieval defines it."""
    relevant = [position in ranks for position in range(1, max(ranks) + 1)]
    precisions = [sum(relevant[:n + 1]) / (n + 1) for n, hit in enumerate(relevant) if hit]
    return sum(precisions) / len(precisions)


def official_average_precision(ranks, size):
    """compute_AP of Market-1501's evaluation: the trapezoid under precision and recall, item by item."""
    ap, old_recall, old_precision, hits = 0.0, 0.0, 1.0, 0
    for position in range(1, size + 1):
        hits += position in ranks
        recall, precision = hits / len(ranks), hits / position
        ap += (recall - old_recall) * (old_precision + precision) / 2
        old_recall, old_precision = recall, precision
    return ap


def test_ranks_1_2_4_7_have_the_published_values():
    result = metrics([[1, 2, 4, 7]])
    assert round(result['mAP'], 4) == 0.8304
    assert round(result['mAP_trapezoid'], 4) == 0.8110
    assert result['mINP'] == pytest.approx(4 / 7)
    assert (result['rank1'], result['rank5'], result['rank10']) == (1, 1, 1)


def test_perfect_and_worst_rankings():
    assert set(metrics([[1], [1, 2, 3], list(range(1, 130))]).values()) == {1.0}
    worst = metrics([[82161]])
    assert (worst['rank1'], worst['rank5'], worst['rank10']) == (0, 0, 0)
    assert worst['mAP'] == worst['mINP'] == 1 / 82161 == 2 * worst['mAP_trapezoid']


def queries(matches, largest):
    """The ranks of a query's matches, `matches` of them at most."""
    return st.lists(st.integers(1, largest), max_size=matches, unique=True).map(sorted)


def check_means(ranks_per_query):
    assert metrics(ranks_per_query) == pytest.approx(naive_metrics(ranks_per_query), rel=1e-12)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(queries(6, 30), min_size=1, max_size=6).filter(any))
def test_means_equal_the_naive_loop(ranks_per_query):
    check_means(ranks_per_query)


@pytest.mark.long
@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(queries(33, 200), min_size=1, max_size=31).filter(any))
def test_means_over_many_queries_equal_the_naive_loop(ranks_per_query):
    check_means(ranks_per_query)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(queries(33, 200).filter(len))
def test_both_definitions_equal_what_they_are_named_after(ranks):
    result = metrics([ranks])
    assert result['mAP'] == pytest.approx(average_precision_from_a_list(ranks), rel=1e-12)
    assert result['mAP_trapezoid'] == pytest.approx(official_average_precision(ranks, max(ranks) + 3), rel=1e-9)


@pytest.mark.parametrize('where', [0, 1, 2, 3])
def test_queries_without_a_match_are_left_out_wherever_they_stand(where):
    ranks = [[1, 5], [3], [2, 4, 9]]
    assert metrics(ranks[:where] + [[], []] + ranks[where:]) == metrics(ranks)


def test_rank_k_counts_the_first_match_at_exactly_k():
    result = metrics([[1, 90], [5, 6], [6, 7], [10], [11]])
    assert (result['rank1'], result['rank5'], result['rank10']) == (0.2, 0.4, 0.8)


@pytest.mark.parametrize('ranks', [[], [[]], [[], [], []]])
def test_no_query_with_a_match_is_an_error(ranks):
    with pytest.raises(ValueError,
                       match='At least one query must have a true match in the gallery, but none has; check pids'):
        metrics(ranks)


@pytest.mark.parametrize('offsets, ranks', [([0, 2], [5, -2 ** 63]), ([0, 2], [2 ** 63 - 1, -2 ** 63]),
                                            ([0, 2 ** 63 - 1, -2, 2], [1, 2])])
def test_differences_that_leave_64_bits_are_refused(offsets, ranks):
    with pytest.raises(ValueError, match='must ascend from'):
        retrieval_metrics(offsets, ranks)


def test_values_are_plain_floats_by_the_documented_names():
    result = metrics([[2]])
    assert METRICS == ('rank1', 'rank5', 'rank10', 'mAP', 'mAP_trapezoid', 'mINP') and tuple(result) == METRICS
    assert all(type(value) is float for value in result.values())


def test_a_new_measure_is_one_line_of_formulas(monkeypatch):
    monkeypatch.setitem(FORMULAS, 'rank20', lambda matches: first_rank(matches) <= 20)
    result = metrics([[21, 90], [20], [1]])
    assert tuple(result) == (*METRICS, 'rank20') and result['rank20'] == 2 / 3


@pytest.mark.parametrize('offsets, ranks', [([1, 2], [5, 3]), ([0, 1], [0]), ([0, 2], [1, 1]), ([0, 1], [1, 2])])
def test_what_cannot_be_ranks_is_refused(offsets, ranks):
    with pytest.raises(ValueError, match='must ascend from'):
        retrieval_metrics(offsets, ranks)
