"""Ranks of the true matches → Rank-k, mAP (both definitions) and mINP. A new measure is a line of FORMULAS."""

from typing import NamedTuple

import numpy as np

from mgn.ops.arguments import as_ids, integer, truth
from mgn.ops.errors import UserError
from mgn.ops.ranking.ranks import match_ranks_from_distance


class Matches(NamedTuple):
    """The ranks of the V queries that have a match, one query after the other."""
    ranks: np.ndarray    # (M,) from 1, ascending within each query
    ordinal: np.ndarray  # (M,) 1…m within each query
    starts: np.ndarray   # (V,) where each query's ranks begin
    counts: np.ndarray   # (V,) its number m of matches


def first_rank(matches):
    return matches.ranks[matches.starts]


def average_precision(matches):
    """(1/m) Σ i/rᵢ."""
    return mean_by_query(matches, matches.ordinal / matches.ranks)


def trapezoid_precision(matches):
    """(1/m) Σ ½[i/rᵢ + (i−1)/(rᵢ−1)], the official measure of Market-1501; a match at rank 1 counts 1."""
    ranks, ordinal = matches.ranks, matches.ordinal
    before = np.where(ranks == 1, 1.0, (ordinal - 1) / np.maximum(ranks - 1, 1))
    return mean_by_query(matches, (ordinal / ranks + before) / 2)


def inverse_negative_penalty(matches):
    """m / rₘ (Ye et al., "Deep Learning for Person Re-identification", TPAMI 2021)."""
    return matches.counts / matches.ranks[matches.starts + matches.counts - 1]


def mean_by_query(matches, values):
    return np.add.reduceat(values, matches.starts) / matches.counts


FORMULAS = {  # name → function of Matches → (V,), whose mean is the measure
    'rank1': lambda matches: first_rank(matches) <= 1,
    'rank5': lambda matches: first_rank(matches) <= 5,
    'rank10': lambda matches: first_rank(matches) <= 10,
    'mAP': average_precision,
    'mAP_trapezoid': trapezoid_precision,
    'mINP': inverse_negative_penalty,
}
METRICS = tuple(FORMULAS)
AS_RANKED = 'pass what match_ranks returns'


def retrieval_metrics(offsets, ranks):
    """Means over the queries that have a match.

    Args:
        offsets: (Q+1,) ints, ranks: (M,) ints from 1, ascending within each query (`mgn.ops.match_ranks`).
    Returns:
        {name: fraction in [0, 1]} for each name of METRICS, in that order. FORMULAS gives their definitions.
    Raises:
        UserError: no query has a match; what cannot be ranks.
    """
    matches = true_matches(offsets, ranks)
    return {name: float(np.mean(formula(matches))) for name, formula in FORMULAS.items()}


def evaluate_rank(distmat, q_pids, g_pids, q_camids, g_camids, max_rank=50, use_metric_cuhk03=False, use_cython=True):
    """fastreid.evaluation.rank.evaluate_rank: the same arguments and numbers, by counting instead of sorting.

    Equal distances are ordered by gallery index, where fast-reid's order is left to its sort. No id is special here: −1
    is one like any other. Where a query has fewer than max_rank items left, its curve stays at 1 (fast-reid's compiled
    code reads there what an earlier query left).

    Args:
        distmat: (Q, G) distances, as of match_ranks_from_distance; q_pids, g_pids, q_camids, g_camids: (Q,), (G,)
            integers.
        max_rank: length of the CMC curve, at most G. use_cython: without effect.
    Returns:
        (cmc (min(max_rank, G),), all_AP (V,), all_INP (V,)), float32 NumPy arrays, over the V queries that have a
        match.
    Raises:
        UserError: use_metric_cuhk03=True; no query with a match; whatever match_ranks_from_distance refuses.
    """
    if truth(use_metric_cuhk03, 'use_metric_cuhk03', 'False is what evaluate_rank does'):
        raise UserError('evaluate_rank needs use_metric_cuhk03=False, since it does not draw single gallery images as '
                        "CUHK03's old protocol does; use CUHK03's new protocol (767/700 identities)")
    max_rank = integer(max_rank, 'max_rank', 1, 2 ** 63 - 1, 'it is the length of the CMC curve')
    offsets, ranks, _ = match_ranks_from_distance(distmat, q_pids, g_pids, q_camids, g_camids, junk_pid=None)
    matches = true_matches(offsets, ranks)
    length = min(max_rank, np.shape(distmat)[1])
    # What is beyond is left out.
    hits = np.bincount(np.minimum(first_rank(matches) - 1, length), minlength=length + 1)[:length]
    measures = np.cumsum(hits) / len(matches.starts), average_precision(matches), inverse_negative_penalty(matches)
    return tuple(measure.astype(np.float32) for measure in measures)


def true_matches(offsets, ranks, may_be_none=False):
    offsets, ranks = as_ids(offsets, 'Q + 1', 'offsets', AS_RANKED), as_ids(ranks, 'M', 'ranks', AS_RANKED)
    counts, ascends = np.diff(offsets), ranks > np.roll(ranks, 1)
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(ranks) or (offsets[1:] < offsets[:-1]).any():
        raise UserError(f'offsets must ascend from 0 to the number of ranks, {len(ranks)}, not {offsets}; {AS_RANKED}')
    starts, counts = offsets[:-1][counts > 0], counts[counts > 0]
    if len(starts) == 0 and not may_be_none:
        raise UserError('At least one query must have a true match in the gallery, but none has; check pids and camids')
    ascends[starts] = ranks[starts] > 0
    if not ascends.all():
        raise UserError(f'ranks must ascend from 1 within each query, but ranks[{ascends.argmin()}] does not; '
                        f'{AS_RANKED}')
    return Matches(ranks, np.arange(1, len(ranks) + 1) - np.repeat(starts, counts), starts, counts)
