"""What a run leaves behind, compared to the last bit."""

import json

import torch

from mgn.runs import checkpoint

TIMINGS = {'images_per_s', 'data_wait', 'features_s', 'ranking_s', 'redecided'}


def outcome(folder):
    """All that a run leaves, but for its timings."""
    def untimed(record):
        return {name: value for name, value in record.items() if name not in TIMINGS}

    return {'last': checkpoint.load(str(folder / 'last.pth')), 'best': checkpoint.load(str(folder / 'best.pth')),
            'metrics': [untimed(json.loads(line)) for line in (folder / 'metrics.jsonl').read_text().splitlines()],
            'eval': untimed(json.loads((folder / 'eval.json').read_text()))}


def assert_same(a, b, where=''):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for name in a:
            assert_same(a[name], b[name], f'{where}.{name}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f'{where}[{i}]')
    else:
        assert a == b, where
