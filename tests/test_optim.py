"""Parameter groups by the bias rule, and the schedules against the recipe's numbers."""

import math
from pathlib import Path

import gin
import pytest
import torch

from mgn import config, optim
from mgn.model import MGN

RECIPES = Path(__file__).parents[1] / 'gin'


@pytest.fixture(autouse=True)
def clean_gin():
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.fixture(scope='module')
def model():
    return MGN(5, backbone='resnet18', pretrained=False, embedding_dim=8)


def names_in(group, model):
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {name_of[id(p)] for p in group['params']}


def test_parameters_with_bias_in_their_name_and_no_others_are_in_the_bias_group(model):
    config.load([], [])
    weights, biases = optim.make_optimizer(model).param_groups
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names_in(biases, model) == {name for name in trainable if 'bias' in name}
    assert names_in(weights, model) == {name for name in trainable if 'bias' not in name}
    assert {'trunk.1.bias', 'heads.7.norm.bias'} <= names_in(biases, model)  # of batch normalisation, too
    assert len(weights['params']) + len(biases['params']) == len(trainable)


def test_the_frozen_bias_of_every_neck_is_in_no_group(model):
    config.load([], [])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f'heads.{i}.neck.bias' for i in range(8)}
    groups = optim.make_optimizer(model).param_groups
    assert not frozen & set.union(*(names_in(group, model) for group in groups))


def test_a_model_without_biases_is_taken():
    config.load([], [])
    model = torch.nn.Linear(3, 2, bias=False)
    assert [len(group['params']) for group in optim.make_optimizer(model).param_groups] == [1, 0]


@pytest.mark.parametrize('optimizer', ['Adam', 'AdamW', 'SGD'])
def test_biases_get_twice_the_learning_rate_and_no_decay(model, optimizer):
    config.load([], [f'make_optimizer.optimizer = @{optimizer}', f'{optimizer}.lr = 3.5e-4',
                     f'{optimizer}.weight_decay = 5e-4'])
    result = optim.make_optimizer(model)
    assert isinstance(result, getattr(torch.optim, optimizer))
    for group, lr, decay in zip(result.param_groups, (3.5e-4, 7e-4), (5e-4, 0)):
        assert group['lr'] == group['initial_lr'] == lr
        assert group['weight_decay'] == decay


@pytest.mark.parametrize('recipe', ['market.gin', 'duke.gin', 'msmt17.gin'])
def test_the_recipes_train_with_adam_at_their_learning_rate_and_decay(model, recipe):
    config.load([str(RECIPES / recipe)], [])
    result = optim.make_optimizer(model)
    assert isinstance(result, torch.optim.Adam) and not isinstance(result, torch.optim.AdamW)
    assert [(group['lr'], group['weight_decay']) for group in result.param_groups] == [(3.5e-4, 5e-4), (7e-4, 0)]
    assert all(group['betas'] == (0.9, 0.999) for group in result.param_groups)


@pytest.mark.parametrize('optimizer', ['Adam', 'AdamW', 'SGD'])
def test_the_macros_lr_and_weight_decay_reach_the_optimiser(model, optimizer):
    config.load([], [f'make_optimizer.optimizer = @{optimizer}', 'lr = 0.5', 'weight_decay = 0.25'])
    groups = optim.make_optimizer(model).param_groups
    assert [(group['lr'], group['weight_decay']) for group in groups] == [(0.5, 0.25), (1.0, 0)]


def test_factor_and_decay_of_biases_are_as_bound(model):
    config.load([], ['make_optimizer.optimizer = @SGD', 'SGD.lr = 0.5', 'make_optimizer.bias_lr_factor = 3.0',
                     'make_optimizer.bias_weight_decay = 0.25'])
    group = optim.make_optimizer(model).param_groups[1]
    assert (group['lr'], group['initial_lr'], group['weight_decay']) == (1.5, 1.5, 0.25)


def test_one_step_moves_weights_and_biases_by_the_rule():
    config.load([], ['make_optimizer.optimizer = @SGD', 'lr = 0.5', 'weight_decay = 0.25', 'SGD.momentum = 0.0'])
    layer = torch.nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = optim.make_optimizer(layer)
    layer(torch.ones(1, 3)).sum().backward()  # every gradient is 1
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), weight - 0.5 * (1 + 0.25 * weight))
    torch.testing.assert_close(layer.bias.detach(), bias - 2 * 0.5)


@pytest.mark.parametrize('recipe, total, warmup, milestones', [
    ('market.gin', 18000, 2000, (8000, 14000)), ('duke.gin', 23000, 2500, (10000, 18000)),
    ('msmt17.gin', 42000, 4700, (19000, 33000))])
def test_the_recipes_warm_up_from_a_hundredth_and_drop_to_a_tenth_at_their_steps(recipe, total, warmup, milestones):
    config.load([str(RECIPES / recipe)], [])
    assert gin.query_parameter('%total_steps') == total
    assert repr(gin.query_parameter('train.schedule')) == '@multi_step'
    for step in {0, 1, warmup // 2, warmup - 1, warmup, *milestones, *(m - 1 for m in milestones), total - 1}:
        expected = 0.01 + 0.99 * step / warmup if step < warmup else 1
        for milestone in milestones:
            if step >= milestone:
                expected *= 0.1
        assert optim.multi_step(step, total) == pytest.approx(expected, rel=1e-12)


def test_the_default_schedule_is_that_of_market():
    points = {0: 0.01, 1000: 0.505, 2000: 1, 7999: 1, 8000: 0.1, 13999: 0.1, 14000: 0.01, 17999: 0.01}
    assert {step: optim.multi_step(step, 18000) for step in points} == pytest.approx(points, rel=1e-12)


def test_multi_step_multiplies_by_gamma_at_every_milestone_also_while_warming_up():
    factors = [optim.multi_step(step, 10, warmup_steps=4, warmup_factor=0.5, milestones=(2, 6, 6, 8), gamma=0.5)
               for step in range(10)]
    assert factors == [0.5, 0.625, 0.375, 0.4375, 0.5, 0.5, 0.125, 0.125, 0.0625, 0.0625]


def test_cosine_stays_at_1_until_its_start_and_falls_to_its_final_factor():
    start, total, final = 40, 129, 0.1
    for step in range(total + 5):
        share = min(max(step - start, 0) / (total - start), 1)
        expected = final + (1 - final) * (1 + math.cos(math.pi * share)) / 2
        assert optim.cosine(step, total, warmup_steps=0, start=start, final_factor=final) == pytest.approx(expected)
    assert optim.cosine(start, total, 0, start=start) == 1
    assert optim.cosine((start + total) / 2, total, 0, start=start) == pytest.approx(0.5)
    assert optim.cosine(total, total, 0, start=start, final_factor=final) == pytest.approx(final)


def test_cosine_is_scaled_by_the_linear_warm_up():
    for step in range(40):
        warmup = min(0.01 + 0.99 * step / 20, 1)
        expected = warmup * (1 + math.cos(math.pi * step / 40)) / 2
        assert optim.cosine(step, 40, warmup_steps=20, warmup_factor=0.01) == pytest.approx(expected)


@pytest.mark.parametrize('schedule', [optim.multi_step, optim.cosine])
def test_without_warm_up_the_first_step_has_the_full_rate(schedule):
    assert schedule(0, 10, warmup_steps=0) == 1


def test_a_cosine_that_starts_at_the_end_stays_at_1():
    assert [optim.cosine(step, 10, warmup_steps=0, start=10) for step in (0, 9, 10)] == [1, 1, 1]
