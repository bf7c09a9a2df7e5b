"""Label-smoothed cross-entropy and the weighted sum of MGN's losses, against naive loops."""

import math

import pytest
import torch
from mining import naive, naive_loss

from mgn.losses import circle_softmax, mgn_losses, smoothed_cross_entropy
from mgn.model import MGNOutput

TOLERANCE = {torch.float32: {'rtol': 1e-5, 'atol': 1e-5}, torch.float64: {'rtol': 1e-12, 'atol': 1e-12}}


def naive_cross_entropy(logits, labels, smoothing):
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist()):
        log_sum = max(row) + math.log(sum(math.exp(x - max(row)) for x in row))
        for c, x in enumerate(row):
            target = 1 - smoothing if c == label else smoothing / (len(row) - 1)
            total -= target * (x - log_sum)
    return total / len(labels)


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


@pytest.mark.parametrize('options', [{}, {'margin': None}, {'margin': 0.3, 'smoothing': 0.0},
                                     {'cross_entropy_weight': 1.0, 'triplet_weight': 2.0, 'smoothing': 0.2}])
def test_the_losses_are_weighted_sums_over_heads(options):
    embeddings, labels = random_anchors((3,), 12, 6, torch.float64)
    logits = tuple(random_anchors((), 12, 4, torch.float64, seed=seed)[0] for seed in range(8))
    losses = mgn_losses(MGNOutput(logits, embeddings, torch.empty(12, 0)), labels, **options)
    settings = {'cross_entropy_weight': 0.25, 'triplet_weight': 1 / 3, 'margin': 1.2, 'smoothing': 0.1, **options}
    cross_entropy = sum(naive_cross_entropy(head, labels, settings['smoothing']) for head in logits)
    triplet = sum(naive_loss(*naive(embeddings, labels)[:2], settings['margin']))
    assert list(losses) == ['cross_entropy', 'triplet']
    assert losses['cross_entropy'].item() == pytest.approx(settings['cross_entropy_weight'] * cross_entropy, rel=1e-10)
    assert losses['triplet'].item() == pytest.approx(settings['triplet_weight'] * triplet, rel=1e-8)


def test_each_term_may_have_a_weight_of_its_own():
    embeddings, labels = random_anchors((2,), 12, 6, torch.float64)
    logits = tuple(random_anchors((), 12, 4, torch.float64, seed=seed)[0] for seed in range(3))
    output = MGNOutput(logits, embeddings, torch.empty(12, 0))
    losses = mgn_losses(output, labels, cross_entropy_weight=(1.0, 0.0, 3), triplet_weight=[0.5, 2.0], smoothing=0.0)
    cross_entropies = [naive_cross_entropy(head, labels, 0) for head in logits]
    triplets = naive_loss(*naive(embeddings, labels)[:2], 1.2)
    assert losses['cross_entropy'].item() == pytest.approx(cross_entropies[0] + 3 * cross_entropies[2], rel=1e-10)
    assert losses['triplet'].item() == pytest.approx(0.5 * triplets[0] + 2 * triplets[1], rel=1e-8)
    for wrong in ((1.0,), (1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match='triplet_weight must be one number or one for each of 2'):
            mgn_losses(output, labels, triplet_weight=wrong)


def test_cross_entropy_takes_the_logits_of_the_softmax_asked_for():
    embeddings, labels = random_anchors((2,), 12, 6, torch.float64)
    cosines = tuple(random_anchors((), 12, 4, torch.float64, seed=seed)[0].tanh() for seed in range(3))
    losses = mgn_losses(MGNOutput(cosines, embeddings, torch.empty(12, 0)), labels, softmax=circle_softmax)
    expected = sum(naive_cross_entropy(circle_softmax(head, labels, 64.0, 0.35), labels, 0.1) for head in cosines)
    assert losses['cross_entropy'].item() == pytest.approx(0.25 * expected, rel=1e-10)


@pytest.mark.parametrize('scale, margin', [(64.0, 0.35), (16.0, 0.25)])
def test_circle_softmax_equals_its_formula_and_its_gradient_treats_weights_as_constants(scale, margin):
    generator = torch.Generator().manual_seed(0)
    cosines = (2 * torch.rand(5, 7, generator=generator, dtype=torch.float64) - 1).requires_grad_()
    labels = torch.tensor([0, 3, 6, 3, 1])
    logits = circle_softmax(cosines, labels, scale, margin)
    logits.sum().backward()
    for b in range(5):
        for c in range(7):
            cosine = cosines[b, c].item()
            weight, offset = (1 + margin - cosine, 1 - margin) if c == labels[b] else (cosine + margin, margin)
            weight = max(weight, 0)
            assert logits[b, c].item() == pytest.approx(scale * weight * (cosine - offset), rel=1e-12)
            assert cosines.grad[b, c].item() == pytest.approx(scale * weight, rel=1e-12)
