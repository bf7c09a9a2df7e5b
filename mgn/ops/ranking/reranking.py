"""k-reciprocal re-ranking in sparse rows.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017. Of N = Q + G items, i's
encoding is V[i, j] = exp(−d²(i, j) / max d²(i, ·)), normalised, over its expanded k-reciprocal neighbours j, then the
mean over i's k2 nearest. The final distance (1 − λ) · Jaccard + λ · d² / max d² differs from 1 − λ + λ · d² / max d²
only where two encodings overlap. So a query's gallery is counted as match_ranks counts it, and its few hundred overlaps
one by one.
"""

import numpy as np
import torch

from mgn.ops.arguments import all_ids, as_junk_pid, integer, real
from mgn.ops.private import uncompiled
from mgn.ops.ranking.counting import Overlaps
from mgn.ops.ranking.keys import compared, finite_norms, keys_of_pairs, ranking_kernels
from mgn.ops.ranking.nearest import nearest
from mgn.ops.ranking.ranks import MatchRanks, as_ranks, identities, nonmatches_between, sorted_matches
from mgn.ops.ranking.tiles import denormals, in_pinned_memory, spans, tile_of


@uncompiled
@denormals()
def k_reciprocal_ranks(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, k1=20, k2=6,
                       lambda_value=0.3, metric='cosine', junk_pid=-1, precision='auto'):
    """Ranks of the true matches by the k-reciprocal re-ranked distance, ties by gallery index; no N×N matrix is made.

    The published formula, d² being (1 − cos)² or the squared Euclidean distance, of the canonical keys of match_ranks,
    and neighbours those of topk; all in float64. The same bits for any tile, thread count and precision on one machine
    (exp is the machine's).

    Args:
        query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric, junk_pid, precision: as of
            match_ranks. Junk items are neighbours like any other, and take no rank.
        k1: neighbours that are to be reciprocal. k2: neighbours whose encodings are averaged, 1 for none. lambda_value:
            the weight λ of the original distance, from 0 to 1.
    Returns:
        MatchRanks; redecided counts the pairs of query and gallery that were left to their keys. Neighbours are
        searched on the features' device, all else is the CPU's work. Memory: 256 MB, a copy of the features and, on
        usual data, up to 16 KB per row; on a GPU 2 GB more there, and another copy.
    Raises:
        UserError: k1, k2 or lambda_value out of range, and whatever match_ranks refuses.
    """
    comparison = compared(query, gallery, metric, precision)
    k1, k2 = integer(k1, 'k1', 1, 2 ** 31 - 1, 'usual is 20'), integer(k2, 'k2', 1, 2 ** 31 - 1, 'usual is 6')
    lambda_value = real(lambda_value, 'lambda_value', 0, 1, '0.3 is usual, 1 ranks by the original distance')
    ids = all_ids(len(query), len(gallery), query_pids, gallery_pids, query_camids, gallery_camids)
    query, gallery, cosine, _ = comparison
    norms = torch.cat((finite_norms(query, 'query'), finite_norms(gallery, 'gallery')))
    encodings, maxima = encode(comparison, norms, k1, k2)
    here = [in_pinned_memory(x, waiting=True) for x in comparison[:2]] if query.is_cuda else comparison[:2]
    host, sparse = comparison._replace(query=here[0], gallery=here[1]), ranking_kernels(torch.device('cpu'))
    columns = sparse.transpose(*rows_between(encodings, len(query), len(norms)), len(norms))
    excluded, offsets, ranks, redecided = identities(ids, as_junk_pid(junk_pid)), [np.zeros(1, np.int64)], [], 0
    for block in spans(len(query), tile_of(query)[1]):
        block_encodings = rows_between(encodings, block.start, block.stop)
        overlaps = Overlaps(*sparse.overlap(*block_encodings, *columns, len(gallery)))
        block_host, block_excluded, largest = host.of_queries(block), excluded.of_queries(block), maxima[block]

        def final_distances_of(owners, items):
            squares = squared(keys_of_pairs(block_host, owners, items).numpy(), cosine)
            owners, items = owners.numpy(), items.numpy()
            return torch.from_numpy((1 - lambda_value) * jaccard_of(overlaps, owners, items)
                                    + lambda_value * relative(squares, largest[owners]))
        matches = sorted_matches(block_excluded, ids.of_queries(block), final_distances_of)
        steps, reconsidered = nonmatches_between(
            comparison.of_queries(block), norms[block], matches, block_excluded,
            (overlaps, torch.from_numpy(largest), lambda_value), block_host[:2] if query.is_cuda else None)
        offsets.append(matches.offsets.numpy()[1:] + offsets[-1][-1])
        ranks.append(as_ranks(steps, matches.offsets))
        redecided += reconsidered
    return MatchRanks(np.concatenate(offsets), np.concatenate([np.empty(0, np.int64), *ranks]), redecided)


def encode(comparison, norms, k1, k2):
    """Encodings of all N rows, queries first, and the largest d² of each, (N,) float64.

    Encodings are sparse rows: offsets (N+1,) int64, columns int32, values float64.
    """
    features, sparse = torch.cat(comparison[:2]), ranking_kernels(torch.device('cpu'))
    comparison = comparison._replace(query=features, gallery=features)
    found = nearest(comparison, norms, norms, min(max(k1 + 1, k2), len(features)), farthest=True)
    items, farthest = (tensor.cpu() for tensor in found[1:])
    maxima = squared(farthest.numpy(), comparison.cosine)
    offsets, columns = sparse.reciprocal(items[:, :k1 + 1].contiguous(), round(k1 / 2) + 1)
    owners = np.repeat(np.arange(len(items)), np.diff(offsets.numpy()))
    pairs = (indices.to(features.device) for indices in (torch.from_numpy(owners), columns.long()))
    squares = squared(keys_of_pairs(comparison, *pairs).cpu().numpy(), comparison.cosine)
    weights = np.exp(-relative(squares, maxima[owners]))
    weights /= np.bincount(owners, weights, len(items))[owners]
    encodings = offsets, columns, torch.from_numpy(weights)
    return encodings if k2 == 1 else sparse.mean_rows(*encodings, items[:, :k2].contiguous()), maxima


def rows_between(encodings, first, last):
    offsets, columns, values = encodings
    entries = slice(offsets[first], offsets[last])
    return offsets[first:last + 1] - offsets[first], columns[entries], values[entries]


def squared(keys, cosine):
    return np.square(np.maximum(1 + keys, 0)) if cosine else keys


def relative(squares, maxima):
    """squares / maxima, 0 where all distances are."""
    return np.divide(squares, maxima, out=np.zeros_like(squares), where=maxima > 0)


def jaccard_of(overlaps, owners, items):
    """Jaccard distances of pairs of query and gallery: 1 where their encodings do not overlap."""
    offsets, overlapping, jaccard = (tensor.numpy() for tensor in overlaps)
    distances = np.ones(len(owners))
    if len(overlapping):
        places = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) << 32 | overlapping
        wanted = owners << 32 | items
        at = np.minimum(np.searchsorted(places, wanted), len(places) - 1)
        distances = np.where(places[at] == wanted, jaccard[at], distances)
    return distances
