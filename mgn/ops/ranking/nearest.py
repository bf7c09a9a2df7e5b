"""The k nearest of every query by (canonical key, gallery index): a matrix product selects, keys decide."""

import math
from typing import NamedTuple

import numpy as np
import torch

from mgn.ops.arguments import as_distances, neighbours, truth
from mgn.ops.errors import UserError
from mgn.ops.private import uncompiled
from mgn.ops.ranking import product, reference
from mgn.ops.ranking.keys import compared, finite_norms, keys_of_pairs, ranking_kernels
from mgn.ops.ranking.tiles import PRODUCTS, blocks_of, denormals, refuse_nan, spans, tile_of

GPU_SELECTED = 2 ** 26  # products of a GPU's tile, 256 MB: what is selected is read and settled fewer times
STATE = 2 ** 30     # bytes of what is selected for all queries at once; beyond them block after block
SELECTED = 2 ** 21  # candidates of a block
# Queries at a time whose candidates do not fit. Queries up to which, on a CPU, float32 products are the fastest:
# rounding the gallery takes longer than others save.
CROWDED, FEW = 256, 160


class Nearest(NamedTuple):
    """The k nearest of every query, ascending; tensors where the query is one, else NumPy arrays."""
    distances: torch.Tensor  # (Q, k) float64: 1 − cos or ‖q − g‖; of a matrix its own values
    indices: torch.Tensor    # (Q, k) int64, of gallery rows


@uncompiled
def topk(query, gallery, k, metric='cosine', precision='auto', exclude_self=False):
    """The k nearest gallery items of every query, by (canonical key, gallery index) as match_ranks orders them.

    A matrix product, tile by tile, selects; what lies within its error of the k-th is decided by its key. So the result
    is the same bits for any tile, thread count, device and precision of the product. Where query and gallery are one
    tensor, each product of two tiles serves both.

    Args:
        query: (Q, D), gallery: (G, D), float32 or half, NumPy arrays or tensors of one device.
        k: from 1 to 4096.
        metric: 'cosine' or 'euclidean'. precision: as of match_ranks, but on a CPU float32 for up to 160 queries.
        exclude_self: query and gallery are the same tensor, and no item is its own neighbour.
    Returns:
        Nearest, of min(k, G) columns (G − 1 with exclude_self). Distances carry no gradient. Memory: 256 MB, 48 bytes
        per row and 30 per entry of the result, beyond features and result; 1 GB more where query and gallery are one
        tensor; 3 MB a thread; on a GPU 2 GB more.
    Raises:
        UserError: k out of range, exclude_self of two tensors, and whatever match_ranks refuses of features.
    """
    k = neighbours(k)
    truth(exclude_self, 'exclude_self', 'True leaves each item out of its own neighbours')
    comparison = compared(query, gallery, metric, precision)
    if exclude_self and not is_one_tensor(comparison):
        raise UserError('query and gallery must be the same tensor for exclude_self=True, but two were given; pass one '
                        'twice, or leave the query itself out of the gallery')
    norms = finite_norms(comparison.query, 'query'), finite_norms(comparison.gallery, 'gallery')
    k = min(k, max(len(comparison.gallery) - exclude_self, 0))
    keys, items, _ = nearest(comparison, *norms, k, exclude_self)
    # NumPy's root is rounded to nearest, torch's is not.
    distances = keys.add_(1).clamp_(min=0) if comparison.cosine else torch.from_numpy(np.sqrt(keys.cpu().numpy()))
    return like(query, distances.to(items.device), items)


@uncompiled
@denormals()
def topk_from_distance(dist, k):
    """The k smallest of every row, ties by column: the first k columns of a stable sort.

    Args:
        dist: (Q, G) float16, bfloat16, float32 or float64, NumPy array or tensor, of any strides; ±inf are values.
        k: from 1 to 4096.
    Returns:
        Nearest, of min(k, G) columns; distances are dist's own values, of its type and without gradient.
    Raises:
        UserError: a NaN (naming its place), k out of range, a matrix that is not of floating point.
    """
    k, matrix = neighbours(k), as_distances(dist, 'dist (Q, G)')
    kernels = ranking_kernels(matrix.device) if matrix.device.type == 'cpu' else reference
    k = min(k, matrix.shape[1])
    values, items = matrix.new_empty(len(matrix), k), matrix.new_empty(len(matrix), k, dtype=torch.int64)
    for block, distances in blocks_of(matrix):
        block_values = distances.new_empty(len(distances), k)
        refuse_nan(kernels.nearest_in_distances(distances, block_values, items[block]), distances, block)
        values[block] = block_values
    return like(dist, values, items)


