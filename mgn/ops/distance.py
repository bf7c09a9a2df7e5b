"""Distances of all pairs of rows, exact between near duplicates, too: nothing is multiplied out, so nothing cancels."""

import math

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F

from mgn.ops.native import kernels
from mgn.ops.triplet import FEATURE_TYPES, wide

METRICS = ('euclidean', 'sqeuclidean', 'cosine')  # as csrc/kernels count them


def pairwise_distance(x, y, metric='euclidean', out=None):
    """The distance of every row of x from every row of y, with a relative error of at most 1e-5, however near or far from the origin.

    Sums squared differences, in float32 (float64 for float64 rows) where their rounding allows, else in float64; never x² + y² − 2xy,
    and no matrix product. On CUDA the error is that for D up to 3072 (4096 for the Euclidean ones), on the CPU up to 16384. Identical
    rows are at distance 0. Distances are right wherever their type holds them, also where their squares leave its range. Differentiable
    once in x and y, in reverse mode, with gradient 0 at distance 0 and, for the cosine, of zero vectors. Memory beyond operands and
    result does not grow with N and M on the CPU, and is 16 (N + M) bytes for the cosine on CUDA.

    Args:
        x: (N, D) float16, bfloat16, float32 or float64; half precision is computed in float32.
        y: (M, D) of the same type and device.
        metric: 'euclidean' ‖x − y‖, 'sqeuclidean' ‖x − y‖², or 'cosine' 1 − x·y / (‖x‖‖y‖), measured as ½ ‖x/‖x‖ − y/‖y‖‖² with x/‖x‖
            as float64 rounds it, and 0 of a zero vector.
        out: (N, M), of any floating type and any strides, to write to and return; gets no gradient.
    Returns:
        (N, M) float32, float64 for float64 rows, or out. NaN and infinite entries raise nothing: distances are NaN or infinite as the
        formula has them (the cosine of a row with infinity is NaN).
    Raises:
        ValueError: shapes, types or devices that do not go together; an unknown metric; an out that overlaps its operands or itself, or
            is given while an operand asks for a gradient.
    """
    _check(x, y, metric, out)
    if out is None:
        return torch.ops.mgn.pairwise_distance.default(x, y, metric)
    torch.ops.mgn.pairwise_distance_out.default(x, y, metric, out)
    return out


def _check(x, y, metric, out):
    for name, rows in (('x', x), ('y', y)):
        if not isinstance(rows, torch.Tensor):
            raise ValueError(f'want {name} as a tensor, got {type(rows).__name__}; torch.as_tensor makes one')
        if rows.dim() != 2 or rows.dtype not in FEATURE_TYPES:
            raise ValueError(f'want {name} of shape (rows, D), real floating point, got shape {tuple(rows.shape)}, {rows.dtype}; '
                             'reshape it, or cast it with .float()')
    if y.device != x.device:
        raise ValueError(f'want y on {x.device}, where x is, got {y.device}; move it with .to()')
    if y.dtype != x.dtype or y.shape[1] != x.shape[1]:
        raise ValueError(f'want y like x but for its number of rows, {tuple(x.shape)}, {x.dtype}, got {tuple(y.shape)}, {y.dtype}; '
                         'cast one of them, or take rows of one width')
    if metric not in METRICS:
        raise ValueError(f'want {", ".join(METRICS[:-1])} or {METRICS[-1]} as metric, got {metric!r}; choose one of them')
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(rows).tangent is not None for rows in (x, y)):
        raise ValueError('want derivatives in reverse mode, got a tensor of forward mode; use backward() or torch.autograd.grad')
    if out is None:
        return
    shape = (x.shape[0], y.shape[0])
    if not isinstance(out, torch.Tensor) or out.shape != shape or not out.dtype.is_floating_point or out.device != x.device:
        got = f'{tuple(out.shape)}, {out.dtype} on {out.device}' if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(f'want out of shape {shape}, floating point, on {x.device}, got {got}; torch.empty makes one')
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or out.requires_grad):
        raise ValueError('want no gradient through out, got a tensor that requires one; leave out away, or call under torch.no_grad()')


