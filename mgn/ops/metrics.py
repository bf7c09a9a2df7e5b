"""Ranks of the true matches → Rank-k, mAP (both definitions) and mINP."""

import numpy as np

METRICS = ('rank1', 'rank5', 'rank10', 'mAP', 'mAP_trapezoid', 'mINP')


def retrieval_metrics(offsets, ranks, top=(1, 5, 10)):
    """Means over the queries that have a match.

    Args:
        offsets: (Q+1,) ints, ranks: (M,) ints from 1, ascending within each query (`mgn.ops.match_ranks`).
        top: the k of Rank-k.
    Returns:
        Fractions in [0, 1] by name: rank1, rank5, …; mAP = mean of (1/m) Σ i/rᵢ; mAP_trapezoid = mean of
        (1/m) Σ ½[i/rᵢ + (i−1)/(rᵢ−1)], the official measure of Market-1501; mINP = mean of m / r_m (Ye et al., "Deep
        Learning for Person Re-identification", TPAMI 2021).
    Raises:
        ValueError: no query has a match.
    """
    first, precision, trapezoid, penalty = query_metrics(offsets, ranks)
    if len(first) == 0:
        raise ValueError('want at least one query with a true match, got none; check pids and camids')
    return {**{f'rank{k}': float(np.mean(first <= k)) for k in top}, 'mAP': float(np.mean(precision)),
            'mAP_trapezoid': float(np.mean(trapezoid)), 'mINP': float(np.mean(penalty))}


def query_metrics(offsets, ranks):
    """The first rank, both average precisions and the INP of each query that has a match, (V,) each."""
    counts = np.diff(offsets)
    m = counts[counts > 0]
    if len(m) == 0:
        return np.empty(0, np.int64), *np.empty((3, 0))
    starts = offsets[:-1][counts > 0]
    i = np.arange(1, len(ranks) + 1) - np.repeat(starts, m)  # 1…m within each query
    precision = i / ranks
    before = np.where(ranks == 1, 1.0, (i - 1) / np.maximum(ranks - 1, 1))
    return (ranks[starts], np.add.reduceat(precision, starts) / m, np.add.reduceat((precision + before) / 2, starts) / m,
            m / ranks[starts + m - 1])
