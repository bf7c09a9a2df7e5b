"""The k nearest of every query by (canonical key, gallery index): a matrix product selects, keys decide."""

from typing import NamedTuple

import numpy as np
import torch

from mgn.ops import filter, ranking_reference
from mgn.ops.arguments import as_distances, feature_pair
from mgn.ops.native import kernels
from mgn.ops.tiles import blocks_of, denormals, finite_norms, keys_of_pairs, not_a_number, rows, spans, tile_of, uncompiled

LARGEST_K = 4096
STATE = 2 ** 30     # bytes of what is selected for all queries at once; beyond them block after block
SELECTED = 2 ** 21  # candidates of a block
CROWDED = 256       # queries at a time whose candidates do not fit


class Nearest(NamedTuple):
    """The k nearest of every query, ascending; tensors where the query is one, else NumPy arrays."""
    distances: torch.Tensor  # (Q, k) float64: 1 − cos or ‖q − g‖; of a matrix its own values
    indices: torch.Tensor    # (Q, k) int64, of gallery rows


def topk(query, gallery, k, metric='cosine', precision='float32', exclude_self=False):
    """The k nearest gallery items of every query, by (canonical key, gallery index) as match_ranks orders them.

    A matrix product, tile by tile, selects; what lies within its error of the k-th is decided by its key. So the result is the
    same bits for any tile, thread count, device and precision of the product. Where query and gallery are one tensor, each
    product of two tiles serves both.

    Args:
        query: (Q, D), gallery: (G, D), float32 or half, NumPy arrays or tensors of one device.
        k: from 1 to 4096.
        metric: 'cosine' or 'euclidean'. precision: as of match_ranks; it changes the time alone.
        exclude_self: query and gallery are the same tensor, and no item is its own neighbour.
    Returns:
        Nearest, of min(k, G) columns (G − 1 with exclude_self). Distances carry no gradient. Memory: 256 MB, 48 bytes per row and
        30 per entry of the result, beyond features and result; 1 GB more where query and gallery are one tensor.
    Raises:
        ValueError: k out of range, exclude_self of two tensors, and whatever match_ranks refuses of features.
    """
    want_k(k)
    if not isinstance(exclude_self, bool):
        raise ValueError(f'want exclude_self True or False, got {exclude_self!r}; True leaves each item out of its own neighbours')
    as_given = type(query)
    query, gallery = feature_pair(query, gallery, metric, precision)
    if exclude_self and not same(query, gallery):
        raise ValueError('want query and gallery to be the same tensor for exclude_self=True, got two; pass one twice, or leave out what you '
                         'know to be the query itself')
    return given_back(as_given, torch.ops.mgn.topk.default(query, gallery, k, metric, precision, exclude_self))


def topk_from_distance(dist, k):
    """The k smallest of every row, ties by column: the first k columns of a stable sort.

    Args:
        dist: (Q, G) float16, bfloat16, float32 or float64, NumPy array or tensor, of any strides; ±inf are values.
        k: from 1 to 4096.
    Returns:
        Nearest, of min(k, G) columns; distances are dist's own values, of its type and without gradient.
    Raises:
        ValueError: a NaN (naming its place), k out of range, a matrix that is not of floating point.
    """
    want_k(k)
    as_given = type(dist)
    return given_back(as_given, torch.ops.mgn.topk_from_distance.default(as_distances(dist, 'dist (Q, G)'), k))


def want_k(k):
    if isinstance(k, bool) or np.ndim(k) or not hasattr(k, '__index__') or not 1 <= k <= LARGEST_K:
        raise ValueError(f'want k as an integer from 1 to {LARGEST_K}, got {k!r}; longer lists are a sort, e.g. of pairwise_distance')


def same(query, gallery):
    return (query.data_ptr(), query.shape, query.stride(), query.dtype) == (gallery.data_ptr(), gallery.shape, gallery.stride(), gallery.dtype)


def given_back(as_given, result):
    return Nearest(*result) if issubclass(as_given, torch.Tensor) else Nearest(*(tensor.numpy() for tensor in result))


torch.library.define('mgn::topk', '(Tensor query, Tensor gallery, int k, str metric, str precision, bool exclude_self) -> (Tensor, Tensor)')
torch.library.define('mgn::topk_from_distance', '(Tensor dist, int k) -> (Tensor, Tensor)')


