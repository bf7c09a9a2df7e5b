"""A checkpoint of a thin network and small images to make reports of, for the tests of the page and of its numbers."""

import csv
import json
import re

import pytest
import torch
from conftest import write_image
from thin import BINDINGS

from mgn import config, evaluation
from mgn.model import MGN
from mgn.runs import checkpoint

SIZE = (48, 24)
COMMON = [*BINDINGS, f'input_size = {SIZE}', 'dataset = @csv_table()', 'Extractor.batch_size = 5']


def write_weights(path, seed=0, *bindings):
    """A checkpoint with random weights, in the form of best.pth."""
    config.load([], [*COMMON, *bindings])
    torch.manual_seed(seed)
    model = MGN(5)
    for name, buffer in model.named_buffers():  # as after training: statistics of its own
        if name.endswith('running_var'):
            buffer.uniform_(0.5, 1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {'config': checkpoint.configuration(portable=True), 'num_classes': 5, 'step': 7, 'mAP': 0.5,
                           'model': model.state_dict()})
    return path


def write_table(root, shots, size=(64, 32)):
    """Images named by (file, pid, camid, split), and dataset.csv, which lists them."""
    root.mkdir(exist_ok=True)
    with open(root / 'dataset.csv', 'w', errors='surrogateescape', newline='') as file:
        table = csv.writer(file)
        table.writerow(('path', 'pid', 'camid', 'split'))
        table.writerows(shots)
    for seed, (name, *_) in enumerate(shots):
        write_image(root / name, seed, size)
    return root


def people(queries=8, cameras=3):
    """Queries of persons 1, 2, …, a person in every camera, person 0 in the gallery alone; the last query has no match.
    """
    shots = [(f'q/{pid}_{pid % cameras}.png', pid, pid % cameras, 'query') for pid in range(1, queries + 1)]
    shots += [(f'g/{pid}_{camid}_{i}.png', pid, camid, 'gallery') for pid in range(queries) for camid in range(cameras)
              for i in range(1 + (pid + camid) % 3)]
    return shots


def bind(weights, root, output_dir, *bindings):
    """The content of the checkpoint, loaded as the binaries do."""
    return config.load_checkpoint([], [
        f'weights = {str(weights)!r}', f'data_root = {str(root)!r}', f'output_dir = {str(output_dir)!r}',
        "device = 'cpu'", 'workers = 0', *bindings])


def made(weights, root, output_dir, *bindings):
    """The data of the page that mgn.report makes."""
    evaluation.report_checkpoint(bind(weights, root, output_dir, *bindings))
    return data_of(output_dir / 'report.html')


def data_of(path):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)[1])


@pytest.fixture
def weights(tmp_path):
    return write_weights(tmp_path / 'run' / 'best.pth')


@pytest.fixture
def root(tmp_path):
    return write_table(tmp_path / 'data', people())
