"""The matrix product that decides most pairs of a ranking, its error bound, and the settings that keep it to that."""

import contextlib
import functools
import os
import threading
import time

import torch

from mgn.ops.private import cpu_capabilities, onednn_product

# Rows within this range can neither overflow in a product nor lose it to underflow or to flushed denormals.
SMALLEST, LARGEST = 2.0 ** -40, 2.0 ** 60
TRIALS, WORTH_A_TRIAL = 3, 2 ** 28  # products timed of each GEMM, of so many multiplications at least
LOCK = threading.RLock()
TIMES = {}  # (GEMM, threads) → seconds a multiplication in its trials


@contextlib.contextmanager
def exact_float32():
    """float32 products of torch take their operands as they are; whatever says otherwise is restored afterwards.

    The settings are the whole process's, so one thread at a time; another that changes them meanwhile undoes it.
    """
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    with LOCK, contextlib.ExitStack() as stack:
        before = [setting.fp32_precision for setting in settings]
        for device in ('cpu', 'cuda'):
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            for setting in settings:
                setting.fp32_precision = 'ieee'
            yield
        finally:
            for setting, precision in zip(settings, before):
                setting.fp32_precision = 'none'  # where that inherits it, it was inherited
                if setting.fp32_precision != precision:
                    setting.fp32_precision = precision


def available(precision, device):
    """The precision that filters on this device: float32 where it has no faster units for the one asked for."""
    has_units = False  # nothing is known of other devices
    if device.type == 'cuda':
        has_units = torch.cuda.get_device_capability(device) >= (8, 0) and torch.version.hip is None
    elif device.type == 'cpu' and precision == 'bfloat16':
        has_units = any(cpu_capabilities().get(name) for name in ('avx512_bf16', 'amx_tile'))
    return precision if has_units else 'float32'


def chosen(comparison):
    """The precision that filters this comparison, and its relative_error."""
    width, device = comparison.query.shape[1], comparison.query.device
    precision = available(comparison.precision, device) if width else 'float32'
    return precision, relative_error(precision, width, device)


def relative_error(precision, width, device):
    """c such that |products(q, g) − q·g| ≤ c·‖q‖·‖g‖ for rows of `width`, of norms from SMALLEST to LARGEST.

    Sums in any order (Higham, "Accuracy and Stability of Numerical Algorithms", §3.1); tensor cores and AMX may
    truncate.
    """
    # What underflows or is flushed is at most 2⁻¹²⁶ a term, and the product of norms at least 2⁻⁸⁰.
    underflow = width * 2.0 ** -40
    if precision == 'bfloat16':  # two parts leave 2⁻¹⁶ of each operand; the product of the small ones is left out
        return 1.02 * summing(width + 2, 2.0 ** -22) + 3.1 * 2.0 ** -16 + underflow
    if precision == 'tf32':
        return 1.01 * (summing(width, 2.0 ** -22) + 2 * 2.0 ** -11) + underflow
    if not float32_is_float32(device):  # at worst bfloat16, truncated
        return 1.02 * (summing(width, 2.0 ** -22) + 2 * 2.0 ** -7) + underflow
    emulated = device.type == 'cuda' and 'CUBLAS_EMULATE_SINGLE_PRECISION' in os.environ
    return summing(width, 2.0 ** -22 if emulated else 2.0 ** -24) + underflow


# similarity = product · item_scale + item_shift orders the gallery as the metric does: q·g/‖g‖, or 2 q·g − ‖g‖². The
# level of a key on that scale is key · level_scale + level_shift: −‖q‖ · key, or ‖q‖² − key.

def item_terms(norms, cosine):
    """(n,) float64 norms → item_scale, item_shift (n,) float32, and the largest norm that they say anything of.

    A NaN says nothing, of rows outside the range.
    """
    # A row of zeros has products of 0 exactly.
    inside = ((norms >= SMALLEST) & (norms <= LARGEST)) | (norms == 0)
    scale = torch.where(norms > 0, 1 / norms, 0) if cosine else torch.full_like(norms, 2)
    shift = torch.where(inside, torch.zeros_like(norms) if cosine else -norms * norms, torch.nan)
    return scale.float(), shift.float(), torch.where(inside, norms, 0).amax()


