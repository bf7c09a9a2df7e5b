"""Features and ranks → what a report shows of them: chosen queries with their nearest, distributions, pairs of cameras.

Ranks come from match_ranks and neighbours from topk, so no matrix of all queries and gallery items is held.
"""

import numpy as np
import torch
import torch.nn.functional as F

from mgn.data.datasets import JUNK_PID
from mgn.ops import match_ranks, topk
from mgn.ops.metrics import average_precision, first_rank, true_matches

LISTED, LOOKED_AT = 10, 30                # nearest items that take a rank, and all that are looked at for them
BINS, SAMPLED, ITEMS = 100, 1000, 4096    # of similarities from −1 to 1; queries; gallery items at a time


def by_query(ranks):
    """AP and first rank of every query: (Q,) each, NaN and 0 where it has no match."""
    matches, matched = true_matches(ranks.offsets, ranks.ranks, True), np.diff(ranks.offsets) > 0
    ap, first = np.full(len(matched), np.nan), np.zeros(len(matched), np.int64)
    ap[matched], first[matched] = average_precision(matches), first_rank(matches)
    return ap, first


def choose(ap, count):
    """At most `count` of the queries that have a match: the worst third, the best third, and others at random."""
    order = np.argsort(ap, kind='stable')[:np.count_nonzero(~np.isnan(ap))]
    third = min(count, len(order)) // 3
    others = np.random.default_rng(0).permutation(order[third:len(order) - third])[:count - 2 * third]
    return np.concatenate((order[:third], others, order[len(order) - third:]))


def most_changed(before, after, count):
    """The queries whose AP differs most between two networks, at most `count` of them."""
    change = np.nan_to_num(np.abs(after - before))
    return np.argsort(-change, kind='stable')[:min(count, np.count_nonzero(change))]


def ranked_lists(features, ids, ranks, chosen, dataset, images):
    """Of each chosen query: the ranks of its matches and [(image, kind, rank, similarity), …] of its nearest.

    images: {Sample: the number of its image on the page}, which takes those that are new. kind: 'match', 'other', or
    'junk', which has no rank.
    """
    (query, gallery), (query_pids, gallery_pids, query_camids, gallery_camids) = features, map(np.asarray, ids)
    place, lists = getattr(gallery, 'device', 'cpu'), []
    distances, items = (x.cpu().numpy() for x in topk(query[chosen].to(place), gallery, LOOKED_AT))
    for q, row, cosines in zip(chosen, items, 1 - distances):
        match, junk = kinds(query_pids[q], gallery_pids[row], query_camids[q], gallery_camids[row])
        rank, kind = np.cumsum(~junk), np.where(junk, 'junk', np.where(match, 'match', 'other'))
        shown = row[rank - ~junk < LISTED]  # those before which fewer than LISTED take a rank
        image, *nearest = (images.setdefault(sample, len(images)) for sample in (
            dataset.query[q], *(dataset.gallery[i] for i in shown)))
        lists.append({'query': q, 'image': image, 'ranks': ranks.ranks[ranks.offsets[q]:ranks.offsets[q + 1]],
                      'nearest': list(zip(nearest, kind, np.where(junk, None, rank), cosines.round(4)))})
    return lists


def kinds(query_pids, gallery_pids, query_camids, gallery_camids):
    """Which pairs are matches, and which are junk, as match_ranks defines them."""
    same = query_pids == gallery_pids
    junk = (same & (query_camids == gallery_camids)) | (gallery_pids == JUNK_PID)
    return same & ~junk, junk


def similarities(features, ids):
    """How many pairs have a cosine in each of BINS, of matches and of non-matches, and of how many queries.

    SAMPLED queries, evenly spaced in the list, with the whole gallery.
    """
    (query, gallery), (query_pids, gallery_pids, query_camids, gallery_camids) = features, map(np.asarray, ids)
    sampled = np.unique(np.linspace(0, len(query) - 1, SAMPLED).astype(int))
    rows, counts = F.normalize(query[sampled].float()), np.zeros((2, BINS), np.int64)
    for first in range(0, len(gallery), ITEMS):
        part = slice(first, first + ITEMS)
        items = gallery[part] if isinstance(gallery, torch.Tensor) else torch.from_numpy(np.array(gallery[part]))
        cosines = (rows @ F.normalize(items.to(rows)).T).cpu().numpy()
        match, junk = kinds(query_pids[sampled, None], gallery_pids[part], query_camids[sampled, None],
                            gallery_camids[part])
        for count, pairs in zip(counts, (match, ~match & ~junk)):
            count += np.histogram(cosines[pairs].clip(-1, 1), BINS, (-1, 1))[0]
    return {'queries': len(sampled), 'matches': counts[0], 'others': counts[1]}


def by_cameras(features, ids, dataset):
    """mAP of each camera's queries, a row, in the gallery images of each camera alone, a column; None: no match."""
    (query, gallery), (query_pids, gallery_pids, query_camids, gallery_camids) = features, map(np.asarray, ids)
    cameras, item_cameras = (np.array([sample.camid for sample in part]) for part in (dataset.query, dataset.gallery))
    rows, columns, means = np.unique(cameras), np.unique(item_cameras), []
    for camera in columns:
        items = np.flatnonzero(item_cameras == camera)
        ap, first = by_query(match_ranks(query, gallery[items], query_pids, gallery_pids[items], query_camids,
                                         gallery_camids[items]))
        of_rows = (ap[(cameras == row) & (first > 0)] for row in rows)
        means.append([each.mean().round(4) if len(each) else None for each in of_rows])
    return {'rows': rows, 'columns': columns, 'mAP': list(zip(*means))}
