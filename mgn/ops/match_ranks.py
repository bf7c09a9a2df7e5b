"""Ranks of every query's true matches, in an order that no GEMM, tile, thread count or machine can change."""

from typing import NamedTuple

import numpy as np
import torch

UNIT = 2.0 ** -53  # unit roundoff of float64
CHUNK_BYTES = 128 << 20  # of approximate keys held at a time


class MatchRanks(NamedTuple):
    """The ranks of query q are ranks[offsets[q]:offsets[q + 1]], ascending, from 1."""
    offsets: np.ndarray    # (Q+1,) int64
    ranks: np.ndarray      # (M,) int64
    redecided: int         # pairs that the matrix product left open and the canonical key decided


def match_ranks(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, junk_pid=-1):
    """Ranks of the true matches (same pid, other camid) among the non-junk gallery, by cosine similarity.

    The order is that of (canonical key, gallery index). The key, in float64 from float32 features: minus
    dot(q, g) / (‖q‖·‖g‖), each sum taken as 16 interleaved partial sums (element i goes to sum i mod 16, ascending), then
    halved (sum j takes j+8, then j+4, j+2, j+1); 0 for a zero vector. A float64 matrix product approximates all keys;
    a pair within its rounding error of a match is decided by its key.

    Args:
        query: (Q, D), gallery: (G, D), float32 or half, NumPy arrays or tensors.
        query_pids, gallery_pids, query_camids, gallery_camids: (Q,) and (G,) integers.
        junk_pid: the id of boxes that are neither match nor non-match; None for none. Items of the query's own pid and
            camid are junk too. A query of the junk id has no match.
    Raises:
        ValueError: float64 or non-finite features, or shapes that do not fit.
    """
    query, gallery = as_features(query, 'query'), as_features(gallery, 'gallery')
    query_pids, query_camids = (as_ids(ids, len(query), name) for ids, name in
                                ((query_pids, 'query_pids'), (query_camids, 'query_camids')))
    gallery_pids, gallery_camids = (as_ids(ids, len(gallery), name) for ids, name in
                                    ((gallery_pids, 'gallery_pids'), (gallery_camids, 'gallery_camids')))
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f'want query and gallery of one width, got {query.shape} and {gallery.shape}')

    # Product and key each carry at most D roundings relative to ‖q‖·‖g‖ (Higham, "Accuracy and Stability", §3.1), and a
    # few more of norms and division; float32 products neither overflow nor underflow in float64.
    tolerance = 4 * (query.shape[1] + 16) * UNIT
    query_norms, gallery_norms = norms(query), norms(gallery)
    gallery_ids = np.arange(len(gallery)) if junk_pid is None else np.flatnonzero(gallery_pids != junk_pid)
    ranks, redecided = [], 0
    chunk = max(1, CHUNK_BYTES // (8 * max(len(gallery), 1)))
    for first in range(0, len(query), chunk):
        dots = query[first:first + chunk] @ gallery.T
        for q, row in enumerate(dots, first):
            same_pid = gallery_pids == query_pids[q]
            if query_pids[q] == junk_pid and junk_pid is not None:
                same_pid[:] = False
            matches = np.flatnonzero(same_pid & (gallery_camids != query_camids[q]))
            if len(matches) == 0:
                ranks.append(matches)
                continue
            keys = -cosine(row, query_norms[q], gallery_norms)
            keys[matches] = canonical_keys(query[q], gallery[matches], query_norms[q], gallery_norms[matches])
            strangers = gallery_ids[~same_pid[gallery_ids]]
            undecided = strangers[gap_to_nearest(keys[strangers], np.sort(keys[matches])) <= tolerance]
            keys[undecided] = canonical_keys(query[q], gallery[undecided], query_norms[q], gallery_norms[undecided])
            redecided += len(undecided)
            ranked = np.sort(np.concatenate([matches, strangers]))
            ranked = ranked[np.argsort(keys[ranked], kind='stable')]
            ranks.append(np.flatnonzero(same_pid[ranked]) + 1)
    offsets = np.cumsum([0, *map(len, ranks)])
    return MatchRanks(offsets, np.concatenate([np.empty(0, np.int64), *ranks]).astype(np.int64), redecided)


def canonical_keys(query, gallery, query_norm, gallery_norms):
    """query: (D,), gallery: (n, D), float64 copies of float32 features → (n,) float64 keys."""
    return -cosine(canonical_sum(query * gallery), query_norm, gallery_norms)


def norms(features):
    return np.sqrt(np.concatenate([np.empty(0), *(canonical_sum(part * part) for part in
                                                  np.split(features, range(1024, len(features), 1024)))]))


def canonical_sum(products):
    """(n, D) float64 → (n,) sums in the one order that defines them."""
    n, width = products.shape
    padded = np.zeros((n, -(-width // 16) * 16))  # adding zeros at the end changes no sum
    padded[:, :width] = products
    sums = np.zeros((n, 16))
    for column in range(0, padded.shape[1], 16):
        sums += padded[:, column:column + 16]
    for half in (8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half:2 * half]
    return sums[:, 0]


def cosine(dots, query_norm, gallery_norms):
    scale = query_norm * gallery_norms
    return np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)


def gap_to_nearest(values, thresholds):
    """Distance of each value to the nearest of the sorted thresholds (at least one)."""
    above = np.searchsorted(thresholds, values)
    return np.minimum(np.abs(values - thresholds[np.maximum(above - 1, 0)]),
                      np.abs(values - thresholds[np.minimum(above, len(thresholds) - 1)]))


def as_features(features, name):
    """(n, D) float32 or half, array or tensor → float64 array of the same values."""
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu()
        features = features.float().numpy() if features.dtype == torch.bfloat16 else features.numpy()
    features = np.asarray(features)
    if features.ndim != 2 or features.dtype not in (np.float32, np.float16):
        raise ValueError(f'want {name} features (n, D) of float32 or half precision, got shape {features.shape} of '
                         f'{features.dtype}; cast, e.g. {name}.astype("float32")')
    if not np.isfinite(features).all():
        row = np.flatnonzero(~np.isfinite(features).all(1))[0]
        raise ValueError(f'want finite {name} features, got NaN or infinity in row {row}; look for what made it')
    # torch.set_flush_denormal lasts for the thread and would make denormals 0 in the conversion.
    flushing = np.array([1], np.uint32).view(np.float32).astype(np.float64)[0] == 0
    torch.set_flush_denormal(False)
    try:
        return features.astype(np.float64)
    finally:
        torch.set_flush_denormal(bool(flushing))


def as_ids(ids, length, name):
    ids = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
    if ids.size == 0:
        ids = ids.astype(np.int64)  # an empty list comes as float64
    if ids.shape != (length,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f'want {name} of shape ({length},) and an integer type, got shape {ids.shape} of {ids.dtype}')
    return ids
