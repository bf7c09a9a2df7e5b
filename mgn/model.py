"""Images → features and logits: MGN over a torchvision ResNet.

Source: Wang et al., "Learning Discriminative Features with Multiple Granularities for Person Re-Identification",
ACM MM 2018, arXiv:1804.01438. Defaults follow fast-reid's `projects/MGN`; `paper_heads` follows the paper.
"""

import copy
from typing import Annotated, Literal, NamedTuple

import gin
import torch
from torch import nn
from torch.nn import functional as F

from mgn import weights
from mgn.convolution import use_products
from mgn.ops.errors import FileError, UserError

BACKBONES = tuple(f'resnet{depth}{ibn}' for ibn in ('', '_ibn') for depth in (18, 34, 50, 101))


class MGNOutput(NamedTuple):
    """Of B images; with parts (1, 2, 3): 3 whole maps, 8 heads, in the order b1, b2, b3, b21, b22, b31, b32, b33."""
    logits: tuple[torch.Tensor, ...]  # a (B, C) tensor per head, of a cosine classifier the cosines; () without classes
    embeddings: torch.Tensor          # (triplets, B, width), for the triplet loss: of whole maps, then of each branch's
    #                                   joined stripes, if asked for, all padded with 0 to one width
    features: torch.Tensor            # (B, heads · embedding_dim): the test feature, not yet L2-normalised


