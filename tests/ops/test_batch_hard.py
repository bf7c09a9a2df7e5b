"""mgn.ops.batch_hard and its loss, as compiled for every instruction set here and as references, against loops over
pairs."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from implementations import IMPLEMENTATIONS, run_as
from memory import only_linux, printed
from mining import (RELATIVE_ERROR, TYPES, assert_mined, cases, examples, naive, naive_loss, random_candidates,
                    random_features,
                    random_labels)

from mgn.ops import batch_hard, batch_hard_triplet_loss, triplet

@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch, device):
    """Each way to run an operation on the device that is tested."""
    return run_as(request.param, 'triplet', monkeypatch, device)


@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('heads, n, width',
                         [((3,), 1, 5), ((2, 2), 2, 1), ((), 31, 129), ((2,), 33, 17), ((1,), 64, 256), ((), 129, 2)])
@pytest.mark.parametrize('m', [None, 1, 70])
def test_mining_equals_the_loop_over_pairs(implementation, device, dtype, heads, n, width, m):
    anchors, labels = random_features(*heads, n, width, dtype=dtype, device=device), random_labels(n, device=device)
    candidates = random_candidates(heads, m, width, dtype, device=device)
    assert_mined(batch_hard(anchors, labels, *candidates), anchors, labels, *candidates)


@pytest.mark.parametrize('n',
                         [257, 600])  # blocks of anchors of both sizes on the CPU; with 3 heads several blocks on CUDA
@pytest.mark.parametrize('m', [None, 300])
def test_large_batches_equal_the_loop_over_pairs(implementation, device, n, m):
    anchors, labels = random_features(3, n, 40, device=device), random_labels(n, 20, device=device)
    candidates = random_candidates((3,), m, 40, classes=20, device=device)
    assert_mined(batch_hard(anchors, labels, *candidates), anchors, labels, *candidates)


def test_thousands_of_anchors_equal_the_loop_on_some(implementation, device):
    anchors, labels = random_features(9000, 12, device=device), random_labels(9000, 500, device=device)
    got, some = batch_hard(anchors, labels), slice(4000, 4040)
    assert_mined(type(got)(*(tensor[some] for tensor in got)), anchors[some], labels[some], anchors, labels)


@pytest.mark.parametrize('own', [True, False])
def test_ties_go_to_the_lowest_index(implementation, device, own):
    """Features of small integers: every distance is exact, and most of them tie."""
    anchors = random_features(2, 200, 4, seed=3, device=device).round().clamp(-1, 1)
    labels = random_labels(200, 9, device=device)
    candidates = () if own else (anchors.flip(1), labels.flip(0))
    got, expected = batch_hard(anchors, labels, *candidates), naive(anchors, labels, *candidates)
    assert got.pos_idx.tolist() == expected[2].tolist() and got.neg_idx.tolist() == expected[3].tolist()


@pytest.mark.parametrize('scale', [1e25, 1e-25])
def test_ties_of_distances_whose_squares_float32_does_not_hold_go_to_the_lowest_index(implementation, device, scale):
    anchors = random_features(1, 60, 3, seed=3, device=device).round().clamp(-1, 1) * scale
    labels = random_labels(60, 5, device=device)
    got, expected = batch_hard(anchors, labels), naive(anchors, labels)
    assert got.pos_idx.tolist() == expected[2].tolist() and got.neg_idx.tolist() == expected[3].tolist()


def test_one_image_per_identity_has_itself_as_its_positive(implementation, device):
    anchors = random_features(5, 3, device=device)
    got = batch_hard(anchors, torch.arange(5, device=device))
    assert got.dist_ap.tolist() == [0] * 5 and got.pos_idx.tolist() == [0, 1, 2, 3, 4]
    other = batch_hard(anchors, torch.arange(5, device=device), anchors[:2].clone(),
                       torch.tensor([7, 0], device=device))
    assert other.pos_idx.tolist() == [1, -1, -1, -1, -1] and other.dist_ap[1:].tolist() == [-math.inf] * 4


@pytest.mark.parametrize('dtype, scale',
                         [(torch.float32, 1.0), (torch.float32, 1e-30), (torch.float32, 1e25), (torch.float64, 1.0),
                                          (torch.float64, 1e-200), (torch.float64, 1e200)])
def test_near_duplicates_far_from_the_origin_keep_their_distances(implementation, device, dtype, scale):
    """Distances of 1e-2 at 1e3: x² + y² − 2xy would leave nothing of them in float32; squares of 1e-30 and 1e25 leave
    its range, those of 1e±200 float64's."""
    anchors = scale * (1e3 + 1e-2 * random_features(64, 31, dtype=dtype, device=device))
    labels = random_labels(64, device=device)
    assert_mined(batch_hard(anchors, labels), anchors, labels)


