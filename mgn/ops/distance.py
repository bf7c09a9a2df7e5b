"""Distances of all pairs of rows, exact between near duplicates, too: nothing is multiplied out, so nothing cancels."""

import math

import torch
import torch.nn.functional as F
from torch.autograd.forward_ad import unpack_dual

from mgn.ops.arguments import check_alike, check_rows, choice
from mgn.ops.errors import UserError
from mgn.ops.native import kernels
from mgn.ops.private import sum_of_differences

DISTANCES = ('euclidean', 'sqeuclidean', 'cosine')  # as csrc/kernels count them


def pairwise_distance(x, y, metric='euclidean'):
    """The distance of every row of x from every row of y, to a relative error of 1e-5, near duplicates included.

    Sums squared differences, in float32 (float64 for float64 rows) where their rounding allows, else in float64; never
    x² + y² − 2xy, and no matrix product. On CUDA the error is that for D up to 3072 (4096 for the Euclidean ones), on
    the CPU up to 16384. Identical rows are at distance 0. Distances are right wherever their type can hold
    them, even where their squares overflow or underflow; the cosine of float64 rows where their norms are from 1e-300
    to 1e308. Differentiable once in x and y, in reverse mode, with gradient 0 at distance 0 and, for the cosine, of
    zero vectors. Memory beyond operands and result does not grow with N and M on the CPU, and is 16 (N + M) bytes for
    the cosine on CUDA.

    Args:
        x: (N, D) float16, bfloat16, float32 or float64; half precision is computed in float32.
        y: (M, D) of the same type and device.
        metric: 'euclidean' ‖x − y‖, 'sqeuclidean' ‖x − y‖², or 'cosine' 1 − x·y / (‖x‖‖y‖), measured as ½ ‖x/‖x‖ −
            y/‖y‖‖² with x/‖x‖ as float64 rounds it, and 0 of a zero vector.
    Returns:
        (N, M) float32, float64 for float64 rows. NaN and infinite entries raise nothing: distances are NaN or infinite
        as the formula has them (the cosine of a row with infinity is NaN).
    Raises:
        UserError: shapes, types or devices that do not go together; an unknown metric; tensors of forward-mode
            derivatives.
    """
    check_rows(x, 'x')
    check_rows(y, 'y')
    check_alike(y, 'y', x, 'x')
    choice(metric, 'metric', DISTANCES, 'measure any other distance with torch operations')
    if unpack_dual(x).tangent is not None or unpack_dual(y).tangent is not None:
        raise UserError('pairwise_distance has derivatives in reverse mode only, but got a tensor of forward mode; '
                        'use backward() or torch.autograd.grad')
    return torch.ops.mgn.pairwise_distance.default(x, y, metric)


torch.library.define('mgn::pairwise_distance', '(Tensor x, Tensor y, str metric) -> Tensor')
# The gradient with respect to x; exchanged and transposed, to y.
torch.library.define('mgn::pairwise_distance_gradient',
                     '(Tensor x, Tensor y, Tensor? dist, Tensor grad, str metric) -> Tensor')


