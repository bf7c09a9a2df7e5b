"""The average of the weights: its numbers, its use in evaluations and best.pth; a run may take it up or drop it."""

import pytest
import torch
from thin import thin, train  # noqa: F401 (a fixture)
from torch import nn

from mgn import training
from mgn.runs import checkpoint
from mgn.averaging import WeightAverage

pytestmark = pytest.mark.usefixtures('thin')


@pytest.mark.parametrize('decay', [0, 0.3, 0.999])
def test_it_is_the_average_of_a_naive_loop(decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, decay)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(30):
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn_like(value))
        average.update(model, step)
        share = min(decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = share * expected[name] + (1 - share) * value
        for name, value in average.model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_evaluations_and_best_have_the_average_and_last_has_both(market, tmp_path, monkeypatch):
    seen, real = [], training.evaluate

    def evaluate(model, *args):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return real(model, *args)
    monkeypatch.setattr(training, 'evaluate', evaluate)
    model = train(market, tmp_path, 'train.ema_decay = 0.8')
    last, best = (checkpoint.load(str(tmp_path / name)) for name in ('last.pth', 'best.pth'))
    assert all(torch.equal(value, last['average'][name]) for name, value in seen[-1].items())
    assert all(torch.equal(value, last['model'][name]) for name, value in model.state_dict().items())
    weight = 'trunk.0.weight'
    assert not torch.equal(last['model'][weight], last['average'][weight])
    evaluated_at = {0: 0, 4: 1, 7: 2}[best['step']]
    assert all(torch.equal(value, seen[evaluated_at][name]) for name, value in best['model'].items())


def test_training_is_the_same_with_an_average_and_without(market, tmp_path):
    one, other = (train(market, tmp_path / str(decay), f'train.ema_decay = {decay}').state_dict()
                  for decay in (None, 0.8))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_takes_an_average_up_and_drops_it(market, tmp_path):
    train(market, tmp_path, 'total_steps = 4')
    assert checkpoint.load(str(tmp_path / 'last.pth'))['average'] is None
    before = checkpoint.load(str(tmp_path / 'last.pth'))['model']['trunk.0.weight']
    train(market, tmp_path, 'train.ema_decay = 0.999', 'total_steps = 5')
    last = checkpoint.load(str(tmp_path / 'last.pth'))
    share = (1 + 4) / (10 + 4)
    expected = share * before + (1 - share) * last['model']['trunk.0.weight']
    torch.testing.assert_close(last['average']['trunk.0.weight'], expected)
    train(market, tmp_path, 'total_steps = 6')
    assert checkpoint.load(str(tmp_path / 'last.pth'))['average'] is None


@pytest.mark.parametrize('decay', [1, -0.1, 1.5])
def test_a_decay_out_of_range_is_an_error(market, tmp_path, decay):
    message = f'train.ema_decay must be a finite number from 0 to 0.999999 or None, found {decay}'
    with pytest.raises(ValueError, match=message):
        train(market, tmp_path, f'train.ema_decay = {decay}')
