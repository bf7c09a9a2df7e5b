"""k-reciprocal re-ranking (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017) in sparse rows.

Of N = Q + G items, i's encoding is V[i, j] = exp(−d²(i, j) / max d²(i, ·)), normalised, over its expanded k-reciprocal neighbours j, then the
mean over i's k2 nearest. The final distance (1 − λ) · Jaccard + λ · d² / max d² differs from 1 − λ + λ · d² / max d² only where two encodings
overlap. So a query's gallery is counted as match_ranks counts it, and its few hundred overlaps one by one.
"""

import numbers

import numpy as np
import torch

from mgn.ops import filter, ranking_reference, reranking_reference
from mgn.ops.arguments import all_ids, as_distances, as_junk_pid, feature_pair
from mgn.ops.counting import FilterTerms, Overlaps, Tile, as_tensors
from mgn.ops.native import kernels
from mgn.ops.nearest import nearest
from mgn.ops.ranking import IDS, MatchRanks, as_ranks, identities, sorted_matches
from mgn.ops.tiles import denormals, finite_norms, keys_of_pairs, rows, spans, tile_of, uncompiled

ROWS = 2 ** 23  # numbers of dense rows at a time


def k_reciprocal_ranks(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, k1=20, k2=6, lambda_value=0.3, metric='cosine',
                       junk_pid=-1, precision='float32'):
    """Ranks of the true matches by the k-reciprocal re-ranked distance, ties by gallery index; no N×N matrix is made.

    The published formula, d² being (1 − cos)² or the squared Euclidean distance, of the canonical keys of match_ranks, and neighbours those of
    topk; all in float64. The same bits for any tile, thread count and precision on one machine (exp is the machine's).

    Args:
        query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric, junk_pid, precision: as of match_ranks. Junk
            items are neighbours like any other, and take no rank.
        k1: neighbours that are to be reciprocal. k2: neighbours whose encodings are averaged, 1 for none. lambda_value: the weight λ
            of the original distance, from 0 to 1.
    Returns:
        MatchRanks; redecided counts the pairs of query and gallery that were left to their keys. Neighbours are searched on the features'
        device, all else is the CPU's work. Memory: 256 MB, a copy of the features and, on usual data, up to 16 KB per row.
    Raises:
        ValueError: k1, k2 or lambda_value out of range, and whatever match_ranks refuses.
    """
    query, gallery = feature_pair(query, gallery, metric, precision)
    want_parameters(k1, k2, lambda_value)
    ids = all_ids(len(query), len(gallery), query_pids, gallery_pids, query_camids, gallery_camids)
    offsets, ranks, redecided = torch.ops.mgn.k_reciprocal_ranks.default(query, gallery, *ids, k1, k2, lambda_value, metric, as_junk_pid(junk_pid),
                                                                         precision)
    return MatchRanks(offsets.numpy(), ranks.numpy(), redecided.item())


def re_ranking(q_g_dist, q_q_dist, g_g_dist, k1=20, k2=6, lambda_value=0.3):
    """Stands in for torchreid's and fast-reid's function of this name: the same arguments and numbers, with sparse encodings.

    Equal distances are ordered by index (queries before the gallery), where theirs are left to an unstable sort; a row of distances that
    are all 0 has relative distances 0, where theirs are NaN. As theirs, row i is column i of the matrix over queries and gallery.

    Args:
        q_g_dist: (Q, G), q_q_dist: (Q, Q), g_g_dist: (G, G), of floating point, NumPy arrays or tensors, of any strides.
        k1, k2, lambda_value: as of k_reciprocal_ranks.
    Returns:
        (Q, G) float32 NumPy array of final distances.
    Raises:
        ValueError: shapes that do not fit, NaN or infinite distances, parameters out of range.
    """
    q_g, q_q, g_g = (as_distances(dist, name) for dist, name in ((q_g_dist, 'q_g_dist (Q, G)'), (q_q_dist, 'q_q_dist (Q, Q)'),
                                                                (g_g_dist, 'g_g_dist (G, G)')))
    queries, items = q_g.shape
    if q_q.shape != (queries, queries) or g_g.shape != (items, items):
        raise ValueError(f'want q_g_dist (Q, G), q_q_dist (Q, Q) and g_g_dist (G, G), got {tuple(q_g.shape)}, {tuple(q_q.shape)} and '
                         f'{tuple(g_g.shape)}; mind the order of arguments')
    want_parameters(k1, k2, lambda_value)
    return torch.ops.mgn.re_ranking.default(q_g, q_q, g_g, k1, k2, lambda_value).numpy()


def want_parameters(k1, k2, lambda_value):
    for name, value in (('k1', k1), ('k2', k2)):
        if isinstance(value, bool) or np.ndim(value) or not hasattr(value, '__index__') or not 1 <= value < 2 ** 31:
            raise ValueError(f'want {name} as an integer from 1 to 2³¹ − 1, got {value!r}; usual are k1=20, k2=6')
    if not isinstance(lambda_value, numbers.Real) or isinstance(lambda_value, bool) or not 0 <= lambda_value <= 1:
        raise ValueError(f'want lambda_value as a number from 0 to 1, got {lambda_value!r}; 0.3 is usual, 1 ranks by the original distance')


