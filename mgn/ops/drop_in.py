"""The functions that users of fast-reid and torchreid have, under the same names: they change one import."""

import numpy as np
import torch

from mgn.ops.arguments import as_distances, integer, reranking, truth
from mgn.ops.errors import UserError
from mgn.ops.metrics import query_metrics
from mgn.ops.private import uncompiled
from mgn.ops.ranking.ranks import match_ranks_from_distance
from mgn.ops.ranking.reranking import encode, final_distances, relative, rows_between, sparse_kernels
from mgn.ops.ranking.tiles import denormals, spans

ROWS = 2 ** 23  # numbers of dense rows at a time


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
    first, precision, _, penalty = query_metrics(offsets, ranks)
    if len(first) == 0:
        raise UserError('At least one query must have its identity in the gallery, seen by another camera, but none '
                        'has; check pids and camids')
    length = min(max_rank, np.shape(distmat)[1])
    hits = np.bincount(np.minimum(first - 1, length), minlength=length + 1)[:length]  # what is beyond is left out
    return (np.cumsum(hits) / len(first)).astype(np.float32), precision.astype(np.float32), penalty.astype(np.float32)


@uncompiled
@denormals()
def re_ranking(q_g_dist, q_q_dist, g_g_dist, k1=20, k2=6, lambda_value=0.3):
    """torchreid's and fast-reid's function of this name: the same arguments and numbers, with sparse encodings.

    Equal distances are ordered by index (queries before the gallery), where theirs are left to an unstable sort; a row
    of distances that are all 0 has relative distances 0, where theirs are NaN. As theirs, row i is column i of the
    matrix over queries and gallery.

    Args:
        q_g_dist: (Q, G), q_q_dist: (Q, Q), g_g_dist: (G, G), of floating point, NumPy arrays or tensors, of any
            strides.
        k1, k2, lambda_value: as of k_reciprocal_ranks.
    Returns:
        (Q, G) float32 NumPy array of final distances.
    Raises:
        UserError: shapes that do not fit, NaN or infinite distances, parameters out of range.
    """
    given = {'q_g_dist (Q, G)': q_g_dist, 'q_q_dist (Q, Q)': q_q_dist, 'g_g_dist (G, G)': g_g_dist}
    q_g, q_q, g_g = (as_distances(dist, name).cpu() for name, dist in given.items())
    (queries, items), total = q_g.shape, sum(q_g.shape)
    if q_q.shape != (queries, queries) or g_g.shape != (items, items):
        raise UserError(f'{", ".join(given)} must fit each other, but have the shapes {tuple(q_g.shape)}, '
                        f'{tuple(q_q.shape)} and {tuple(g_g.shape)}; mind the order of arguments')
    k1, k2, lambda_value = reranking(k1, k2, lambda_value)
    neighbours, maxima = nearest_of_all(q_g, q_q, g_g, min(max(k1 + 1, k2), total))

    def relative_squares(owners, others):
        return np.square(relative(distances_of_pairs(q_g, q_q, g_g, owners, others), maxima[owners]))
    encodings, sparse = encode(neighbours, k1, k2, relative_squares), sparse_kernels()
    columns = sparse.transpose(*rows_between(encodings, queries, total), total)
    final = np.empty(q_g.shape, np.float32)
    for block in spans(queries, ROWS // max(total, 1)):
        block_encodings = rows_between(encodings, block.start, block.stop)
        offsets, overlapping, overlaps = sparse.overlap(*block_encodings, *columns, items)
        jaccard = np.ones((len(offsets) - 1, items))
        jaccard[np.repeat(np.arange(len(jaccard)), np.diff(offsets.numpy())), overlapping.numpy()] = overlaps.numpy()
        # Divided first: squares may leave float64's range.
        squares = np.square(relative(q_g[block].double().numpy(), maxima[block, None]))
        final[block] = final_distances(jaccard, squares, lambda_value)
    return final


def nearest_of_all(q_g, q_q, g_g, count):
    """The nearest to each query and item, (Q + G, count), and its largest distance, (Q + G,) float64."""
    queries, total = len(q_g), sum(q_g.shape)
    items, maxima = torch.empty(total, count, dtype=torch.int64), np.zeros(total)
    for part in spans(total, ROWS // max(total, 1)):  # rows of the whole matrix, which is not made
        query_part = slice(part.start, min(part.stop, queries))
        gallery_part = slice(max(part.start - queries, 0), max(part.stop - queries, 0))
        upper = torch.cat((q_q[:, query_part].T, q_g[query_part]), 1)
        lower = torch.cat((q_g[:, gallery_part].T, g_g[:, gallery_part].T), 1)
        distances = torch.cat((upper, lower))
        distances = distances.to(torch.promote_types(distances.dtype, torch.float32)).abs_()  # they are to be squared
        nearest_values = distances.new_empty(len(distances), count)
        bad_row = sparse_kernels().nearest_in_distances(distances, nearest_values, items[part])
        maxima[part] = distances.amax(1).double().numpy()
        if bad_row < 0 and np.isinf(maxima[part]).any():
            bad_row = int(np.isinf(maxima[part]).argmax())
        if bad_row >= 0:
            row = part.start + bad_row
            name = f'query {row}' if row < queries else f'gallery item {row - queries}'
            raise UserError(f'Distances must be finite, but those of {name} have NaN or infinity; look for the cause')
    return items, maxima


def distances_of_pairs(q_g, q_q, g_g, owners, others):
    """Entries (owners[p], others[p]), float64, of the transposed matrix over queries and gallery, as published."""
    owners, others = torch.from_numpy(owners), torch.from_numpy(others)
    queries, distances = len(q_g), np.empty(len(owners))
    own_is_query, other_is_query = owners < queries, others < queries
    for dist, row, column, pairs in (
            (q_q, others, owners, own_is_query & other_is_query),
            (q_g, owners, others - queries, own_is_query & ~other_is_query),
            (q_g, others, owners - queries, ~own_is_query & other_is_query),
            (g_g, others - queries, owners - queries, ~own_is_query & ~other_is_query)):
        distances[pairs.numpy()] = dist[row[pairs], column[pairs]].double().numpy()
    return distances
