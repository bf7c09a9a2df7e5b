"""MGN against a straightforward second implementation that shares nothing but its weights; its options and errors."""

import pytest
import torch
import torchvision

from mgn.losses import mgn_losses
from mgn.model import MGN, AvgPool, GeMPool, MaxPool
from mgn.ops.errors import UserError
from mgn.optim import make_optimizer

SMALL = dict(backbone='resnet18', pretrained=False)


def make(num_classes=5, seed=0, **options):
    torch.manual_seed(seed)
    return MGN(num_classes, **{**SMALL, **options})


def images(batch=2, height=96, width=32, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def shake(model):
    """Weights as after some training: no statistic, scale or bias at its start, no two branches alike."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith('running_var'):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point() and tensor.ndim == 1:
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        elif tensor.is_floating_point() and tensor.ndim > 1:
            tensor.mul_(1 + 0.3 * torch.randn(len(tensor), *[1] * (tensor.ndim - 1), generator=generator))
    return model


class NaiveIBN(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.IN, self.BN = torch.nn.InstanceNorm2d(channels // 2, affine=True), torch.nn.BatchNorm2d(channels // 2)

    def forward(self, x):
        half = len(self.IN.weight)
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
        first = ((x - mean) / (var + 1e-5).sqrt())[:, :half]
        first = first * self.IN.weight[:, None, None] + self.IN.bias[:, None, None]
        mean, var, weight, bias = (value[:, None, None] for value in (
            self.BN.running_mean, self.BN.running_var, self.BN.weight, self.BN.bias))
        return torch.cat((first, (x[:, half:] - mean) / (var + 1e-5).sqrt() * weight + bias), 1)


def naive_forward(model, backbone, images, pooling, parts, strides, bnneck, paper_heads, first_pooling='padded',
                  reduction_bn=True, reduction_relu=True, classifier='linear', triplets='reduced',
                  joined_stripes=False):
    """The same numbers the long way: a whole torchvision ResNet per branch, loops over stripes, formulas for layers."""
    state = model.state_dict()
    whole_maps, striped = [], []
    for b, (n, stride) in enumerate(zip(parts, strides)):
        with torch.device('meta'):  # every value is copied from the state below
            resnet = torchvision.models.get_model(backbone.removesuffix('_ibn'), weights=None)
            for block in (*resnet.layer1, *resnet.layer2, *resnet.layer3) if '_ibn' in backbone else ():
                block.bn1 = NaiveIBN(block.bn1.num_features)
        resnet = resnet.to_empty(device='cpu').to(images.dtype).eval()
        own = resnet.state_dict()
        layers = len(resnet.layer3)
        for key in own:
            first, *rest = key.split('.')
            place = '.'.join(rest)
            if first in ('conv1', 'bn1'):
                source = f'trunk.{("conv1", "bn1").index(first)}.{place}'
            elif first in ('layer1', 'layer2'):
                source = f'trunk.{4 + ("layer1", "layer2").index(first)}.{place}'
            elif first == 'layer3' and rest[0] == '0':
                source = f'trunk.6.{".".join(rest[1:])}'
            elif first == 'layer3':
                source = f'branches.{b}.{int(rest[0]) - 1}.{".".join(rest[1:])}'
            elif first == 'layer4':
                source = f'branches.{b}.{layers - 1 + int(rest[0])}.{".".join(rest[1:])}'
            else:
                continue
            own[key].copy_(state[source])
        strided = resnet.layer4[0].conv1 if backbone[:8] in ('resnet18', 'resnet34') else resnet.layer4[0].conv2
        strided.stride = resnet.layer4[0].downsample[0].stride = (stride, stride)
        x = resnet.relu(resnet.bn1(resnet.conv1(images)))
        if first_pooling == 'ceil':  # padded behind the last row and column only, where the map's sides are even
            x = torch.nn.functional.pad(x, (0, 1, 0, 1), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
        else:
            x = resnet.maxpool(x)
        feature_map = resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))
        pool = naive_pool(pooling, state.get(f'pools.{b}.p'))
        whole_maps += pool(feature_map, 1)
        striped += pool(feature_map, n) if n > 1 else []
    reduced, features, logits = [], [], []
    for h, pooled in enumerate(whole_maps + striped):
        y = pooled @ state[f'heads.{h}.reduction.weight'].T
        y = naive_norm(y, state, f'heads.{h}.norm') if reduction_bn else y
        y = y.clamp(min=0) if reduction_relu else y
        z = naive_norm(y, state, f'heads.{h}.neck') if bnneck else y
        classified = pooled if paper_heads and h < len(parts) else z
        reduced.append(y), features.append(z)
        weight = state[f'heads.{h}.classifier.weight']
        norms = classified.norm(dim=1)[:, None] * weight.norm(dim=1) if classifier == 'cosine' else 1
        logits.append(classified @ weight.T / norms)
    vectors = reduced if triplets == 'reduced' else features
    embeddings, first = vectors[:len(parts)], len(parts)
    for n in parts if joined_stripes else ():
        if n > 1:
            embeddings.append(torch.cat(vectors[first:first + n], 1))
            first += n
    width = max(x.shape[1] for x in embeddings)
    embeddings = [torch.cat((x, x.new_zeros(len(x), width - x.shape[1])), 1) for x in embeddings]
    return logits, torch.stack(embeddings), torch.cat(features, 1)


def naive_norm(x, state, name):
    mean, var, weight, bias = (state[f'{name}.{part}'] for part in ('running_mean', 'running_var', 'weight', 'bias'))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def naive_pool(kind, exponents=None):
    def pool(feature_map, n):
        height = feature_map.shape[2]
        result = []
        for i in range(n):
            p = exponents[i + (n > 1)] if kind == 'gem' else None  # the whole map's comes first
            rows = range(i * height // n, -(-(i + 1) * height // n))
            pixels = torch.stack([feature_map[:, :, r, c] for r in rows for c in range(feature_map.shape[3])])
            if kind == 'max':
                result.append(pixels.amax(0))
            elif kind == 'avg':
                result.append(pixels.mean(0))
            else:
                result.append(pixels.clamp(min=1e-6).pow(p).mean(0).pow(1 / p))
        return result
    return pool


@pytest.mark.parametrize('backbone, options', [
    ('resnet18', {}),
    ('resnet50', dict(parts=(1, 3), last_strides=(1, 2), pooling='avg', bnneck=False)),
    ('resnet18', dict(pooling='gem', last_strides=(2, 2, 2), embedding_dim=33)),
    ('resnet34', dict(parts=(2,), last_strides=(1,), bnneck=False, paper_heads=True)),
    ('resnet50_ibn', dict(pooling='gem', last_strides=(1, 1, 1), first_pooling='ceil', reduction_bn=False,
                          reduction_relu=False, classifier='cosine', triplets='neck', joined_stripes=True)),
    ('resnet18_ibn', dict(reduction_relu=False, joined_stripes=True, embedding_dim=7)),
])
def test_forward_equals_the_straightforward_implementation(backbone, options):
    model = shake(make(backbone=backbone, **options)).double().eval()
    batch = images(3, height=112).double()  # maps of 4 and 7 rows: stripes overlap
    want = {**dict(pooling='max', parts=(1, 2, 3), bnneck=True, paper_heads=False), **options}
    strides = want.pop('last_strides', (2, 1, 1))
    want.pop('embedding_dim', None)
    with torch.no_grad():
        got = model(batch)
        logits, embeddings, features = naive_forward(model, backbone, batch, strides=strides, **want)
    assert len(got.logits) == len(logits)
    for ours, theirs in zip([*got.logits, got.embeddings, got.features], [*logits, embeddings, features]):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert features.std() > 0.01


@pytest.mark.parametrize('backbone, width', [
    ('resnet18', 512), ('resnet34', 512), ('resnet50', 2048), ('resnet101', 2048), ('resnet18_ibn', 512),
    ('resnet34_ibn', 512), ('resnet101_ibn', 2048)])
def test_defaults_give_eight_heads_on_every_backbone(backbone, width):
    with torch.no_grad(), torch.device('meta'):
        model = make(7, backbone=backbone).eval()
        output = model(torch.zeros(2, 3, 64, 32))
    assert [x.shape for x in output.logits] == [(2, 7)] * 8
    assert output.embeddings.shape == (3, 2, 256)
    assert output.features.shape == (2, 2048)
    assert [head.reduction.weight.shape for head in model.heads] == [(256, width)] * 8


@pytest.mark.parametrize('parts, heads', [((1,), 1), ((2,), 3), ((1, 1), 2), ((3, 2), 7), ((1, 2, 3, 4), 13)])
def test_other_granularities_give_a_head_per_whole_map_and_per_stripe(parts, heads):
    model = make(31, parts=parts, last_strides=(1,) * len(parts), embedding_dim=33).eval()
    with torch.no_grad():
        output = model(images(1, height=64))
    assert [x.shape for x in output.logits] == [(1, 31)] * heads
    assert output.embeddings.shape == (len(parts), 1, 33)
    assert output.features.shape == (1, 33 * heads)


def test_heads_stand_in_the_order_b1_b2_b3_b21_b22_b31_b32_b33():
    model = make(embedding_dim=8)
    seen, maps = [], []
    for head in model.heads:
        head.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0])))
    for branch in model.branches:
        branch.register_forward_hook(lambda module, inputs, output: maps.append(output))
    shake(model).eval()
    with torch.no_grad():
        output = model(images())
    b1, b2, b3 = maps
    expected = [b1, b2, b3, b2[:, :, :3], b2[:, :, 3:], b3[:, :, :2], b3[:, :, 2:4], b3[:, :, 4:]]
    pooled = dict(seen)
    assert len(seen) == len(pooled) == 8
    for h, (head, part) in enumerate(zip(model.heads, expected)):
        torch.testing.assert_close(pooled[head], part.amax((2, 3)), rtol=0, atol=0)
        with torch.no_grad():
            reduced, feature, logits = head(pooled[head])
        torch.testing.assert_close(output.features[:, 8 * h:8 * h + 8], feature)
        torch.testing.assert_close(output.logits[h], logits)
        if h < 3:
            torch.testing.assert_close(output.embeddings[h], reduced)


@pytest.mark.parametrize('backbone', ['resnet18', 'resnet50'])
def test_branch_1_halves_the_map_and_the_others_keep_it(backbone):
    model = make(backbone=backbone).eval()
    with torch.no_grad():
        shared = model.trunk(images(1, 384, 128))
        sizes = [branch(shared).shape[2:] for branch in model.branches]
    assert shared.shape[2:] == (24, 8)
    assert sizes == [(12, 4), (24, 8), (24, 8)]


def test_the_shared_trunk_runs_once():
    model = make().eval()
    calls = []
    for module in [*model.trunk, *model.branches]:
        module.register_forward_hook(lambda module, inputs, output: calls.append(module))
    with torch.no_grad():
        model(images())
    assert calls == [*model.trunk, *model.branches]


@pytest.mark.parametrize('bnneck, paper_heads', [(True, False), (False, False), (False, True)])
def test_every_trainable_parameter_gets_a_gradient(bnneck, paper_heads):
    model = make(pooling='gem', bnneck=bnneck, paper_heads=paper_heads)
    sum(mgn_losses(model(images(4, height=64)), torch.tensor([0, 0, 1, 1])).values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize('height', [1, 2, 5, 6, 7, 12, 31, 33])
@pytest.mark.parametrize('kind, module', [('max', MaxPool), ('avg', AvgPool), ('gem', GeMPool)])
def test_pooling_equals_a_loop_over_rows(kind, module, height):
    generator = torch.Generator().manual_seed(height)
    feature_map = torch.randn(2, 3, 4, height, generator=generator, dtype=torch.float64).transpose(2, 3)
    for n in range(1, min(height, 4) + 1):
        exponents = torch.arange(2., 3 + n)[:1 if n == 1 else n + 1].double()
        pool = module(*[n] * (kind == 'gem')).double()
        for p in pool.parameters():
            p.data.copy_(exponents)
        got, want = pool(feature_map, n), naive_pool(kind, exponents)(feature_map, n)
        assert len(got) == n
        for ours, theirs in zip(got, want):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('module', [MaxPool, AvgPool])
def test_a_nan_reaches_its_own_stripe_alone(module):
    feature_map = torch.zeros(1, 2, 6, 3)
    feature_map[0, 1, 2, 2] = torch.nan
    upper, middle, lower = module()(feature_map, 3)
    assert middle.isnan().tolist() == [[False, True]]
    assert not upper.isnan().any() and not lower.isnan().any()


def test_gem_starts_at_3_and_learns_an_exponent_for_each_head():
    model = make(pooling='gem')
    exponents = {name: p for name, p in model.named_parameters() if name.startswith('pools.')}
    assert {name: p.tolist() for name, p in exponents.items()} == {
        'pools.0.p': [3.0], 'pools.1.p': [3.0] * 3, 'pools.2.p': [3.0] * 4}
    assert all(p.requires_grad for p in exponents.values())


def test_the_bias_of_the_bnneck_stays_zero():
    model = make()
    optimizer = make_optimizer(model, torch.optim.Adam)
    before = [head.neck.weight.clone() for head in model.heads]
    sum(mgn_losses(model(images(4, height=64)), torch.tensor([0, 0, 1, 1])).values()).backward()
    optimizer.step()
    for head, weight in zip(model.heads, before):
        assert not head.neck.bias.requires_grad and not head.neck.bias.any()
        assert head.neck.weight.requires_grad and not torch.equal(head.neck.weight, weight)
        assert head.norm.bias.requires_grad and head.norm.bias.any()


def test_without_bnneck_the_feature_is_the_reduced_one():
    model = shake(make(bnneck=False, embedding_dim=8)).eval()
    assert not any('neck' in name for name in model.state_dict())
    with torch.no_grad():
        output = model(images())
    assert torch.equal(torch.cat(list(output.embeddings), 1), output.features[:, :24])


def test_paper_heads_classify_the_unreduced_whole_maps_and_the_reduced_stripes():
    model = make(7, bnneck=False, paper_heads=True)
    assert [head.classifier.weight.shape for head in model.heads] == [(7, 512)] * 3 + [(7, 256)] * 5


def test_without_classes_there_are_no_classifiers_and_the_same_features():
    model, bare = shake(make()).eval(), make(0).eval()
    assert not any('classifier' in name for name in bare.state_dict())
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if 'classifier' not in k})
    with torch.no_grad():
        want, got = model(images()), bare(images())
    assert got.logits == ()
    assert torch.equal(got.features, want.features) and torch.equal(got.embeddings, want.embeddings)


@pytest.mark.parametrize('options, message', [
    (dict(parts=(), last_strides=()), 'part count'),
    (dict(parts=(1, 2)), r'parts=\(1, 2\), last_strides=\(2, 1, 1\)'),
    (dict(parts=(1, 2, 3, 4)), 'one length'),
    (dict(paper_heads=True), 'no BNNeck'),
])
def test_impossible_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize('height', [32, 1])
def test_an_image_with_fewer_rows_than_stripes_is_an_error(height):
    with pytest.raises(ValueError, match=rf'\(3,\) needs .* \(33, 1\) pixels, found \({height}, 32\); bind a larger'):
        make(parts=(3,), last_strides=(1,)).eval()(images(1, height))


@pytest.mark.parametrize('options', [
    dict(backbone='resnet18_ibn', parts=(1,), last_strides=(2,)),
    dict(backbone='resnet18_ibn', parts=(1,), last_strides=(1,), first_pooling='ceil'),
    dict(backbone='resnet18_ibn', parts=(2,), last_strides=(2,)),
    dict(backbone='resnet18', parts=(1,), last_strides=(1,)),
    dict(backbone='resnet18', parts=(1, 2), last_strides=(2, 2), first_pooling='ceil'),
    dict(backbone='resnet18', parts=(2, 3), last_strides=(2, 1))])
@torch.no_grad()
def test_images_are_too_small_where_a_layer_fails_or_a_map_has_fewer_rows_than_stripes(options):
    """Of images that are not wider than high: IBN fails for maps of a pixel, and asks for two rows of all."""
    model, refused = make(**options).eval(), 0
    for height in (1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35, 48, 49):
        for width in {1, 2, 3, min(height, 16), height}:
            if width <= height:
                try:
                    shared = model.trunk(torch.zeros(1, 3, height, width))
                    fits = all(branch(shared).shape[2] >= n for branch, n in zip(model.branches, model.parts))
                except (RuntimeError, ValueError):
                    fits = False
                try:
                    model.check_size(height, width)
                    assert fits, (height, width)
                except UserError as error:
                    assert not fits and f'found ({height}, {width}); bind a larger input_size' in error.message
                    refused += 1
    assert (refused > 0) == (options != dict(backbone='resnet18', parts=(1,), last_strides=(1,)))


def test_in_images_of_the_least_size_the_gradient_is_finite():
    model = make(backbone='resnet18_ibn', parts=(1, 2), last_strides=(2, 1))
    with pytest.raises(UserError, match=r'resnet18_ibn with .* at least \(17, 1\) pixels, found \(16, 16\); bind'):
        model(images(2, 16, 16))
    model(images(2, 17, 1)).features.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