torch.library.define('mgn::k_reciprocal_ranks', f'(Tensor query, Tensor gallery, {IDS}, int k1, int k2, float lambda_value, str metric, '
                                                'int? junk_pid, str precision) -> (Tensor, Tensor, Tensor)')
torch.library.define('mgn::re_ranking', '(Tensor q_g_dist, Tensor q_q_dist, Tensor g_g_dist, int k1, int k2, float lambda_value) -> Tensor')


@denormals()
def _k_reciprocal_ranks(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, k1, k2, lambda_value, metric, junk_pid, precision):
    if query.device.type not in ('cpu', 'cuda'):  # mps has no float64
        query, gallery = query.cpu(), gallery.cpu()
    cosine, queries = metric == 'cosine', len(query)
    compiled = kernels(query.device) or ranking_reference
    norms = torch.cat((finite_norms(compiled, query, 'query'), finite_norms(compiled, gallery, 'gallery')))
    encodings, maxima = encode_features(compiled, torch.cat((query, gallery)), norms, k1, k2, cosine, precision)
    columns = on_host()[1].transpose(*of_rows(encodings, queries, len(norms)), len(norms))
    excluded, redecided = identities(query_pids.numpy(), gallery_pids.numpy(), junk_pid), torch.zeros(1, dtype=torch.int64)
    of_blocks = [(torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64))]
    with filter.exact_float32():
        for block in spans(queries, tile_of(query, gallery)[1]):
            overlaps = Overlaps(*on_host()[1].overlap(*of_rows(encodings, block.start, block.stop), *columns, len(gallery)))
            largest = maxima[block]

            def finals(owners, found):
                keys = keys_of_pairs(compiled, query[block], gallery, owners, found, cosine)
                return final_distances(jaccard_of(overlaps, owners, found), relative(squared(keys, cosine), largest[owners]), lambda_value)
            of_block = excluded.of_queries(block)
            matches = sorted_matches(of_block, query_camids[block].numpy(), gallery_camids.numpy(), finals)
            steps, offsets = torch.zeros(len(matches.keys), dtype=torch.int64), torch.from_numpy(matches.offsets)
            if len(matches.keys):
                count(query[block], gallery, norms[block], norms[queries:], cosine, precision,
                      (as_tensors(matches), as_tensors(of_block), overlaps, torch.from_numpy(largest), lambda_value, steps, redecided))
            of_blocks.append((offsets[1:] + of_blocks[-1][0][-1], as_ranks(steps, matches.offsets)))
    return *(torch.cat(parts) for parts in zip(*of_blocks)), redecided[0]


def count(query, gallery, query_norms, gallery_norms, cosine, precision, counted):
    """Counts the non-matches of all tiles; the products are the device's work, all else the CPU's."""
    device, width = query.device, query.shape[1]
    precision = filter.available(precision, device) if width else 'float32'
    relative_error = filter.relative_error(precision, width, device)
    item_scale, item_shift, largest = (terms.cpu() for terms in filter.item_terms(gallery_norms, cosine))
    of_queries, some = filter.operand(rows(query, slice(None)), precision), rows(query, slice(None)).cpu()
    query_norms, gallery_norms = query_norms.cpu(), gallery_norms.cpu()
    terms = filter.query_terms(query_norms, largest, relative_error, width, cosine)
    for part in spans(len(gallery), tile_of(query, gallery)[0]):
        tile = rows(gallery, part)
        dots = filter.products(of_queries, filter.operand(tile, precision), precision).cpu()
        on_host()[0].count_reranked(Tile(some, tile.cpu(), query_norms, gallery_norms[part]), cosine, part.start,
                                    FilterTerms(dots, item_scale[part], item_shift[part], *terms), *counted)


def on_host():
    """What counts, and what works on sparse rows."""
    compiled = kernels(torch.device('cpu'))
    return compiled or ranking_reference, compiled or reranking_reference


def encode_features(compiled, features, norms, k1, k2, cosine, precision):
    """Encodings of all rows, and the largest d² of each, (N,) float64."""
    neighbours = min(max(k1 + 1, k2), len(features))
    _, items, far = nearest(compiled, features, features, norms, norms, neighbours, cosine, precision, farthest=True)
    maxima = squared(far.numpy(), cosine)

    def relative_of(owners, found):
        return relative(squared(keys_of_pairs(compiled, features, features, owners, found, cosine), cosine), maxima[owners])
    return encode(items, k1, k2, relative_of), maxima


def encode(items, k1, k2, relative_of):
    """Encodings as sparse rows, offsets (N+1,) int64, columns int32 and values float64, from items (N, ≥ max(k1 + 1, k2)), nearest first."""
    sparse = on_host()[1]
    offsets, columns = sparse.reciprocal(items[:, :k1 + 1].contiguous(), round(k1 / 2) + 1)
    owners = np.repeat(np.arange(len(items)), np.diff(offsets.numpy()))
    weights = np.exp(-relative_of(owners, columns.numpy().astype(np.int64)))
    weights /= np.bincount(owners, weights, len(items))[owners]
    encodings = offsets, columns, torch.from_numpy(weights)
    return encodings if k2 == 1 else sparse.mean_rows(*encodings, items[:, :k2].contiguous())


