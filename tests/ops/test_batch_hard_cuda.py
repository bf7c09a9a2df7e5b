"""What only a GPU can show: that nothing waits for it, that streams and graphs are kept, and how features that are not
finite go."""

import pytest
import torch
from cuda_checks import captured, nothing_waits
from mining import TYPES, random_features, random_labels

from mgn.ops import batch_hard, batch_hard_triplet_loss


pytestmark = pytest.mark.usefixtures('gpu')


@pytest.mark.parametrize('n', [64, 5000])  # the backward looks through the pairs, or sorts them first
def test_forward_and_backward_wait_for_nothing(device, n):
    anchors, labels = random_features(3, n, 16, device=device).requires_grad_(), random_labels(n, 50, device=device)
    with nothing_waits():
        batch_hard_triplet_loss(anchors, labels).sum().backward()


def test_a_captured_graph_replays_on_new_features(device):
    anchors, labels = random_features(3, 64, 32, device=device).requires_grad_(), random_labels(64, device=device)

    def step():
        loss = batch_hard_triplet_loss(anchors, labels, 1.2)
        return loss, torch.autograd.grad(loss.sum(), anchors)[0]

    replay, results = captured(step)
    with torch.no_grad():
        anchors.copy_(random_features(3, 64, 32, seed=1, device=device))
    replay()
    assert all(torch.equal(*pair) for pair in zip(results, step()))


def test_work_goes_to_the_current_stream(device):
    anchors, labels = random_features(3, 2000, 64, device=device), random_labels(2000, device=device)
    expected, stream = batch_hard(anchors, labels), torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(stream):
            late = torch.zeros_like(anchors)
            torch.cuda._sleep(10_000_000)
            late.copy_(anchors)
            got = batch_hard(late, labels)
        stream.synchronize()
        assert all(torch.equal(*pair) for pair in zip(got, expected))


@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_an_odd_feature_makes_its_own_distances_nan_and_the_loss(device, dtype, value):
    anchors, labels = random_features(2, 20, 9, dtype=dtype), random_labels(20, 3)
    anchors[1, 7, 3] = value
    anchors, labels = anchors.to(device).requires_grad_(), labels.to(device)
    with nothing_waits():
        mined, loss = batch_hard(anchors, labels), batch_hard_triplet_loss(anchors, labels)
        loss.sum().backward()
    assert loss[0].isfinite() and loss[1].isnan() and mined.dist_ap[0].isfinite().all()
    assert mined.pos_idx[1, 7] == mined.neg_idx[1, 7] == -1
    assert mined.dist_ap[1, 7].isnan() and mined.dist_an[1, 7].isnan()
    assert (mined.dist_ap[1].isnan() == (labels == labels[7])).all()
    assert anchors.grad[0].isfinite().all() and anchors.grad[1, 7].isnan().all()
