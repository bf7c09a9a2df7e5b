"""Batch-hard mining and triplet loss (Hermans et al., "In Defense of the Triplet Loss", arXiv:1703.07737)."""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mgn.ops.arguments import HALF_TYPES, INTEGER_TYPES, check_alike, check_device, check_rows, check_tensor, real
from mgn.ops.distance import power_of_two, reference_type, refuse_second_derivative, wide
from mgn.ops.errors import UserError
from mgn.ops.native import kernels
from mgn.ops.private import below_autograd, watching_modes


class BatchHard(NamedTuple):
    """Each anchor's hardest pairs: distances float32 (float64 for float64 features), indices int64, all (..., N)."""
    dist_ap: torch.Tensor  # to the farthest positive; −inf where there is none
    dist_an: torch.Tensor  # to the nearest negative; +inf where there is none
    pos_idx: torch.Tensor  # which candidate that is; −1 where there is none
    neg_idx: torch.Tensor


def batch_hard(anchors, labels, candidates=None, candidate_labels=None):
    """Each anchor's farthest candidate of its own label and nearest of another, by Euclidean distance (not squared).

    An anchor counts among its own positives, at distance 0, where it is among the candidates. Of equal distances the
    lowest index is taken. Distances are measured on the selected pairs from the differences of features, so they do not
    cancel between near duplicates far from the origin. The pair is the hardest to within a relative 1e-5 in float32 (on
    CUDA for D up to 4096). dist_ap and dist_an are differentiable, once, with gradient 0 at distance 0. Memory is O(N·D
    + M·D).

    Args:
        anchors: (..., N, D) float16, bfloat16, float32 or float64; leading dimensions are heads, mined separately in
            one call. Half precision is mined in float32.
        labels: (N,) of any integer type.
        candidates: (..., M, D) like the anchors; the anchors themselves if left out.
        candidate_labels: (M,) integers, with candidates.
    Returns:
        BatchHard. On CUDA an anchor that is not finite, or is compared with a candidate that is not, has distance NaN
        and index −1.
    Raises:
        UserError: shapes, types or devices that do not go together; on the CPU features that are not finite.
    """
    _check(anchors, labels, candidates, candidate_labels)
    return BatchHard(*torch.ops.mgn.batch_hard.default(anchors, labels, candidates, candidate_labels))


def batch_hard_triplet_loss(anchors, labels, margin=0.3, candidates=None, candidate_labels=None):
    """Mean over each head's anchors of the hinge max(0, ap − an + margin) of their hardest pairs.

    Args:
        anchors, labels, candidates, candidate_labels: as of batch_hard.
        margin: in units of distance; None for the soft margin log(1 + exp(ap − an)).
    Returns:
        (...) loss per head, of batch_hard's type of distances, over the anchors that have both a positive and a
        negative; 0 with gradient 0 where none has. Differentiable in anchors and candidates. NaN on CUDA where features
        are not finite.
    Raises:
        UserError: as batch_hard; a margin that is no finite number.
    """
    _check(anchors, labels, candidates, candidate_labels)
    if margin is not None:
        margin = real(margin, 'margin', -math.inf, math.inf, 'None is the soft margin; a margin gets no gradient')
    return torch.ops.mgn.batch_hard_triplet_loss.default(anchors, labels, candidates, candidate_labels, margin)[0]


def _check(anchors, labels, candidates, candidate_labels):
    _check_labelled(anchors, 'anchors', labels, 'labels')
    if candidates is None and candidate_labels is None:
        return
    if candidates is None or candidate_labels is None:
        missing = 'candidates' if candidates is None else 'candidate_labels'
        raise UserError(f'candidates and candidate_labels go together, but {missing} is None; pass both, or neither')
    _check_labelled(candidates, 'candidates', candidate_labels, 'candidate_labels')
    check_alike(candidates, 'candidates', anchors, 'anchors')
    if (candidate_labels.dtype == torch.uint64) != (labels.dtype == torch.uint64):
        raise UserError('labels and candidate_labels must both be uint64 or neither, not '
                        f'{labels.dtype} and {candidate_labels.dtype}; cast one of them')


def _check_labelled(features, name, labels, labels_name):
    check_rows(features, name, heads=True)
    check_tensor(labels, labels_name)
    if labels.shape != features.shape[-2:-1] or labels.dtype not in INTEGER_TYPES:
        raise UserError(f'{labels_name} must be integers of shape ({features.shape[-2]},), since {name} have the shape '
                        f'{tuple(features.shape)}, not {labels.dtype} of shape {tuple(labels.shape)}; '
                        'pass one label per row, the same for all heads')
    check_device(labels, labels_name, features, name)


