"""What only a GPU can show of training: that its steps wait for nothing."""

import contextlib

import pytest
import torch
from cuda_checks import nothing_waits
from thin import thin  # noqa: F401 (a fixture)

from mgn import training
from mgn.data.augmentation import Augmentation
from mgn.data.images import TrainBatch
from mgn.runs.meter import Meter
from mgn.model import MGN

pytestmark = pytest.mark.usefixtures('gpu', 'thin')


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize('clip_gradient_norm', [None, 5.0])
def test_steps_wait_for_nothing(device, precision, clip_gradient_norm):
    torch.manual_seed(0)
    device, augmentation = torch.device(device), Augmentation()
    model = MGN(6, embedding_dim=16).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    scaler, meter = torch.amp.GradScaler(device.type, enabled=False), Meter()
    images, labels = torch.randint(0, 256, (8, 3, 64, 32), dtype=torch.uint8), torch.arange(8) // 2
    draws = [draw.pin_memory() for draw in augmentation.draw(0, 0, 8, (64, 32))]
    batch = TrainBatch(images.pin_memory(), labels.pin_memory(), draws, [])
    for step in range(4):  # what is made once and kept is made in the first ones
        with nothing_waits() if step >= 2 else contextlib.nullcontext():
            losses = training.train_step(model, optimizer, augmentation, batch, device, precision, clip_gradient_norm,
                                         None, scaler)
            meter.add(losses, step)
    assert meter.count == 4