def _topk(query, gallery, k, metric, precision, exclude_self):
    cosine = metric == 'cosine'
    if query.device.type not in ('cpu', 'cuda'):  # mps has no float64
        one = same(query, gallery)
        query = query.cpu()
        gallery = query if one else gallery.cpu()
    compiled = kernels(query.device) or ranking_reference
    query_norms, gallery_norms = finite_norms(compiled, query, 'query'), finite_norms(compiled, gallery, 'gallery')
    k = min(k, len(gallery) - (1 if exclude_self and len(gallery) else 0))
    keys, items = nearest(compiled, query, gallery, query_norms, gallery_norms, k, cosine, precision, exclude_self)
    distances = keys.add_(1).clamp_(min=0) if cosine else torch.from_numpy(np.sqrt(keys.numpy()))  # torch's root is not rounded to nearest
    return distances.to(query.device), items.to(query.device)


def nearest(compiled, query, gallery, query_norms, gallery_norms, k, cosine, precision='float32', exclude_self=False, farthest=False):
    """Keys (Q, k) float64 and items (Q, k) int64 of the k nearest; with `farthest` also the largest key of each query, (Q,). On the CPU."""
    wanted = [(k, 1)] + [(1, -1)] * farthest  # how many, and in which direction of the key
    results = [(torch.empty(len(query), count, dtype=torch.float64), torch.empty(len(query), count, dtype=torch.int64)) for count, _ in wanted]
    if len(gallery) == 0 or len(query) == 0 or k == 0:
        return *results[0], *(keys[:, 0] for keys, _ in results[1:])
    device, width = query.device, query.shape[1]
    precision = filter.available(precision, device) if width else 'float32'
    item_scale, item_shift, largest = filter.item_terms(gallery_norms, cosine)
    capacities = [min(count + exclude_self + max(16, count // 2), len(gallery)) for count, _ in wanted]
    items_at_once, queries_at_once = tile_of(query, gallery)
    queries_at_once = min(queries_at_once, max(SELECTED // sum(capacities), 1))
    one = same(query, gallery) and len(query) * sum(capacities) * 12 <= STATE
    if one:
        items_at_once = queries_at_once = min(items_at_once, queries_at_once)
    blocks = spans(len(query), queries_at_once)
    # No key is larger where no feature is negative, and then there may be many as large.
    ceiling = 0 if farthest and cosine and width and min(query.amin(), gallery.amin()) >= 0 else torch.inf
    selects = compiled if hasattr(compiled, 'select_nearest') else ranking_reference  # on CUDA torch.topk does
    chosen = {}  # of a block: what is selected so far, in each direction

    def select(block, part, dots):
        if block.start not in chosen:
            chosen[block.start] = [(torch.full((len(dots), capacity), torch.inf, dtype=torch.float32, device=device),
                                    torch.full((len(dots), capacity), -1, dtype=torch.int64, device=device)) for capacity in capacities]
        for (_, sign), (values, items) in zip(wanted, chosen[block.start]):
            selects.select_nearest(dots, -sign * item_scale[part], -sign * item_shift[part], part.start, values, items)

    with filter.exact_float32():
        relative_error = filter.relative_error(precision, width, device)
        _, _, error = filter.query_terms(query_norms, largest, relative_error, width, cosine)
        for block in blocks:
            of_queries = filter.operand(rows(query, block), precision)
            for part in spans(len(gallery), items_at_once):
                if one and part.start < block.start:
                    continue
                dots = filter.products(of_queries, filter.operand(rows(gallery, part), precision), precision)
                select(block, part, dots)
                if one and part.start > block.start:
                    select(part, block, dots.T.contiguous())
            for (count, sign), (keys, items), selected in zip(wanted, results, chosen.pop(block.start)):
                settled = settle(compiled, query, gallery, block, *selected, error[block], count, sign, cosine, exclude_self)
                keys[block], items[block], crowded, bound = settled
                if sign < 0:
                    crowded = crowded[~(keys[crowded, 0] == ceiling)]
                for some in crowded.split(CROWDED) if len(crowded) else ():
                    keys[some], items[some] = of_crowded(compiled, query, gallery, some, bound[some - block.start], keys[some, -1:], items[some, -1:],
                                                         item_scale, item_shift, count, sign, cosine, exclude_self, precision)
    return *results[0], *(keys[:, 0] for keys, _ in results[1:])


def settle(compiled, query, gallery, block, values, items, error, k, sign, cosine, exclude_self):
    """The block's k nearest by (sign · key, item) of what is selected: (n, C) values, the smallest ones of −sign · similarity.

    Returns keys, items (n, k); which queries have more candidates than were selected, for whom keys and items are those of what was, and
    a bound of every query's candidates.
    """
    owner = torch.arange(block.start, block.stop, device=items.device)[:, None]
    if exclude_self:
        values = values.masked_fill(items == owner, torch.inf)
        items = items.masked_fill(items == owner, -1)
    values, order = values.sort(dim=1)
    items = items.gather(1, order)
    capacity = values.shape[1]
    unknown = (values == -torch.inf).sum(1)  # these may be anywhere, so the k-th of the others bounds the k-th
    kth = values.gather(1, (unknown + k - 1).clamp(max=capacity - 1)[:, None])[:, 0].double()
    kth[unknown + k > capacity] = torch.inf
    bound = kth + 2 * error
    crowded = bound.isinf() if capacity == len(gallery) else ~(values[:, -1 - exclude_self] > bound)  # the last may be the query itself
    crowded |= error.isinf()
    candidates = (values <= bound[:, None]) & (items >= 0)
    candidates = candidates[:, :max(int(candidates.sum(1).max()), k)]
    items = items[:, :candidates.shape[1]]
    owners = owner.expand_as(items)[candidates]
    keys = torch.full(items.shape, torch.inf, dtype=torch.float64, device=items.device)
    keys[candidates] = sign * torch.from_numpy(keys_of_pairs(compiled, query, gallery, owners.cpu().numpy(), items[candidates].cpu().numpy(),
                                                             cosine)).to(keys.device)
    keys, items = first_by_key(keys, items, k)
    return sign * keys.cpu(), items.cpu(), crowded.cpu().nonzero()[:, 0] + block.start, bound


def first_by_key(keys, items, k):
    """The first k columns of (n, m) in the order of (key, item)."""
    items, order = items.sort(dim=1)
    keys, order = keys.gather(1, order).sort(dim=1, stable=True)
    return keys[:, :k], items.gather(1, order)[:, :k]


def of_crowded(compiled, query, gallery, queries, bound, limit_keys, limit_items, item_scale, item_shift, k, sign, cosine, exclude_self, precision):
    """As settle, of some queries alone, from all products: every pair within the bound goes by its key. None of the k nearest comes after the
    limit, (n, 1) key and item."""
    some = query[queries.to(query.device)]
    limit_keys = sign * limit_keys
    keys = torch.full((len(some), k), torch.inf, dtype=torch.float64)
    items = torch.full((len(some), k), len(gallery))
    operand = filter.operand(rows(some, slice(None)), precision)
    for part in spans(len(gallery), tile_of(query, gallery)[0]):
        dots = filter.products(operand, filter.operand(rows(gallery, part), precision), precision)
        value = dots * (-sign * item_scale[part]) - sign * item_shift[part]
        candidates = (~(value > bound[:, None])).cpu()
        if exclude_self:
            candidates &= torch.arange(part.start, part.stop) != queries[:, None]
        owners, found = candidates.nonzero().T
        found += part.start
        found_keys = sign * torch.from_numpy(keys_of_pairs(compiled, some, gallery, owners.numpy(), found.numpy(), cosine))
        limit_key, limit_item = limit_keys[owners, 0], limit_items[owners, 0]
        within = (found_keys < limit_key) | ((found_keys == limit_key) & (found <= limit_item))
        owners, found, found_keys = owners[within], found[within], found_keys[within]
        counts = owners.bincount(minlength=len(some))
        at = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]  # among its owner's
        new_keys = torch.full((len(some), int(counts.max())), torch.inf, dtype=torch.float64)
        new_items = torch.full(new_keys.shape, len(gallery))
        new_keys[owners, at], new_items[owners, at] = found_keys, found
        keys, items = first_by_key(torch.cat((keys, new_keys), 1), torch.cat((items, new_items), 1), k)
    return sign * keys, items


@denormals()
def _topk_from_distance(dist, k):
    compiled = kernels(dist.device) if dist.device.type == 'cpu' else None
    compiled = compiled or ranking_reference
    k = min(k, dist.shape[1])
    distances, items = dist.new_empty(len(dist), k), dist.new_empty(len(dist), k, dtype=torch.int64)
    for block, some in blocks_of(dist):
        values = some.new_empty(len(some), k)
        odd = compiled.nearest_in_distances(some, values, items[block])
        if odd >= 0:
            raise not_a_number(some, odd, block.start)
        distances[block] = values
    return distances, items


@torch.library.register_fake('mgn::topk')
def _(query, gallery, k, metric, precision, exclude_self):
    count = torch.sym_min(k, torch.sym_max(gallery.shape[0] - int(exclude_self), 0))
    return query.new_empty(query.shape[0], count, dtype=torch.float64), query.new_empty(query.shape[0], count, dtype=torch.int64)


@torch.library.register_fake('mgn::topk_from_distance')
def _(dist, k):
    count = torch.sym_min(k, dist.shape[1])
    return dist.new_empty(dist.shape[0], count), dist.new_empty(dist.shape[0], count, dtype=torch.int64)


torch.library.impl('mgn::topk', 'CompositeExplicitAutograd', uncompiled(_topk))
torch.library.impl('mgn::topk_from_distance', 'CompositeExplicitAutograd', uncompiled(_topk_from_distance))
