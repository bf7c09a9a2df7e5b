"""Images → features and logits: MGN over a torchvision ResNet.

Source: Wang et al., "Learning Discriminative Features with Multiple Granularities for Person Re-Identification",
ACM MM 2018, arXiv:1804.01438. Defaults follow fast-reid's `projects/MGN`; `paper_heads` follows the paper.
"""

import copy
from typing import NamedTuple

import gin
import torch
from torch import nn
from torch.nn import functional as F

from mgn.convolution import ProductConv
from mgn.ops.arguments import integer
from mgn.ops.errors import FileError, UserError
from mgn.runs.checkpoint import load_pretrained

BACKBONES = ('resnet18', 'resnet34', 'resnet50', 'resnet101')


class MGNOutput(NamedTuple):
    """Of B images; with parts (1, 2, 3): 3 whole maps, 8 heads, in the order b1, b2, b3, b21, b22, b31, b32, b33."""
    logits: tuple[torch.Tensor, ...]  # a (B, C) tensor per head; empty where num_classes is 0
    embeddings: torch.Tensor          # (branches, B, embedding_dim): reduced whole-map features, for the triplet loss
    features: torch.Tensor            # (B, heads · embedding_dim): the test feature, not yet L2-normalised


@gin.configurable(denylist=['num_classes', 'fresh'])
class MGN(nn.Module):
    """Shared trunk, one branch per entry of `parts`, one head per whole map and per stripe.

    Args:
        num_classes: C; 0 builds no classifiers, for feature extraction.
        backbone: one of BACKBONES.
        pretrained: True for torchvision's ImageNet V1 weights, False for none, or a path of such a state dict.
        parts: stripes of each branch; 1 means the whole map alone.
        last_strides: stride of layer4 in each branch.
        embedding_dim: width of each head's reduced feature.
        pooling: 'max', 'avg' or 'gem' (generalised mean, learnable p, Radenović et al., TPAMI 2019).
        bnneck: batch normalisation without bias behind the reduced feature (Luo et al., CVPRW 2019).
        paper_heads: the paper's softmax on the unreduced whole-map features instead of on the reduced ones.
        fresh: False leaves `pretrained` aside, for a model whose weights a checkpoint will replace.
    """

    def __init__(self, num_classes: int, backbone: str = 'resnet50', pretrained: bool | str = True,
                 parts: tuple[int, ...] = (1, 2, 3), last_strides: tuple[int, ...] = (2, 1, 1),
                 embedding_dim: int = 256, pooling: str = 'max', bnneck: bool = True, paper_heads: bool = False,
                 fresh: bool = True):
        super().__init__()
        fitting = {*parts} <= {*range(1, 129)} and {*last_strides} <= {1, 2}
        if not fitting or not 1 <= len(parts) == len(last_strides):
            raise UserError(f'Every branch needs a part count from 1 to 128 and a last stride of 1 or 2, found '
                            f'parts={parts}, last_strides={last_strides}; bind MGN.parts and MGN.last_strides to one '
                            f'length')
        integer(embedding_dim, 'MGN.embedding_dim', 1, 2 ** 16, '256 is published')
        if pooling not in POOLINGS:
            raise UserError(f'MGN.pooling must be one of {", ".join(POOLINGS)}, found {pooling!r}')
        if paper_heads and bnneck:
            raise UserError('The paper has no BNNeck: with MGN.paper_heads = True bind MGN.bnneck = False')
        resnet = make_resnet(backbone, pretrained if fresh else False)
        for block in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            use_products(block)
        width = resnet.fc.in_features
        self.parts = tuple(parts)
        self.architecture = {  # all that features depend on, beside the weights
            'backbone': backbone, 'parts': list(parts), 'last_strides': list(last_strides),
            'embedding_dim': embedding_dim, 'pooling': pooling, 'bnneck': bnneck}
        self.trunk = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1, resnet.layer2,
                                   resnet.layer3[0])
        self.branches = nn.ModuleList(
            nn.Sequential(*copy.deepcopy(resnet.layer3[1:]), *with_stride(copy.deepcopy(resnet.layer4), stride))
            for stride in last_strides)
        self.pools = nn.ModuleList(POOLINGS[pooling]() for _ in parts)
        stripe_count = sum(n for n in self.parts if n > 1)
        self.heads = nn.ModuleList(Head(width, embedding_dim, num_classes, bnneck, classify_pooled)
                                   for classify_pooled in [paper_heads] * len(parts) + [False] * stripe_count)
        self.feature_dim = embedding_dim * len(self.heads)

    def forward(self, images):
        """images: (B, 3, H, W) float32, normalised → MGNOutput. UserError where H is too low for the stripes.

        Shapes in comments: ResNet-50, 384×128, parts (1, 2, 3).
        """
        shared = self.trunk(images)                                            # (B, 1024, 24, 8)
        wholes, stripes = [], []
        for branch, pool, n in zip(self.branches, self.pools, self.parts):
            feature_map = branch(shared)                                       # (B, 2048, 24, 8), branch 1: 12×4
            if feature_map.shape[2] < n:
                raise UserError(f'{n} stripes need a feature map of at least {n} rows, found {feature_map.shape[2]} '
                                f'from images {images.shape[2]} pixels high; bind a higher input_size')
            wholes += pool(feature_map, 1)
            if n > 1:
                stripes += pool(feature_map, n)
        outputs = [head(pooled) for head, pooled in zip(self.heads, wholes + stripes)]  # pooled: (B, 2048)
        reduced, features, logits = zip(*outputs)
        logits = tuple(x for x in logits if x is not None)
        return MGNOutput(logits, torch.stack(reduced[:len(wholes)]), torch.cat(features, dim=1))