@pytest.mark.parametrize('width', [2048, 4096, pytest.param(50_000, marks=pytest.mark.long)])
def test_the_error_of_long_sums_stays_within_1e_5(implementation, device, width):
    """Equal terms, so that roundings of a running sum would add up instead of cancelling."""
    if device != 'cpu':
        width = min(width, 4096)  # what the docstring promises there
    steps = torch.linspace(1, 1.01, 40, device=device)[:, None]
    anchors, labels = steps.expand(40, width), torch.arange(40, device=device) % 2
    assert_mined(batch_hard(anchors, labels), anchors, labels)


@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('margin', [0.0, 0.3, 1.2, None])
@pytest.mark.parametrize('m', [None, 20])
def test_loss_equals_the_loop_over_triplets(implementation, device, dtype, margin, m):
    anchors, labels = random_features(3, 33, 17, dtype=dtype, device=device), random_labels(33, device=device)
    candidates = random_candidates((3,), m, 17, dtype, 5, device)
    got = batch_hard_triplet_loss(anchors, labels, margin, *candidates)
    assert got.shape == (3,) and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = naive_loss(*naive(anchors, labels, *candidates)[:2], margin)
    assert got.tolist() == pytest.approx(expected, rel=RELATIVE_ERROR[dtype], abs=RELATIVE_ERROR[dtype])


@pytest.mark.parametrize('shift', [0, 3e4, -3e4])
def test_the_soft_margin_is_stable(implementation, device, shift):
    """ap − an of ±3e4: exp of it overflows, its logarithm must not."""
    anchors = torch.tensor([[0.0], [1.0 + max(shift, 0)], [2.0 - min(shift, 0)]], device=device, requires_grad=True)
    labels = torch.tensor([0, 0, 1], device=device)
    loss = batch_hard_triplet_loss(anchors, labels, None)
    expected = naive_loss(*naive(anchors, labels)[:2], None)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    loss.backward()
    assert anchors.grad.isfinite().all()


def norm(difference):
    """Without squares that leave float64's range."""
    largest = difference.detach().abs().sum().clamp(min=1e-300)
    return largest * torch.linalg.vector_norm(difference / largest)


def gradients(anchors, labels, margin, candidates=None, candidate_labels=None):
    """∂Σ loss over anchors and candidates, by autograd through a loop's formula in float64 on the pairs that were
    mined. On the CPU: it takes thousands of small operations.

    At the hinge's kink (ap = an at margin 0) the returned distances decide: there the gradient is 0.
    """
    x, y = (None if rows is None
            else rows.detach().cpu().double().reshape(math.prod(rows.shape[:-2]), *rows.shape[-2:]).requires_grad_()
            for rows in (anchors, candidates))
    y = x if y is None else y
    mined = batch_hard(anchors, labels, candidates, candidate_labels)
    pairs = [idx.reshape(x.shape[:2]).tolist() for idx in (mined.pos_idx, mined.neg_idx)]
    gaps = (mined.dist_ap.detach().double() - mined.dist_an.detach().double()).reshape(x.shape[:2]).tolist()
    total = x.sum() * 0 + y.sum() * 0
    for head in range(len(x)):
        terms = []
        for i, (p, q) in enumerate(zip(pairs[0][head], pairs[1][head])):
            if p >= 0 and q >= 0:
                ap, an = (norm(x[head, i] - y[head, j]) for j in (p, q))
                hinge = (ap - an + (margin or 0)) * float(gaps[head][i] + (margin or 0) > 0)
                terms.append(torch.logaddexp(ap - an, ap * 0) if margin is None else hinge)
        if terms:
            total = total + sum(terms) / len(terms)
    grads = torch.autograd.grad(total, [x] if candidates is None else [x, y])
    return [grad.reshape(like.shape).to(like.device) for grad, like in zip(grads, (anchors, candidates))]


