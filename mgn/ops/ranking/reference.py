"""What the kernels of ranking do, in PyTorch: the same arguments, the same bits."""

import numpy as np
import torch

from mgn.ops.ranking.sparse_rows import mean_rows, overlap, reciprocal, transpose  # noqa: F401, kernels as well
from mgn.ops.ranking.tiles import exact

TILE = 2 ** 22  # elements of float64 copies at a time


def canonical_sum(products):
    """(n, D) float64 → (n,) sums in the one order that defines them."""
    sums = products.new_zeros(len(products), 16)
    for column in range(0, products.shape[1], 16):
        part = products[:, column:column + 16]
        sums[:, :part.shape[1]] += part
    for half in (8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half:2 * half]
    return sums[:, 0]


def canonical_norm(values):
    """(n, D) float64 → (n,). NumPy's root is rounded to nearest; torch's, from MKL, is not."""
    squares = canonical_sum(values * values)
    return torch.from_numpy(np.sqrt(squares.cpu().numpy())).to(squares.device)


def canonical_norms(features, norms):
    for rows, row_norms in zip(split(features, features.shape[1]), split(norms, features.shape[1])):
        row_norms.copy_(canonical_norm(exact(rows)))


def round_to_tf32(features, norms, rounded, residual):
    """To nearest, ties away from zero, in the 13 bits that float32 has more; residual: what that takes of the norm."""
    rounded.copy_((features.view(torch.int32) + 0x1000 & ~0x1fff).view(torch.float32))
    residual.copy_(torch.linalg.vector_norm(features.double() - rounded, dim=1) / norms)


def canonical_keys(query, gallery, queries, items, cosine, keys):
    width = query.shape[1]
    for q, i, pair_keys in zip(*(split(tensor, width) for tensor in (queries, items, keys))):
        x, y = exact(query[q]), exact(gallery[i])
        if cosine:
            scale = canonical_norm(x) * canonical_norm(y)
            pair_keys.copy_(torch.where(scale > 0, -(canonical_sum(x * y) / scale), 0))
        else:
            pair_keys.copy_(canonical_sum((x - y) * (x - y)))


