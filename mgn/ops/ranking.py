"""Ranks of every query's true matches, in an order that no GEMM, tile, thread count or machine can change."""

import functools
from typing import NamedTuple

import numpy as np
import torch

from mgn.ops import filter, ranking_reference
from mgn.ops.arguments import all_ids, as_distances, as_junk_pid, feature_pair
from mgn.ops.counting import Excluded, FilterTerms, Matches, Tile, as_tensors
from mgn.ops.native import kernels
from mgn.ops.tiles import (OPERANDS, blocks_of, denormals, finite_norms, keys_of_pairs, not_a_number, not_finite, read_ahead, rows, runs_of,
                           spans, tile_of, uncompiled)

PAIRS = 2 ** 19  # of one identity looked at together


class MatchRanks(NamedTuple):
    """The ranks of query q are ranks[offsets[q]:offsets[q + 1]], ascending, from 1."""
    offsets: np.ndarray    # (Q+1,) int64
    ranks: np.ndarray      # (M,) int64
    redecided: int         # pairs of query and item that the matrix product left open, and their keys decided


def match_ranks(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric='cosine', junk_pid=-1,
                precision='float32'):
    """Ranks of the true matches (same pid, other camid) among the non-junk gallery, nearest first.

    The order is that of (canonical key, gallery index). The key, in float64 from float32 features, by sums taken as 16
    interleaved partial sums (element i goes to sum i mod 16, ascending), then halved (sum j takes j+8, then j+4, j+2, j+1):
    cosine: minus dot(q, g) / (‖q‖·‖g‖), 0 for a zero vector; euclidean: Σ (q − g)², each difference and square rounded.
    A matrix product, tile by tile, decides all pairs that are farther apart than it can err; the others are decided by their keys.

    Args:
        query: (Q, D), gallery: (G, D), float32 or half, NumPy arrays or tensors of one device; they are not copied. A gallery of host
            memory goes with queries on a GPU too: it is moved there tile by tile. It may be a memory-mapped file, larger than memory.
        query_pids, gallery_pids, query_camids, gallery_camids: (Q,) and (G,) of any integer type.
        metric: 'cosine' or 'euclidean'.
        junk_pid: the id of boxes that are neither match nor non-match; None for none. Items of the query's own pid and
            camid are junk too. A query of the junk id has no match.
        precision: of the matrix product: 'float32', 'tf32' or 'bfloat16' (three products of split features); it changes the
            time, never the ranks. Where the device has no units for it, float32.
    Returns:
        MatchRanks. Memory: 256 MB and 32 bytes per row and match at most, beyond features, ids and result.
    Raises:
        ValueError: float64 or non-finite features (naming the row), shapes or devices that do not fit, an unknown option.
    """
    query, gallery = feature_pair(query, gallery, metric, precision, streamed=True)
    ids = all_ids(len(query), len(gallery), query_pids, gallery_pids, query_camids, gallery_camids)
    offsets, ranks, redecided = torch.ops.mgn.match_ranks.default(query, gallery, *ids, metric, as_junk_pid(junk_pid), precision)
    return MatchRanks(offsets.numpy(), ranks.numpy(), redecided.item())


def match_ranks_from_distance(dist, query_pids, gallery_pids, query_camids, gallery_camids, junk_pid=-1):
    """As match_ranks, from a matrix of distances: the order is that of (value, gallery index), the values taken as they are.

    Args:
        dist: (Q, G) float16, bfloat16, float32 or float64, NumPy array or tensor, of any strides; ±inf are values.
        query_pids, gallery_pids, query_camids, gallery_camids, junk_pid: as of match_ranks.
    Returns:
        MatchRanks, redecided 0. It runs on the CPU; memory as of match_ranks.
    Raises:
        ValueError: a NaN (naming its place), a matrix that is not of floating point, shapes that do not fit.
    """
    dist = as_distances(dist, 'dist (Q, G)')
    ids = all_ids(*dist.shape, query_pids, gallery_pids, query_camids, gallery_camids)
    offsets, ranks = torch.ops.mgn.match_ranks_from_distance.default(dist, *ids, as_junk_pid(junk_pid))
    return MatchRanks(offsets.numpy(), ranks.numpy(), 0)


# Below: the operators as torch knows them, on tensors; ids are int64 on the CPU, and so are the results.

IDS = 'Tensor query_pids, Tensor gallery_pids, Tensor query_camids, Tensor gallery_camids'
torch.library.define('mgn::match_ranks', f'(Tensor query, Tensor gallery, {IDS}, str metric, int? junk_pid, str precision) -> '
                                         '(Tensor, Tensor, Tensor)')
