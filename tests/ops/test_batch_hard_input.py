"""What mgn.ops.batch_hard refuses and how, and that torch knows its operators: opcheck, autocast, torch.compile."""

import pytest
import torch
from forks import run_program
from mining import TYPES, random_features, random_labels
from torch.fx.experimental.proxy_tensor import make_fx

from mgn.ops import batch_hard, batch_hard_triplet_loss, triplet

X, LABELS = torch.ones(3, 8, 4), torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize('arguments, message', [
    ((X[0, 0], LABELS),
     r'anchors must have the shape \(..., rows, D\) and a real floating type, not \(4,\) and torch.float32; '
                        'reshape'),
    ((X.long(), LABELS), r'anchors must have .* not \(3, 8, 4\) and torch.int64'),
    ((X.to(torch.complex64), LABELS), 'anchors must have .* a real floating type, not .* torch.complex64'),
    ((X, LABELS[:7]), r'labels must be integers of shape \(8,\), since anchors have the shape \(3, 8, 4\), '
                      r'not torch.int64 of shape \(7,\); pass one label'),
    ((X, LABELS.expand(3, 8)), r'labels must be integers of shape \(8,\)'),
    ((X, LABELS.float()), r'labels must be integers .* not torch.float32 of shape \(8,\)'),
    ((X, LABELS.bool()), 'labels must be integers .* not torch.bool'),
    ((X, [0] * 8), 'labels must be a tensor, not list; torch.as_tensor makes one'),
    ((X.tolist(), LABELS), 'anchors must be a tensor, not list'),
    ((X, LABELS, X), 'candidates and candidate_labels go together, but candidate_labels is None; pass both'),
    ((X, LABELS, None, LABELS), 'candidates and candidate_labels go together, but candidates is None; pass both'),
    ((X, LABELS, X[0], LABELS), r'candidates must be like anchors, \(3, 8, 4\) of torch.float32, '
                                r'in all but the number of rows, not \(8, 4\)'),
    ((X, LABELS, X[..., :3], LABELS), r'candidates must be like anchors, .* not \(3, 8, 3\)'),
    ((X, LABELS, X.half(), LABELS), 'candidates must be like anchors, .* torch.float16; cast'),
    ((X, LABELS, X, LABELS[:2]), r'candidate_labels must be integers of shape \(8,\)'),
    ((X, LABELS, X, LABELS.to(torch.uint64)), 'labels and candidate_labels must both be uint64 or neither, '
                                              'not torch.int64 and torch.uint64; cast'),
    ((X, LABELS, X.to('meta'), LABELS), 'candidate_labels must be on meta like candidates, not on cpu; move'),
    ((X, LABELS, X.to('meta'), LABELS.to('meta')), 'candidates must be on cpu like anchors, not on meta; move'),
    ((X, LABELS.to('meta')), 'labels must be on cpu like anchors, not on meta; move'),
])
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_hard(*arguments)
    with pytest.raises(ValueError, match=message):
        batch_hard_triplet_loss(*arguments[:2], 0.3, *arguments[2:])


@pytest.mark.parametrize('margin', [float('nan'), float('inf'), torch.tensor(0.3)])
def test_a_margin_that_is_no_number_is_refused(margin):
    with pytest.raises(ValueError, match='margin must be a finite number, not .*; None is the soft margin'):
        batch_hard_triplet_loss(X, LABELS, margin)


@pytest.mark.parametrize('reference', [False, True])
@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('dtype', TYPES)
def test_features_that_are_not_finite_are_named_on_the_cpu(monkeypatch, reference, value, dtype):
    if reference:
        monkeypatch.setattr(triplet, 'kernels', lambda device: None)
    spoilt = X.to(dtype).clone()
    spoilt[1, 5, 2] = value
    with pytest.raises(ValueError,
                       match=f'anchors must be finite, but head 1, row 5, dimension 2 is {value}; look for what '
                             f'diverged'):
        batch_hard_triplet_loss(spoilt, LABELS)
    with pytest.raises(ValueError, match='candidates must be finite, but head 1, row 5, dimension 2 is '):
        batch_hard(X.to(dtype), LABELS, spoilt, LABELS)
    with pytest.raises(ValueError, match='head 0, row 5'):
        batch_hard(spoilt[1], LABELS)
    with pytest.raises(ValueError, match='head 0, 1, row 5'):
        batch_hard(spoilt[None], LABELS)


def test_second_derivatives_are_refused_instead_of_being_0(device):
    anchors, labels = random_features(8, 4, device=device).requires_grad_(), random_labels(8, device=device)
    for value in (batch_hard_triplet_loss(anchors, labels), batch_hard(anchors, labels).dist_an.sum()):
        gradient, = torch.autograd.grad(value, anchors, create_graph=True)
        with pytest.raises(RuntimeError, match='batch-hard mining have first derivatives only'):
            gradient.square().sum().backward()


def test_indices_changed_in_place_are_refused_by_the_gradient():
    """NumPy changes them behind autograd's back."""
    anchors = random_features(8, 4).requires_grad_()
    mined = batch_hard(anchors, random_labels(8))
    indices = mined.neg_idx.numpy()
    indices += 1000
    with pytest.raises(RuntimeError, match='indices below 8, the number of candidates'):
        mined.dist_an.sum().backward()


