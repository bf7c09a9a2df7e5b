"""Ranks of the true matches → Rank-k, mAP (both definitions) and mINP. A new measure is a line of FORMULAS."""

from typing import NamedTuple

import numpy as np

from mgn.ops.arguments import as_ids
from mgn.ops.errors import UserError


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
    if len(matches.starts) == 0:
        raise UserError('At least one query must have a true match in the gallery, but none has; check pids and camids')
    return {name: float(np.mean(formula(matches))) for name, formula in FORMULAS.items()}


def query_metrics(offsets, ranks):
    """The first rank, both average precisions and the INP of each query that has a match, (V,) each."""
    matches = true_matches(offsets, ranks)
    measures = first_rank, average_precision, trapezoid_precision, inverse_negative_penalty
    return tuple(measure(matches) for measure in measures)


def true_matches(offsets, ranks):
    offsets, ranks = as_ids(offsets, 'Q + 1', 'offsets', AS_RANKED), as_ids(ranks, 'M', 'ranks', AS_RANKED)
    counts, ascends = np.diff(offsets), np.diff(ranks, prepend=0) > 0
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(ranks) or (counts < 0).any():
        raise UserError(f'offsets must ascend from 0 to the number of ranks, {len(ranks)}, not {offsets}; {AS_RANKED}')
    starts, counts = offsets[:-1][counts > 0], counts[counts > 0]
    ascends[starts] = ranks[starts] > 0
    if not ascends.all():
        raise UserError(f'ranks must ascend from 1 within each query, but ranks[{ascends.argmin()}] does not; '
                        f'{AS_RANKED}')
    return Matches(ranks, np.arange(1, len(ranks) + 1) - np.repeat(starts, counts), starts, counts)
