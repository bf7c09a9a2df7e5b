"""train.losses: a function, or a class whose parameters are trained, saved, resumed and left out of evaluation."""

import json

import gin
import pytest
import torch
from centre import CentreLoss
from outcomes import assert_same, outcome
from thin import thin, train  # noqa: F401 (a fixture)

from mgn import training
from mgn.losses import make_losses, mgn_losses
from mgn.model import MGN
from mgn.ops.errors import UserError
from mgn.runs import checkpoint

pytestmark = pytest.mark.usefixtures('thin')
CENTRE = 'train.losses = @CentreLoss'


class Crash(Exception):
    pass


def crash_at(monkeypatch, call):
    calls, real = [], training.train_step

    def step(*args):
        if len(calls) == call:
            raise Crash
        calls.append(0)
        return real(*args)
    monkeypatch.setattr(training, 'train_step', step)


@gin.configurable(denylist=['output', 'labels', 'candidates', 'candidate_labels'])
def cross_entropy_alone(output, labels, candidates=None, candidate_labels=None):
    return {'cross_entropy': mgn_losses(output, labels)['cross_entropy']}


def lines(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_a_function_of_ones_own_is_bound_by_reference(market, tmp_path):
    train(market, tmp_path, 'train.losses = @cross_entropy_alone')
    reports = [line for line in lines(tmp_path) if 'loss' in line]
    assert reports and all(line['loss'] == line['cross_entropy'] and 'triplet' not in line for line in reports)
    assert checkpoint.load(str(tmp_path / 'last.pth'))['losses'] == {}


def test_the_default_is_mgn_losses_bound_by_reference(market, tmp_path):
    one, other = (train(market, tmp_path / str(len(bindings)), *bindings).state_dict()
                  for bindings in ((), ('train.losses = @mgn_losses',)))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_parameters_of_losses_are_drawn_after_the_model_trained_and_saved(market, tmp_path):
    plain = train(market, tmp_path / 'plain', 'total_steps = 1', 'lr = 0.0').state_dict()
    fixed = train(market, tmp_path / 'fixed', 'total_steps = 1', 'lr = 0.0', CENTRE).state_dict()
    assert all(torch.equal(value, fixed[name]) for name, value in plain.items())  # the same first weights
    start = checkpoint.load(str(tmp_path / 'fixed' / 'last.pth'))['losses']
    train(market, tmp_path / 'run', CENTRE)
    last, best = (checkpoint.load(str(tmp_path / 'run' / name)) for name in ('last.pth', 'best.pth'))
    assert start['centres'].shape == (2, 6, 16) and not torch.equal(last['losses']['centres'], start['centres'])
    assert last['losses']['bias'].any() and 'losses' not in best and best['model'].keys() == plain.keys()
    weights, biases = last['optimizer']['param_groups']  # groups by the same rule as the model's
    trainable = [name for name, parameter in MGN(6).named_parameters() if parameter.requires_grad]
    assert len(weights['params']) == sum('bias' not in name for name in trainable) + 1
    assert len(biases['params']) == sum('bias' in name for name in trainable) + 1
    report = [line for line in lines(tmp_path / 'run') if 'loss' in line][0]
    assert report['loss'] == pytest.approx(report['cross_entropy'] + report['triplet'] + report['centre'], rel=1e-6)


def test_evaluation_takes_no_notice_of_them(market, tmp_path):
    for bindings in ((), (CENTRE, 'CentreLoss.weight = 5.0')):
        train(market, tmp_path / str(len(bindings)), 'total_steps = 1', 'lr = 0.0', *bindings)
    one, other = (json.loads((tmp_path / name / 'eval.json').read_text())['mAP'] for name in ('0', '2'))
    assert one == other


@pytest.mark.parametrize('kind', [
    (), ("train.precision = 'float16'", 'train.clip_gradient_norm = 1.0')],
    ids=['plain', 'float16, clipped'])
def test_a_resumed_run_is_bit_identical(market, tmp_path, monkeypatch, kind):
    train(market, tmp_path / 'whole', CENTRE, *kind)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, 5)
        train(market, tmp_path / 'parts', CENTRE, *kind)
    train(market, tmp_path / 'parts', CENTRE, *kind)
    assert_same(outcome(tmp_path / 'parts'), outcome(tmp_path / 'whole'))