@pytest.mark.parametrize('heads', [(), (3,), (2, 3)])
def test_results_can_be_changed_in_place(device, heads):
    anchors, labels = random_features(*heads, 8, 4, device=device).requires_grad_(), random_labels(8, device=device)
    loss = batch_hard_triplet_loss(anchors, labels)
    expected, = torch.autograd.grad(2 * loss.sum(), anchors, retain_graph=True)
    loss *= 2
    loss += 1
    loss.sum().backward()
    assert torch.equal(anchors.grad, expected)
    with torch.no_grad():
        assert batch_hard(anchors, labels).dist_an.mul_(0).sum() == 0


@pytest.mark.parametrize('dtype, own', [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False), *(
    pytest.param(dtype, own, marks=pytest.mark.long) for dtype in TYPES for own in (True, False)
    if dtype not in (torch.float32, torch.bfloat16) or (dtype, own) == (torch.bfloat16, True))])
def test_opcheck(device, dtype, own):
    anchors, labels = random_features(2, 6, 3, dtype=dtype,
                                      device=device).requires_grad_(), random_labels(6, device=device)
    others = (None, None) if own else (random_features(2, 5, 3, dtype=dtype, seed=1, device=device).requires_grad_(),
                                       random_labels(5, seed=1, device=device))
    torch.library.opcheck(torch.ops.mgn.batch_hard, (anchors, labels, *others))
    for margin in (0.3, None):
        torch.library.opcheck(torch.ops.mgn.batch_hard_triplet_loss, (anchors, labels, *others, margin))
    mined = [tensor.detach() for tensor in torch.ops.mgn.batch_hard(anchors, labels, *others)]
    inputs = anchors.detach(), None if own else others[0].detach()
    torch.library.opcheck(torch.ops.mgn.batch_hard_backward,
                          (*inputs, *mined, torch.ones_like(mined[0]), torch.ones_like(mined[0]), None))
    torch.library.opcheck(torch.ops.mgn.batch_hard_backward,
                          (*inputs, *mined, torch.ones_like(mined[0][:, 0]), None, torch.ones_like(mined[0])))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_mines_half_features_in_float32(device, dtype):
    layer = torch.nn.Linear(8, 5, device=device)
    images, labels = random_features(20, 8, device=device), random_labels(20, device=device)
    with torch.autocast(torch.device(device).type, dtype):
        features = layer(images)
        loss = batch_hard_triplet_loss(features, labels)
    assert features.dtype == dtype and loss.dtype == torch.float32
    torch.testing.assert_close(loss, batch_hard_triplet_loss(features.float(), labels))
    loss.backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()


def test_torch_compile_takes_a_margin_that_changes(device):
    anchors, labels = torch.randn(6, 4, device=device), torch.arange(6, device=device) % 3
    compiled = torch.compile(lambda margin: batch_hard_triplet_loss(anchors, labels, margin), backend='eager',
                             fullgraph=True)
    for margin in (0.3, 0.5, 0.7):
        assert torch.equal(compiled(margin), batch_hard_triplet_loss(anchors, labels, margin))


def test_torch_compile_takes_the_loss_in_one_graph(device):
    anchors, labels = random_features(2, 20, 8, device=device).requires_grad_(), random_labels(20, device=device)

    def loss_of(anchors, labels):
        return batch_hard_triplet_loss(2 * anchors, labels, 1.2).sum() + batch_hard(anchors, labels).dist_ap.mean()

    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend='aot_eager')):
        anchors.grad = None
        loss = function(anchors, labels)
        loss.backward()
        results.append((loss.detach(), anchors.grad))
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize('mode', ['real', 'fake', 'symbolic'])
def test_a_tracer_sees_the_operators(device, mode):
    """Forward and backward: eager calls may take a shortcut, traced ones must not."""
    anchors, labels = random_features(2, 20, 8, device=device), random_labels(20, device=device)

    def step(anchors, labels):
        anchors = anchors.detach().requires_grad_()
        return torch.autograd.grad(batch_hard_triplet_loss(anchors, labels).sum(), anchors)[0]

    graph = make_fx(step, tracing_mode=mode)(anchors, labels)
    called = {str(node.target) for node in graph.graph.nodes}
    assert {'mgn.batch_hard_triplet_loss.default', 'mgn.batch_hard_backward.default'} <= called
    other = random_features(2, 20, 8, seed=1, device=device)
    assert torch.equal(graph(other, labels),
                       step(other, labels)) and not torch.equal(graph(other, labels), step(anchors, labels))


def test_raw_operators_refuse_what_would_touch_memory_that_is_not_theirs():
    """In a process of its own: what they must not do is crash."""
    program = '''
import torch
from mgn.ops import native
assert native.missing('_C') is None
x, labels = torch.ones(1, 8, 4), torch.zeros(8, dtype=torch.int64)
good = [x, labels, None, None, torch.empty(1, 8), torch.empty(1, 8), labels[None].clone(), labels[None].clone(),
        None, None, None]
torch.ops.mgn_cpu.batch_hard(*good)
for place, bad in ((0, x[0]), (0, x.half()), (0, x.expand(2, 8, 4)), (1, labels[:7]), (1, labels.int()),
                   (2, x[:, :, :3]), (4, torch.empty(1, 7)), (4, torch.empty(1, 8, dtype=torch.float64)),
                   (6, labels[None, :3]), (8, torch.empty(0))):
    try:
        torch.ops.mgn_cpu.batch_hard(*good[:place], bad, *good[place + 1:])
    except RuntimeError as error:
        print(str(error).splitlines()[0])
    else:
        raise SystemExit(f'argument {place} was taken: {bad.shape} {bad.dtype}')
'''
    done = run_program(program)
    assert done.returncode == 0, done.stdout + done.stderr
