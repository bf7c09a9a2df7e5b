"""α query expansion: each query becomes the weighted mean of itself and its nearest gallery items."""

import math

import torch
import torch.nn.functional as F

from mgn.ops.arguments import as_features, real
from mgn.ops.ranking.nearest import topk
from mgn.ops.private import uncompiled
from mgn.ops.ranking.tiles import exact, spans

BLOCK = 2 ** 20  # numbers of a block of queries: 8 MB


@uncompiled
@torch.no_grad()
def expand_queries(query, gallery, k, alpha=3.0):
    """α query expansion (Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019).

    The sum, in float64, of the L2-normalised query and its k most similar L2-normalised gallery items, nearest first,
    each times max(cosine similarity, 0) ** alpha; normalised. The query's own weight is 1. alpha=0 is the plain
    average, whatever the similarities.

    Args:
        query: (Q, D), gallery: (G, D), float32 or half, NumPy arrays or tensors of one device, CPU or CUDA. A row of
            zeros has similarity 0 to all.
        k: gallery items averaged into a query, from 1 to 4096; all of them where the gallery has fewer. Ties go by
            gallery index.
        alpha: 0 or more; the larger it is, the less distant items count.
    Returns:
        (Q, D) float32 on the same device, without gradient; a row is zero where its sum is. The same input gives the
        same bits.
        Memory: that of mgn.ops.topk, and 64 MB beyond features and result.
    Raises:
        UserError: alpha negative or not finite, k out of range, and whatever topk refuses, NaN or infinite features
            among it.
    """
    alpha = real(alpha, 'alpha', 0, math.inf, '3 is usual, 0 averages without weights')
    query, gallery = as_features(query, 'query'), as_features(gallery, 'gallery')
    distances, items = topk(query, gallery, k)
    weights = (1 - distances).clamp_(min=0).pow_(alpha)  # (Q, k) float64
    expanded = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    for block in spans(len(query), BLOCK // max(query.shape[1], 1)):
        total = normalised(query[block])
        for weight, item in zip(weights[block].T, items[block].T):  # a neighbour of every query
            total += weight[:, None] * normalised(gallery[item])
        expanded[block] = normalised(total)
    return expanded


def normalised(rows):
    return F.normalize(exact(rows), eps=1e-100)  # of float32 nothing but zeros is as short
