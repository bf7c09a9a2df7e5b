"""A training step: its precision, the scale of its loss, compilation, the fused optimizer, clipping."""

import functools
import logging

import pytest
import torch
from thin import thin, train  # noqa: F401 (a fixture)

from mgn import training
from mgn.data import augmentation
from mgn.data.images import TrainBatch
from mgn.model import MGN, MGNOutput
from mgn.runs import checkpoint

pytestmark = pytest.mark.usefixtures('thin')


class Tiny(torch.nn.Module):
    """Some model of MGN's interface."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 4, 5)

    def forward(self, images):
        x = self.layer(images.flatten(1))
        return MGNOutput((x[:, :2], x[:, 1:3]), x[None, :, 2:], x)


def tiny_step(clip_gradient_norm, precision='float32', scaler=None):
    """Change of all weights by one step of plain gradient descent at lr 1, and the losses."""
    torch.manual_seed(0)
    model = Tiny()
    augment = augmentation.Augmentation()
    images = torch.randint(0, 256, (4, 3, 8, 4), dtype=torch.uint8)
    batch = TrainBatch(images, torch.tensor([0, 0, 1, 1]), augment.draw(0, 0, 4, (8, 4)), [])
    before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = training.train_step(model, optimizer, augment, batch, torch.device('cpu'), precision, clip_gradient_norm,
                                 None, scaler)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before.detach(), losses


@pytest.mark.parametrize('clip_gradient_norm', [None, 0.25])
def test_float16_scales_the_loss_and_unscales_the_gradient(clip_gradient_norm):
    want, _ = tiny_step(clip_gradient_norm)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 10)
    got, losses = tiny_step(clip_gradient_norm, 'float16', scaler)
    assert 0 < (got - want).norm() < 0.02 * want.norm()
    assert all(value.dtype == torch.float32 for value in losses.values())


def test_losses_in_bfloat16_are_float32():
    _, losses = tiny_step(None, 'bfloat16')
    assert all(value.dtype == torch.float32 for value in losses.values())


def test_a_step_whose_scaled_gradient_overflows_is_left_out_and_the_scale_halved():
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 40)
    change, losses = tiny_step(None, 'float16', scaler)
    assert change.norm() == 0 and scaler.get_scale() == 2.0 ** 39 and losses['loss'].isfinite()


def test_the_scale_of_the_loss_goes_on_with_a_run(market, tmp_path, monkeypatch):
    init = functools.partialmethod(torch.amp.GradScaler.__init__, growth_interval=2)
    monkeypatch.setattr(torch.amp.GradScaler, '__init__', init)
    train(market, tmp_path / 'whole', "train.precision = 'float16'")
    train(market, tmp_path / 'parts', "train.precision = 'float16'", 'total_steps = 3')
    train(market, tmp_path / 'parts', "train.precision = 'float16'")
    one, other = (checkpoint.load(str(tmp_path / run / 'last.pth'))['scaler'] for run in ('whole', 'parts'))
    assert one['scale'] != 2.0 ** 16 and other == one


def test_auto_is_what_the_device_is_fast_at(market, tmp_path, monkeypatch, caplog):
    seen, real = [], training.train_step
    monkeypatch.setattr(training, 'train_step', lambda *args: (seen.append(args[5]), real(*args))[1])
    for units in (True, False):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': units, 'amx_tile': False})
        with caplog.at_level(logging.INFO):
            train(market, tmp_path / str(units), "train.precision = 'auto'", 'total_steps = 1')
    assert seen == ['bfloat16', 'float32']
    for precision in seen:
        assert caplog.text.count(f"train.precision = 'auto' means {precision}") == 1


def test_the_compiled_model_is_what_is_trained(market, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda model: (compiled.append(model), model)[1])
    model = train(market, tmp_path, 'train.compile = True', 'total_steps = 1')
    assert compiled == [model]


@pytest.mark.long
def test_a_compiled_run_is_near_the_plain_one(market, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'compiled'))  # others may be damaged
    one, other = (train(market, tmp_path / str(compiled), f'train.compile = {compiled}', 'total_steps = 2').state_dict()
                  for compiled in (False, True))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-2, atol=1e-2)


def test_the_optimizer_is_fused(market, tmp_path):
    train(market, tmp_path, 'total_steps = 1')
    assert all(group['fused'] for group in checkpoint.load(str(tmp_path / 'last.pth'))['optimizer']['param_groups'])


def test_clipping_shortens_the_whole_gradient_and_keeps_its_direction():
    free, losses = tiny_step(None)
    assert free.norm() > 1
    clipped, _ = tiny_step(0.25)
    torch.testing.assert_close(clipped, free / free.norm() * 0.25, rtol=1e-4, atol=1e-6)
    loose, _ = tiny_step(1e6)
    torch.testing.assert_close(loose, free, rtol=1e-6, atol=0)
    assert set(losses) == {'loss', 'cross_entropy', 'triplet'} and not any(x.requires_grad for x in losses.values())


@pytest.mark.parametrize('freeze', [(), ("train.freeze = ('trunk',)", 'train.freeze_steps = 1')])
def test_clipping_is_bound_by_gin_and_frozen_modules_have_no_part_in_the_norm(market, tmp_path, freeze):
    fixed = train(market, tmp_path / 'a', 'total_steps = 1', 'lr = 0.0').state_dict()
    clipped = train(market, tmp_path / 'b', 'total_steps = 1', 'lr = 1.0', 'train.clip_gradient_norm = 0.5',
                    'make_optimizer.optimizer = @SGD', 'SGD.momentum = 0', 'weight_decay = 0.0',
                    'make_optimizer.bias_lr_factor = 1.0', 'cosine.warmup_steps = 0', *freeze).state_dict()
    names = [name for name, _ in MGN(6).named_parameters()]
    change = torch.cat([(clipped[name] - fixed[name]).flatten() for name in names])
    assert change.norm() == pytest.approx(0.5, rel=1e-3)