# Below: the operators as torch knows them (schema, every device's implementation, fake, autograd). Without candidates
# the anchors are their own.

LABELLED = 'Tensor anchors, Tensor labels, Tensor? candidates, Tensor? candidate_labels'
torch.library.define('mgn::batch_hard', f'({LABELLED}) -> (Tensor, Tensor, Tensor, Tensor)')
torch.library.define('mgn::batch_hard_triplet_loss',
                     f'({LABELLED}, float? margin) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)')
torch.library.define('mgn::batch_hard_backward',
                     '(Tensor anchors, Tensor? candidates, Tensor dist_ap, Tensor dist_an, Tensor pos_idx, '
                     'Tensor neg_idx, Tensor grad_ap, Tensor? grad_an, Tensor? slope) -> (Tensor, Tensor)')


def heads_first(features):
    """(..., rows, D) → (heads, rows, D), contiguous, in a type that the kernels of its device read."""
    if features.dim() != 3:
        features = features.reshape(math.prod(features.shape[:-2]), *features.shape[-2:])
    if features.dtype in HALF_TYPES and features.device.type == 'cpu':
        features = features.float()
    return features.contiguous()


def _batch_hard(anchors, labels, candidates, candidate_labels):
    return _batch_hard_triplet_loss(anchors, labels, candidates, candidate_labels, None, with_loss=False)[2:]


def _batch_hard_triplet_loss(anchors, labels, candidates, candidate_labels, margin, with_loss=True):
    """(loss, slope, dist_ap, dist_an, pos_idx, neg_idx); slope is ∂loss/∂dist_ap = −∂loss/∂dist_an."""
    x, labels, y = heads_first(anchors), labels.to(torch.int64).contiguous(), None
    if candidates is not None:
        y, candidate_labels = heads_first(candidates), candidate_labels.to(torch.int64).contiguous()
    if max(len(labels), 0 if y is None else len(candidate_labels)) >= 2**31:
        raise UserError(f'There must be fewer than 2³¹ rows, not {len(labels)} anchors; mine them in parts')
    compiled = kernels(x.device)
    if compiled is None:
        if x.device.type == 'cpu':
            _check_finite(anchors, candidates)
        mined = batch_hard_reference(x, labels, *((x, labels) if y is None else (y, candidate_labels)))
        results = *(triplet_loss_reference(*mined, margin) if with_loss else (None, None)), *mined
        heads = anchors.shape[:-2]
        return tuple(None if result is None else result.reshape(heads + result.shape[1:]).clone() for result in results)
    loss, slope, *mined = empty_results(anchors, with_loss)
    if not compiled.batch_hard.default(x, labels, y, candidate_labels, *mined, loss, slope, margin):
        _check_finite(anchors, candidates)
        raise UserError('Features were NaN or infinite, and another thread has overwritten them since; mine a clone')
    return loss, slope, *mined


def empty_results(anchors, with_loss):
    """What _batch_hard_triplet_loss returns, to be filled.

    In the shapes to return, since a view could not be changed in place.
    """
    dtype, shape = wide(anchors.dtype), anchors.shape[:-1]
    loss = slope = None
    if with_loss:
        loss, slope = anchors.new_empty(shape[:-1], dtype=dtype), anchors.new_empty(shape, dtype=dtype)
    return loss, slope, *(anchors.new_empty(shape, dtype=each) for each in (dtype, dtype, torch.int64, torch.int64))


def _check_finite(anchors, candidates):
    for name, features in (('anchors', anchors), ('candidates', candidates)):
        if features is not None and not features.isfinite().all():
            *head, row, column = (~features.isfinite()).nonzero()[0].tolist()
            raise UserError(f'{name} must be finite, but head {", ".join(map(str, head)) or 0}, row {row}, dimension '
                            f'{column} is {features[(*head, row, column)].item()}; look for what diverged, '
                            'e.g. by too high a learning rate')


