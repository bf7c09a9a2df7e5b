"""The training loop: what it writes, in which fields, and that every step does what it says."""

import itertools
import json
import logging
import math
import os

import gin
import pytest
import torch
from conftest import write_market
from thin import BINDINGS, fitting_schedule, thin, train  # noqa: F401 (a fixture)

from mgn import config, training
from mgn.runs import checkpoint, processes
from mgn.devices import find_device
from mgn.runs.meter import Meter
from mgn.ops.errors import UserError
from mgn.ops.metrics import METRICS

pytestmark = pytest.mark.usefixtures('thin')

TRAINING = {'step', 'epoch', 'loss', 'cross_entropy', 'triplet', 'lr', 'images_per_s', 'data_wait'}
EVALUATION = {'step', *METRICS}


def records(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_a_run_writes_its_files_and_its_lines(market, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger='mgn'):
        train(market, tmp_path)
    assert {'last.pth', 'best.pth', 'config.gin', 'metrics.jsonl', 'eval.json'} <= set(os.listdir(tmp_path))
    assert not list(tmp_path.glob('*.tmp'))

    lines = records(tmp_path)
    assert [line['step'] for line in lines] == [0, 3, 4, 6, 7, 7]
    evaluations = [line for line in lines if 'mAP' in line]
    steps = [line for line in lines if 'loss' in line]
    assert [line['step'] for line in evaluations] == [0, 4, 7]
    assert all(line.keys() == EVALUATION for line in evaluations)
    assert all(line.keys() == TRAINING for line in steps)
    assert all(0 <= line[name] <= 1 for line in evaluations for name in EVALUATION - {'step'})
    assert [line['epoch'] for line in steps] == [0, 1, 2]
    for line in steps:
        assert line['loss'] == pytest.approx(line['cross_entropy'] + line['triplet'], rel=1e-6)
        assert line['images_per_s'] > 0 and 0 < line['data_wait'] < 1
    # Warm-up over two steps, constant to step 3, then half a cosine to step 7; each line has the lr of its last step.
    assert [line['lr'] for line in steps] == pytest.approx(
        [1e-2, 1e-2 * (1 + math.cos(math.pi / 2)) / 2, 1e-2 * (1 + math.cos(math.pi * 3 / 4)) / 2])

    results = json.loads((tmp_path / 'eval.json').read_text())
    assert {name: results[name] for name in EVALUATION} == evaluations[-1]
    for line in evaluations:
        assert f'{100 * line["mAP"]:.2f}' in caplog.text
    assert f'checkpoints, metrics and configuration are in {tmp_path}' in caplog.text


def test_best_holds_the_weights_of_the_best_evaluation_and_nothing_to_go_on_with(market, tmp_path):
    train(market, tmp_path)
    best, last = (checkpoint.load(str(tmp_path / name)) for name in ('best.pth', 'last.pth'))
    evaluations = [line for line in records(tmp_path) if 'mAP' in line]
    assert best['mAP'] == max(line['mAP'] for line in evaluations)
    assert best['step'] == max(evaluations, key=lambda line: line['mAP'])['step']
    assert set(best) == {'format', 'config', 'num_classes', 'step', 'mAP', 'model'}
    assert best['num_classes'] == 6 and best['model'].keys() == last['model'].keys()
    assert last['step'] == 7
    assert last['config'] == gin.config_str() and best['config'] == checkpoint.configuration(portable=True)
    assert str(market) in last['config'] and str(market) not in best['config']  # best.pth is for others, too
    assert os.path.getsize(tmp_path / 'best.pth') < os.path.getsize(tmp_path / 'last.pth') / 2


@pytest.mark.parametrize('found, best', [((0.1, 0.5, 0.3), 4), ((0.5, 0.5, 0.3), 0)])
def test_best_is_replaced_by_a_better_evaluation_alone(market, tmp_path, monkeypatch, found, best):
    real, found = training.evaluate, iter(found)
    monkeypatch.setattr(training, 'evaluate', lambda *args: {**real(*args), 'mAP': next(found)})
    train(market, tmp_path)
    assert (checkpoint.load(str(tmp_path / 'best.pth'))['step'], next(found, None)) == (best, None)


def test_a_checkpoint_is_written_before_each_evaluation(market, tmp_path, monkeypatch):
    def evaluate(*args):
        raise UserError('An error of the evaluation.')
    monkeypatch.setattr(training, 'evaluate', evaluate)
    with pytest.raises(UserError, match='of the evaluation'):
        train(market, tmp_path, 'train.evaluate_first = False', 'train.evaluate_every = 3',
              'train.checkpoint_every = 100')
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 3


def test_speed_is_of_images_and_the_share_of_waiting_of_what_a_step_takes(market, tmp_path, monkeypatch):
    seconds, real = itertools.count(), training.train_step  # one passes from each look at the clock to the next
    with monkeypatch.context() as patch:
        patch.setattr(training.time, 'perf_counter', lambda: next(seconds))
        patch.setattr(training, 'train_step', lambda *args: (next(seconds), real(*args))[1])
        train(market, tmp_path)
    lines = [line for line in records(tmp_path) if 'loss' in line]
    assert [(line['images_per_s'], line['data_wait']) for line in lines] == [(2 * 2 / 3, 1 / 3)] * 3


def test_with_query_expansion_and_re_ranking_lines_and_best_are_of_plain_ranking(market, tmp_path):
    train(market, tmp_path, 'total_steps = 1', 'query_expansion = 2', 'rerank = True', 'evaluate.k1 = 3',
          'evaluate.k2 = 2')
    lines = [line for line in records(tmp_path) if 'mAP' in line]
    assert len(lines) == 2 and all(line.keys() == EVALUATION for line in lines)
    assert checkpoint.load(str(tmp_path / 'best.pth'))['mAP'] == max(line['mAP'] for line in lines)
    results = json.loads((tmp_path / 'eval.json').read_text())
    assert {name: results[name] for name in EVALUATION} == lines[-1]
    assert results['query_expansion']['k'] == 2
    assert results['rerank']['expanded'] and 0 < results['rerank']['mAP'] <= 1


def test_the_configuration_written_beside_a_run_is_the_operative_one_and_loads(market, tmp_path):
    train(market, tmp_path, 'SGD.momentum = 0.5')
    text = (tmp_path / 'config.gin').read_text()
    for line in ('lr = 0.01', 'train.clip_gradient_norm = None', 'mgn_losses.margin = 1.2',
                 'flip_test = False'):
        assert line in text.splitlines()
    assert 'SGD' not in text and 'msmt17' not in text
    config.load([str(tmp_path / 'config.gin')], [])
    assert gin.query_parameter('%P') == 2


def test_the_periods_may_coincide_or_exceed_the_run(market, tmp_path):
    train(market, tmp_path / 'all', 'train.log_every = 1', 'train.checkpoint_every = 1', 'train.evaluate_every = 1',
          'total_steps = 2')
    assert [('mAP' in line, line['step']) for line in records(tmp_path / 'all')] == [
        (True, 0), (False, 1), (True, 1), (False, 2), (True, 2)]
    train(market, tmp_path / 'none', 'train.log_every = 99', 'train.checkpoint_every = 99', 'train.evaluate_every = 99',
          'total_steps = 2')
    assert [('mAP' in line, line['step']) for line in records(tmp_path / 'none')] == [(True, 0), (False, 2), (True, 2)]
    assert checkpoint.load(str(tmp_path / 'none' / 'last.pth'))['step'] == 2


def test_training_changes_the_weights_and_the_seed_decides_them(market, tmp_path):
    untrained = train(market, tmp_path / 'a', 'total_steps = 1', 'lr = 0.0')
    once, again, other = (train(market, tmp_path / name, 'total_steps = 2', f'seed = {seed}')
                          for name, seed in (('b', 0), ('c', 0), ('d', 1)))
    weights = [model.state_dict()['branches.1.0.conv1.weight'] for model in (untrained, once, again, other)]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[3])


