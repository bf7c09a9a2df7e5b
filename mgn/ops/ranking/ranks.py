"""Ranks of every query's true matches: the non-matches before each are counted, never sorted."""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch

from mgn.ops.arguments import all_ids, as_distances, as_junk_pid
from mgn.ops.private import uncompiled
from mgn.ops.ranking import product
from mgn.ops.ranking.counting import Excluded, FilterTerms, Matches, Tile
from mgn.ops.ranking.keys import compared, finite_norms, keys_in_order, ranking_kernels, refuse_not_finite
from mgn.ops.ranking.tiles import (OPERANDS, PRODUCTS, blocks_of, denormals, exact, in_pinned_memory, is_readable,
                                   on_device, once, refuse_nan, rows, spans, tile_of)

PAIRS = 2 ** 19  # of one identity looked at together
KEPT = 3 * 2 ** 23  # elements of queries whose operands are kept for all tiles: 96 MB, twice that if converted


class MatchRanks(NamedTuple):
    """The ranks of query q are ranks[offsets[q]:offsets[q + 1]], ascending, from 1."""
    offsets: np.ndarray    # (Q+1,) int64
    ranks: np.ndarray      # (M,) int64
    redecided: int         # pairs of query and item that the matrix product left open, and their keys decided


@uncompiled
def match_ranks(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric='cosine', junk_pid=-1,
                precision='auto'):
    """Ranks of the true matches (same pid, other camid) among the non-junk gallery, nearest first.

    The order is that of (canonical key, gallery index). The key, in float64 from float32 features, by sums taken as 16
    interleaved partial sums (element i goes to sum i mod 16, ascending), then halved (sum j takes j+8, then j+4, j+2,
    j+1): cosine: minus dot(q, g) / (‖q‖·‖g‖), 0 for a zero vector; euclidean: Σ (q − g)², each difference and square
    rounded. A matrix product, tile by tile, decides all pairs that are farther apart than it can err; the others are
    decided by their keys.

    Args:
        query: (Q, D), gallery: (G, D), float32 or half, NumPy arrays or tensors of one device; they are not copied. A
            gallery of host memory goes with queries on a GPU too: a part is moved there while the one before is ranked.
            It may be a memory-mapped file (np.memmap), larger than memory.
        query_pids, gallery_pids, query_camids, gallery_camids: (Q,) and (G,) of any integer type.
        metric: 'cosine' or 'euclidean'.
        junk_pid: the id of boxes that are neither match nor non-match; None for none. Items of the query's own pid and
            camid are junk too. A query of the junk id has no match.
        precision: of the matrix product: 'auto', 'float32' or 'tf32'. It changes the time, never the ranks. 'auto' is
            'tf32' on GPUs where that is proven to be faster; on CPUs bfloat16 halves with AMX, from 128 dimensions on,
            or int16 with VNNI, from 192 on; else 'float32'. 'tf32' is float32 where there are no units for it, and on
            every CPU.
    Returns:
        MatchRanks. Memory: 256 MB and 32 bytes per row and match at most, beyond features, ids and result; 3 MB a
        thread; on a GPU 2 GB more for features that are converted or rounded.
    Raises:
        UserError: float64 or non-finite features (naming the row), shapes or devices that do not fit, an unknown
            option.
    """
    comparison = compared(query, gallery, metric, precision, streamed=True)
    ids = all_ids(len(query), len(gallery), query_pids, gallery_pids, query_camids, gallery_camids,
                  device=comparison.query.device)
    query_norms = finite_norms(comparison.query, 'query')
    excluded = identities(ids, as_junk_pid(junk_pid))
    matches = sorted_matches(excluded, ids, functools.partial(keys_in_order, comparison))
    steps, redecided = nonmatches_between(comparison, query_norms, matches, excluded)
    offsets = matches.offsets
    del matches  # as_ranks takes as much memory
    return MatchRanks(offsets.cpu().numpy(), as_ranks(steps, offsets), redecided)


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
    excluded = identities(ids, as_junk_pid(junk_pid))
    matches = sorted_matches(excluded, ids, lambda queries, items: exact(dist[queries, items]))
    steps = torch.zeros_like(matches.items)
    for block, distances in blocks_of(dist):
        refuse_nan(ranking_kernels(dist.device).count_in_distances(
            distances, matches.of_queries(block), excluded.of_queries(block), steps), distances, block)
    offsets = matches.offsets
    del matches  # as_ranks takes as much memory
    return MatchRanks(offsets.numpy(), as_ranks(steps, offsets), 0)


