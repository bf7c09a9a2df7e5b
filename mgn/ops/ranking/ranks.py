"""Ranks of every query's true matches: the non-matches before each are counted, never sorted."""

import functools
from typing import NamedTuple

import numpy as np
import torch

from mgn.ops.arguments import all_ids, as_distances, as_junk_pid
from mgn.ops.private import uncompiled
from mgn.ops.ranking import product
from mgn.ops.ranking.counting import Excluded, FilterTerms, Matches, Tile, as_tensors
from mgn.ops.ranking.keys import compared, finite_norms, keys_in_order, ranking_kernels, refuse_not_finite
from mgn.ops.ranking.tiles import OPERANDS, blocks_of, denormals, read_ahead, refuse_nan, rows, spans, tile_of

PAIRS = 2 ** 19  # of one identity looked at together


class MatchRanks(NamedTuple):
    """The ranks of query q are ranks[offsets[q]:offsets[q + 1]], ascending, from 1."""
    offsets: np.ndarray    # (Q+1,) int64
    ranks: np.ndarray      # (M,) int64
    redecided: int         # pairs of query and item that the matrix product left open, and their keys decided


@uncompiled
def match_ranks(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric='cosine', junk_pid=-1,
                precision='float32'):
    """Ranks of the true matches (same pid, other camid) among the non-junk gallery, nearest first.

    The order is that of (canonical key, gallery index). The key, in float64 from float32 features, by sums taken as 16
    interleaved partial sums (element i goes to sum i mod 16, ascending), then halved (sum j takes j+8, then j+4, j+2,
    j+1): cosine: minus dot(q, g) / (‖q‖·‖g‖), 0 for a zero vector; euclidean: Σ (q − g)², each difference and square
    rounded. A matrix product, tile by tile, decides all pairs that are farther apart than it can err; the others are
    decided by their keys.

    Args:
        query: (Q, D), gallery: (G, D), float32 or half, NumPy arrays or tensors of one device; they are not copied. A
            gallery of host memory goes with queries on a GPU too: it is moved there tile by tile. It may be a
            memory-mapped file, larger than memory.
        query_pids, gallery_pids, query_camids, gallery_camids: (Q,) and (G,) of any integer type.
        metric: 'cosine' or 'euclidean'.
        junk_pid: the id of boxes that are neither match nor non-match; None for none. Items of the query's own pid and
            camid are junk too. A query of the junk id has no match.
        precision: of the matrix product: 'float32', 'tf32' or 'bfloat16' (three products of split features); it changes
            the time, never the ranks. Where the device has no units for it, float32.
    Returns:
        MatchRanks. Memory: 256 MB and 32 bytes per row and match at most, beyond features, ids and result.
    Raises:
        UserError: float64 or non-finite features (naming the row), shapes or devices that do not fit, an unknown
            option.
    """
    comparison = compared(query, gallery, metric, precision, streamed=True)
    ids = all_ids(len(query), len(gallery), query_pids, gallery_pids, query_camids, gallery_camids)
    query_norms = finite_norms(comparison.query, 'query')
    excluded = identities(ids, as_junk_pid(junk_pid))
    matches = sorted_matches(excluded, ids, functools.partial(keys_in_order, comparison))
    steps, redecided = nonmatches_between(comparison, query_norms, 0, matches, excluded)
    offsets = matches.offsets
    del matches  # as_ranks takes as much memory
    return MatchRanks(offsets, as_ranks(steps, offsets), redecided)


@uncompiled
@denormals()
def match_ranks_from_distance(dist, query_pids, gallery_pids, query_camids, gallery_camids, junk_pid=-1):
    """As match_ranks, from a matrix of distances: the order is that of (value, gallery index), the values as they are.

    Args:
        dist: (Q, G) float16, bfloat16, float32 or float64, NumPy array or tensor, of any strides; ±inf are values.
        query_pids, gallery_pids, query_camids, gallery_camids, junk_pid: as of match_ranks.
    Returns:
        MatchRanks, redecided 0. It runs on the CPU; memory as of match_ranks.
    Raises:
        UserError: a NaN (naming its place), a matrix that is not of floating point, shapes that do not fit.
    """
    dist = as_distances(dist, 'dist (Q, G)')
    ids = all_ids(*dist.shape, query_pids, gallery_pids, query_camids, gallery_camids)
    dist = dist.cpu()

    def distances_of(queries, items):
        return dist[torch.from_numpy(queries), torch.from_numpy(items)].double().numpy()
    excluded = identities(ids, as_junk_pid(junk_pid))
    matches = sorted_matches(excluded, ids, distances_of)
    offsets, excluded, matches = matches.offsets, as_tensors(excluded), as_tensors(matches)
    steps = torch.zeros(len(matches.keys), dtype=torch.int64)
    for block, distances in blocks_of(dist):
        kernels, given = ranking_kernels(dist.device), (matches.of_queries(block), excluded.of_queries(block))
        refuse_nan(kernels.count_in_distances(distances, *given, steps), distances, block)
    return MatchRanks(offsets, as_ranks(steps, offsets), 0)


def identities(ids, junk_pid):
    """The gallery by identity, and the indices of junk: Excluded."""
    query_pids, gallery_pids = ids.query_pids, ids.gallery_pids
    smallest, largest = (int(gallery_pids.min()), int(gallery_pids.max())) if len(gallery_pids) else (0, 0)
    # NumPy sorts 16 bits by radix.
    narrow = (gallery_pids - smallest).astype(np.uint16) if largest - smallest < 2 ** 16 else gallery_pids
    order = np.argsort(narrow, kind='stable')
    begin, end = (np.searchsorted(gallery_pids, query_pids, side, sorter=order) for side in ('left', 'right'))
    if junk_pid is None:
        return Excluded(order, begin, end, np.empty(0, np.int64))
    end = np.where(query_pids == junk_pid, begin, end)  # a query of the junk id has no match
    return Excluded(order, begin, end, np.flatnonzero(gallery_pids == junk_pid))