def test_the_returned_model_is_the_one_in_last(market, tmp_path):
    model = train(market, tmp_path, 'total_steps = 2')
    saved = checkpoint.load(str(tmp_path / 'last.pth'))['model']
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize('name', ['train.log_every', 'train.checkpoint_every', 'train.evaluate_every', 'total_steps'])
def test_a_period_below_one_is_an_error(market, tmp_path, name):
    with pytest.raises(ValueError, match=f'{name.split(".")[-1]} must be an integer from 1 to 2147483647, found 0'):
        train(market, tmp_path, f'{name} = 0')


def test_bfloat16_trains_to_about_the_losses_of_float32(market, tmp_path):
    for precision in ('float32', 'bfloat16'):
        train(market, tmp_path / precision, f"train.precision = '{precision}'")
    first, second = ([line['loss'] for line in records(tmp_path / precision) if 'loss' in line]
                     for precision in ('float32', 'bfloat16'))
    assert first != second
    assert first[0] == pytest.approx(second[0], rel=0.05)


def test_a_precision_that_does_not_exist_is_an_error(market, tmp_path):
    with pytest.raises(ValueError, match="train.precision must be 'auto' or 'float32' or .*'float16', found 'fp16'"):
        train(market, tmp_path, "train.precision = 'fp16'")


