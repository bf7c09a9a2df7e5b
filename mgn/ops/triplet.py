"""Batch-hard triplet loss (Hermans et al., "In Defense of the Triplet Loss", arXiv:1703.07737)."""

import torch
import torch.nn.functional as F


def batch_hard_triplet_loss(anchors, labels, margin=0.3):
    """Mean over the anchors of each head's hardest triplet, Euclidean (not squared), not normalised.

    Args:
        anchors: (..., N, D) floating point; leading dimensions are heads, mined separately.
        labels: (N,) integers. An anchor counts among its own positives, at distance 0.
        margin: of the hinge max(0, ap − an + margin); None for the soft margin log(1 + exp(ap − an)).
    Returns:
        (...) loss per head; 0 with gradient 0 where no anchor has a negative. The gradient is 0 at distance 0.
    Raises:
        ValueError: labels of another length.
    """
    if labels.shape != anchors.shape[-2:-1]:
        raise ValueError(f'want labels of shape ({anchors.shape[-2]},) for anchors of shape {tuple(anchors.shape)}, '
                         f'got {tuple(labels.shape)}; pass one label per anchor')
    if len(labels) == 0:
        return anchors.sum((-2, -1))
    positive = labels[:, None] == labels[None, :]                                           # (N, N)
    with torch.no_grad():  # mined by distances from differences: x² + y² − 2xy would cancel between near duplicates
        dist = torch.cdist(anchors, anchors, compute_mode='donot_use_mm_for_euclid_dist')   # (..., N, N)
        hardest_positive = dist.masked_fill(~positive, -torch.inf).argmax(-1)               # (..., N)
        hardest_negative = dist.masked_fill(positive, torch.inf).argmin(-1)
    dist_ap = pair_distance(anchors, hardest_positive)
    dist_an = pair_distance(anchors, hardest_negative)
    loss = F.softplus(dist_ap - dist_an) if margin is None else F.relu(dist_ap - dist_an + margin)
    has_negative = ~positive.all(-1)                                                        # (N,)
    return loss.masked_fill(~has_negative, 0).sum(-1) / has_negative.sum().clamp(min=1)


def pair_distance(anchors, partners):
    """Distance of each anchor to the anchor at index partners (..., N); its gradient is 0 at distance 0."""
    others = anchors.gather(-2, partners.unsqueeze(-1).expand_as(anchors))
    return torch.linalg.vector_norm(anchors - others, dim=-1)