class Head(nn.Module):
    """Pooled (B, width) → reduced (B, dim) before the neck, feature (B, dim) after it, logits (B, C) or None.

    The published 1×1 convolution acts on a 1×1 map, so it is a linear layer here.
    """

    def __init__(self, width, dim, num_classes, bnneck, classify_pooled):
        super().__init__()
        self.reduction = nn.Linear(width, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim)
        self.neck = nn.BatchNorm1d(dim) if bnneck else nn.Identity()
        self.classify_pooled = classify_pooled
        self.classifier = nn.Linear(width if classify_pooled else dim, num_classes, bias=False) if num_classes else None
        nn.init.kaiming_normal_(self.reduction.weight, mode='fan_out', nonlinearity='relu')
        nn.init.normal_(self.norm.weight, 1, 0.02)
        if bnneck:
            nn.init.normal_(self.neck.weight, 1, 0.02)
            self.neck.bias.requires_grad_(False)
        if num_classes:
            nn.init.normal_(self.classifier.weight, 0, 0.001)

    def forward(self, pooled):
        reduced = F.relu(self.norm(self.reduction(pooled)))
        feature = self.neck(reduced)
        logits = self.classifier(pooled if self.classify_pooled else feature) if self.classifier else None
        return reduced, feature, logits


class MaxPool(nn.Module):
    """(B, C, H, W) → the maxima of n horizontal stripes, (B, C) each. If n does not divide H, stripes share rows."""

    def forward(self, feature_map, n):
        return F.adaptive_max_pool2d(feature_map, (n, 1)).squeeze(3).unbind(2)


class AvgPool(nn.Module):
    def forward(self, feature_map, n):
        return F.adaptive_avg_pool2d(feature_map, (n, 1)).squeeze(3).unbind(2)


class GeMPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, feature_map, n):
        means = F.adaptive_avg_pool2d(feature_map.clamp(min=1e-6).pow(self.p), (n, 1))
        return means.pow(1 / self.p).squeeze(3).unbind(2)


POOLINGS = {'max': MaxPool, 'avg': AvgPool, 'gem': GeMPool}


def use_products(module):
    """Replaces the convolutions inside `module` by ProductConvs of the same parameters."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d):
                setattr(parent, name, ProductConv.like(child))


def with_stride(layer4, stride):
    """Sets the stride of a ResNet's layer4, wherever its first block carries it (torchvision builds 2)."""
    for conv in layer4.modules():
        if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):
            conv.stride = (stride, stride)
    return layer4


def make_resnet(backbone, pretrained):
    """A torchvision ResNet, with ImageNet weights where `pretrained` is True, or those of a file where it is a path."""
    if backbone not in BACKBONES:
        raise UserError(f'MGN.backbone must be one of {", ".join(BACKBONES)}, found {backbone!r}')
    import torchvision  # takes as long to import as torch, which --help need not wait for

    resnet = torchvision.models.get_model(backbone, weights=None)
    if pretrained is True:
        weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
        try:
            resnet.load_state_dict(weights.get_state_dict(check_hash=True))
        except (OSError, RuntimeError) as error:  # RuntimeError: the downloaded file has another hash
            raise FileError(f'The ImageNet weights {weights.url} could not be downloaded ({error}); bring the file and '
                            f"bind MGN.pretrained = '<its path>', or False to train from scratch") from error
    elif pretrained:
        load_pretrained(resnet, pretrained, backbone)
    return resnet
