"""Batch normalisation of a trained model, folded into the layers before it: the same features by less work."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def folded(model):
    """A copy of an MGN for features alone, in evaluation mode and without classifiers; its output's `logits` are empty.

    With the running statistics batch normalisation is a scale and a shift of each channel, which the weights and a bias of the convolution
    or linear layer before it take over. Features differ by float32's roundings; the model itself stays as it is.
    """
    copied = copy.deepcopy(model).eval()
    for head in copied.heads:
        head.classifier = None
    for parent in list(copied.modules()):
        children = list(parent.named_children())  # in the order in which they are applied
        for (name, layer), (norm_name, norm) in zip(children, children[1:]):
            if isinstance(norm, NORMS) and isinstance(layer, (nn.Conv2d, nn.Linear)):
                fuse = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
                setattr(parent, name, fuse(layer, norm))
                setattr(parent, norm_name, nn.Identity())
    return copied
