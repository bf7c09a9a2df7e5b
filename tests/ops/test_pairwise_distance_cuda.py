"""What only a GPU can show of pairwise distances: that nothing waits for it, that streams and graphs are kept, large
grids."""

import pytest
import torch
from cuda_checks import captured, nothing_waits
from mining import TYPES, random_features

from mgn.ops import pairwise_distance
from mgn.ops.distance import DISTANCES as METRICS, pairwise_distance_reference


pytestmark = pytest.mark.usefixtures('gpu')


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('dtype', TYPES)
def test_forward_and_backward_wait_for_nothing(device, metric, dtype):
    x, y = (random_features(rows, 70, dtype=dtype, seed=rows, device=device).requires_grad_() for rows in (130, 300))
    with nothing_waits():
        pairwise_distance(x, y, metric).sum().backward()


@pytest.mark.parametrize('metric', METRICS)
def test_a_captured_graph_replays_on_new_rows(device, metric):
    x, y = random_features(64, 32, device=device), random_features(200, 32, seed=1, device=device)
    replay, dist = captured(lambda: pairwise_distance(x, y, metric))
    x.copy_(random_features(64, 32, seed=2, device=device))
    replay()
    assert torch.equal(dist, pairwise_distance(x, y, metric))


def test_work_goes_to_the_current_stream(device):
    x, stream = random_features(2000, 64, device=device), torch.cuda.Stream()
    expected = pairwise_distance(x, x, 'cosine')
    for _ in range(10):
        with torch.cuda.stream(stream):
            late = torch.zeros_like(x)
            torch.cuda._sleep(10_000_000)
            late.copy_(x)
            got = pairwise_distance(late, late, 'cosine')
        stream.synchronize()
        assert torch.equal(got, expected) and (got.diagonal() == 0).all()


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('dtype', TYPES)
def test_near_duplicates_among_many(device, metric, dtype):
    """Thousands of blocks; of each metric some pairs are measured anew."""
    x = 30 + random_features(3000, 100, dtype=torch.float64, device=device)
    y = torch.cat((x + 1e-2 * random_features(3000, 100, dtype=torch.float64, seed=1, device=device), x, -x)).to(dtype)
    x = x.to(dtype)
    got = pairwise_distance(x, y, metric)
    rows = slice(1000, 1100)
    expected = pairwise_distance_reference(x[rows], y, metric)
    torch.testing.assert_close(got[rows].double(), expected, rtol=1e-5, atol=1e-20 if metric == 'cosine' else 0)
    assert (got[:, 3000:6000].diagonal() == 0).all()