def of_rows(encodings, first, last):
    offsets, columns, values = encodings
    return offsets[first:last + 1] - offsets[first], columns[offsets[first]:offsets[last]], values[offsets[first]:offsets[last]]


def squared(keys, cosine):
    return np.square(np.maximum(1 + keys, 0)) if cosine else keys


def relative(squares, maxima):
    """squares / maxima, 0 where all distances are."""
    return np.divide(squares, maxima, out=np.zeros_like(squares), where=maxima > 0)


def final_distances(jaccard, relative_squares, lambda_value):
    return (1 - lambda_value) * jaccard + lambda_value * relative_squares


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


@denormals()
def _re_ranking(q_g, q_q, g_g, k1, k2, lambda_value):
    q_g, q_q, g_g = (dist.cpu() for dist in (q_g, q_q, g_g))
    compiled, sparse = on_host()
    queries, total = len(q_g), sum(q_g.shape)
    neighbours = min(max(k1 + 1, k2), total)
    items, maxima = torch.empty(total, neighbours, dtype=torch.int64), np.zeros(total)
    final = torch.empty(q_g.shape, dtype=torch.float32)
    kind = torch.promote_types(torch.promote_types(torch.promote_types(q_g.dtype, q_q.dtype), g_g.dtype), torch.float32)

    def distances(part):  # rows of the whole matrix, which is not made
        of_queries, of_gallery = slice(part.start, min(part.stop, queries)), slice(max(part.start - queries, 0), max(part.stop - queries, 0))
        upper = torch.cat((q_q[:, of_queries].T.to(kind), q_g[of_queries].to(kind)), 1)
        lower = torch.cat((q_g[:, of_gallery].T.to(kind), g_g[:, of_gallery].T.to(kind)), 1)
        return torch.cat((upper, lower)).abs_()  # they are to be squared

    for part in spans(total, ROWS // max(total, 1)):
        some = distances(part)
        values = some.new_empty(len(some), neighbours)
        odd = compiled.nearest_in_distances(some, values, items[part])
        maxima[part] = some.amax(1).double().numpy()
        if odd >= 0 or np.isinf(maxima[part]).any():
            row = part.start + (odd if odd >= 0 else int(np.isinf(maxima[part]).argmax()))
            kind_of, number = ('query', row) if row < queries else ('gallery item', row - queries)
            raise ValueError(f'want finite distances, got NaN or infinity among those of {kind_of} {number}; look for what made it')

    def relative_of(owners, found):
        squares = np.empty(len(owners))
        for start in range(0, len(owners), 2 ** 20):  # pairs
            o, f = (torch.from_numpy(array[start:start + 2 ** 20]) for array in (owners, found))
            values = torch.empty(len(o), dtype=torch.float64)
            for dist, first, second, of in ((q_q, f, o, (o < queries) & (f < queries)), (q_g, o, f - queries, (o < queries) & (f >= queries)),
                                            (q_g, f, o - queries, (o >= queries) & (f < queries)),
                                            (g_g, f - queries, o - queries, (o >= queries) & (f >= queries))):
                values[of] = dist[first[of], second[of]].double()
            squares[start:start + 2 ** 20] = np.square(relative(values.numpy(), maxima[owners[start:start + 2 ** 20]]))
        return squares

    encodings = encode(items, k1, k2, relative_of)
    columns = sparse.transpose(*of_rows(encodings, queries, total), total)
    for block in spans(queries, ROWS // max(total, 1)):
        offsets, overlapping, jaccard = sparse.overlap(*of_rows(encodings, block.start, block.stop), *columns, q_g.shape[1])
        owners = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets.numpy()))
        of_jaccard = np.ones((len(offsets) - 1, q_g.shape[1]))
        of_jaccard[owners, overlapping.numpy()] = jaccard.numpy()
        squares = np.square(relative(q_g[block].double().numpy(), maxima[block, None]))  # divided first: squares may leave float64's range
        final[block] = torch.from_numpy(final_distances(of_jaccard, squares, lambda_value))
    return final


@torch.library.register_fake('mgn::k_reciprocal_ranks')
def _(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, k1, k2, lambda_value, metric, junk_pid, precision):
    matches = torch.library.get_ctx().new_dynamic_size()
    return query_pids.new_empty(len(query) + 1), query_pids.new_empty(matches), query_pids.new_empty(())


@torch.library.register_fake('mgn::re_ranking')
def _(q_g_dist, q_q_dist, g_g_dist, k1, k2, lambda_value):
    return q_g_dist.new_empty(q_g_dist.shape, dtype=torch.float32, device='cpu')


torch.library.impl('mgn::k_reciprocal_ranks', 'CompositeExplicitAutograd', uncompiled(_k_reciprocal_ranks))
torch.library.impl('mgn::re_ranking', 'CompositeExplicitAutograd', uncompiled(_re_ranking))
