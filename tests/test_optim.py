"""Parameter groups by the bias rule, and the recipes' optimizers."""

from pathlib import Path

import pytest
import torch

from mgn import config, optim
from mgn.model import MGN
from mgn.ops.errors import UserError
from mgn.step import set_lr

RECIPES = Path(__file__).parents[1] / 'gin'
pytestmark = pytest.mark.usefixtures('clean_gin')


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


def test_bias_counts_wherever_it_stands_in_a_name():
    config.load([], [])
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(1)) for name in ('biases', 'a_bias_b', 'bia')})
    weights, biases = optim.make_optimizer(model).param_groups
    assert names_in(weights, model) == {'bia'} and names_in(biases, model) == {'biases', 'a_bias_b'}


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
def test_a_first_step_that_float16_leaves_out_leaves_no_unwritten_memory_as_state(optimizer):
    config.load([], [f'make_optimizer.optimizer = @{optimizer}'])
    model, scaler = torch.nn.Linear(3, 2), torch.amp.GradScaler('cpu')
    made = optim.make_optimizer(model)
    torch.use_deterministic_algorithms(True)  # unwritten memory is NaN
    try:
        for factor in (float('inf'), 1):
            made.zero_grad()
            scaler.scale((factor * model(torch.ones(1, 3))).sum()).backward()
            scaler.step(made)
            scaler.update()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


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
def test_the_macros_lr_and_weight_decay_reach_the_optimizer(model, optimizer):
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


def test_a_factor_of_the_schedule_is_of_each_groups_own_rate(model):
    config.load([], ['lr = 0.5'])
    optimizer = optim.make_optimizer(model)
    for factor in (0.25, 0.5):  # of the initial rates, not of the present ones
        assert set_lr(optimizer, factor) == 0.5 * factor
        assert [group['lr'] for group in optimizer.param_groups] == [0.5 * factor, 1.0 * factor]


@pytest.mark.parametrize('bindings, reason', [(['lr = -0.5'], 'Invalid learning rate'),
                                              (['Adam.fused = True', 'Adam.foreach = True'], 'cannot be `True`'),
                                              (['make_optimizer.optimizer = @SGD', 'SGD.differentiable = True'],
                                               'differentiable = True')])
def test_what_the_optimizer_refuses_is_a_sentence(model, bindings, reason):
    config.load([], bindings)
    with pytest.raises(UserError, match=f'The optimizer refuses its bindings: .*{reason}.*; bind others'):
        optim.make_optimizer(model)


def test_the_configuration_of_an_earlier_run_is_read(model):
    """config.gin names every option of the optimizer, those that have to be as they are among them."""
    config.load([], ['Adam.differentiable = False', 'Adam.maximize = False', 'Adam.fused = True'])
    assert isinstance(optim.make_optimizer(model), torch.optim.Adam)
