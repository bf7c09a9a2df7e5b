"""Output of MGN → named losses, as in fast-reid's `projects/MGN`, and how `train.losses` refers to others."""

import inspect
import math
from collections.abc import Callable
from typing import Annotated

import gin
import torch
import torch.nn.functional as F
from torch import nn

from mgn.ops import batch_hard_triplet_loss
from mgn.ops.errors import UserError


Weight = Annotated[float, 0, math.inf]


@gin.configurable(denylist=['output', 'labels', 'candidates', 'candidate_labels'])
def mgn_losses(output, labels, candidates=None, candidate_labels=None,
               cross_entropy_weight: Weight | tuple[Weight, ...] = 0.25,
               triplet_weight: Weight | tuple[Weight, ...] = 1 / 3, margin: Weight | None = 1.2,
               smoothing: Annotated[float, 0, 1] = 0.1,
               softmax: Callable[..., torch.Tensor] | None = None) -> dict:
    """The weighted terms by name; their sum is what training minimises.

    Args:
        output: MGNOutput of B images. labels: (B,) int64 in 0…C−1.
        candidates: (triplets, M, width), candidate_labels: (M,): embeddings to find the hardest pairs among,
            these images' own included; None: these alone.
        cross_entropy_weight: of the sum over heads, or a weight for each. triplet_weight: of the sum over embeddings,
            or a weight for each.
        margin: of the batch-hard hinge; None for the soft margin.
        smoothing: ε of the label smoothing.
        softmax: (logits, labels) → the logits that cross-entropy takes, such as @circle_softmax; None: as they are.
    Returns:
        {'cross_entropy': scalar, 'triplet': scalar}
    Raises:
        UserError: other numbers of weights than of terms.
    """
    logits = [softmax(x, labels) if softmax else x for x in output.logits]
    cross_entropies = torch.stack([smoothed_cross_entropy(x, labels, smoothing) for x in logits])
    triplets = batch_hard_triplet_loss(output.embeddings, labels, margin, candidates, candidate_labels)
    return {'cross_entropy': weighted_sum(cross_entropies, cross_entropy_weight, 'mgn_losses.cross_entropy_weight'),
            'triplet': weighted_sum(triplets, triplet_weight, 'mgn_losses.triplet_weight')}


def weighted_sum(terms, weight, name):
    """One weight times the sum of terms (n,), or their sum with a weight each; `name` is the weight's binding."""
    if not isinstance(weight, (tuple, list)):
        return float(weight) * terms.sum()
    if len(weight) != len(terms):
        raise UserError(f'{name} must be one number or one for each of {len(terms)} terms, found {len(weight)}; bind '
                        f'others')
    return sum(float(x) * term for x, term in zip(weight, terms))


@gin.configurable(denylist=['cosines', 'labels'])
def circle_softmax(cosines, labels, scale: Weight = 64.0, margin: Annotated[float, 0, 1] = 0.35) -> torch.Tensor:
    """Logits of Circle loss with class labels (Sun et al., CVPR 2020): those far from their optimum weigh more.

    cosines: (B, C), as MGN.classifier = 'cosine' gives them; labels: (B,) int64 → (B, C).
    """
    is_own = F.one_hot(labels, cosines.shape[1]).bool()
    weight = torch.where(is_own, 1 + margin - cosines, cosines + margin).relu().detach()
    return scale * weight * torch.where(is_own, cosines - (1 - margin), cosines - margin)


def smoothed_cross_entropy(logits, labels, smoothing):
    """Mean cross-entropy against 1−ε on the true class and ε/(C−1) on every other (Szegedy et al., CVPR 2016, use ε/C).

    logits: (B, C), labels: (B,) int64 → scalar.
    """
    classes = logits.shape[1]
    # PyTorch spreads its smoothing over all C classes, the true one included.
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / max(classes - 1, 1))


def make_losses(losses, num_classes, branches, embedding_dim):
    """What `train.losses` refers to, as a module that is called like mgn_losses: (output, labels[, candidates,
    candidate_labels]) → {name: scalar}.

    Args:
        losses: a function, or a subclass of torch.nn.Module, for losses with parameters. The class is called with
            the other three arguments by name.
    """
    if inspect.isclass(inspect.unwrap(losses)):  # gin wraps a class that is referred to with a scope
        return losses(num_classes=num_classes, branches=branches, embedding_dim=embedding_dim)
    module = nn.Module()
    module.forward = losses
    return module
