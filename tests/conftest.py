"""Images that the tests make themselves, in the layouts of the data sets; what tests of several operations share."""

import gc
import os
import signal
from contextlib import contextmanager

import gin
import numpy as np
import pytest
import torch
from emulation import FILES, FLAGS, ROOT, compile_for_emulator, finish, start
from implementations import IMPLEMENTATIONS, run_as
from PIL import Image

from mgn.data.images import Decoder, to_batch


def write_image(path, seed, size=(64, 32)):
    """A noisy image of one random colour, size=(H, W), in the format of the suffix; returns (3, H, W) uint8 pixels."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (3, 1, 1)) // 2 + rng.integers(0, 128, (3, *size))
    pixels = pixels.astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    return torch.from_numpy(pixels)


def smooth_pixels(height, width, seed=0, amplitude=150):
    """(H, W, 3) uint8 with structure, as photographs have; an amplitude of 150 clips the extremes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y * rng.uniform(0.05, 0.9) + x * rng.uniform(0.05, 0.9) + rng.uniform(0, 6)) for _ in range(3)]
    pixels = np.stack(waves, -1) * amplitude + 128 + rng.normal(0, 10, (height, width, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def difference(image, path_or_pixels):
    """Largest difference in levels of a (3, H, W) tensor and (H, W, 3) pixels."""
    return np.abs(image.permute(1, 2, 0).numpy().astype(int) - path_or_pixels).max()


def read_image(path, size):
    """One image as a batch would hold it."""
    return to_batch([Decoder()(path)], size)[0]


def write_market(root, identities=6, images=4, cameras=2, suffix='.jpg', size=(64, 32)):
    """A folder in Market-1501's layout; identities 1… to train, 101… to test, one distractor, one junk box."""
    seed = 0
    for pid in range(1, identities + 1):
        for i in range(images):
            write_image(root / 'bounding_box_train' / f'{pid:04d}_c{i % cameras + 1}s1_{i:06d}_01{suffix}', seed, size)
            seed += 1
    for pid in (101, 102, 103):
        write_image(root / 'query' / f'{pid:04d}_c1s1_000000_00{suffix}', seed, size)
        for i in range(3):
            name = f'{pid:04d}_c{i % cameras + 1}s1_{i + 1:06d}_01{suffix}'
            write_image(root / 'bounding_box_test' / name, seed + i, size)
        seed += 3
    write_image(root / 'bounding_box_test' / f'0000_c1s1_000009_01{suffix}', seed, size)
    write_image(root / 'bounding_box_test' / f'-1_c1s1_000009_01{suffix}', seed + 1, size)
    return root


def pytest_addoption(parser):
    parser.addoption('--device', default='cpu', help='what the tests of operations run on: cpu or cuda')


def pytest_configure(config):
    """Two processes of tests share the cores: more threads would wait for each other. `make long` sets two."""
    if config.getoption('--device') == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        os.environ['OMP_NUM_THREADS'] = '1'  # of programs that tests start
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Of a GPU only the tests that take a device are asked for."""
    if config.getoption('--device') != 'cpu':
        others = [item for item in items if 'device' not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if 'device' in item.fixturenames]


def pytest_collection_finish():
    """What has been imported stays: to look through it for garbage again and again took a tenth of the time."""
    gc.freeze()


@pytest.fixture(scope='session', autouse=True)
def heard():
    """SIGINT reaches the tests and their programs, also if a script runs pytest in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch):
    """Neighbours of few queries are sought by the products that many queries take."""
    monkeypatch.setattr('mgn.ops.ranking.nearest.FEW', 0)


@pytest.fixture
def clean_gin():
    """The test begins without bindings, and none outlives it."""
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.fixture(scope='session')
def device(request):
    return request.config.getoption('--device')


@pytest.fixture(scope='session')
def kernels(tmp_path_factory):
    """with kernels(kind, order) as process: …; on the way out the executable has ended and no sanitizer spoke."""
    folder, built = tmp_path_factory.mktemp('kernels'), {}

    @contextmanager
    def kernels(kind, order='forward', of='batch_hard', blocks=1):
        if (kind, of) not in built:
            sources = [path for path in (ROOT / 'csrc/kernels').glob('*.cu') if path.name.startswith(FILES.get(of, of))]
            sources.append(ROOT / f'tests/cuda_emulator/{of}_main.cpp')
            built[kind, of] = compile_for_emulator(folder, f'{of}_{kind}', sources, FLAGS[kind])
        process = start(built[kind, of], order=order, blocks=blocks)
        try:
            yield process
        except BaseException:
            process.kill()
            raise
        finish(process)
    return kernels


@pytest.fixture(params=IMPLEMENTATIONS)
def ranking(request, monkeypatch):
    """Each way to rank on the CPU."""
    return run_as(request.param, 'ranking.keys', monkeypatch, 'cpu')


@pytest.fixture
def gpu(device):
    if not device.startswith('cuda'):
        pytest.skip('no GPU; --device=cuda runs this on one')


@pytest.fixture(scope='session')
def market(tmp_path_factory):
    """A small data set in Market-1501's layout, shared by all tests; none may change it."""
    return write_market(tmp_path_factory.mktemp('data') / 'market1501')