def wide(dtype):
    """The type of arithmetic and distances."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_type(device):
    """The type that references compute in."""
    return torch.float32 if device.type == 'mps' else torch.float64


def _empty_result(x, y, metric):
    return x.new_empty((x.shape[0], y.shape[0]), dtype=wide(x.dtype))


def _pairwise_distance(x, y, metric):
    """One call where the kernel reads both as they are; else tile by tile, so that copies stay small."""
    compiled, result, number = kernels(x.device), _empty_result(x, y, metric), DISTANCES.index(metric)
    readable = x.dtype if x.device.type == 'cuda' else result.dtype
    if compiled and readable == x.dtype and x.is_contiguous() and y.is_contiguous():
        compiled.pairwise_distance.default(x, y, number, result)
        return result
    rows = max(1, min(1024, 2**21 // max(x.shape[1], 1)))
    for x_block, result_rows in zip(x.split(rows), result.split(rows)):
        x_block = x_block.to(readable).contiguous()
        for y_block, result_block in zip(y.split(rows), result_rows.split(rows, dim=1)):
            if compiled:
                tile = _empty_result(x_block, y_block, metric)
                compiled.pairwise_distance.default(x_block, y_block.to(readable).contiguous(), number, tile)
            else:
                tile = pairwise_distance_reference(x_block, y_block, metric)
            result_block.copy_(tile)
    return result


def pairwise_distance_reference(x, y, metric):
    """pairwise_distance by its definition, in float64 (float32 on devices without it)."""
    x, y = x.to(reference_type(x.device)), y.to(reference_type(y.device))
    if metric == 'cosine':
        # Of both in one call: CUDA sums in an order that depends on the number of rows.
        x, y = unit(torch.cat((x, y)))[0].split((len(x), len(y)))
        return torch.cdist(x, y, compute_mode='donot_use_mm_for_euclid_dist').square() / 2
    dist = torch.cdist(x, y, compute_mode='donot_use_mm_for_euclid_dist')
    # Of these the squares may have left the range.
    out_of_range = ((dist < torch.finfo(dist.dtype).tiny ** 0.4) | dist.isinf()).nonzero()
    for pairs in out_of_range.split(max(1, 2**20 // max(x.shape[1], 1))):
        i, j = pairs.unbind(1)
        difference = x[i] - y[j]
        largest = F.pad(difference.abs(), (0, 1)).amax(-1)
        ratios = torch.linalg.vector_norm(difference / largest[:, None], dim=-1)
        dist[i, j] = torch.where((largest == 0) | largest.isinf(), largest, largest * ratios)
    return dist.square() if metric == 'sqeuclidean' else dist


def unit(rows):
    """(N, D) → x/‖x‖, 0 of zero vectors, and ‖x‖ (N, 1)."""
    scale = power_of_two(F.pad(rows.abs(), (0, 1)).amax(-1, keepdim=True))
    rows = rows.contiguous() / scale
    # A row more: a single one would be summed in another order, by all threads. Then equal rows would not be at
    # distance 0.
    norm = torch.linalg.vector_norm(F.pad(rows, (0, 0, 0, 1)), dim=-1, keepdim=True)[:-1]
    return torch.where(norm == 0, 0, rows / norm), norm * scale


def power_of_two(largest):
    """About as large as each number, and exact to divide by; 1 for 0, NaN and infinity."""
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest)[1] - 1)
    return torch.where((largest > 0) & largest.isfinite(), power, 1)


def _gradient(x, y, dist, grad, metric):
    """Σ over y of what each pair pulls at x, from differences, in float64; by torch some rows at a time."""
    result, dtype = x.new_empty(x.shape), reference_type(x.device)
    compiled = kernels(x.device) if x.device.type == 'cuda' else None
    if compiled:
        number = DISTANCES.index(metric)
        compiled.pairwise_distance_gradient.default(x.contiguous(), y.contiguous(), dist, grad, number, result)
        return result
    # ∂‖x − y‖ = (x − y) / ‖x − y‖; of its square (x − y) / ½, of half its square (x − y) / 1.
    if dist is None:
        dist = grad.new_tensor(0.5 if metric == 'sqeuclidean' else 1).expand(grad.shape)
    rows = max(1, min(1024, math.isqrt(2**24 // max(x.shape[1], 1))))  # rows × rows × D elements at a time at most
    for i in range(0, x.shape[0], rows):
        x_block = x[i:i + rows].to(dtype)
        x_block, norm = unit(x_block) if metric == 'cosine' else (x_block.contiguous(), None)
        pull = torch.zeros_like(x_block)
        for j in range(0, y.shape[0], rows):
            y_block = y[j:j + rows].to(dtype)
            y_block = unit(y_block)[0] if metric == 'cosine' else y_block.contiguous()
            weight = grad[i:i + rows, j:j + rows].to(dtype).contiguous()
            divisor = dist[i:i + rows, j:j + rows].to(dtype).contiguous()
            if dtype == torch.float64:
                pull += sum_of_differences(weight, x_block, y_block, divisor)
            else:
                ratio = torch.where(divisor == 0, 0, weight / divisor)
                pull += ((x_block[:, None] - y_block) * ratio[..., None]).sum(1)
        if metric == 'cosine':
            pull = torch.where(norm == 0, 0, (pull - (pull * x_block).sum(-1, keepdim=True) * x_block) / norm)
        result[i:i + rows] = pull
    return result


def _setup(ctx, inputs, output):
    x, y, ctx.metric = inputs
    ctx.save_for_backward(x, y, output if ctx.metric == 'euclidean' else None)


def _backward(ctx, grad):
    (x, y, dist), gradient = ctx.saved_tensors, torch.ops.mgn.pairwise_distance_gradient.default
    transposed = None if dist is None else dist.T
    return (gradient(x, y, dist, grad, ctx.metric) if ctx.needs_input_grad[0] else None,
            gradient(y, x, transposed, grad.T, ctx.metric) if ctx.needs_input_grad[1] else None, None)


def refuse_second_derivative(ctx, *grads):
    """Without it the gradient of a gradient would be 0 in silence."""
    raise RuntimeError('Distances and batch-hard mining have first derivatives only, but a second was asked for by '
                       'create_graph=True; for it, measure distances with torch operations, on the mined indices')


torch.library.impl('mgn::pairwise_distance', 'CompositeExplicitAutograd', _pairwise_distance)
torch.library.impl('mgn::pairwise_distance_gradient', 'CompositeExplicitAutograd', _gradient)
torch.library.register_fake('mgn::pairwise_distance', _empty_result)
torch.library.register_fake('mgn::pairwise_distance_gradient', lambda x, y, dist, grad, metric: x.new_empty(x.shape))
torch.library.register_autograd('mgn::pairwise_distance', _backward, setup_context=_setup)
torch.library.register_autograd('mgn::pairwise_distance_gradient', refuse_second_derivative)