def identities(ids, junk_pid):
    """The gallery by identity, and the indices of junk: Excluded."""
    gallery_pids, order = ids.gallery_pids.sort(stable=True)
    begin, end = (torch.searchsorted(gallery_pids, ids.query_pids, right=right) for right in (False, True))
    if junk_pid is None:
        return Excluded(order, begin, end, order[:0])
    end = torch.where(ids.query_pids == junk_pid, begin, end)  # a query of the junk id has no match
    return Excluded(order, begin, end, (ids.gallery_pids == junk_pid).nonzero()[:, 0])


def sorted_matches(excluded, ids, keys_of):
    """Matches: the items of every query's identity from another camera. keys_of(queries, items) gives their keys.

    PAIRS of a query and an item of its identity at a time. Their keys are asked for in the order of the items, so that
    a row of the gallery is read once.
    """
    reached = (excluded.end - excluded.begin).cumsum(0).cpu().numpy()
    offsets = torch.zeros(len(reached) + 1, dtype=torch.int64, device=excluded.order.device)
    keys, items, first = [offsets[:0].double()], [offsets[:0]], 0
    while first < len(reached):
        before = reached[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(reached, before + PAIRS, 'right')))
        queries, matched = matches_by_item(excluded, ids, slice(first, last))
        matched_keys = keys_of(queries, matched)
        ascending = in_order(matched_keys, queries - first)
        offsets[1:].index_add_(0, queries, torch.ones_like(queries))
        keys.append(matched_keys.index_select(0, ascending))  # a third of the time of keys[ascending]
        items.append(matched.index_select(0, ascending))
        first = last
    return Matches(offsets.cumsum_(0), torch.cat(keys), torch.cat(items))


def matches_by_item(excluded, ids, block):
    """Queries and items of all matches of a block of queries, ascending by (item, query)."""
    order, begin, end, _ = excluded.of_queries(block)
    lengths = end - begin
    owners = torch.repeat_interleave(lengths)
    shifts = begin - lengths.cumsum(0) + lengths
    places = torch.arange(len(owners), device=order.device).add_(shifts.index_select(0, owners))
    items = order.index_select(0, places)
    queries = owners.add_(block.start)
    from_another = ids.gallery_camids.index_select(0, items) != ids.query_camids.index_select(0, queries)
    matches = from_another.nonzero()[:, 0]
    items = items.index_select(0, matches)
    ascending = (items.int() if len(order) < 2 ** 31 else items).sort(stable=True).indices  # of 32 bits: half the time
    return queries.index_select(0, matches.index_select(0, ascending)), items.index_select(0, ascending)


def in_order(keys, queries):
    """The order of matches by (query, key), others as they are. Sorts integers, which takes a third of the time."""
    bits = keys.view(torch.int64)
    bits = bits.masked_fill(bits == -2 ** 63, 0)  # −0 becomes 0
    by_key = (bits ^ (bits >> 63 & 2 ** 63 - 1)).sort(stable=True).indices
    return by_key.index_select(0, queries.index_select(0, by_key).int().sort(stable=True).indices)


def nonmatches_between(comparison, query_norms, matches, excluded, reranking=(), host=None):
    """Counts the non-matches between each match and the one before it, in one pass over the gallery's tiles.

    Args:
        comparison: of (Q, D) queries with their norms and (G, D) items.
        matches: Matches of the Q queries, on the device that counts.
        excluded: Excluded, as `identities` returns it, there as well.
        reranking: Overlaps, largest squares and λ, to count by re-ranked distances, on the CPU.
        host: for that, the features (query, gallery) in main memory, where the comparison's are not.
    Returns:
        (M,) int64, and the number of pairs that were decided by their keys.
    """
    kernels = ranking_kernels(matches.keys.device)
    count = kernels.count_reranked if reranking else kernels.count_nonmatches
    steps = torch.zeros_like(matches.items)
    redecided = torch.zeros(1, dtype=torch.int64, device=steps.device)
    offsets, blocks = matches.offsets.cpu(), spans(len(query_norms), tile_of(comparison.query)[1])
    blocks = [block for block in blocks if offsets[block.start] < offsets[block.stop]]
    tiles = filtered_tiles(comparison, query_norms, blocks)
    with product.exact_float32():
        for block, part, tile, terms in in_main_memory(tiles, *host) if host else tiles:
            count(tile, comparison.cosine, part.start, terms, matches.of_queries(block),
                  excluded.of_queries(block), *reranking, steps, redecided)
    return steps, redecided.item()


