"""ResNets with few channels in place of torchvision's, so that a test of what is around the model takes little time."""

from contextlib import contextmanager

import gin
import pytest
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from mgn import config, training

BINDINGS = ("input_size = (64, 32)", "P = 2", "K = 2", "total_steps = 7", "workers = 0", "device = 'cpu'", "lr = 1e-2",
            "MGN.pretrained = False", "MGN.embedding_dim = 16", "MGN.parts = (1, 2)", "MGN.last_strides = (2, 1)",
            "train.log_every = 3", "train.checkpoint_every = 2", "train.evaluate_every = 4",
            "train.schedule = @cosine", "train.precision = 'float32'")


class ThinResNet(nn.Module):
    def __init__(self):
        super().__init__()

        def block(width, stride, out):
            down = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            return BasicBlock(width, out, stride, down)

        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(8, 8))
        self.layer2 = nn.Sequential(block(8, 2, 8))
        self.layer3 = nn.Sequential(block(8, 2, 16), BasicBlock(16, 16))
        self.layer4 = nn.Sequential(block(16, 2, 16))
        self.fc = nn.Linear(16, 10)


@contextmanager
def thin_networks():
    """Within the block every backbone is a ThinResNet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mgn.model.make_resnet', lambda backbone, imagenet: ThinResNet())
        yield


@contextmanager
def narrow_networks():
    """Within the block ResNet-50 and 101 have a sixteenth of the channels inside their bottlenecks, and all layers."""
    real = torchvision.models.get_model

    def narrow(name, **options):
        return real(name, **options, **({'width_per_group': 4} if name in ('resnet50', 'resnet101') else {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, 'get_model', narrow)
        yield


@pytest.fixture
def thin():
    """MGN over a thin ResNet; no binding outlives the test."""
    with thin_networks():
        yield
    gin.clear_config()


def fitting_schedule(*bindings):
    """Bindings of a schedule that fits into the total_steps bound last: warm-up for 2 steps, constant to step 3."""
    steps = [int(binding.split('=')[1]) for binding in bindings if binding.startswith('total_steps = ')][-1]
    return (f'cosine.warmup_steps = {min(2, steps)}', f'cosine.start = {min(3, steps)}')


def train(data_root, output_dir, *bindings):
    """Seven steps in epochs of three, logged at 3, 6, 7, saved at 0, 2, 4, 6, 7, evaluated at 0, 4, 7."""
    config.load([], [*BINDINGS, *fitting_schedule(*BINDINGS, *bindings), f"data_root = '{data_root}'", *bindings])
    return training.Training(str(output_dir)).run()
