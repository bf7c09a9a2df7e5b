"""Output of MGN → named losses, as in fast-reid's `projects/MGN`, and how `train.losses` refers to others."""

import inspect
import math

import gin
import torch.nn.functional as F
from torch import nn

from mgn.ops import batch_hard_triplet_loss
from mgn.ops.arguments import real
from mgn.ops.errors import UserError


@gin.configurable(denylist=['output', 'labels', 'candidates', 'candidate_labels'])
def mgn_losses(output, labels, candidates=None, candidate_labels=None, cross_entropy_weight: float = 0.25,
               triplet_weight: float = 1 / 3, margin: float | None = 1.2, smoothing: float = 0.1) -> dict:
    """The weighted terms by name; their sum is what training minimises.

    Args:
        output: MGNOutput of B images. labels: (B,) int64 in 0…C−1.
        candidates: (branches, M, embedding_dim), candidate_labels: (M,): embeddings to find the hardest pairs among,
            these images' own included; None: these alone.
        cross_entropy_weight: of the sum over heads. triplet_weight: of the sum over whole-map heads.
        margin: of the batch-hard hinge; None for the soft margin.
        smoothing: ε of the label smoothing.
    Returns:
        {'cross_entropy': scalar, 'triplet': scalar}
    Raises:
        UserError: weights, a margin or a smoothing out of range.
    """
    real(cross_entropy_weight, 'mgn_losses.cross_entropy_weight', 0, math.inf, '0.25 is published')
    real(triplet_weight, 'mgn_losses.triplet_weight', 0, math.inf, '1/3 is published')
    if margin is not None:
        real(margin, 'mgn_losses.margin', 0, math.inf, 'None is the soft margin')
    real(smoothing, 'mgn_losses.smoothing', 0, 1, '0 smoothes nothing')
    cross_entropy = sum(smoothed_cross_entropy(logits, labels, smoothing) for logits in output.logits)
    triplet = batch_hard_triplet_loss(output.embeddings, labels, margin, candidates, candidate_labels).sum()
    return {'cross_entropy': float(cross_entropy_weight) * cross_entropy, 'triplet': float(triplet_weight) * triplet}


def smoothed_cross_entropy(logits, labels, smoothing):
    """Mean cross-entropy against 1−ε on the true class and ε/(C−1) on every other (Szegedy et al., CVPR 2016, use ε/C).

    logits: (B, C), labels: (B,) int64 → scalar.
    """
    classes = logits.shape[1]
    # PyTorch spreads its smoothing over all C classes, the true one included.
    return F.cross_entropy(logits, labels, label_smoothing=smoothing * classes / max(classes - 1, 1))


class FunctionLosses(nn.Module):
    """A function such as mgn_losses as a module without parameters."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def make_losses(losses, num_classes, branches, embedding_dim):
    """What `train.losses` refers to, as a module that is called like mgn_losses: (output, labels[, candidates,
    candidate_labels]) → {name: scalar}.

    Args:
        losses: a function, or a subclass of torch.nn.Module, for losses with parameters. The class is called with
            the other three arguments by name.
    Raises:
        UserError: anything else, such as a module that exists already, made before the seed was set.
    """
    kind = inspect.unwrap(losses)  # gin wraps a class that is referred to with a scope
    if inspect.isclass(kind) and issubclass(kind, nn.Module):
        return losses(num_classes=num_classes, branches=branches, embedding_dim=embedding_dim)
    if inspect.isclass(kind) or isinstance(losses, nn.Module) or not callable(losses):
        raise UserError(f'train.losses should be a function or a subclass of torch.nn.Module, but is {losses!r}. '
                        f'Bind a reference, e.g. train.losses = @mgn_losses')
    return FunctionLosses(losses)