@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('margin', [0.3, None])
@pytest.mark.parametrize('m', [None, 20])
def test_gradients_equal_those_of_the_mined_pairs(implementation, device, dtype, margin, m):
    anchors = random_features(2, 24, 150, dtype=dtype, device=device).requires_grad_()
    labels = random_labels(24, device=device)
    candidates = random_candidates((2,), m, 150, dtype, device=device)
    for features in candidates[:1]:
        features.requires_grad_()
    batch_hard_triplet_loss(anchors, labels, margin, *candidates).sum().backward()
    got = [x.grad for x in (anchors, *candidates[:1])]
    assert all(grad.dtype == dtype for grad in got)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for grad, expected in zip(got, gradients(anchors, labels, margin, *candidates)):
        torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize('own', [True, False])
def test_finite_differences_agree(implementation, device, own):
    anchors = 2 * random_features(2, 6, 3, dtype=torch.float64, device=device)
    labels = random_labels(6, 3, device=device)
    others = 2 * random_features(2, 5, 3, dtype=torch.float64, seed=1, device=device)
    of_others = random_labels(5, 3, seed=1, device=device)
    inputs = [anchors.requires_grad_()] + [others.requires_grad_()] * (not own)
    for margin in (1.2, None):
        assert torch.autograd.gradcheck(
            lambda x, y=None: batch_hard_triplet_loss(x, labels, margin, y, None if y is None else of_others), inputs)
    assert torch.autograd.gradcheck(lambda x, y=None: batch_hard(x, labels, y, None if y is None else of_others)[:2],
                                    inputs)


@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('margin', [1.2, None])
def test_gradient_is_0_at_distance_0(implementation, device, dtype, margin):
    anchors = torch.ones(2, 6, 5, dtype=dtype, device=device, requires_grad=True)
    loss = batch_hard_triplet_loss(anchors, torch.arange(6, device=device) // 2, margin)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(2) if margin is None else margin] * 2)
    assert (anchors.grad == 0).all()


def test_the_margin_is_three_tenths_unless_given(implementation, device):
    anchors, labels = random_features(2, 12, 5, device=device), random_labels(12, 4, device=device)
    assert torch.equal(batch_hard_triplet_loss(anchors, labels), batch_hard_triplet_loss(anchors, labels, 0.3))
    assert not torch.equal(batch_hard_triplet_loss(anchors, labels), batch_hard_triplet_loss(anchors, labels, 0.31))


def test_gradient_is_0_where_the_hinge_just_closes(implementation, device):
    anchors = torch.tensor([[0.0], [1.0], [-1.0]], device=device, requires_grad=True)
    loss = batch_hard_triplet_loss(anchors, torch.tensor([0, 0, 1], device=device), margin=0.0)  # the first's pairs tie
    loss.backward()
    assert loss == 0 and (anchors.grad == 0).all()


def test_gradients_of_the_smallest_distances_are_unit_vectors(implementation, device):
    """1 / 1e-42 is infinite in float32, the direction of the pair is not."""
    anchors = torch.tensor([[0.0, 0.0], [0.0, 1e-42], [1.0, 0.0]], device=device, requires_grad=True)
    batch_hard(anchors, torch.tensor([0, 0, 1], device=device)).dist_ap[0].backward()
    torch.testing.assert_close(anchors.grad, torch.tensor([[0.0, -1.0], [0.0, 1.0], [0.0, 0.0]], device=device))


@pytest.mark.parametrize('n', [0, 1, 33])
@pytest.mark.parametrize('margin', [1.2, None])
def test_without_a_negative_loss_and_gradient_are_0(implementation, device, n, margin):
    anchors = random_features(3, n, 4, device=device).requires_grad_()
    loss = batch_hard_triplet_loss(anchors, torch.zeros(n, dtype=torch.int64, device=device), margin)
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0] and (anchors.grad == 0).all()


