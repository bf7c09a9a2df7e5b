"""What the kernels of ranking do, in PyTorch: the same arguments, the same bits."""

import numpy as np
import torch

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


def exact(features):
    """(n, D) float32 → float64 of the same values; torch.set_flush_denormal would make denormals 0 on the way."""
    bits = features.contiguous().view(torch.int32)
    denormal = (bits & 0x7fffffff < 0x800000) & (bits & 0x7fffffff > 0)
    values = features.double()
    if denormal.any():
        fraction = (bits & 0x7fffff).double() * 2.0 ** -149
        values = torch.where(denormal, torch.where(bits < 0, -fraction, fraction), values)
    return values


def canonical_norm(values):
    """(n, D) float64 → (n,). NumPy's root is rounded to nearest; torch's, from MKL, is not."""
    squares = canonical_sum(values * values)
    return torch.from_numpy(np.sqrt(squares.cpu().numpy())).to(squares.device)


def canonical_norms(features, norms):
    for some, out in zip(split(features, features.shape[1]), split(norms, features.shape[1])):
        out.copy_(canonical_norm(exact(some)))


def canonical_keys(query, gallery, queries, items, cosine, keys):
    width = query.shape[1]
    for q, i, out in zip(*(split(tensor, width) for tensor in (queries, items, keys))):
        x, y = exact(query[q]), exact(gallery[i])
        if cosine:
            scale = canonical_norm(x) * canonical_norm(y)
            out.copy_(torch.where(scale > 0, -(canonical_sum(x * y) / scale), 0))
        else:
            out.copy_(canonical_sum((x - y) * (x - y)))


def count_nonmatches(tile, cosine, first, filter_terms, matches, excluded, steps, redecided):
    query, gallery, _, _ = tile
    dots, item_scale, item_shift, level_scale, level_shift, error = filter_terms
    offsets, keys, items = matches
    similarities = (dots * item_scale + item_shift).double()
    for q in range(len(query)):
        own = slice(offsets[q], offsets[q + 1])
        level = (keys[own] * level_scale[q] + level_shift[q])[:, None]                   # (m, 1)
        margin = error[q] + level.abs() * 2.0 ** -50
        counted = nonmatches(len(gallery), first, excluded, q)                               # (n,)
        before = counted & (similarities[q] > level + margin)                                # (m, n)
        undecided = counted & ~before & ~(similarities[q] < level - margin)
        at = undecided.any(0).nonzero()[:, 0]
        found = torch.empty(len(at), dtype=torch.float64, device=query.device)
        canonical_keys(query, gallery, torch.full_like(at, q), at, cosine, found)
        before[:, at] |= undecided[:, at] & precedes(found, first + at, keys[own], items[own])
        steps[own] += torch.diff(before.sum(1), prepend=before.new_zeros(1, dtype=torch.int64))
        redecided += len(at)


def count_in_distances(distances, matches, excluded, steps):
    offsets, keys, items = matches
    numbers = torch.arange(distances.shape[1])
    for q, row in enumerate(distances):
        if row.isnan().any():
            return q
        own = slice(offsets[q], offsets[q + 1])
        before = nonmatches(len(row), 0, excluded, q) & precedes(row.double(), numbers, keys[own], items[own])
        steps[own] += torch.diff(before.sum(1), prepend=torch.zeros(1, dtype=torch.int64))
    return -1


def nonmatches(count, first, excluded, q):
    """(count,): whether the items first, first + 1, … are non-matches of query q."""
    order, begin, end, junk = excluded
    left_out = torch.cat((order[begin[q]:end[q]], junk)) - first
    counted = torch.ones(count, dtype=torch.bool, device=left_out.device)
    counted[left_out[(left_out >= 0) & (left_out < count)]] = False
    return counted


def precedes(keys, items, of_matches, match_items):
    """(m, n): whether (key, item) comes before the match's."""
    return (keys < of_matches[:, None]) | ((keys == of_matches[:, None]) & (items < match_items[:, None]))


def split(tensor, width):
    return tensor.split(max(1, TILE // max(width, 1)))


def select_nearest(dots, item_scale, item_shift, first, values, items):
    found = dots * item_scale + item_shift
    found = found.masked_fill(found.isnan(), -torch.inf)
    numbers = torch.arange(first, first + dots.shape[1], device=items.device).expand(dots.shape)
    together, numbers = torch.cat((values, found), 1), torch.cat((items, numbers), 1)
    smallest, order = together.topk(values.shape[1], largest=False, sorted=False)
    values.copy_(smallest)
    items.copy_(numbers.gather(1, order))


def nearest_in_distances(distances, values, items):
    for some, of_values, of_items in zip(*(split(tensor, distances.shape[1]) for tensor in (distances, values, items))):
        if some.isnan().any():
            return distances.isnan().any(1).nonzero()[0].item()
        ascending, order = some.sort(dim=1, stable=True)
        of_values.copy_(ascending[:, :values.shape[1]])
        of_items.copy_(order[:, :values.shape[1]])
    return -1


def count_reranked(tile, cosine, first, filter_terms, matches, excluded, overlaps, maxima, lambda_value, steps, redecided):
    query, gallery, _, _ = tile
    dots, item_scale, item_shift, level_scale, level_shift, error = filter_terms
    offsets, keys, items = matches
    overlap_offsets, overlap_items, jaccard = overlaps
    similarities = (dots * item_scale + item_shift).double()
    numbers = first + torch.arange(len(gallery))
    for q in range(len(query)):
        own = slice(offsets[q], offsets[q + 1])
        of_gallery = slice(*torch.searchsorted(overlap_items[overlap_offsets[q]:overlap_offsets[q + 1]], torch.tensor([first, first + len(gallery)],
                                               dtype=overlap_items.dtype)).add(overlap_offsets[q]))
        distance = torch.ones(len(gallery), dtype=torch.float64)
        distance[overlap_items[of_gallery].long() - first] = jaccard[of_gallery]

        def final(key, at):
            square = (1 + key).clamp(min=0).square() if cosine else key
            return (1 - lambda_value) * distance[at] + lambda_value * (square / maxima[q] if maxima[q] > 0 else square * 0)
        counted = nonmatches(len(gallery), first, excluded, q)
        key, apart = (similarities[q] - level_shift[q]) / level_scale[q], error[q] / level_scale[q].abs() + 2.0 ** -48
        before = counted & (final(key + apart, slice(None)) + 2.0 ** -48 < keys[own][:, None])           # (m, n)
        undecided = counted & ~before & ~(final(key - apart, slice(None)) - 2.0 ** -48 > keys[own][:, None])
        at = undecided.any(0).nonzero()[:, 0]
        found = torch.empty(len(at), dtype=torch.float64)
        canonical_keys(query, gallery, torch.full_like(at, q), at, cosine, found)
        before[:, at] |= undecided[:, at] & precedes(final(found, at), numbers[at], keys[own], items[own])
        steps[own] += torch.diff(before.sum(1), prepend=before.new_zeros(1, dtype=torch.int64))
        redecided += len(at)