def is_one_tensor(comparison):
    """Whether query and gallery are the same memory, read in the same way."""
    query, gallery = ((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in comparison[:2])
    return query == gallery


def like(given, distances, items):
    """Nearest of tensors where a tensor was given, else of NumPy arrays."""
    return Nearest(*((distances, items) if isinstance(given, torch.Tensor) else (distances.numpy(), items.numpy())))


class Search(NamedTuple):
    """The `count` first of every query by sign · key, sought among the `capacity` first by the matrix product."""
    count: int
    sign: int      # −1: the farthest come first
    capacity: int


def nearest(comparison, query_norms, gallery_norms, k, exclude_self=False, farthest=False):
    """Keys (Q, k) float64 and items (Q, k) int64 of the k nearest, and the largest key of each query, (Q,).

    The largest key is asked for by `farthest`, else None. All on the query's device.
    """
    query, gallery, cosine, *_ = comparison
    searches = [Search(count, sign, min(count + exclude_self + max(16, count // 2), len(gallery)))
                for count, sign in ([(k, 1), (1, -1)] if farthest else [(k, 1)])]
    results = [[torch.empty(len(query), search.count, dtype=dtype, device=query.device)
                for dtype in (torch.float64, torch.int64)] for search in searches]
    if len(gallery) and len(query) and k:
        width = query.shape[1]
        # Of width 0 all is float32.
        precision = product.available(comparison.precision, query.device, width * (query.is_cuda or len(query) > FEW))
        comparison = comparison._replace(precision=precision)
        of_items = product.operands(gallery, gallery_norms, precision)
        of_queries = of_items if is_one_tensor(comparison) else product.operands(query, query_norms, precision)
        operands, residuals = zip(of_queries, of_items)
        *item_terms, largest = product.item_terms(gallery_norms, cosine)
        relative_error = product.relative_error(precision, width, query.device, *residuals)
        error = product.query_terms(query_norms, largest, relative_error, width, cosine)[-1]
        # No key is larger where no feature is negative, and then there may be many as large.
        never_negative = farthest and cosine and query.shape[1] and min(query.amin(), gallery.amin()) >= 0
        with product.exact_float32():
            for block, selected in selections(comparison, operands, item_terms, searches):
                for search, (keys, items), candidates in zip(searches, results, selected):
                    keys[block], items[block], crowded, bound = settle(comparison, search, block, candidates,
                                                                       error[block], exclude_self)
                    if search.sign < 0 and never_negative:
                        crowded = crowded[keys[crowded, 0] != 0]
                    for queries in crowded.split(CROWDED) if len(crowded) else ():
                        limits = bound[queries - block.start], search.sign * keys[queries, -1:], items[queries, -1:]
                        keys[queries], items[queries] = settle_crowded(comparison, operands, search, queries, limits,
                                                                       item_terms, exclude_self)
    return *results[0], results[1][0][:, 0] if farthest else None


def selections(comparison, operands, item_terms, searches):
    """Yields each block of queries with (values, items) for each search: its `capacity` smallest −sign · similarity."""
    query, gallery, _, precision = comparison
    capacity = sum(search.capacity for search in searches)
    items_at_once, queries_at_once = tile_of(query, GPU_SELECTED)
    at_most = max(SELECTED // capacity, 1)
    is_one = is_one_tensor(comparison) and len(query) * capacity * 12 <= STATE
    if is_one:
        items_at_once = queries_at_once = min(math.isqrt(items_at_once * queries_at_once), at_most)
    terms = [[-search.sign * of_items for of_items in item_terms] for search in searches]
    room = torch.empty(0 if query.is_cuda else items_at_once * queries_at_once, dtype=torch.float32)
    selected = {}  # of a block's start: what is selected so far

    def select(block, part, dots):
        if block.start not in selected:
            selected[block.start] = [(dots.new_full((len(dots), search.capacity), torch.inf),
                                      dots.new_full((len(dots), search.capacity), -1, dtype=torch.int64))
                                     for search in searches]
        for (scale, shift), (values, items) in zip(terms, selected[block.start]):
            comparison.kernels.select_nearest(dots, scale[part], shift[part], part.start, values, items)

    for block in spans(len(query), min(queries_at_once, at_most)):
        products = product.products_of(operands[0](block), precision, room)
        for part in spans(len(gallery), items_at_once):
            if is_one and part.start < block.start:
                continue
            dots = products(operands[1](part))[0]
            select(block, part, dots)
            if is_one and part.start > block.start:
                select(part, block, dots.T.contiguous() if dots.is_cuda else dots.T)
            del dots  # before the next is made
        yield block, selected.pop(block.start)


def settle(comparison, search, block, candidates, error, exclude_self):
    """The block's `count` first by (sign · key, item) of what is selected.

    Returns keys and items (n, count); which queries have more candidates than were selected, so that their keys and
    items may not be final; and a bound of every query's candidates.
    """
    (values, items), (k, sign, capacity) = candidates, search
    if exclude_self:
        own = items == torch.arange(block.start, block.stop, device=items.device)[:, None]
        values, items = values.masked_fill(own, torch.inf), items.masked_fill(own, -1)
    values, order = values.sort(dim=1)
    items = items.gather(1, order)
    unknown = (values == -torch.inf).sum(1)  # these may be anywhere, so the k-th of the others bounds the k-th
    known = torch.cat((values, values.new_full((len(values), k), torch.inf)), 1)
    bound = known.gather(1, (unknown + k - 1)[:, None])[:, 0].double() + 2 * error
    # Unless all were selected; the last may be the query itself.
    crowded = bound.isinf() if capacity == len(comparison.gallery) else ~(values[:, -1 - exclude_self] > bound)
    is_candidate = (values <= bound[:, None]) & (items >= 0)
    items = items[:, :max(int(is_candidate.sum(1).max()), k)]
    found = tuple(is_candidate[:, :items.shape[1]].nonzero().T)
    keys = torch.full(items.shape, torch.inf, dtype=torch.float64, device=items.device)
    keys[found] = sign * keys_of_pairs(comparison, found[0] + block.start, items[found])
    keys, items = first_by_key(keys, items, k)
    return sign * keys, items, (crowded | error.isinf()).nonzero()[:, 0] + block.start, bound


def first_by_key(keys, items, k):
    """The first k columns of (n, m) in the order of (key, item)."""
    items, order = items.sort(dim=1)
    keys, order = keys.gather(1, order).sort(dim=1, stable=True)
    return keys[:, :k], items.gather(1, order)[:, :k]


def settle_crowded(comparison, operands, search, queries, limits, item_terms, exclude_self):
    """As settle, of some queries, from all products: every pair within the bound goes by its key.

    operands: functions of queries and of items, as product.operands returns them. limits: the bound (n,) of each query,
    and sign · key and item (n, 1) after which none of its `count` first comes.
    """
    (bound, limit_keys, limit_items), (item_scale, item_shift), (k, sign, _) = limits, item_terms, search
    precision, comparison = comparison.precision, comparison.of_queries(queries)
    query, gallery, *_ = comparison
    none = torch.full_like(limit_keys, torch.inf), torch.full_like(limit_items, len(gallery))
    keys, items = (column.repeat(1, k) for column in none)
    products = product.products_of(operands[0](queries), precision, torch.empty(PRODUCTS, dtype=torch.float32))
    for part in spans(len(gallery), tile_of(query)[0]):
        dots = products(operands[1](part))[0]
        values = dots * (-sign * item_scale[part]) - sign * item_shift[part]
        is_candidate = ~(values > bound[:, None])
        if exclude_self:
            is_candidate &= torch.arange(part.start, part.stop, device=queries.device) != queries[:, None]
        owners, found = is_candidate.nonzero().T
        found += part.start
        found_keys = sign * keys_of_pairs(comparison, owners, found)
        limit_key, limit_item = limit_keys[owners, 0], limit_items[owners, 0]
        within = ((found_keys < limit_key) | ((found_keys == limit_key) & (found <= limit_item))).nonzero()[:, 0]
        owners, found, found_keys = owners[within], found[within], found_keys[within]
        counts = owners.bincount(minlength=len(query))
        place = owners, torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]
        new_keys, new_items = (column.repeat(1, int(counts.max())) for column in none)
        new_keys[place], new_items[place] = found_keys, found
        keys, items = first_by_key(torch.cat((keys, new_keys), 1), torch.cat((items, new_items), 1), k)
    return sign * keys, items