torch.library.define('mgn::pairwise_distance', '(Tensor x, Tensor y, str metric) -> Tensor')
torch.library.define('mgn::pairwise_distance_out', '(Tensor x, Tensor y, str metric, Tensor(a!) out) -> ()')
# The gradient with respect to x; exchanged and transposed, to y.
torch.library.define('mgn::pairwise_distance_gradient', '(Tensor x, Tensor y, Tensor? dist, Tensor grad, str metric) -> Tensor')


def _pairwise_distance(x, y, metric):
    out = _empty_result(x, y, metric)
    _measure(x, y, metric, out)
    return out


def _empty_result(x, y, metric):
    return x.new_empty((x.shape[0], y.shape[0]), dtype=wide(x.dtype))


def _pairwise_distance_out(x, y, metric, out):
    if torch._debug_has_internal_overlap(out) == 1:
        raise ValueError(f'want out without overlap, got strides {out.stride()} for shape {tuple(out.shape)}; pass a clone')
    begin, end = _span(out)
    for name, rows in (('x', x), ('y', y)):
        if max(begin, _span(rows)[0]) < min(end, _span(rows)[1]):
            raise ValueError(f'want out apart from {name}, got memory that overlaps; pass an out with memory of its own, or {name}.clone()')
    _measure(x, y, metric, out)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _span(tensor):
    """The addresses between which its elements lie."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else -1
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _measure(x, y, metric, out):
    """Into out; some rows at a time where they or out have to be converted."""
    compiled, dtype = kernels(x.device), wide(x.dtype)
    readable = x.dtype if x.device.type == 'cuda' else dtype
    if compiled and readable == x.dtype and dtype == out.dtype and x.is_contiguous() and y.is_contiguous() and out.is_contiguous():
        compiled.pairwise_distance.default(x, y, METRICS.index(metric), out)
        return
    rows = max(1, min(1024, 2**21 // max(x.shape[1], 1)))
    for some, to_some in zip(x.split(rows), out.split(rows)):
        some = some.to(readable).contiguous()
        for others, to_both in zip(y.split(rows), to_some.split(rows, dim=1)):
            if compiled:
                tile = _empty_result(some, others, metric)
                compiled.pairwise_distance.default(some, others.to(readable).contiguous(), METRICS.index(metric), tile)
            else:
                tile = pairwise_distance_reference(some, others, metric).to(dtype)
            to_both.copy_(tile)


def arithmetic(device):
    return torch.float32 if device.type == 'mps' else torch.float64


def pairwise_distance_reference(x, y, metric):
    """pairwise_distance by its definition, in float64 (float32 on devices without it)."""
    x, y = x.to(arithmetic(x.device)), y.to(arithmetic(y.device))
    if metric == 'cosine':
        return torch.cdist(unit(x)[0], unit(y)[0], compute_mode='donot_use_mm_for_euclid_dist').square() / 2
    dist = torch.cdist(x, y, compute_mode='donot_use_mm_for_euclid_dist')
    odd = ((dist < torch.finfo(dist.dtype).tiny ** 0.4) | dist.isinf()).nonzero()  # squares may have left the range
    for pairs in odd.split(max(1, 2**20 // max(x.shape[1], 1))):
        i, j = pairs.unbind(1)
        difference = x[i] - y[j]
        largest = F.pad(difference.abs(), (0, 1)).amax(-1)
        ratios = torch.linalg.vector_norm(difference / largest[:, None], dim=-1)
        dist[i, j] = torch.where((largest == 0) | largest.isinf(), largest, largest * ratios)
    return dist.square() if metric == 'sqeuclidean' else dist


def unit(rows):
    """(N, D) → x/‖x‖, 0 of zero vectors, and ‖x‖ (N, 1)."""
    largest = F.pad(rows.abs(), (0, 1)).amax(-1, keepdim=True)
    scale = torch.where(largest.isfinite(), torch.ldexp(torch.ones_like(largest), torch.frexp(largest)[1] - 1), 1)  # exact to divide by
    rows = rows.contiguous() / scale
    # A row more: a single one would be summed in another order, by all threads, and equal rows would no longer be at distance 0.
    norm = torch.linalg.vector_norm(F.pad(rows, (0, 0, 0, 1)), dim=-1, keepdim=True)[:-1]
    return torch.where(norm == 0, 0, rows / norm), norm * scale


def _gradient(x, y, dist, grad, metric):
    """Σ over y of what each pair pulls at x, from differences, in float64, some rows at a time."""
    result, dtype = x.new_empty(x.shape), arithmetic(x.device)
    rows = max(1, min(1024, math.isqrt(2**24 // max(x.shape[1], 1))))  # rows × rows × D elements at a time at most
    for i in range(0, x.shape[0], rows):
        some = x[i:i + rows].to(dtype)
        towards, norm = unit(some) if metric == 'cosine' else (some, None)
        pull = torch.zeros_like(towards)
        for j in range(0, y.shape[0], rows):
            others = y[j:j + rows].to(dtype)
            others = unit(others)[0] if metric == 'cosine' else others.contiguous()
            weight = grad[i:i + rows, j:j + rows].to(dtype).contiguous()
            # ∂‖x − y‖ = (x − y) / ‖x − y‖; of its square (x − y) / ½, of half its square (x − y) / 1.
            apart = dist[i:i + rows, j:j + rows].to(dtype).contiguous() if dist is not None else torch.full_like(
                weight, 0.5 if metric == 'sqeuclidean' else 1)
            if dtype == torch.float64:
                pull += torch.ops.aten._cdist_backward(weight, towards.contiguous(), others, 2.0, apart)  # Σ weight · (x − y) / apart
            else:
                ratio = torch.where(apart == 0, 0, weight / apart)
                pull += ((towards[:, None] - others) * ratio[..., None]).sum(1)
        if metric == 'cosine':
            pull = torch.where(norm == 0, 0, (pull - (pull * towards).sum(-1, keepdim=True) * towards) / norm)
        result[i:i + rows] = pull
    return result


def _setup(ctx, inputs, output):
    x, y, ctx.metric = inputs
    ctx.save_for_backward(x, y, output if ctx.metric == 'euclidean' else None)


def _backward(ctx, grad):
    (x, y, dist), gradient = ctx.saved_tensors, torch.ops.mgn.pairwise_distance_gradient.default
    return (gradient(x, y, dist, grad, ctx.metric) if ctx.needs_input_grad[0] else None,
            gradient(y, x, None if dist is None else dist.T, grad.T, ctx.metric) if ctx.needs_input_grad[1] else None, None)


def _no_second_derivative(ctx, grad):
    raise RuntimeError('want first derivatives of pairwise distances, got create_graph=True and a second; there is none: '
                       'measure the distances with torch instead')


torch.library.impl('mgn::pairwise_distance', 'CompositeExplicitAutograd', _pairwise_distance)
torch.library.impl('mgn::pairwise_distance_out', 'CompositeExplicitAutograd', _pairwise_distance_out)
torch.library.impl('mgn::pairwise_distance_gradient', 'CompositeExplicitAutograd', _gradient)
torch.library.register_fake('mgn::pairwise_distance', _empty_result)
torch.library.register_fake('mgn::pairwise_distance_out', lambda x, y, metric, out: None)
torch.library.register_fake('mgn::pairwise_distance_gradient', lambda x, y, dist, grad, metric: x.new_empty(x.shape))
torch.library.register_autograd('mgn::pairwise_distance', _backward, setup_context=_setup)
torch.library.register_autograd('mgn::pairwise_distance_gradient', _no_second_derivative)