@pytest.mark.parametrize('heads, n, m, width',
                         [((), 0, None, 4), ((3,), 0, 5, 4), ((3,), 5, 0, 4), ((0,), 5, None, 4), ((2,), 5, None, 0)])
def test_empty_batches_give_empty_results_and_losses_of_0(implementation, device, heads, n, m, width):
    anchors = torch.ones(*heads, n, width, device=device, requires_grad=True)
    candidates = () if m is None else (torch.ones(*heads, m, width, device=device, requires_grad=True),
                                       torch.arange(m, device=device))
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    assert_mined(batch_hard(anchors, labels, *candidates), anchors, labels, *candidates)
    loss = batch_hard_triplet_loss(anchors, labels, 0.3, *candidates)
    assert loss.shape == heads and (loss == 0).all()
    loss.sum().backward()
    assert anchors.grad.shape == anchors.shape and (anchors.grad == 0).all()


def test_the_anchors_passed_as_candidates_of_other_labels_are_no_longer_their_own(implementation, device):
    anchors, labels = random_features(3, 40, 6, device=device).requires_grad_(), random_labels(40, device=device)
    others = random_labels(40, seed=1, device=device)
    assert_mined(batch_hard(anchors, labels, anchors, others), anchors, labels, anchors, others)
    batch_hard_triplet_loss(anchors, labels, 0.3, anchors, others).sum().backward()
    expected = sum(gradients(anchors, labels, 0.3, anchors, others))
    torch.testing.assert_close(anchors.grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('length', [16, 300])
def test_strided_expanded_and_narrow_inputs_are_taken(implementation, device, length):
    whole = random_features(4, 6, 2 * length, device=device)
    labels = random_labels(2 * length, device=device).to(torch.uint8)
    strided = whole.transpose(1, 2)[::2, ::2]                                      # (2, length, 6)
    assert_mined(batch_hard(strided, labels[::2]), strided, labels[::2])
    expanded = whole[:1].transpose(1, 2).expand(3, -1, -1)
    assert_mined(batch_hard(expanded, labels), expanded, labels)
    constant = torch.ones(1, 1, device=device).expand(length, 6)                   # zero strides
    assert_mined(batch_hard(constant, labels[::2]), constant, labels[::2])


@pytest.mark.parametrize('dtype', sorted(triplet.INTEGER_TYPES, key=str))
def test_labels_of_any_integer_type_are_taken(implementation, device, dtype):
    anchors, largest = random_features(6, 3, device=device), torch.iinfo(dtype).max
    labels = torch.tensor([0, largest, 0, largest, 1, 2], dtype=dtype).to(device)
    assert_mined(batch_hard(anchors, labels), anchors, labels)


def test_heads_are_mined_separately(implementation, device):
    anchors, labels = random_features(3, 70, 33, device=device), random_labels(70, device=device)
    alone = torch.stack([batch_hard_triplet_loss(head, labels, 1.2) for head in anchors])
    assert torch.equal(batch_hard_triplet_loss(anchors, labels, 1.2), alone)


def test_results_are_the_same_bits_every_time(implementation, device):
    """Many anchors pull on few candidates: sums whose order would show."""
    anchors, labels = random_features(3, 512, 64, device=device), random_labels(512, device=device)
    candidates, of_candidates = random_features(3, 40, 64, seed=1,
                                                device=device).requires_grad_(), random_labels(40, device=device)
    results = []
    for _ in range(8):
        loss = batch_hard_triplet_loss(anchors, labels, 1.2, candidates, of_candidates)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), candidates)))
    assert all(torch.equal(*pair) for other in results for pair in zip(results[0], other))


def test_a_distance_beyond_float32_is_still_a_negative(implementation, device):
    anchors = torch.tensor([[3e38], [-3e38]], device=device, requires_grad=True)
    mined = batch_hard(anchors, torch.tensor([0, 1], device=device))
    assert mined.neg_idx.tolist() == [1, 0] and mined.dist_an.tolist() == [math.inf] * 2
    loss = batch_hard_triplet_loss(anchors, torch.tensor([0, 1], device=device))
    loss.backward()
    assert loss == 0 and (anchors.grad == 0).all()


