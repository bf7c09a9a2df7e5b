"""Label-smoothed cross-entropy, batch-hard triplets and their weighted sum, against naive loops."""

import math

import pytest
import torch

from mgn.losses import mgn_losses, smoothed_cross_entropy
from mgn.model import MGNOutput
from mgn.ops import batch_hard_triplet_loss

TOLERANCE = {torch.float32: {'rtol': 1e-5, 'atol': 1e-5}, torch.float64: {'rtol': 1e-12, 'atol': 1e-12}}
SOFT = {'rtol': 1e-8, 'atol': 1e-8}  # torch's softplus is linear beyond 20: off by exp(−20)


def naive_cross_entropy(logits, labels, smoothing):
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist()):
        log_sum = max(row) + math.log(sum(math.exp(x - max(row)) for x in row))
        for c, x in enumerate(row):
            target = 1 - smoothing if c == label else smoothing / (len(row) - 1)
            total -= target * (x - log_sum)
    return total / len(labels)


def naive_triplet(anchors, labels, margin):
    """One head's (N, D) anchors; differences, squares and sums in Python's float64."""
    rows, labels = anchors.double().tolist(), labels.tolist()
    total = 0.0
    for a, label in zip(rows, labels):
        dist = [math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b))) for b in rows]
        positive = max(d for d, other in zip(dist, labels) if other == label)  # the anchor itself among them
        negative = min((d for d, other in zip(dist, labels) if other != label), default=None)
        if negative is None:
            continue
        total += math.log1p(math.exp(positive - negative)) if margin is None else max(0, positive - negative + margin)
    return total / len(rows)


def random_anchors(heads, n, width, dtype, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(*heads, n, width, generator=generator, dtype=torch.float64).to(dtype)
    return anchors, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('batch, classes', [(1, 2), (31, 2), (33, 5), (129, 31), (4, 751)])
@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.3])
def test_cross_entropy_equals_the_loop_over_classes(dtype, batch, classes, smoothing):
    logits, _ = random_anchors((), batch, classes, dtype)
    labels = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(1))
    got = smoothed_cross_entropy(5 * logits, labels, smoothing)
    assert got.shape == () and got.dtype == dtype
    assert got.item() == pytest.approx(naive_cross_entropy(5 * logits, labels, smoothing), rel=TOLERANCE[dtype]['rtol'])


def test_cross_entropy_is_smallest_at_probability_1_minus_epsilon():
    smoothing, classes = 0.1, 4
    best = torch.tensor([1 - smoothing] + [smoothing / (classes - 1)] * (classes - 1), dtype=torch.float64).log()
    logits = best[None].clone().requires_grad_()
    smoothed_cross_entropy(logits, torch.tensor([0]), smoothing).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(1, classes, dtype=torch.float64))


def test_cross_entropy_of_a_single_class_is_0():
    assert smoothed_cross_entropy(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64), 0.1) == 0


