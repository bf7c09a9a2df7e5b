"""MGN's first weights: the recipe's distributions, branches that start equal, ImageNet's from a file or the network."""

import io
from email.message import Message
from urllib.error import URLError

import pytest
import torch
import torchvision
from thin import narrow_networks

from mgn.model import MGN, make_resnet


def test_branches_start_equal_and_are_independent_afterwards():
    model = MGN(5, backbone='resnet18', pretrained=False)
    first, *others = (dict(branch.named_parameters()) for branch in model.branches)
    for other in others:
        assert first.keys() == other.keys()
        for name in first:
            assert torch.equal(first[name], other[name])
            assert first[name].data_ptr() != other[name].data_ptr()
    before = others[0]['0.conv1.weight'].clone()
    with torch.no_grad():
        first['0.conv1.weight'].zero_()
    assert torch.equal(others[0]['0.conv1.weight'], before)
    assert len(list(model.parameters())) == len({p.data_ptr() for p in model.parameters()})


def test_initial_weights_follow_the_recipe():
    torch.manual_seed(0)
    heads = MGN(129, backbone='resnet18', pretrained=False).heads

    def is_normal(values, mean, std):
        values = torch.cat([v.detach().flatten() for v in values])
        spread = std / len(values) ** 0.5
        assert abs(values.mean() - mean) < 4 * spread
        assert abs(values.std() / std - 1) < 4 * (2 * len(values)) ** -0.5
        assert abs((values - mean).abs().mean() / std - 0.7979) < 4 * 0.6028 * len(values) ** -0.5  # as a Gaussian's

    is_normal([head.reduction.weight for head in heads], 0, (2 / 256) ** 0.5)  # Kaiming, fan_out, ReLU's gain
    is_normal([head.norm.weight for head in heads], 1, 0.02)
    is_normal([head.neck.weight for head in heads], 1, 0.02)
    is_normal([head.classifier.weight for head in heads], 0, 0.001)
    assert not any(norm.bias.any() for head in heads for norm in (head.norm, head.neck))


def test_classifiers_and_reductions_have_no_bias():
    for head in MGN(5, backbone='resnet18', pretrained=False).heads:
        assert head.reduction.bias is None and head.classifier.bias is None


@pytest.fixture
def imagenet_like():
    torch.manual_seed(3)
    return torchvision.models.resnet18(weights=None).state_dict()


def holds(model, state):
    assert torch.equal(model.trunk[0].weight, state['conv1.weight'])
    assert torch.equal(model.trunk[6].conv2.weight, state['layer3.0.conv2.weight'])
    for branch in model.branches:
        assert torch.equal(branch[0].conv1.weight, state['layer3.1.conv1.weight'])
        assert torch.equal(branch[1].downsample[0].weight, state['layer4.0.downsample.0.weight'])
        assert torch.equal(branch[2].bn2.weight, state['layer4.1.bn2.weight'])


def test_pretrained_weights_come_from_a_local_file(tmp_path, monkeypatch, imagenet_like):
    torch.save(imagenet_like, tmp_path / 'weights.pth')
    holds(MGN(5, backbone='resnet18', pretrained=str(tmp_path / 'weights.pth')), imagenet_like)
    monkeypatch.setenv('HOME', str(tmp_path))
    holds(MGN(5, backbone='resnet18', pretrained='~/weights.pth'), imagenet_like)


def test_pretrained_true_uses_torchvisions_cache(tmp_path, monkeypatch, imagenet_like):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    (tmp_path / 'hub' / 'checkpoints').mkdir(parents=True)
    torch.save(imagenet_like, tmp_path / 'hub' / 'checkpoints' / weights.url.rsplit('/', 1)[1])
    holds(MGN(5, backbone='resnet18', pretrained=True), imagenet_like)


def test_pretrained_true_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError('Name or service not known')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'urlopen', unreachable)
    with pytest.raises(OSError, match='(?s)ImageNet weights https://.*resnet18.*not known.*MGN.pretrained') as raised:
        MGN(5, backbone='resnet18', pretrained=True)
    assert not isinstance(raised.value, URLError)


def test_pretrained_true_answered_by_something_else_says_what_to_do(tmp_path, monkeypatch):
    class LoginPage(io.BytesIO):
        def info(self):
            return Message()

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'urlopen', lambda *args, **kwargs: LoginPage(b'<html>please log in</html>'))
    with pytest.raises(OSError, match='(?s)ImageNet weights https://.*resnet18.*MGN.pretrained'):
        MGN(5, backbone='resnet18', pretrained=True)


def test_unfit_pretrained_files_are_errors(tmp_path, imagenet_like):
    with pytest.raises(FileNotFoundError, match='no file .*nowhere.pth'):
        MGN(5, backbone='resnet18', pretrained=str(tmp_path / 'nowhere.pth'))
    torch.save(imagenet_like, tmp_path / 'resnet18.pth')
    with pytest.raises(ValueError, match='(?s)resnet18.pth do not fit.*layer1.2.* is missing.*those of resnet34'):
        MGN(5, backbone='resnet34', pretrained=str(tmp_path / 'resnet18.pth'))
    with pytest.raises(ValueError, match='(?s)resnet18.pth do not fit.*bn1.IN.weight is missing.*MGN.backbone'):
        MGN(5, backbone='resnet18_ibn', pretrained=str(tmp_path / 'resnet18.pth'))
    with pytest.raises(ValueError, match="no ImageNet weights of resnet18_ibn; bring the file of IBN-Net"):
        MGN(5, backbone='resnet18_ibn')
    (tmp_path / 'text.pth').write_text('not weights')
    with pytest.raises(ValueError, match='text.pth is damaged'):
        MGN(5, backbone='resnet18', pretrained=str(tmp_path / 'text.pth'))


@pytest.mark.parametrize('backbone', ['resnet18_ibn', 'resnet34_ibn', 'resnet50_ibn', 'resnet101_ibn'])
def test_weights_of_ibn_net_are_loaded_with_the_prefix_and_field_of_its_older_files(tmp_path, backbone):
    with narrow_networks(), torch.device('meta'):
        names = make_resnet(backbone).state_dict()
    state = {name: torch.full(tensor.shape, 0.5, dtype=tensor.dtype) for name, tensor in names.items()}
    state['layer3.1.conv1.weight'] = torch.randn(state['layer3.1.conv1.weight'].shape)
    older = {f'module.{name}': tensor for name, tensor in state.items() if 'num_batches' not in name}
    for name, content in {'a.pth': state, 'b.pth': {'state_dict': older, 'epoch': 90}}.items():
        torch.save(content, tmp_path / name)
        with narrow_networks():
            model = MGN(5, backbone=backbone, pretrained=str(tmp_path / name))
        assert torch.equal(model.branches[2][0].conv1.weight, state['layer3.1.conv1.weight'])
        assert all((tensor == 0.5).all() for tensor in model.trunk.state_dict().values() if tensor.is_floating_point())