def sorted_matches(excluded, ids, keys_of):
    """Matches: the items of every query's identity from another camera. keys_of(queries, items) gives their keys."""
    order, begin, end, _ = excluded
    lengths = end - begin
    reached = np.cumsum(lengths)
    offsets, keys, items = np.zeros(len(begin) + 1, np.int64), [np.empty(0)], [np.empty(0, np.int64)]
    first = 0
    while first < len(begin):
        before = reached[first] - lengths[first]
        last = max(first + 1, int(np.searchsorted(reached, before + PAIRS, 'right')))
        counts = lengths[first:last]
        queries = np.repeat(np.arange(first, last), counts)
        shifts = np.repeat(begin[first:last] + before - (reached[first:last] - counts), counts)
        candidates = order[np.arange(len(queries)) + shifts]
        is_match = ids.gallery_camids[candidates] != ids.query_camids[queries]
        queries, matched = queries[is_match], candidates[is_match]
        matched_keys = keys_of(queries, matched)
        ascending = np.lexsort((matched, matched_keys, queries))
        offsets[first + 1:last + 1] = np.bincount(queries - first, minlength=last - first)
        keys.append(matched_keys[ascending])
        items.append(matched[ascending])
        first = last
    return Matches(np.cumsum(offsets), np.concatenate(keys), np.concatenate(items))


def nonmatches_between(comparison, query_norms, first, matches, excluded, reranking=()):
    """Counts the non-matches between each match and the one before it, in one pass over the gallery's tiles.

    Args:
        comparison: of (Q, D) queries with their norms and (G, D) items, numbered first, first + 1, ….
        matches: Matches of the Q queries, as NumPy arrays; also of items elsewhere.
        excluded: Excluded, as `identities` returns it, of items of this gallery.
        reranking: Overlaps, largest squares and λ, to count by re-ranked distances, on the CPU; queries of one tile.
    Returns:
        (M,) int64 on the CPU, and the number of pairs that were decided by their keys.
    """
    query, gallery, cosine, _ = comparison
    device, width, offsets = query.device, query.shape[1], matches.offsets
    counting_device = torch.device('cpu') if reranking else device
    kernels = ranking_kernels(counting_device)
    count = kernels.count_reranked if reranking else kernels.count_nonmatches
    matches, excluded = as_tensors(matches, counting_device), as_tensors(excluded, counting_device)
    steps = torch.zeros(len(matches.keys), dtype=torch.int64, device=counting_device)
    redecided = torch.zeros(1, dtype=torch.int64, device=counting_device)
    items_at_once, queries_at_once = tile_of(query, gallery)
    precision, relative_error = product.chosen(comparison)

    @functools.lru_cache(maxsize=None if len(query) * width <= OPERANDS else 1)  # converted once, where that fits
    def queries(start, stop):
        query_rows = rows(query, slice(start, stop))
        return query_rows.to(counting_device), product.operand(query_rows, precision)

    with product.exact_float32():
        for part, tile, norms in finite_tiles(comparison, items_at_once):
            item_scale, item_shift, largest = product.item_terms(norms, cosine)
            operand = product.operand(tile, precision)
            for block in spans(len(query), len(query) if reranking else queries_at_once):
                if offsets[block.start] == offsets[block.stop]:
                    continue
                query_rows, query_operand = queries(block.start, block.stop)
                dots = product.products(query_operand, operand, precision)
                terms = product.query_terms(query_norms[block], largest, relative_error, width, cosine)
                terms = FilterTerms(dots, item_scale, item_shift, *terms)
                pairs, terms = (as_tensors(tensors, counting_device) for tensors in (
                    Tile(query_rows, tile, query_norms[block], norms), terms))
                count(pairs, cosine, first + part.start, terms, matches.of_queries(block), excluded.of_queries(block),
                      *reranking, steps, redecided)
    return steps.cpu(), redecided.item()


def finite_tiles(comparison, items_at_once):
    """Yields each part of the gallery, its rows on the query's device and their norms; UserError if not finite."""
    query, gallery, _, _ = comparison
    finite = torch.ones((), dtype=torch.bool, device=query.device)
    parts = spans(len(gallery), items_at_once)
    for part, ahead in zip(parts, [*parts[1:], None]):
        tile = rows(gallery, part).to(query.device)
        if ahead:
            read_ahead(gallery, [(ahead.start, ahead.stop)])
        norms = torch.empty(len(tile), dtype=torch.float64, device=query.device)
        comparison.kernels.canonical_norms(tile, norms)
        finite &= norms.isfinite().all()
        if query.device.type == 'cpu' and not finite:  # elsewhere this would wait for the device
            break
        yield part, tile, norms
    if not finite:
        refuse_not_finite(gallery, 'gallery')


def as_ranks(steps, offsets):
    """Non-matches between each match and its query's one before → its rank: matches take ranks, too. NumPy."""
    reached = steps.add_(1).cumsum_(0).numpy()
    begin, lengths = offsets[:-1], np.diff(offsets)
    before = np.concatenate(([0], reached))[begin]  # all that the queries before have counted
    reached -= np.repeat(before, lengths)
    return reached