def test_cross_entropy_takes_large_and_non_contiguous_logits():
    logits = (1e4 * random_anchors((), 12, 31, torch.float64)[0]).T[::2]
    labels = torch.arange(16) % 12
    assert smoothed_cross_entropy(logits, labels, 0.1).item() == pytest.approx(naive_cross_entropy(logits, labels, 0.1))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('heads', [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize('n, width', [(2, 1), (31, 129), (33, 17), (129, 2)])
@pytest.mark.parametrize('margin', [0.0, 0.3, 1.2, None])
def test_triplet_loss_equals_the_loop_over_triplets(dtype, heads, n, width, margin):
    anchors, labels = random_anchors(heads, n, width, dtype)
    labels[:2] = torch.tensor([0, 1])
    got = batch_hard_triplet_loss(anchors, labels, margin)
    assert got.shape == heads and got.dtype == dtype
    rows = anchors.reshape(-1, n, width)[:2]  # a few heads: the loop is slow
    expected = torch.tensor([naive_triplet(head, labels, margin) for head in rows], dtype=torch.float64)
    tolerance = SOFT if margin is None and dtype == torch.float64 else TOLERANCE[dtype]
    torch.testing.assert_close(got.reshape(-1)[:2].double(), expected, **tolerance)


@pytest.mark.parametrize('heads', [2, 3])
def test_heads_are_mined_separately(heads):
    anchors, labels = random_anchors((heads,), 16, 8, torch.float64)
    expected = torch.stack([batch_hard_triplet_loss(head, labels, 1.2) for head in anchors])
    assert torch.equal(batch_hard_triplet_loss(anchors, labels, 1.2), expected)


def test_non_contiguous_anchors_and_labels_are_taken():
    anchors, labels = random_anchors((6,), 10, 8, torch.float64)
    strided, every_other = anchors.transpose(1, 2).contiguous().transpose(1, 2)[::2], labels.repeat_interleave(2)[::2]
    expected = batch_hard_triplet_loss(anchors[::2], labels, 1.2)
    torch.testing.assert_close(batch_hard_triplet_loss(strided, every_other, 1.2), expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize('margin', [1.2, None])
def test_triplet_gradient_equals_finite_differences(margin):
    anchors, labels = random_anchors((2,), 9, 4, torch.float64, classes=3)
    anchors = (2 * anchors).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: batch_hard_triplet_loss(x, labels, margin), (anchors,))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('margin', [1.2, None])
def test_gradient_is_0_at_distance_0(dtype, margin):
    anchors = torch.ones(2, 6, 5, dtype=dtype, requires_grad=True)
    loss = batch_hard_triplet_loss(anchors, torch.arange(6) // 2, margin)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2) if margin is None else margin))
    assert (anchors.grad == 0).all()


def test_one_image_per_identity_has_itself_as_its_positive():
    anchors, _ = random_anchors((), 5, 3, torch.float64)
    labels = torch.arange(5)
    anchors.requires_grad_()
    loss = batch_hard_triplet_loss(anchors, labels, 2.0)
    assert loss.item() == pytest.approx(naive_triplet(anchors.detach(), labels, 2.0), rel=1e-12)
    loss.backward()
    assert anchors.grad.isfinite().all() and anchors.grad.any()


@pytest.mark.parametrize('n', [6, 64])
@pytest.mark.parametrize('margin', [1.2, None])
def test_near_duplicates_far_from_the_origin_keep_their_distances_in_float32(n, margin):
    """Distances of 1e-2 at 1e3: x² + y² − 2xy would leave nothing of them in float32."""
    offsets, labels = random_anchors((), n, 31, torch.float32, classes=3)
    anchors = 1e3 + 1e-2 * offsets
    got = batch_hard_triplet_loss(anchors, labels, margin).item()
    assert got == pytest.approx(naive_triplet(anchors, labels, margin), rel=1e-5)
    anchors.requires_grad_()
    batch_hard_triplet_loss(anchors, labels, margin).backward()
    exact = anchors.detach().double().requires_grad_()
    batch_hard_triplet_loss(exact, labels, margin).backward()
    torch.testing.assert_close(anchors.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('n', [1, 33])
@pytest.mark.parametrize('margin', [1.2, None])
def test_without_a_negative_loss_and_gradient_are_0(n, margin):
    anchors, _ = random_anchors((3,), n, 4, torch.float32)
    anchors.requires_grad_()
    loss = batch_hard_triplet_loss(anchors, torch.zeros(n, dtype=torch.int64), margin)
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert (anchors.grad == 0).all()


def test_an_empty_batch_has_loss_0():
    anchors = torch.empty(3, 0, 4, requires_grad=True)
    assert batch_hard_triplet_loss(anchors, torch.empty(0, dtype=torch.int64), 1.2).tolist() == [0, 0, 0]


@pytest.mark.parametrize('margin', [1.2, None])
def test_nan_in_an_anchor_makes_the_loss_nan(margin):
    anchors, labels = random_anchors((2,), 8, 4, torch.float32, classes=2)
    anchors[1, 3, 2] = torch.nan
    got = batch_hard_triplet_loss(anchors, labels, margin)
    assert got[0].isfinite() and got[1].isnan()


@pytest.mark.parametrize('shape', [(7,), (9,), (8, 1), (3, 8), ()])
def test_labels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r'want labels of shape \(8,\) for anchors of shape \(3, 8, 4\), got'):
        batch_hard_triplet_loss(torch.randn(3, 8, 4), torch.zeros(shape, dtype=torch.int64), 1.2)


@pytest.mark.parametrize('options', [{}, {'margin': None}, {'margin': 0.3, 'smoothing': 0.0},
                                     {'cross_entropy_weight': 1.0, 'triplet_weight': 2.0, 'smoothing': 0.2}])
def test_the_losses_are_weighted_sums_over_heads(options):
    embeddings, labels = random_anchors((3,), 12, 6, torch.float64)
    logits = tuple(random_anchors((), 12, 4, torch.float64, seed=seed)[0] for seed in range(8))
    losses = mgn_losses(MGNOutput(logits, embeddings, torch.empty(12, 0)), labels, **options)
    settings = {'cross_entropy_weight': 0.25, 'triplet_weight': 1 / 3, 'margin': 1.2, 'smoothing': 0.1, **options}
    cross_entropy = sum(naive_cross_entropy(head, labels, settings['smoothing']) for head in logits)
    triplet = sum(naive_triplet(head, labels, settings['margin']) for head in embeddings)
    assert list(losses) == ['cross_entropy', 'triplet']
    assert losses['cross_entropy'].item() == pytest.approx(settings['cross_entropy_weight'] * cross_entropy, rel=1e-10)
    assert losses['triplet'].item() == pytest.approx(settings['triplet_weight'] * triplet, rel=1e-8)
