import copy

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgn import convolution
from mgn.convolution import ProductConv, ProductGradient, use_products
from mgn.model import MGN


@pytest.fixture(params=[0, 10 ** 9], ids=['products of the gradient', 'one product'])
def always(request, monkeypatch):
    monkeypatch.setattr(convolution, 'SMALL_MAP', request.param)
    monkeypatch.setattr(convolution, 'WIDE', 1)


def pair(channels, out, k, stride, dtype=torch.float64):
    """torch's convolution and ours, of the same weights."""
    plain = torch.nn.Conv2d(channels, out, k, stride, k // 2, bias=False).to(dtype)
    own = copy.deepcopy(plain)
    use_products(own)
    return plain, own


def assert_same(plain, own, x, bound=1e-12):
    want, got = plain(x), own(x)
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)
    seed = torch.randn_like(want)
    gradients = (torch.autograd.grad(y, [x, layer.weight], seed) for y, layer in ((got, own), (want, plain)))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # one fixture for all examples
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.sampled_from([1, 2]),
       st.booleans(), st.integers(0, 99))
def test_it_is_the_convolution(always, images, height, width, k, stride, channels_last, seed):
    torch.manual_seed(seed)
    x = torch.randn(images, 3, height, width, dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last) if channels_last else x.mT.contiguous().mT).requires_grad_()
    assert_same(*pair(3, 5, k, stride), x)


@pytest.mark.parametrize('k', [1, 3])
@pytest.mark.parametrize('stride', [1, 2])
def test_gradients_are_those_of_differences(k, stride):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, k, k, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, weight: ProductGradient.apply(x, weight, stride),
                                    (x.requires_grad_(), weight.requires_grad_()))


def test_what_is_frozen_gets_no_gradient(always):
    plain, own = pair(3, 5, 3, 1)
    own.weight.requires_grad_(False)
    x = torch.randn(2, 3, 8, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(own(x).sum(), x), torch.autograd.grad(plain(x).sum(), x))
    own.weight.requires_grad_()
    own(x.detach()).sum().backward()
    plain(x.detach()).sum().backward()
    torch.testing.assert_close(own.weight.grad, plain.weight.grad)


def test_gradients_lie_as_the_weights_do(always):
    own = ProductConv(16, 8, 3, 1, 1, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 8, 4).to(memory_format=torch.channels_last)
    gradient, = torch.autograd.grad(own(x).sum(), own.weight)
    assert gradient.stride() == own.weight.stride()


def test_nan_stays_where_it_is(always):
    plain, own = pair(2, 3, 3, 1)
    x = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    x[0, 1, 2, 2] = torch.nan
    torch.testing.assert_close(own(x), plain(x), equal_nan=True)


def test_wide_convolutions_take_products_and_others_do_not(monkeypatch):
    taken, apply = [], ProductGradient.apply
    monkeypatch.setattr(ProductGradient, 'apply',
                        lambda x, weight, stride: (taken.append(weight.shape[1]), apply(x, weight, stride))[1])
    model = MGN(4, 'resnet18', pretrained=False).train()
    images = torch.randn(4, 3, 128, 64)
    model(images)
    assert set(taken) == {128, 256, 512}
    taken.clear()
    with torch.no_grad():
        model(images)
    with torch.autocast('cpu', torch.bfloat16):
        model(images)
    assert not taken


def test_in_bfloat16_it_is_torchs(always):
    plain, own = pair(4, 4, 3, 1, torch.float32)
    x = torch.randn(2, 4, 8, 4, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        assert own(x).dtype == torch.bfloat16
        assert_same(plain, own, x, bound=0.1)


def test_float32_at_the_shapes_of_a_resnet():
    torch.manual_seed(0)
    for channels, out, k, stride, height, width in ((256, 1024, 1, 1, 24, 8), (512, 1024, 1, 2, 12, 6),
                                                    (256, 256, 3, 1, 24, 8), (512, 512, 3, 2, 24, 8)):
        plain, own = pair(channels, out, k, stride, torch.float32)
        x = torch.randn(2, channels, height, width).to(memory_format=torch.channels_last)
        seed = torch.randn_like(plain(x))
        want, got = (torch.autograd.grad(conv(x), conv.weight, seed)[0] for conv in (plain, own))
        assert (got - want).norm() < 1e-6 * want.norm()


def test_a_model_is_built_of_product_convolutions_without_a_draw_or_a_copy():
    layer = torch.nn.Conv2d(3, 5, 3, 2, 1)
    before, weight, bias, text = torch.get_rng_state(), layer.weight, layer.bias, repr(layer)
    use_products(layer)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.weight is weight and layer.bias is bias
    assert repr(layer) == text.replace('Conv2d', 'ProductConv')
    model = MGN(4, 'resnet50', pretrained=False, parts=(1,), last_strides=(1,))
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [type(module) for module in convolutions] == [torch.nn.Conv2d] + [ProductConv] * 52
    torch.manual_seed(0)
    first = MGN(4, 'resnet18', pretrained=False).state_dict()
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None).state_dict()
    assert torch.equal(first['branches.0.1.conv2.weight'], resnet['layer4.0.conv2.weight'])