@gin.configurable(denylist=['num_classes', 'fresh'])
class MGN(nn.Module):
    """Shared trunk, one branch per entry of `parts`, one head per whole map and per stripe.

    Args:
        num_classes: C; 0 builds no classifiers, for feature extraction.
        backbone: one of BACKBONES; in those with IBN half of the early channels pass instance normalisation (`IBN`).
        pretrained: True for torchvision's ImageNet V1 weights, False for none, or the path of a file that mgn.weights
            reads: of a backbone, or of a whole MGN, whose classifiers are left out.
        parts: stripes of each branch; 1 means the whole map alone.
        last_strides: stride of layer4 in each branch.
        embedding_dim: width of each head's reduced feature.
        pooling: 'max', 'avg' or 'gem' (generalised mean, a learnable p for each head, Radenović et al., TPAMI 2019).
        first_pooling: of the trunk, 3×3 with stride 2: 'padded' by 1 as torchvision's, or 'ceil': not padded, the last
            window smaller, as fast-reid's from version 1.0 on.
        reduction_bn, reduction_relu: what follows the linear reduction.
        bnneck: batch normalisation without bias behind the reduced feature (Luo et al., CVPRW 2019).
        paper_heads: the paper's softmax on the unreduced whole-map features instead of on the reduced ones.
        classifier: 'linear', or 'cosine': of feature and class.
        triplets: which features the triplet loss takes, 'reduced' or those behind the 'neck'.
        joined_stripes: the triplet loss takes each branch's stripes, joined to one vector, too.
        fresh: False leaves `pretrained` aside, for a model whose weights a checkpoint will replace.
    """

    def __init__(self, num_classes: int, backbone: Literal[BACKBONES] = 'resnet50', pretrained: bool | str = True,
                 parts: tuple[Annotated[int, 1, 128], ...] = (1, 2, 3),
                 last_strides: tuple[Literal[1, 2], ...] = (2, 1, 1),
                 embedding_dim: Annotated[int, 1, 2 ** 16] = 256, pooling: Literal['max', 'avg', 'gem'] = 'max',
                 first_pooling: Literal['padded', 'ceil'] = 'padded', reduction_bn: bool = True,
                 reduction_relu: bool = True, bnneck: bool = True, paper_heads: bool = False,
                 classifier: Literal['linear', 'cosine'] = 'linear', triplets: Literal['reduced', 'neck'] = 'reduced',
                 joined_stripes: bool = False, fresh: bool = True):
        super().__init__()
        if not 1 <= len(parts) == len(last_strides):
            raise UserError(f'Every branch needs a part count and a last stride, found parts={parts}, '
                            f'last_strides={last_strides}; bind MGN.parts and MGN.last_strides to one length')
        if paper_heads and bnneck:
            raise UserError('The paper has no BNNeck: with MGN.paper_heads = True bind MGN.bnneck = False')
        resnet = make_resnet(backbone, imagenet=fresh and pretrained is True)
        given = weights.read(pretrained) if fresh and isinstance(pretrained, str) else None
        if given and given.options is None:
            weights.load_backbone(resnet, given, backbone)
        if first_pooling == 'ceil':
            resnet.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
        use_products(nn.ModuleList([resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]))
        width = resnet.fc.in_features
        self.parts = tuple(parts)
        self.architecture = {  # all that features depend on, beside the weights
            'backbone': backbone, 'parts': list(parts), 'last_strides': list(last_strides),
            'embedding_dim': embedding_dim, 'pooling': pooling, 'bnneck': bnneck, 'first_pooling': first_pooling,
            'reduction_bn': reduction_bn, 'reduction_relu': reduction_relu}
        self.trunk = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1, resnet.layer2,
                                   resnet.layer3[0])
        self.branches = nn.ModuleList(
            nn.Sequential(*copy.deepcopy(resnet.layer3[1:]), *with_stride(copy.deepcopy(resnet.layer4), stride))
            for stride in last_strides)
        self.pools = nn.ModuleList(GeMPool(n) if pooling == 'gem' else POOLINGS[pooling]() for n in parts)
        # The trunk's map has n rows or more from a height of 16·(n − 1) + 1 on, 2 more without padding; IBN needs two.
        rows = max(1 + backbone.endswith('_ibn'), *((n - 1) * stride + 1 for n, stride in zip(parts, last_strides)))
        self.least_size = tuple(side + 2 * (first_pooling == 'ceil') for side in (16 * (rows - 1) + 1, 1))
        self.triplets, self.joined_stripes = triplets, joined_stripes
        options = reduction_bn, reduction_relu, bnneck, classifier == 'cosine'
        stripe_count = sum(n for n in self.parts if n > 1)
        self.heads = nn.ModuleList(Head(width, embedding_dim, num_classes, *options, classify_pooled)
                                   for classify_pooled in [paper_heads] * len(parts) + [False] * stripe_count)
        self.feature_dim = embedding_dim * len(self.heads)
        if given and given.options is not None:
            weights.load_all_but_classifiers(self, given)

    @property
    def embeddings_shape(self):
        """Number and width of MGNOutput.embeddings of an image."""
        joined = [n for n in self.parts if n > 1 and self.joined_stripes]
        return len(self.parts) + len(joined), self.architecture['embedding_dim'] * max(joined, default=1)

    def forward(self, images):
        """images: (B, 3, H, W) float32, normalised → MGNOutput. UserError where H or W is too small (`check_size`).

        Shapes in comments: ResNet-50, 384×128, parts (1, 2, 3).
        """
        self.check_size(*images.shape[2:])
        shared = self.trunk(images)                                            # (B, 1024, 24, 8)
        wholes, stripes = [], []
        for branch, pool, n in zip(self.branches, self.pools, self.parts):
            feature_map = branch(shared)                                       # (B, 2048, 24, 8), branch 1: 12×4
            wholes += pool(feature_map, 1)
            if n > 1:
                stripes += pool(feature_map, n)
        outputs = [head(pooled) for head, pooled in zip(self.heads, wholes + stripes)]  # pooled: (B, 2048)
        reduced, features, logits = zip(*outputs)
        logits = tuple(x for x in logits if x is not None)
        embeddings = self.embeddings(reduced if self.triplets == 'reduced' else features)
        return MGNOutput(logits, embeddings, torch.cat(features, dim=1))

    def check_size(self, *size):
        """UserError where images of this size, (H, W), are too small for the stripes, IBN or the first pooling."""
        if any(side < least for side, least in zip(size, self.least_size)):
            raise UserError(f'{self.architecture["backbone"]} with MGN.parts = {self.parts} needs images of at least '
                            f'{self.least_size} pixels, found {size}; bind a larger input_size')

    def embeddings(self, vectors):
        """(B, embedding_dim) of each head → MGNOutput.embeddings. Zeros at the end change no distance."""
        wholes, stripes = vectors[:len(self.parts)], iter(vectors[len(self.parts):])
        if not self.joined_stripes:
            return torch.stack(wholes)
        joined = [torch.cat([next(stripes) for _ in range(n)], 1) for n in self.parts if n > 1]
        return torch.stack([F.pad(x, (0, self.embeddings_shape[1] - x.shape[1])) for x in (*wholes, *joined)])


