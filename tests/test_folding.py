"""Folded batch normalisation gives the same features, and leaves the model as it was."""

import pytest
import torch
from torch import nn

from mgn.folding import folded
from mgn.model import MGN


def trained(**options):
    """An MGN in training, whose batch normalisation has statistics, scales and shifts as if it had been trained."""
    torch.manual_seed(0)
    model = MGN(5, backbone='resnet18', pretrained=False, embedding_dim=32, **options).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
    return model


def images(count):
    return torch.randn(count, 3, 64, 32).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('options', [{}, {'parts': (1, 2), 'last_strides': (2, 2), 'pooling': 'avg'}, {'bnneck': False, 'paper_heads': True, 'pooling': 'gem'}])
def test_features_are_those_of_the_model(options):
    model = trained(**options)  # maps of 4×2 and 2×1 pixels: one product each
    copied = folded(model)
    model.eval()
    with torch.no_grad():
        batch = images(4)
        want, got = model(batch), copied(batch)
    assert got.logits == ()
    for wanted, found in ((want.features, got.features), (want.embeddings, got.embeddings)):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()
    necks = [head.neck for head in copied.heads]  # behind a ReLU, so nothing takes them over
    assert all(module in necks for module in copied.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)))


def test_the_model_stays_as_it_was():
    model = trained()
    model(images(4)).features.sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [p.grad for p in model.parameters()]
    copied = folded(model)
    with torch.no_grad():
        copied(images(4))
        for tensor in copied.state_dict().values():
            tensor.zero_()
    assert model.training and all(module.training for module in model.modules()) and not copied.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients))
    assert all(head.classifier is not None for head in model.heads)
