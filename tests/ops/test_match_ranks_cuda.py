"""What only a GPU can show of ranking: that real cuBLAS products of every precision leave the ranks as they are on the
CPU."""

import numpy as np
import pytest
import torch
from rankings import METRICS, extremes, near_ties, problem, same

from mgn.ops import match_ranks
from mgn.ops.arguments import PRECISIONS


pytestmark = pytest.mark.usefixtures('gpu')


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('make, size',
                         [(problem, (33, 2500, 129)), (near_ties, (9, 300, 33)), (extremes, (20, 500, 64)),
                          (problem, (2, 1, 1)), pytest.param(problem, (700, 9000, 256), id='large')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_ranks_equal_those_of_the_cpu(device, make, size, metric, precision, dtype):
    query, gallery, *ids = make(*size)
    features = [torch.from_numpy(x).clamp(-6e4, 6e4).to(dtype) for x in (query, gallery)]
    expected = match_ranks(*features, *ids, metric=metric)
    got = match_ranks(*(x.to(device) for x in features), *(torch.from_numpy(x).to(device) for x in ids), metric=metric,
                      precision=precision)
    assert same(got, expected)


def test_more_matches_than_shared_memory_counts(device):
    query, gallery, *_ = problem(3, 9000, 16)
    ids = np.arange(3), np.arange(9000) % 3, np.zeros(3, int), np.arange(9000) % 500
    expected = match_ranks(query, gallery, *ids)
    got = match_ranks(*(torch.from_numpy(x).to(device) for x in (query, gallery)), *ids)
    assert same(got, expected)


def test_settings_of_torch_change_nothing_and_are_restored(device):
    query, gallery, *ids = problem(40, 3000, 64)
    features = [torch.from_numpy(x).to(device) for x in (query, gallery)]
    expected = match_ranks(query, gallery, *ids)
    torch.set_float32_matmul_precision('medium')
    try:
        with torch.autocast('cuda'):
            got = match_ranks(*features, *ids)
        assert torch.get_float32_matmul_precision() == 'medium' and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision('highest')
    assert same(got, expected)


def test_features_that_are_not_finite_are_named(device):
    for which, name in ((0, 'query'), (1, 'gallery')):
        query, gallery, *ids = problem(5, 33, 7)
        features = [torch.from_numpy(x).to(device) for x in (query, gallery)]
        features[which][4, 3] = torch.nan
        with pytest.raises(ValueError, match=f'{name} features must be finite, but row 4 has NaN or infinity'):
            match_ranks(*features, *ids)


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('size', [(5, 33, 7), pytest.param((700, 9000, 256), id='large')])
def test_a_gallery_in_host_memory_gives_the_same_ranks(device, metric, size):
    query, gallery, *ids = problem(*size)
    expected = match_ranks(query, gallery, *ids, metric=metric)
    for host in (gallery, torch.from_numpy(gallery), torch.from_numpy(gallery).pin_memory()):
        assert same(match_ranks(torch.from_numpy(query).to(device), host, *ids, metric=metric), expected)


def test_queries_in_host_memory_beside_a_gallery_elsewhere_are_refused(device):
    query, gallery, *ids = problem(5, 33, 7)
    with pytest.raises(ValueError, match='must be on one device'):
        match_ranks(query, torch.from_numpy(gallery).to(device), *ids)
