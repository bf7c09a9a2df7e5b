"""Losses with parameters of their own, as a user would add them."""

import gin
import torch
from torch import nn

from mgn.losses import mgn_losses


@gin.configurable(denylist=['num_classes', 'branches', 'embedding_dim'])
class CentreLoss(nn.Module):
    """MGN's losses, and the squared distance of embeddings to learnt centres of identities (Wen et al., ECCV 2016)."""

    def __init__(self, num_classes, branches, embedding_dim, weight=0.1):
        super().__init__()
        self.weight = weight
        self.centres = nn.Parameter(torch.randn(branches, num_classes, embedding_dim))
        self.bias = nn.Parameter(torch.zeros(embedding_dim))

    def forward(self, output, labels, candidates=None, candidate_labels=None):
        differences = output.embeddings - self.centres[:, labels] - self.bias   # (branches, B, embedding_dim)
        centre = self.weight * differences.square().sum(2).mean()
        return {**mgn_losses(output, labels, candidates, candidate_labels), 'centre': centre}