def query_terms(norms, largest, relative_error, width, cosine):
    """level_scale, level_shift and error (q,) float64: by how much similarity and level of one pair may differ.

    error holds the roundings of products, similarities and keys, but not of the level; infinite for rows outside the
    range.
    """
    own = width * 2.0 ** -53 + 8 * 2.0 ** -24  # of the key; of scale, shift and similarity
    if cosine:
        error = 1.01 * (relative_error + own) * norms
        scale, shift = -norms, torch.zeros_like(norms)
    else:
        error = 1.01 * (2 * relative_error * norms * largest + own * (norms + largest) ** 2)
        scale, shift = torch.full_like(norms, -1), norms * norms
    return scale, shift, torch.where((norms >= SMALLEST) & (norms <= LARGEST), error, torch.inf)


def summing(width, unit):
    return width * unit / (1 - width * unit) if width * unit < 0.5 else float('inf')


@functools.cache
def float32_is_float32(device):
    """Whether products keep all 24 bits of an operand: environment variables, unlike torch, can make them drop some."""
    fine = torch.diag(torch.full((256,), 1 + 2.0 ** -23, dtype=torch.float32, device=device))
    one = torch.eye(256, dtype=torch.float32, device=device)
    with exact_float32():
        results = [result for gemm in gemms(device) for result in (gemm(fine, one), gemm(one, fine))]
    return all(torch.equal(result, fine) for result in results)


def gemms(device):
    """Functions (q, g) → q @ gᵀ in float32."""
    def mm(q, g):
        return torch.mm(q, g.T)
    return (mm, onednn_product) if device.type == 'cpu' and torch.backends.mkldnn.is_available() else (mm,)


def operand(features, precision):
    """(n, D) float32 → what `products` takes, rounded so that nothing else rounds it: a tensor, or two for bfloat16."""
    if precision == 'tf32':  # to nearest, ties to even, in the 13 bits that float32 has more
        bits = features.view(torch.int32)
        return ((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fff).view(torch.float32)
    if precision == 'bfloat16':
        large = features.bfloat16()
        small = (features - large).bfloat16()
        return (large, small) if features.is_cuda else (large.float(), small.float())
    return features


def products(query, items, precision):
    """Operands of (q, D) and (n, D) → (q, n) float32, within relative_error of the products of their rows."""
    if precision == 'bfloat16':
        (q_large, q_small), (large, small) = query, items
        if large.is_cuda:
            pairs = (q_small, large), (q_large, small), (q_large, large)
            return functools.reduce(torch.Tensor.add_, (torch.mm(a, b.T, out_dtype=torch.float32) for a, b in pairs))
        torch.backends.mkldnn.matmul.fp32_precision = 'bf16'
        return torch.mm(q_small, large.T).addmm_(q_large, small.T).addmm_(q_large, large.T)
    if precision == 'tf32':
        torch.backends.cuda.matmul.fp32_precision = 'tf32'
        return torch.mm(query, items.T)
    return fastest(gemms(query.device), query, items)


def fastest(candidates, query, items):
    """The product by the fastest of several GEMMs, which the first large products of the process find out."""
    work = query.shape[0] * items.shape[0] * query.shape[1]
    if len(candidates) == 1 or work < WORTH_A_TRIAL:
        return candidates[0](query, items)
    times = [TIMES.setdefault((gemm.__name__, torch.get_num_threads()), []) for gemm in candidates]
    trials = min(map(len, times))
    if trials >= TRIALS:
        best = min(range(len(candidates)), key=lambda i: min(times[i]))
        return candidates[best](query, items)
    next_up = [len(seconds) for seconds in times].index(trials)
    start = time.perf_counter()
    product = candidates[next_up](query, items)
    times[next_up].append((time.perf_counter() - start) / work)
    return product