def batch_hard_reference(anchors, labels, candidates, candidate_labels):
    """batch_hard by its definition, in float64 (float32 on devices without it), some anchors at a time."""
    x, y = (rows.to(reference_type(rows.device)).masked_fill(~rows.isfinite().all(-1, keepdim=True), torch.nan)
            for rows in (anchors, candidates))
    largest = torch.stack([F.pad(rows.abs().nan_to_num(0, 0, 0).flatten(), (0, 1)).amax() for rows in (x, y)]).amax()
    unit = power_of_two(largest)  # squares of what is near 1 stay in range
    x, y = x / unit, y / unit
    tiles, tile = [], max(1, 2**22 // max(1, y.shape[0] * y.shape[1]))  # anchors whose distances fit anywhere
    for x_tile, tile_labels in zip(x.split(tile, dim=1), labels.split(tile)):
        dist = torch.cdist(x_tile, y, compute_mode='donot_use_mm_for_euclid_dist') * unit            # (heads, tile, M)
        positive = tile_labels[:, None] == candidate_labels
        # One more column stands for "none", behind all others.
        dist_ap, pos_idx = F.pad(dist.masked_fill(~positive, -torch.inf), (0, 1), value=-torch.inf).max(-1)
        dist_an, neg_idx = F.pad(dist.masked_fill(positive, torch.inf), (0, 1), value=torch.inf).min(-1)
        not_finite = x_tile.isnan().any(-1)
        dist_ap, dist_an = dist_ap.masked_fill(not_finite, torch.nan), dist_an.masked_fill(not_finite, torch.nan)
        tiles.append((dist_ap, dist_an, pos_idx.masked_fill(dist_ap.isnan() | ~positive.any(-1), -1),
                      neg_idx.masked_fill(dist_an.isnan() | positive.all(-1), -1)))
    dist_ap, dist_an, pos_idx, neg_idx = (torch.cat(parts, dim=1) for parts in zip(*tiles))
    return dist_ap.to(wide(anchors.dtype)), dist_an.to(wide(anchors.dtype)), pos_idx, neg_idx


def triplet_loss_reference(dist_ap, dist_an, pos_idx, neg_idx, margin):
    """The mined pairs (heads, N) → loss (heads,) and its slope (heads, N)."""
    pair = ((pos_idx >= 0) & (neg_idx >= 0)) | dist_ap.isnan() | dist_an.isnan()
    share = 1 / pair.sum(-1, keepdim=True).clamp(min=1).to(dist_ap.dtype)
    gap = dist_ap - dist_an
    if margin is None:
        term, slope = torch.logaddexp(gap, torch.zeros_like(gap)), gap.sigmoid()
    else:
        gap = gap + margin
        term, slope = gap.relu(), torch.where(gap.isnan(), gap, gap > 0)
    return (term.masked_fill(~pair, 0) * share).sum(-1), slope.masked_fill(~pair, 0) * share


def _batch_hard_backward(anchors, candidates, dist_ap, dist_an, pos_idx, neg_idx, grad_ap, grad_an, slope):
    x, y = heads_first(anchors), None if candidates is None else heads_first(candidates)
    mined, grads = [dist_ap, dist_an, pos_idx, neg_idx], [grad_ap, grad_an, slope]
    if anchors.dim() != 3:
        mined = [tensor.reshape(x.shape[:2]) for tensor in mined]
        grads = [grad if grad is None else grad.reshape(x.shape[:grad.dim() - anchors.dim() + 3]) for grad in grads]
    grads = [grad if grad is None else grad.contiguous() for grad in grads]
    compiled = kernels(x.device)
    if compiled is None:
        grad_anchors, grad_candidates = backward_reference(x, x if y is None else y, *mined, *grads)
        if y is None:
            grad_anchors += grad_candidates
    else:
        grad_anchors = torch.empty_like(x)
        grad_candidates = grad_anchors if y is None else torch.empty_like(y)
        entries = ()
        if x.device.type == 'cuda':
            entries = pairs_by_candidate(mined[2], mined[3], (x if y is None else y).shape[1])
        compiled.batch_hard_backward.default(x, y, *mined, *grads, *entries, grad_anchors, grad_candidates)
    grad_anchors = grad_anchors.view_as(anchors).to(anchors.dtype)
    if y is None:
        return grad_anchors, grad_anchors.new_empty(0)
    return grad_anchors, grad_candidates.view_as(candidates).to(candidates.dtype)


def pairs_by_candidate(pos_idx, neg_idx, m, scanned=2**24):
    """The mined pairs by candidate, as the CUDA kernel gathers them: entries (heads, 2N), offsets (heads, M + 1).

    Entry e < N stands for anchor e and its positive, N + e for e and its negative. (None, None) up to `scanned` anchors
    × candidates of a head: looking through all pairs costs the kernel less than sorting them.
    """
    if pos_idx.shape[1] * m <= scanned:
        return None, None
    candidates, entries = torch.cat((pos_idx, neg_idx), dim=1).sort(dim=1, stable=True)
    bounds = torch.arange(m + 1, device=candidates.device).expand(len(candidates), -1)
    return entries, torch.searchsorted(candidates, bounds.contiguous())


def backward_reference(anchors, candidates, dist_ap, dist_an, pos_idx, neg_idx, grad_ap, grad_an, slope):
    """Gradients of Σ grad_ap·dist_ap + grad_an·dist_an; with a slope, of the loss, and grad_ap (heads,) is its own."""
    # In float64 not for its digits: PyTorch adds float32 rows with atomics on CPUs, in any order.
    dtype = reference_type(anchors.device)
    if slope is not None:
        grad_ap = grad_ap[:, None] * slope
        grad_an = -grad_ap
    heads, m = candidates.shape[:2]
    padded = F.pad(candidates.to(dtype), (0, 0, 0, 1)).flatten(0, 1)  # row M of each head stands for "none"
    to_anchors, to_candidates = torch.zeros_like(anchors, dtype=dtype), torch.zeros_like(padded)
    for dist, idx, grad in ((dist_ap, pos_idx, grad_ap), (dist_an, neg_idx, grad_an)):
        rows = (idx % (m + 1) + torch.arange(heads, device=idx.device)[:, None] * (m + 1)).flatten()
        difference = anchors.to(dtype) - padded[rows].view_as(to_anchors)
        pull = difference / dist[..., None].to(dtype) * grad[..., None].to(dtype)
        pull = pull.masked_fill(((idx < 0) | (dist == 0) | (grad == 0))[..., None], 0)
        to_anchors += pull.masked_fill(dist.isnan()[..., None], torch.nan)
        to_candidates.index_put_((rows,), -pull.flatten(0, 1), accumulate=True)
    return to_anchors, to_candidates.unflatten(0, (heads, m + 1))[:, :m].contiguous()


# Autograd of the operators by hand: torch.library.register_autograd and a second dispatch cost a batch of 64 a fifth of
# its time.

def _without_autograd(operator, implementation, *inputs):
    """operator(*inputs) without autograd; its implementation directly where no subclass or mode (a tracer) watches."""
    if type(inputs[0]) in (torch.Tensor, torch.nn.Parameter) and watching_modes() == 0:
        return implementation(*inputs)
    with below_autograd():
        return operator(*inputs)


class Mining(torch.autograd.Function):

    @staticmethod
    def forward(ctx, operator, implementation, anchors, labels, candidates, *rest):
        output = _without_autograd(operator, implementation, anchors, labels, candidates, *rest)
        *loss, dist_ap, dist_an, pos_idx, neg_idx = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output[1:] if loss else output[2:]))
        ctx.save_for_backward(anchors, candidates, dist_ap, dist_an, pos_idx, neg_idx, *loss[1:])
        ctx.rest = len(rest)
        return output

    @staticmethod
    def backward(ctx, first, second, *_):
        anchors, candidates, *mined = ctx.saved_tensors
        slope = mined.pop() if len(mined) == 5 else None
        if first is second is None:
            return (None,) * (5 + ctx.rest)
        if slope is None:
            pairs = zip((first, second), mined)
            first, second = (torch.zeros_like(dist) if grad is None else grad for grad, dist in pairs)
        inputs = anchors, candidates, *mined, first, second, slope
        operator = torch.ops.mgn.batch_hard_backward.default
        if torch.is_grad_enabled():  # by create_graph=True
            to_anchors, to_candidates = operator(*inputs)
        else:
            to_anchors, to_candidates = _without_autograd(operator, _batch_hard_backward, *inputs)
        return None, None, to_anchors, None, None if candidates is None else to_candidates, *(None,) * ctx.rest


for _name, _implementation in (('batch_hard', _batch_hard), ('batch_hard_triplet_loss', _batch_hard_triplet_loss)):
    _mining = functools.partial(Mining.apply, getattr(torch.ops.mgn, _name).default, _implementation)
    torch.library.impl(f'mgn::{_name}', 'CompositeExplicitAutograd', _implementation)
    torch.library.impl(f'mgn::{_name}', 'Autograd', _mining)
torch.library.impl('mgn::batch_hard_backward', 'CompositeExplicitAutograd', _batch_hard_backward)
torch.library.register_fake('mgn::batch_hard', lambda anchors, *_: empty_results(anchors, with_loss=False)[2:])
torch.library.register_fake('mgn::batch_hard_triplet_loss', lambda anchors, *_: empty_results(anchors, with_loss=True))
torch.library.register_fake('mgn::batch_hard_backward', lambda anchors, candidates, *_: (
    anchors.new_empty(anchors.shape), anchors.new_empty(0 if candidates is None else candidates.shape)))
torch.library.register_autograd('mgn::batch_hard_backward', refuse_second_derivative)
