"""The matrix product that decides most pairs of a ranking, by how much it may err, and what keeps it to that."""

import contextlib
import functools
import os
import threading
import time

import torch

# Rows within this range can neither overflow in a product nor lose it to underflow or to flushed denormals.
SMALLEST, LARGEST = 2.0 ** -40, 2.0 ** 60
TRIALS, WORTH_A_TRIAL = 3, 2 ** 28  # products timed of each GEMM, of so many multiplications at least
PRECISIONS = ('float32', 'tf32', 'bfloat16')
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
    if device.type == 'cuda':
        capability = torch.cuda.get_device_capability(device)
        return precision if capability >= (8, 0) and torch.version.hip is None else 'float32'
    if precision == 'bfloat16' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return precision
    return 'float32'


def relative_error(precision, width, device):
    """c such that |products(q, g) − q·g| ≤ c·‖q‖·‖g‖ for rows of `width`, of norms from SMALLEST to LARGEST.

    Sums in any order (Higham, "Accuracy and Stability of Numerical Algorithms", §3.1); tensor cores and AMX may truncate.
    """
    # What underflows or is flushed is at most 2⁻¹²⁶ a term, and the product of norms at least 2⁻⁸⁰.
    underflow = width * 2.0 ** -40
    if precision == 'bfloat16':  # two parts leave 2⁻¹⁶ of each operand, and the product of the small parts, as small, is left out
        return 1.02 * summing(width + 2, 2.0 ** -22) + 3.1 * 2.0 ** -16 + underflow
    if precision == 'tf32':
        return 1.01 * (summing(width, 2.0 ** -22) + 2 * 2.0 ** -11) + underflow
    if not float32_is_float32(device):  # at worst bfloat16, truncated
        return 1.02 * (summing(width, 2.0 ** -22) + 2 * 2.0 ** -7) + underflow
    emulated = device.type == 'cuda' and 'CUBLAS_EMULATE_SINGLE_PRECISION' in os.environ
    return summing(width, 2.0 ** -22 if emulated else 2.0 ** -24) + underflow


# similarity = product · item_scale + item_shift orders the gallery as the metric does: q·g/‖g‖, or 2 q·g − ‖g‖². The level of a
# key on that scale is key · level_scale + level_shift: −‖q‖ · key, or ‖q‖² − key.

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

    error holds the roundings of products, similarities and keys, but not of the level; infinite for rows outside the range.
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
    """Whether products keep all 24 bits of an operand: environment variables can make them drop some, whatever torch is told."""
    fine = torch.diag(torch.full((256,), 1 + 2.0 ** -23, dtype=torch.float32, device=device))
    one = torch.eye(256, dtype=torch.float32, device=device)
    with exact_float32():
        return all(torch.equal(product, fine) for gemm in gemms(device) for product in (gemm(fine, one), gemm(one, fine)))


def gemms(device):
    """Ways to q @ gᵀ in float32."""
    def mm(q, g):
        return torch.mm(q, g.T)

    def onednn(q, g):
        return torch.ops.mkldnn._linear_pointwise(q, g, None, 'none', [], '')

    return (mm, onednn) if device.type == 'cpu' and torch.backends.mkldnn.is_available() else (mm,)


def operand(features, precision):
    """(n, D) float32 → what `products` takes, rounded here so that nothing else rounds it: a tensor, or two for bfloat16."""
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
            parts = (torch.mm(a, b.T, out_dtype=torch.float32) for a, b in ((q_small, large), (q_large, small), (q_large, large)))
            return functools.reduce(torch.Tensor.add_, parts)
        torch.backends.mkldnn.matmul.fp32_precision = 'bf16'
        return torch.mm(q_small, large.T).addmm_(q_large, small.T).addmm_(q_large, large.T)
    if precision == 'tf32':
        torch.backends.cuda.matmul.fp32_precision = 'tf32'
        return torch.mm(query, items.T)
    return fastest(gemms(query.device), query, items)


def fastest(ways, query, items):
    """The product by the fastest of ways, which the first large products of the process find out."""
    work = query.shape[0] * items.shape[0] * query.shape[1]
    if len(ways) == 1 or work < WORTH_A_TRIAL:
        return ways[0](query, items)
    seconds = [TIMES.setdefault((way.__name__, torch.get_num_threads()), []) for way in ways]
    tried = min(map(len, seconds))
    if tried >= TRIALS:
        return ways[min(range(len(ways)), key=lambda i: min(seconds[i]))](query, items)
    next_up = [len(times) for times in seconds].index(tried)
    start = time.perf_counter()
    product = ways[next_up](query, items)
    seconds[next_up].append((time.perf_counter() - start) / work)
    return product