def test_other_losses_than_those_of_the_checkpoint(market, tmp_path):
    train(market, tmp_path, 'total_steps = 4')
    with pytest.raises(ValueError, match='(?s)centres is missing.*holds another run'):
        train(market, tmp_path, 'total_steps = 5', CENTRE)
    train(market, tmp_path, 'total_steps = 5', 'train.losses = @cross_entropy_alone')  # no parameters on either side
    assert 'triplet' not in lines(tmp_path)[-2]


@gin.configurable(denylist=['num_classes', 'branches', 'embedding_dim'])
class Steep(torch.nn.Module):
    """MGN's losses and one whose gradient is large and known."""

    def __init__(self, num_classes, branches, embedding_dim):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(4))

    def forward(self, output, labels, candidates=None, candidate_labels=None):
        return {**mgn_losses(output, labels, candidates, candidate_labels), 'steep': 1e4 * self.slope.sum()}


def test_they_count_in_the_clipped_norm_and_have_to_be_finite(market, tmp_path):
    bindings = ('total_steps = 1', 'train.losses = @Steep', 'make_optimizer.optimizer = @SGD', 'SGD.momentum = 0',
                'weight_decay = 0.0', 'make_optimizer.bias_lr_factor = 1.0', 'cosine.warmup_steps = 0')
    parts = [{**content['model'], **content['losses']} for content in (
        train_and_load(market, tmp_path / name, *bindings, *more)
        for name, more in (('a', ['lr = 0.0']), ('b', ['lr = 1.0', 'train.clip_gradient_norm = 0.5'])))]
    names = [*(name for name, _ in MGN(6).named_parameters()), 'slope']
    change = torch.cat([(parts[1][name] - parts[0][name]).flatten() for name in names])
    assert change.norm() == pytest.approx(0.5, rel=1e-3)
    torch.testing.assert_close(parts[1]['slope'], torch.full((4,), -0.25), rtol=1e-3, atol=0)  # 0.5 / √4 each
    with pytest.raises(UserError, match='NaN or infinity in the weights slope after step 0; .*last.pth, of step 0'):
        train(market, tmp_path / 'c', *bindings, 'lr = 1e35')  # 1e4 × 1e35 is no float32


def train_and_load(market, folder, *bindings):
    train(market, folder, *bindings)
    return checkpoint.load(str(folder / 'last.pth'))


def test_a_class_is_also_made_from_a_reference_with_a_scope(market, tmp_path):
    train(market, tmp_path, 'total_steps = 1', 'train.losses = @mine/CentreLoss', 'mine/CentreLoss.weight = 0.0')
    assert [line['centre'] for line in lines(tmp_path) if 'loss' in line] == [0.0]


@pytest.mark.parametrize('binding, message', [
    ('@CentreLoss()', r'a reference without parentheses such as @name, found @CentreLoss\(\)'),
    ("'triplet'", "a reference without parentheses such as @name, found 'triplet'"),
    ('@Augmentation', 'a reference without parentheses such as @name, found @Augmentation')])
def test_what_is_no_reference_to_losses_is_refused(market, tmp_path, binding, message):
    with pytest.raises(UserError, match=message):
        train(market, tmp_path, f'train.losses = {binding}')


def test_a_function_becomes_a_module_without_parameters():
    module = make_losses(mgn_losses, 3, 2, 4)
    assert isinstance(module, torch.nn.Module) and not list(module.parameters()) and not module.state_dict()


def test_losses_that_learn_may_do_so_while_the_whole_network_is_frozen(market, tmp_path):
    train(market, tmp_path, CENTRE, "train.freeze = ('trunk', 'branches', 'heads')",
          'train.freeze_steps = 1', 'total_steps = 1')
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 1
