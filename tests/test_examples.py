"""The programs in docs/examples run as printed, from an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mgn.model import MGN
from mgn.runs import checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp('weights') / 'best.pth')
    checkpoint.save(path, {'config': "MGN.backbone = 'resnet18'\ninput_size = (64, 32)", 'num_classes': 0, 'step': 1,
                           'model': MGN(0, 'resnet18', pretrained=False).state_dict()})
    return path


def run(folder, name, *arguments):
    command = [sys.executable, str(ROOT / 'docs/examples' / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)},
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_the_tracker_describes_boxes_that_leave_the_frame(weights, market, tmp_path):
    image = next((market / 'query').iterdir())
    assert run(tmp_path, 'tracker.py', weights, image).startswith('(2, 2048) similarity 0.')


@pytest.mark.long
def test_the_index_finds_the_query_itself_first(weights, market, tmp_path):
    pytest.importorskip('faiss', reason='faiss is not installed; `make peers` does')
    lines = run(tmp_path, 'index.py', weights, market / 'query', market / 'query').splitlines()
    assert len(lines) == 3 * 4
    for i in range(0, 12, 4):
        assert lines[i + 1] == f'  1.0000  {lines[i]}'