def test_flushing_denormals_loses_no_gradient(implementation, device):
    """1 / 3e38 is denormal."""
    anchors = torch.tensor([[3e38], [0.0]], device=device, requires_grad=True)
    try:
        torch.set_flush_denormal(True)
        batch_hard(anchors, torch.tensor([0, 0], device=device)).dist_ap.sum().backward()
    finally:
        torch.set_flush_denormal(False)
    assert anchors.grad.flatten().tolist() == [2, -2]


@pytest.mark.parametrize('threads', [1, 2, 3, 7])
def test_the_number_of_threads_changes_no_bit(threads):
    anchors, labels = random_features(3, 333, 70).requires_grad_(), random_labels(333, 30)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            anchors.grad = None
            batch_hard_triplet_loss(anchors, labels, 1.2).sum().backward()
            results.append([*(tensor.detach() for tensor in batch_hard(anchors, labels)), anchors.grad])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results))


@settings(max_examples=examples(200), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_random_cases(device, case):
    anchors, labels, *candidates, margin = [value.to(device) if isinstance(value, torch.Tensor) else value
                                            for value in case]
    assert_mined(batch_hard(anchors, labels, *candidates), anchors, labels, *candidates)
    inputs = [x.detach().requires_grad_() for x in (anchors, candidates[0]) if x is not None]
    loss = batch_hard_triplet_loss(inputs[0], labels, margin, *((inputs[1], candidates[1]) if len(inputs) == 2 else ()))
    expected = naive_loss(*naive(anchors, labels, *candidates)[:2], margin)
    tolerance = RELATIVE_ERROR[anchors.dtype]
    size = max([1, *(abs(x) for x in expected)])
    spread = anchors.double().abs().max().item() * math.sqrt(anchors.shape[-1]) if anchors.numel() else 0
    assert loss.reshape(-1).tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance * max(size, spread))
    loss.sum().backward()
    for got, want in zip(inputs, gradients(anchors, labels, margin, *candidates)):
        coarse = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[anchors.dtype]
        torch.testing.assert_close(got.grad.double(), want, rtol=coarse, atol=coarse)


@only_linux
def test_many_heads_of_few_rows_are_not_padded_all_at_once():
    """Features of 31 MiB, that each head's panel would pad to 500 MiB."""
    program = '''
import torch
from mgn.ops import batch_hard
anchors, labels = torch.randn(2000, 2, 2048), torch.tensor([0, 1])
batch_hard(anchors[:2], labels)
before = high_water(anew=True)
got = batch_hard(anchors, labels)
print(high_water() - before)
torch.testing.assert_close(got.dist_an[:, 0], (anchors[:, 0] - anchors[:, 1]).norm(dim=-1))
'''
    assert printed(program)[0] < 20 * 2 ** 20


@only_linux
def test_65536_anchors_need_no_matrix():
    """N×N float32 would be 16 GiB; the peak beyond features is allowed 16 MiB."""
    program = '''
import torch
from mgn.ops import batch_hard, batch_hard_triplet_loss
anchors, labels = torch.randn(65536, 8).requires_grad_(), torch.arange(65536) // 4
batch_hard_triplet_loss(anchors[:512], labels[:512]).backward()
before = high_water(anew=True)
batch_hard_triplet_loss(anchors, labels).backward()
got = batch_hard(anchors.detach(), labels)
print(high_water() - before)
rows = torch.tensor([0, 1, 40000, 65535])
x = anchors.detach().double()
dist = torch.cdist(x[rows], x, compute_mode='donot_use_mm_for_euclid_dist')
positive = labels[rows, None] == labels
torch.testing.assert_close(got.dist_ap[rows].double(), dist.masked_fill(~positive, 0).amax(1), rtol=1e-6, atol=0)
torch.testing.assert_close(got.dist_an[rows].double(), dist.masked_fill(positive, torch.inf).amin(1), rtol=1e-6, atol=0)
'''
    assert printed(program)[0] < 16 * 2 ** 20
