"""Features and ranks → what a report shows of them: chosen queries with their nearest, distributions, pairs of cameras.

Ranks come from match_ranks and neighbours from topk, so no matrix of all queries and gallery items is held.
"""

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from mgn.data.datasets import JUNK_PID
from mgn.ops import match_ranks, topk
from mgn.ops.metrics import query_metrics

LISTED = 10     # nearest items that take a rank; junk between them is listed, too
LOOKED_AT = 30  # nearest items that these are taken from
CAMERAS = 24    # of the gallery, those with most images
SAMPLED = 1000  # queries whose similarities are counted
BINS = 100      # of similarities from −1 to 1
ITEMS = 4096    # gallery items at a time


def by_query(ranks):
    """AP and first rank of every query: (Q,) each, NaN and 0 where it has no match."""
    counts = np.diff(ranks.offsets)
    ap, first = np.full(len(counts), np.nan), np.zeros(len(counts), np.int64)
    first[counts > 0], ap[counts > 0] = query_metrics(ranks.offsets, ranks.ranks)[:2]
    return ap, first


def choose(ap, count):
    """At most `count` of the queries that have a match: the worst third, the best third, and others at random."""
    order = np.argsort(ap, kind='stable')[:np.count_nonzero(~np.isnan(ap))]
    if len(order) <= count:
        return order
    third = count // 3
    others = np.random.default_rng(0).permutation(order[third:len(order) - third])[:count - 2 * third]
    return np.concatenate((order[:third], others, order[len(order) - third:]))


def most_changed(before, after, count):
    """The queries whose AP differs most between two networks, at most `count` of them."""
    change = np.nan_to_num(np.abs(after - before))
    return np.argsort(-change, kind='stable')[:min(count, np.count_nonzero(change))]


def ranked_lists(features, ids, ranks, chosen):
    """{query: (the ranks of its matches, [(item, kind, rank, similarity) of its nearest])} of the chosen queries.

    kind: 'match', 'other', or 'junk', which takes no rank: it is None then.
    """
    (query, gallery), (query_pids, gallery_pids, query_camids, gallery_camids) = features, map(np.asarray, ids)
    place, lists = gallery.device if isinstance(gallery, torch.Tensor) else 'cpu', {}
    distances, items = (x.cpu().numpy() for x in topk(query[chosen].to(place), gallery, LOOKED_AT))
    for q, row, similarities in zip(chosen.tolist(), items, 1 - distances):
        match, junk = kinds(query_pids[q], gallery_pids[row], query_camids[q], gallery_camids[row])
        rank = np.cumsum(~junk)
        lists[q] = ranks.ranks[ranks.offsets[q]:ranks.offsets[q + 1]].tolist(), [
            (int(row[i]), 'junk' if junk[i] else 'match' if match[i] else 'other', None if junk[i] else int(rank[i]),
             round(float(similarities[i]), 4)) for i in np.flatnonzero(rank - ~junk < LISTED)]
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
    return {'queries': len(sampled), 'matches': counts[0].tolist(), 'others': counts[1].tolist()}


def by_cameras(features, ids, dataset):
    """mAP of each camera's queries, a row, in the gallery images of each camera alone, a column; None: no match."""
    (query, gallery), (query_pids, gallery_pids, query_camids, gallery_camids) = features, map(np.asarray, ids)
    cameras, item_cameras = (np.array([sample.camid for sample in part]) for part in (dataset.query, dataset.gallery))
    columns = sorted(camera for camera, _ in Counter(item_cameras.tolist()).most_common(CAMERAS))
    rows, means = sorted(set(cameras.tolist())), []
    for camera in columns:
        items = np.flatnonzero(item_cameras == camera)
        ap, first = by_query(match_ranks(query, gallery[items], query_pids, gallery_pids[items], query_camids,
                                         gallery_camids[items]))
        of_rows = (ap[(cameras == row) & (first > 0)] for row in rows)
        means.append([round(each.mean(), 4) if len(each) else None for each in of_rows])
    return {'rows': rows, 'columns': columns, 'mAP': list(zip(*means))}