def filtered_tiles(comparison, query_norms, blocks):
    """Yields (block of queries, part of the gallery, Tile, FilterTerms) for all tiles; UserError if not finite.

    On a GPU what is of items alone is made for as many tiles as `once` allows.
    """
    query, gallery, cosine, *_ = comparison
    device, width = query.device, max(query.shape[1], 1)
    items_at_once = tile_of(query)[0]
    precision = product.available(comparison.precision, device, query.shape[1] if blocks else 0)
    room = torch.empty(PRODUCTS, dtype=torch.float32)

    @functools.lru_cache(maxsize=None if query.numel() <= KEPT else 1)
    def of_queries(number):
        query_rows, norms = rows(query, blocks[number]), query_norms[blocks[number]]
        operand, residual = product.operands(query_rows, norms, precision)
        return query_rows, norms, product.products_of(operand(slice(None)), precision, room), residual
    pieces = items_at_once
    if device.type == 'cuda':
        pieces = max((once(device) if gallery.is_cuda else OPERANDS) // (width if is_readable(gallery) else 2 * width),
                     items_at_once)
    at_once = blocks and device.type == 'cpu' and precision != 'tf32'  # norms come with the first products
    with_norms = of_queries(0)[2] if at_once else comparison.kernels.canonical_norms
    for piece, items, norms, made in finite_pieces(comparison, spans(len(gallery), pieces), with_norms):
        scale, shift, largest = product.item_terms(norms, cosine)
        operand, residual = (items.__getitem__, made[1]) if at_once else product.operands(items, norms, precision)
        for number, block in enumerate(blocks):
            query_rows, own_norms, products, query_residual = of_queries(number)
            error = product.relative_error(precision, query.shape[1], device, query_residual, residual)
            terms = product.query_terms(own_norms, largest, error, query.shape[1], cosine)
            for part in spans(len(items), items_at_once):
                dots = made[0] if at_once and number == 0 else products(operand(part))[0]
                tile = Tile(query_rows, items[part], own_norms, norms[part])
                yield (block, slice(piece.start + part.start, piece.start + part.stop), tile,
                       FilterTerms(dots, scale[part], shift[part], *terms))


def in_main_memory(tiles, query, gallery):
    """The tiles of a GPU for the CPU to count, with rows of these features: a tile is copied while one is counted."""
    def copied():
        for block, part, tile, terms in tiles:
            computing = torch.cuda.current_stream(terms.dots.device)
            norms, terms = map(in_pinned_memory, tile[2:]), FilterTerms(*map(in_pinned_memory, terms))
            tile = Tile(rows(query, block), rows(gallery, part), *norms)
            yield computing.record_event(), (block, part, tile, terms)
    for (copy, tile), _ in itertools.pairwise(itertools.chain(copied(), [None])):  # the next copy has begun
        copy.synchronize()
        yield tile


def finite_pieces(comparison, pieces, with_norms):
    """Yields each piece of the gallery, its rows on the query's device, their norms, and what with_norms(rows, norms),
    which computes these, returns; UserError if not finite.
    """
    query, gallery, *_ = comparison
    finite = torch.ones((), dtype=torch.bool, device=query.device)
    for piece, items in zip(pieces, on_device(gallery, pieces, query.device)):
        norms = torch.empty(len(items), dtype=torch.float64, device=query.device)
        made = with_norms(items, norms)
        finite &= norms.sum() < torch.inf  # false of NaN, too
        if query.device.type == 'cpu' and not finite:  # elsewhere this would wait for the device
            break
        yield piece, items, norms, made
    if not finite:
        refuse_not_finite(gallery, 'gallery')


def as_ranks(steps, offsets):
    """Non-matches between each match and its query's one before → its rank: matches take ranks, too. NumPy."""
    reached = steps.add_(1).cumsum_(0)
    before = torch.cat((reached.new_zeros(1), reached))[offsets[:-1]]  # all that the queries before have counted
    return reached.sub_(torch.repeat_interleave(before, offsets.diff())).cpu().numpy()