torch.library.define('mgn::match_ranks_from_distance', f'(Tensor dist, {IDS}, int? junk_pid) -> (Tensor, Tensor)')


def _match_ranks(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric, junk_pid, precision):
    query, gallery = on_float64_device(query, gallery)
    compiled, cosine = kernels(query.device) or ranking_reference, metric == 'cosine'
    query_norms = finite_norms(compiled, query, 'query')
    excluded = identities(query_pids.numpy(), gallery_pids.numpy(), junk_pid)
    matches = sorted_matches(excluded, query_camids.numpy(), gallery_camids.numpy(),
                             lambda owners, found: keys_in_order(compiled, query, gallery, owners, found, cosine))
    offsets = matches.offsets
    steps, redecided = nonmatches_between(query, query_norms, gallery, 0, matches, excluded, cosine, precision)
    del matches
    return torch.from_numpy(offsets), as_ranks(steps, offsets), redecided


def on_float64_device(query, gallery):
    """Both where keys can be computed: mps has no float64."""
    return (query, gallery) if query.device.type in ('cpu', 'cuda') else (query.cpu(), gallery.cpu())


def keys_in_order(compiled, query, gallery, owners, items, cosine):
    """keys_of_pairs, the gallery's rows taken in their order and asked for ahead, as a file is read best."""
    ascending, keys = np.argsort(items, kind='stable'), np.empty(len(items))
    parts = [ascending[part] for part in spans(len(items), OPERANDS // 4 // max(gallery.shape[1], 1))]
    for part, ahead in zip(parts, [*parts[1:], None]):
        if ahead is not None:
            read_ahead(gallery, runs_of(items[ahead]))
        keys[part] = keys_of_pairs(compiled, query, gallery, owners[part], items[part], cosine)
    return keys


def nonmatches_between(query, query_norms, gallery, first, matches, excluded, cosine, precision):
    """Counts the non-matches between each match and the one before it, in one pass over the gallery's tiles.

    Args:
        query: (Q, D) and its norms, gallery: (G, D), whose rows are the items first, first + 1, ….
        matches: Matches of the Q queries, as NumPy arrays; also of items elsewhere.
        excluded: Excluded, as `identities` returns it, of items of this gallery.
    Returns:
        (M,) int64, and redecided, a scalar; both on the CPU.
    """
    device, width = query.device, query.shape[1]
    compiled, offsets = kernels(device) or ranking_reference, matches.offsets
    matches, excluded = as_tensors(matches, device), as_tensors(excluded, device)
    steps = torch.zeros(len(matches.keys), dtype=torch.int64, device=device)
    redecided = torch.zeros(1, dtype=torch.int64, device=device)

    precision = filter.available(precision, device) if width else 'float32'
    finite = torch.ones((), dtype=torch.bool, device=device)
    items_at_once, queries_at_once = tile_of(query, gallery)
    parts = spans(len(gallery), items_at_once)

    @functools.lru_cache(maxsize=None if len(query) * width <= OPERANDS else 1)  # converted and rounded once, where that fits
    def queries(start, stop):
        some = rows(query, slice(start, stop))
        return some, filter.operand(some, precision)

    with filter.exact_float32():
        relative_error = filter.relative_error(precision, width, device)
        for part, ahead in zip(parts, [*parts[1:], None]):
            tile = rows(gallery, part).to(device)
            if ahead:
                read_ahead(gallery, [(ahead.start, ahead.stop)])
            norms = torch.empty(len(tile), dtype=torch.float64, device=device)
            compiled.canonical_norms(tile, norms)
            finite &= norms.isfinite().all()
            if device.type == 'cpu' and not finite:  # elsewhere this would wait for the device
                break
            item_scale, item_shift, largest = filter.item_terms(norms, cosine)
            operand = filter.operand(tile, precision)
            for block in spans(len(query), queries_at_once):
                if offsets[block.start] == offsets[block.stop]:
                    continue
                some, of_queries = queries(block.start, block.stop)
                dots = filter.products(of_queries, operand, precision)
                terms = filter.query_terms(query_norms[block], largest, relative_error, width, cosine)
                compiled.count_nonmatches(Tile(some, tile, query_norms[block], norms), cosine, first + part.start,
                                          FilterTerms(dots, item_scale, item_shift, *terms), matches.of_queries(block),
                                          excluded.of_queries(block), steps, redecided)
    if not finite:
        raise not_finite(gallery, 'gallery')
    return steps.cpu(), redecided[0].cpu()


@denormals()
def _match_ranks_from_distance(dist, query_pids, gallery_pids, query_camids, gallery_camids, junk_pid):
    dist = dist.cpu()
    compiled = kernels(dist.device) or ranking_reference
    excluded = identities(query_pids.numpy(), gallery_pids.numpy(), junk_pid)
    matches = sorted_matches(excluded, query_camids.numpy(), gallery_camids.numpy(),
                             lambda owners, found: dist[torch.from_numpy(owners), torch.from_numpy(found)].double().numpy())
    offsets = matches.offsets
    excluded, matches = as_tensors(excluded), as_tensors(matches)
    steps = torch.zeros(len(matches.keys), dtype=torch.int64)
    for block, some in blocks_of(dist):
        odd = compiled.count_in_distances(some, matches.of_queries(block), excluded.of_queries(block), steps)
        if odd >= 0:
            raise not_a_number(some, odd, block.start)
    return matches.offsets, as_ranks(steps, offsets)


def identities(query_pids, gallery_pids, junk_pid):
    """The gallery by identity, and the indices of junk: Excluded."""
    smallest, largest = (gallery_pids.min(), gallery_pids.max()) if len(gallery_pids) else (0, 0)
    narrow = (gallery_pids - smallest).astype(np.uint16) if int(largest) - int(smallest) < 2 ** 16 else gallery_pids  # NumPy sorts by radix up to here
    order = np.argsort(narrow, kind='stable')
    begin, end = (np.searchsorted(gallery_pids, query_pids, side, sorter=order) for side in ('left', 'right'))
    junk = np.flatnonzero(gallery_pids == junk_pid) if junk_pid is not None else np.empty(0, np.int64)
    if junk_pid is not None:
        end = np.where(query_pids == junk_pid, begin, end)
    return Excluded(order, begin, end, junk)


def sorted_matches(excluded, query_camids, gallery_camids, keys_of):
    """The true matches of every query: those of its identity, from another camera. keys_of(queries, items) are their keys."""
    order, begin, end, _ = excluded
    lengths = end - begin
    reached = np.cumsum(lengths)
    offsets, keys, items = np.zeros(len(begin) + 1, np.int64), [np.empty(0)], [np.empty(0, np.int64)]
    first = 0
    while first < len(begin):
        before = reached[first] - lengths[first]
        last = max(first + 1, int(np.searchsorted(reached, before + PAIRS, 'right')))
        of = lengths[first:last]
        owners = np.repeat(np.arange(first, last), of)
        found = order[np.arange(len(owners)) + np.repeat(begin[first:last] + before - (reached[first:last] - of), of)]
        true = gallery_camids[found] != query_camids[owners]
        owners, found = owners[true], found[true]
        found_keys = keys_of(owners, found)
        ascending = np.lexsort((found, found_keys, owners))
        offsets[first + 1:last + 1] = np.bincount(owners - first, minlength=last - first)
        keys.append(found_keys[ascending])
        items.append(found[ascending])
        first = last
    return Matches(np.cumsum(offsets), np.concatenate(keys), np.concatenate(items))


def as_ranks(steps, offsets):
    """Non-matches between each match and its query's one before → its rank: matches take ranks, too."""
    reached = steps.add_(1).cumsum_(0).numpy()
    begin, lengths = offsets[:-1], np.diff(offsets)
    before = np.concatenate(([0], reached))[begin]  # all that the queries before have counted
    reached -= np.repeat(before, lengths)
    return torch.from_numpy(reached)


@torch.library.register_fake('mgn::match_ranks')
def _(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric, junk_pid, precision):
    matches = torch.library.get_ctx().new_dynamic_size()
    return (query_pids.new_empty(len(query) + 1), query_pids.new_empty(matches), query_pids.new_empty(()))


@torch.library.register_fake('mgn::match_ranks_from_distance')
def _(dist, query_pids, gallery_pids, query_camids, gallery_camids, junk_pid):
    return query_pids.new_empty(len(dist) + 1), query_pids.new_empty(torch.library.get_ctx().new_dynamic_size())


torch.library.impl('mgn::match_ranks', 'CompositeExplicitAutograd', uncompiled(_match_ranks))
torch.library.impl('mgn::match_ranks_from_distance', 'CompositeExplicitAutograd', uncompiled(_match_ranks_from_distance))