class Head(nn.Module):
    """Pooled (B, width) → reduced (B, dim) before the neck, feature (B, dim) after it, logits (B, C) or None.

    The published 1×1 convolution acts on a 1×1 map, so it is a linear layer here.
    """

    def __init__(self, width, dim, num_classes, reduction_bn, reduction_relu, bnneck, cosine, classify_pooled):
        super().__init__()
        self.reduction = nn.Linear(width, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim) if reduction_bn else nn.Identity()
        self.activation = nn.ReLU() if reduction_relu else nn.Identity()
        self.neck = nn.BatchNorm1d(dim) if bnneck else nn.Identity()
        self.classify_pooled, linear = classify_pooled, CosineLinear if cosine else nn.Linear
        self.classifier = linear(width if classify_pooled else dim, num_classes, bias=False) if num_classes else None
        nn.init.kaiming_normal_(self.reduction.weight, mode='fan_out', nonlinearity='relu')
        if reduction_bn:
            nn.init.normal_(self.norm.weight, 1, 0.02)
        if bnneck:
            nn.init.normal_(self.neck.weight, 1, 0.02)
            self.neck.bias.requires_grad_(False)
        if num_classes:
            nn.init.normal_(self.classifier.weight, 0, 0.01 if cosine else 0.001)

    def forward(self, pooled):
        reduced = self.activation(self.norm(self.reduction(pooled)))
        feature = self.neck(reduced)
        return reduced, feature, self.classifier and self.classifier(pooled if self.classify_pooled else feature)


class CosineLinear(nn.Linear):
    """(B, width) → the cosines of each row and each class, (B, C)."""

    def forward(self, rows):
        return F.linear(F.normalize(rows), F.normalize(self.weight))


def stripes_of(feature_map, n):
    height = feature_map.shape[2]
    return [feature_map[:, :, i * height // n:-(-(i + 1) * height // n)] for i in range(n)]


class MaxPool(nn.Module):
    """(B, C, H, W) → the maxima of n horizontal stripes, (B, C) each. If n does not divide H, stripes share rows."""

    def forward(self, feature_map, n):
        if torch.compiler.is_exporting():  # ONNX has no adaptive pooling
            return tuple(stripe.amax((2, 3)) for stripe in stripes_of(feature_map, n))
        return F.adaptive_max_pool2d(feature_map, (n, 1)).squeeze(3).unbind(2)


class AvgPool(nn.Module):
    def forward(self, feature_map, n):
        return F.adaptive_avg_pool2d(feature_map, (n, 1)).squeeze(3).unbind(2)


class GeMPool(nn.Module):
    """(mean xᵖ)^(1/p), p of the whole map in front, then of each of `parts` stripes."""

    def __init__(self, parts):
        super().__init__()
        self.p = nn.Parameter(torch.full((parts + 1 if parts > 1 else 1,), 3.0))

    def forward(self, feature_map, n):
        return tuple(stripe.pow(p).mean((2, 3)).pow(1 / p) for stripe, p in zip(
            stripes_of(feature_map.clamp(min=1e-6), n), self.p[1:] if n > 1 else self.p))


POOLINGS = {'max': MaxPool, 'avg': AvgPool}


def with_stride(layer4, stride):
    """Sets the stride of a ResNet's layer4, wherever its first block carries it (torchvision builds 2)."""
    for conv in layer4.modules():
        if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):
            conv.stride = (stride, stride)
    return layer4


class IBN(nn.Module):
    """IBN-a: half of the channels through instance, the others through batch normalisation (Pan et al., ECCV 2018)."""

    def __init__(self, channels):
        super().__init__()
        self.IN = nn.InstanceNorm2d(channels // 2, affine=True)
        self.BN = nn.BatchNorm2d(channels - channels // 2)

    def forward(self, x):
        first, second = x.split([self.IN.num_features, self.BN.num_features], 1)
        return torch.cat((self.IN(first), self.BN(second)), 1)


def make_resnet(backbone, imagenet=False):
    """A torchvision ResNet, or one with IBN in layer1 to layer3; with torchvision's ImageNet weights where asked."""
    import torchvision  # takes as long to import as torch, which --help need not wait for

    name = backbone.removesuffix('_ibn')
    resnet = torchvision.models.get_model(name, weights=None)
    if name != backbone:
        if imagenet:
            raise UserError(f'torchvision has no ImageNet weights of {backbone}; bring the file of IBN-Net and bind '
                            f"MGN.pretrained = '<its path>', or False to train from scratch")
        for block in (*resnet.layer1, *resnet.layer2, *resnet.layer3):
            block.bn1 = IBN(block.bn1.num_features)
    if imagenet:
        weights_of = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
        try:
            resnet.load_state_dict(weights_of.get_state_dict(check_hash=True))
        except (OSError, RuntimeError) as error:  # RuntimeError: the downloaded file has another hash
            raise FileError(f'The ImageNet weights {weights_of.url} could not be downloaded ({error}); bring the file '
                            f"and bind MGN.pretrained = '<its path>', or False to train from scratch") from error
    return resnet
