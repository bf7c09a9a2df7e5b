"""Top-k and re-ranking on a GPU give the bits of the CPU."""

import numpy as np
import pytest
import torch
from rankings import METRICS, extremes, near_ties, problem

from mgn.ops import expand_queries, k_reciprocal_ranks, topk, topk_from_distance
from mgn.ops.arguments import PRECISIONS

pytestmark = pytest.mark.usefixtures('gpu')


def large(Q, G, D):
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((16, 256))
    query, gallery = ((rng.standard_normal((n, 16)) @ basis).astype(np.float32) for n in (300, 6000))
    gallery[:900] = gallery[900:1800]
    return query, gallery, *(rng.integers(0, 200, n) for n in (300, 6000)), *(rng.integers(0, 6, n)
                                                                              for n in (300, 6000))


@pytest.mark.parametrize('make', [problem, near_ties, extremes, large])
@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('metric', METRICS)
def test_neighbours_and_ranks_are_those_of_the_cpu(device, make, precision, metric):
    query, gallery, *ids = make(9, 200, 33)
    here = torch.from_numpy(query), torch.from_numpy(gallery)
    there = [x.to(device) for x in here]
    for pair, exclude_self in (((0, 1), False), ((1, 1), False), ((1, 1), True)):
        expected, got = (topk(features[pair[0]], features[pair[1]], 40, metric, exclude_self=exclude_self, **options)
                         for features, options in ((here, {}), (there, {'precision': precision})))
        assert got.indices.is_cuda and all(torch.equal(a.cpu(), b) for a, b in zip(got, expected))
    expected = k_reciprocal_ranks(*here, *ids, metric=metric)
    got = k_reciprocal_ranks(*there, *ids, metric=metric, precision=precision)
    assert np.array_equal(got.offsets, expected.offsets) and np.array_equal(got.ranks, expected.ranks)
    torch.testing.assert_close(expand_queries(*there, 5).cpu(), expand_queries(*here, 5), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_neighbours_of_distances_are_those_of_the_cpu(device, dtype):
    dist = torch.from_numpy(np.random.default_rng(0).integers(0, 99, (20, 3000))).to(dtype)
    for laid_out in (dist, dist.T.contiguous().T):
        expected, got = topk_from_distance(laid_out, 70), topk_from_distance(laid_out.to(device), 70)
        assert got.indices.is_cuda and all(torch.equal(a.cpu(), b) for a, b in zip(got, expected))
    dist = dist.to(device)
    dist[3, 4] = torch.nan
    with pytest.raises(ValueError, match='row 3, column 4 is NaN'):
        topk_from_distance(dist, 5)