def test_a_data_set_without_parentheses_is_an_error(market, tmp_path):
    with pytest.raises(ValueError, match='a reference with parentheses'):
        train(market, tmp_path, 'dataset = @market1501')


@pytest.mark.parametrize('seed', ['-1', '1.5'])
def test_a_seed_that_is_none_is_an_error_before_anything_is_saved(market, tmp_path, seed):
    with pytest.raises(ValueError, match='seed must be an integer'):
        train(market, tmp_path, f'seed = {seed}')
    assert not (tmp_path / 'last.pth').exists()


def test_too_few_identities_are_an_error(market, tmp_path):
    with pytest.raises(ValueError, match='P=7 identities.* 6'):
        train(market, tmp_path, 'P = 7')


def test_the_meter_means_since_the_last_reading(tmp_path):
    meter, values = Meter(), torch.rand(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for first, last in ((0, 3), (3, 4), (4, 7)):
        for step in range(first, last):
            meter.add({'a': values[step, 0], 'b': values[step, 1]}, step)
        a, b = values[first:last].mean(0).tolist()
        assert meter.read(str(tmp_path)) == pytest.approx({'a': a, 'b': b})


@pytest.mark.parametrize('name', ['cuda:99', 'mps:99', 'gpu'])
def test_a_device_that_is_not_there_is_a_clear_error(market, tmp_path, name):
    with pytest.raises(ValueError, match=f"The device '{name}' is not .* this machine.*bind device = 'cpu' or 'auto'"):
        train(market, tmp_path, f"device = '{name}'")
    assert not list(tmp_path.glob('*.pth'))


def test_cuda_is_a_clear_error_exactly_where_there_is_none():
    if torch.cuda.is_available():
        assert find_device('cuda').type == find_device('auto').type == 'cuda'
    else:
        with pytest.raises(ValueError, match="The device 'cuda' is not available"):
            find_device('cuda')
        assert find_device('auto').type == ('mps' if torch.backends.mps.is_available() else 'cpu')


def test_data_of_one_camera_need_cross_camera_false(tmp_path):
    data = write_market(tmp_path / 'data', cameras=1)
    with pytest.raises(ValueError, match='(?i)several cameras.*camera 1.*bind evaluate.cross_camera = False'):
        train(data, tmp_path / 'run', 'total_steps = 1')
    train(data, tmp_path / 'run', 'total_steps = 1', 'evaluate.cross_camera = False')
    assert [line['step'] for line in records(tmp_path / 'run')] == [0, 1, 1]


def test_off_a_terminal_every_logging_step_is_a_plain_line(market, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger='mgn'):
        train(market, tmp_path)
    lines = [record.message for record in caplog.records if record.message.startswith('step ')]
    assert [line.split(':')[0] for line in lines] == ['step 3', 'step 6', 'step 7']
    for name in ('loss', 'lr', 'images/s'):
        assert all(f'{name} ' in line for line in lines)


def test_frozen_modules_stay_as_they_are_until_their_step_and_in_a_resumed_run(market, tmp_path):
    freeze = "train.freeze = ('trunk', 'branches.0')", 'train.freeze_steps = 3', 'lr = 1e-2'
    train(market, tmp_path / 'whole', *freeze)
    train(market, tmp_path / 'parts', *freeze, 'total_steps = 2')
    train(market, tmp_path / 'parts', *freeze, 'total_steps = 3')
    early = checkpoint.load(str(tmp_path / 'parts' / 'last.pth'))['model']
    train(market, tmp_path / 'parts', *freeze, 'total_steps = 4')
    fourth = checkpoint.load(str(tmp_path / 'parts' / 'last.pth'))['model']
    assert not torch.equal(fourth['trunk.0.weight'], early['trunk.0.weight'])
    assert not torch.equal(fourth['trunk.1.running_mean'], early['trunk.1.running_mean'])
    train(market, tmp_path / 'start', *freeze, 'total_steps = 1', 'train.resume = False')
    train(market, tmp_path / 'parts', *freeze, 'train.schedule = @cosine')
    before = checkpoint.load(str(tmp_path / 'start' / 'last.pth'))['model']
    one, other = (checkpoint.load(str(tmp_path / run / 'last.pth'))['model'] for run in ('whole', 'parts'))
    frozen = [name for name in early if name.startswith(('trunk.', 'branches.0.'))]
    assert all(torch.equal(early[name], before[name]) for name in frozen)  # statistics, too
    assert not torch.equal(early['branches.1.0.conv1.weight'], before['branches.1.0.conv1.weight'])
    assert all(not torch.equal(one[name], early[name]) for name in frozen if 'weight' in name or 'running' in name)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_processes_on_unlike_devices_are_refused_before_they_wait_for_each_other(market, tmp_path, monkeypatch):
    """As where one machine lacks its driver, and 'auto' means the CPU there."""
    config.load([], [*BINDINGS, *fitting_schedule(*BINDINGS), f"data_root = '{market}'"])
    monkeypatch.setattr(processes, 'count', lambda: 2)
    monkeypatch.setattr(processes, 'gather', lambda value: [value, ('cuda', 'float32')])
    with pytest.raises(UserError, match='same kind of device, and precision on it, but .* 0 and 1. Bind device'):
        training.Training(str(tmp_path)).check_options()


@pytest.mark.parametrize('optimizer', ['AdamW', 'SGD'])
def test_frozen_modules_thaw_under_every_optimizer(market, tmp_path, optimizer):
    """torch's fused SGD ends where some parameters have momentum and others, frozen so far, have none."""
    freeze = "train.freeze = ('trunk',)", 'train.freeze_steps = 2', f'make_optimizer.optimizer = @{optimizer}'
    frozen, thawed = (train(market, tmp_path / str(steps), *freeze, f'total_steps = {steps}').state_dict()
                      for steps in (2, 3))
    assert not torch.equal(thawed['trunk.0.weight'], frozen['trunk.0.weight'])


def test_a_frozen_module_that_is_not_there_is_an_error(market, tmp_path):
    with pytest.raises(ValueError, match="the module 'backbone', .* have; bind some of trunk, branches"):
        train(market, tmp_path, "train.freeze = ('backbone',)")
    assert not (tmp_path / 'last.pth').exists()


def test_freezing_everything_is_an_error_unless_it_lasts_no_step(market, tmp_path):
    everything = "train.freeze = ('trunk', 'branches', 'heads')"
    with pytest.raises(UserError, match='leaves nothing that learns; bind fewer names'):
        train(market, tmp_path, everything, 'train.freeze_steps = 1')
    train(market, tmp_path, everything, 'train.freeze_steps = 0', 'total_steps = 1')


def test_the_seed_decides_initial_weights_batches_and_draws(market, tmp_path, monkeypatch):
    seen, real = [], training.train_step

    def step(model, optimizer, augmentation, batch, *rest):
        seen.append((model.state_dict()['trunk.0.weight'].clone(), batch.images, torch.cat([
            draws.flatten().float() for draws in batch.draws])))
        return real(model, optimizer, augmentation, batch, *rest)
    monkeypatch.setattr(training, 'train_step', step)
    for seed in (0, 1):
        train(market, tmp_path / str(seed), 'total_steps = 1', f'seed = {seed}', 'train.evaluate_first = False')
    assert not any(torch.equal(one, other) for one, other in zip(*seen, strict=True))
