"""The functions that users of fast-reid and torchreid have, under the same names: they change one import."""

import numpy as np

from mgn.ops.arguments import integer
from mgn.ops.errors import UserError
from mgn.ops.metrics import query_metrics
from mgn.ops.ranking import match_ranks_from_distance


def evaluate_rank(distmat, q_pids, g_pids, q_camids, g_camids, max_rank=50, use_metric_cuhk03=False, use_cython=True):
    """Stands in for fastreid.evaluation.rank.evaluate_rank: the same arguments and numbers, by counting instead of
    sorting.

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
    if use_metric_cuhk03:
        raise UserError("use_metric_cuhk03=True is CUHK03's old protocol, which draws single gallery images at random; "
                        'evaluate_rank does not draw: use the new protocol of CUHK03 (767/700 identities)')
    integer(max_rank, 'max_rank', 1, 2 ** 63 - 1, 'it is the length of the CMC curve')
    offsets, ranks, _ = match_ranks_from_distance(distmat, q_pids, g_pids, q_camids, g_camids, junk_pid=None)
    first, precision, _, penalty = query_metrics(offsets, ranks)
    if len(first) == 0:
        raise UserError('At least one query must have its identity in the gallery, seen by another camera, but none '
                        'has; check pids and camids')
    length = min(max_rank, np.shape(distmat)[1])
    hits = np.bincount(np.minimum(first - 1, length), minlength=length + 1)[:length]  # what is beyond is left out
    return (np.cumsum(hits) / len(first)).astype(np.float32), precision.astype(np.float32), penalty.astype(np.float32)