def split(tensor, width):
    return tensor.split(max(1, TILE // max(width, 1)))


def count_nonmatches(tile, cosine, first, filter_terms, matches, excluded, steps, redecided):
    dots, item_scale, item_shift, level_scale, level_shift, error = filter_terms
    similarities = (dots * item_scale + item_shift).double()
    for q in range(len(tile.query)):
        own = slice(matches.offsets[q], matches.offsets[q + 1])
        level = (matches.keys[own] * level_scale[q] + level_shift[q])[:, None]                     # (m, 1)
        margin = error[q] + level.abs() * 2.0 ** -50
        surely = similarities[q] > level + margin                                                  # (m, n)
        perhaps = ~(similarities[q] < level - margin)
        count_undecided(tile, cosine, first, q, (surely, perhaps), matches, excluded, steps, redecided)


def count_undecided(tile, cosine, first, q, before, matches, excluded, steps, redecided, distance_of=None):
    """Adds the steps of query q, given which items come before each match surely and perhaps: keys decide between.

    distance_of(keys, items): what a match's key is compared with, if not with the keys themselves.
    """
    own, (surely, perhaps) = slice(matches.offsets[q], matches.offsets[q + 1]), before
    counted = nonmatches(len(tile.gallery), first, excluded, q)                                    # (n,)
    surely, perhaps = counted & surely, counted & perhaps & ~surely
    items = perhaps.any(0).nonzero()[:, 0]
    keys = torch.empty(len(items), dtype=torch.float64, device=items.device)
    canonical_keys(tile.query, tile.gallery, torch.full_like(items, q), items, cosine, keys)
    keys = distance_of(keys, items) if distance_of else keys
    surely[:, items] |= perhaps[:, items] & precedes(keys, first + items, matches.keys[own], matches.items[own])
    steps[own] += torch.diff(surely.sum(1), prepend=surely.new_zeros(1, dtype=torch.int64))
    redecided += len(items)


def count_reranked(tile, cosine, first, filter_terms, matches, excluded, overlaps, maxima, lambda_value, steps,
                   redecided):
    dots, item_scale, item_shift, level_scale, level_shift, error = filter_terms
    similarities = (dots * item_scale + item_shift).double()
    bounds = torch.tensor([first, first + len(tile.gallery)], dtype=overlaps.items.dtype)
    for q in range(len(tile.query)):
        entries = slice(overlaps.offsets[q], overlaps.offsets[q + 1])
        begin, end = torch.searchsorted(overlaps.items[entries], bounds).add(overlaps.offsets[q])
        jaccard = torch.ones(len(tile.gallery), dtype=torch.float64)
        jaccard[overlaps.items[begin:end].long() - first] = overlaps.jaccard[begin:end]

        def final(keys, items):
            squares = (1 + keys).clamp(min=0).square() if cosine else keys
            relative = squares / maxima[q] if maxima[q] > 0 else squares * 0
            return (1 - lambda_value) * jaccard[items] + lambda_value * relative
        key = (similarities[q] - level_shift[q]) / level_scale[q]
        apart = error[q] / level_scale[q].abs() + 2.0 ** -48
        levels = matches.keys[matches.offsets[q]:matches.offsets[q + 1]][:, None]                  # (m, 1)
        surely = final(key + apart, slice(None)) + 2.0 ** -48 < levels                             # (m, n)
        perhaps = ~(final(key - apart, slice(None)) - 2.0 ** -48 > levels)
        count_undecided(tile, cosine, first, q, (surely, perhaps), matches, excluded, steps, redecided, final)


def count_in_distances(distances, matches, excluded, steps):
    """−1, or the first row with NaN."""
    numbers = torch.arange(distances.shape[1])
    for q, row in enumerate(distances):
        if row.isnan().any():
            return q
        own = slice(matches.offsets[q], matches.offsets[q + 1])
        before = precedes(row.double(), numbers, matches.keys[own], matches.items[own])
        before &= nonmatches(len(row), 0, excluded, q)
        steps[own] += torch.diff(before.sum(1), prepend=torch.zeros(1, dtype=torch.int64))
    return -1


def nonmatches(count, first, excluded, q):
    """(count,): whether the items first, first + 1, … are non-matches of query q."""
    order, begin, end, junk = excluded
    left_out = torch.cat((order[begin[q]:end[q]], junk)) - first
    counted = torch.ones(count, dtype=torch.bool, device=left_out.device)
    counted[left_out[(left_out >= 0) & (left_out < count)]] = False
    return counted


def precedes(keys, items, match_keys, match_items):
    """(m, n): whether (key, item) comes before the match's."""
    return (keys < match_keys[:, None]) | ((keys == match_keys[:, None]) & (items < match_items[:, None]))


def select_nearest(dots, item_scale, item_shift, first, values, items):
    tile_values = dots * item_scale + item_shift
    tile_values = tile_values.masked_fill(tile_values.isnan(), -torch.inf)
    tile_items = torch.arange(first, first + dots.shape[1], device=items.device).expand(dots.shape)
    all_values, all_items = torch.cat((values, tile_values), 1), torch.cat((items, tile_items), 1)
    smallest, order = all_values.topk(values.shape[1], largest=False, sorted=False)
    values.copy_(smallest)
    items.copy_(all_items.gather(1, order))


def nearest_in_distances(distances, values, items):
    """−1, or the first row with NaN."""
    width, k = distances.shape[1], values.shape[1]
    if k == 0:
        return -1
    with_nan = distances.amax(1).isnan().nonzero()
    if len(with_nan):
        return with_nan[0].item()
    smallest, columns = distances.topk(min(k + 1, width), largest=False)
    tied = smallest[:, k - 1] == smallest[:, -1] if k < width else smallest.new_zeros(len(smallest), dtype=torch.bool)
    columns, order = columns[:, :k].sort(dim=1)
    ascending, order = smallest.gather(1, order).sort(dim=1, stable=True)
    values.copy_(ascending)
    items.copy_(columns.gather(1, order))
    for rows in split(tied.nonzero()[:, 0], width):  # more are as small as the k-th: the first columns of these
        ascending, order = distances[rows].sort(dim=1, stable=True)
        values[rows], items[rows] = ascending[:, :k], order[:, :k]
    return -1
