"""The matrix product that decides most pairs of a ranking, its error bound, and the settings that keep it to that."""

import contextlib
import functools
import os
import threading

import torch

from mgn.ops.ranking import reference
from mgn.ops.ranking.keys import ranking_kernels
from mgn.ops.ranking.tiles import OPERANDS, is_readable, once, rows, spans

# Rows within this range can neither overflow in a product nor lose it to underflow or to flushed denormals.
SMALLEST, LARGEST = 2.0 ** -40, 2.0 ** 60
# GPUs by their capability: those on which the tests of `make gpu` have passed, on an H200, and those with float64 at
# half the rate of float32. Where both hold, precision 'auto' is tf32: a faster product that leaves more pairs to their
# float64 keys.
PROVEN, FAST_FLOAT64 = ((9, 0),), ((8, 0), (9, 0), (10, 0))
# Terms that our own products add up at a time; of int16, which adds exactly, how many go through the cache together.
SUMMED = {'float32': 128, 'bfloat16': 1024, 'int16': 2048}
NARROW = {'bfloat16': 128, 'int16': 192}  # dimensions below which keys take as long as the product saves
LOCK = threading.RLock()


@contextlib.contextmanager
def exact_float32():
    """float32 products of torch take their operands as they are; whatever says otherwise is restored afterwards.

    The settings are the whole process's, so one thread at a time; another that changes them meanwhile undoes it.
    """
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    with LOCK, torch.autocast('cpu', enabled=False), torch.autocast('cuda', enabled=False):
        before = [setting.fp32_precision for setting in settings]
        try:
            for setting in settings:
                setting.fp32_precision = 'ieee'
            yield
        finally:
            for setting, precision in zip(settings, before):
                setting.fp32_precision = 'none'  # where that inherits it, it was inherited
                if setting.fp32_precision != precision:
                    setting.fp32_precision = precision


def available(precision, device, width):
    """The precision that filters rows of this width here.

    bfloat16: three products of halves, by CPUs with AMX. int16: whole multiples of a step, by CPUs with VNNI.
    """
    if device.type != 'cuda' or torch.version.hip is not None or not width:
        kernels = own_kernels(device) if precision == 'auto' else None
        fastest = kernels.fastest_precision() if kernels else 'float32'
        return fastest if width >= NARROW.get(fastest, 1) else 'float32'
    capability = torch.cuda.get_device_capability(device)
    if precision == 'auto':
        return 'tf32' if capability in PROVEN and capability in FAST_FLOAT64 else 'float32'
    return precision if capability >= (8, 0) else 'float32'


def relative_error(precision, width, device, query_residual=None, item_residual=None):
    """c such that |products(q, g) − q·g| ≤ c·‖q‖·‖g‖ for rows of `width`, of norms from SMALLEST to LARGEST.

    Sums in any order (Higham, "Accuracy and Stability of Numerical Algorithms", §3.1); tensor cores may truncate. Where
    `operands` rounds, what it measured is added, and c is a tensor: of each query.
    """
    # What underflows or is flushed is at most 2⁻¹²⁶ a term, and the product of norms at least 2⁻⁸⁰.
    left_out = width * 2.0 ** -40
    if query_residual is not None:
        left_out = left_out + query_residual + item_residual.max() * (1 + query_residual)
    if precision == 'tf32':
        return 1.01 * summing(width, 2.0 ** -22) + left_out
    if own_kernels(device):
        terms, sums = min(width, SUMMED[precision]), -(-width // SUMMED[precision])
        roundings = {'float32': terms, 'bfloat16': 17 + 3 * -(-terms // 32), 'int16': 5 + width // 32}[precision]
        # 1.02: the absolute sum of what is rounded exceeds that of the rows, for three products by up to 2⁻⁶.
        return summing(1.02 * (roundings + 2 * sums), 2.0 ** -24) + left_out
    if not keeps_operands(device):  # at worst bfloat16, truncated
        return 1.02 * (summing(width, 2.0 ** -22) + 2 * 2.0 ** -7) + left_out
    emulated = device.type == 'cuda' and 'CUBLAS_EMULATE_SINGLE_PRECISION' in os.environ
    return summing(width, 2.0 ** -24 if rounds_sums(device) and not emulated else 2.0 ** -22) + left_out


# similarity = product · item_scale + item_shift orders the gallery as the metric does: q·g/‖g‖, or 2 q·g − ‖g‖². The
# level of a key on that scale is key · level_scale + level_shift: −‖q‖ · key, or ‖q‖² − key.

def item_terms(norms, cosine):
    """(n,) float64 norms → item_scale, item_shift (n,) float32, and, if not cosine, the largest norm that they say
    anything of. A NaN says nothing, of rows outside the range.
    """
    inside = in_range(norms) | (norms == 0)  # a row of zeros has products of 0 exactly
    scale = torch.where(norms > 0, 1 / norms, 0) if cosine else torch.full_like(norms, 2)
    shift = torch.where(inside, torch.zeros_like(norms) if cosine else -norms * norms, torch.nan)
    return scale.float(), shift.float(), None if cosine else torch.where(inside, norms, 0).amax()


def query_terms(norms, largest, product_error, width, cosine):
    """level_scale, level_shift and error (q,) float64: by how much similarity and level of one pair may differ.

    product_error: what relative_error returns. error holds the roundings of products, similarities and keys, but not of
    the level; infinite for rows outside the range.
    """
    own = width * 2.0 ** -53 + 8 * 2.0 ** -24  # of the key; of scale, shift and similarity
    if cosine:
        error = 1.01 * (product_error + own) * norms
        scale, shift = -norms, torch.zeros_like(norms)
    else:
        error = 1.01 * (2 * product_error * norms * largest + own * (norms + largest) ** 2)
        scale, shift = torch.full_like(norms, -1), norms * norms
    return scale, shift, torch.where(in_range(norms), error, torch.inf)


def in_range(norms):
    return (norms >= SMALLEST) & (norms <= LARGEST)


def summing(width, unit):
    return width * unit / (1 - width * unit) if width * unit < 0.5 else float('inf')


def by_torch(query, items):
    return torch.mm(query, items.T)


@functools.cache
@exact_float32()
def keeps_operands(device):
    """Whether products keep all 24 bits of an operand: environment variables, unlike torch, can make them drop some."""
    size = probe_size(device)
    fine = torch.diag(torch.full((size,), 1 + 2.0 ** -23, dtype=torch.float32, device=device))
    one = torch.eye(size, dtype=torch.float32, device=device)
    return all(torch.equal(by_torch(*pair), fine) for pair in ((fine, one), (one, fine)))


@functools.cache
@exact_float32()
def rounds_sums(device):
    """Whether products round their sums to nearest: tensor cores truncate, also where they emulate float32.

    1 + 1.5·2⁻²⁴ is 1 + 2⁻²³ to nearest, in whatever order zeros are added, and 1 truncated.
    """
    size = probe_size(device)
    row, one = torch.arange(size, device=device), torch.ones(size, size, dtype=torch.float32, device=device)
    terms = torch.eye(size, dtype=torch.float32, device=device)
    terms[row, (row + 1 + row % 97) % size] = 1.5 * 2.0 ** -24  # in the same step of a tensor core, or in a later one
    return all((by_torch(*pair) == 1 + 2.0 ** -23).all() for pair in ((terms, one), (one, terms)))


def probe_size(device):
    return 2048 if device.type == 'cuda' else 256  # libraries emulate large products only


def own_kernels(device):
    """The kernels with a product of our own, on CPUs that have AVX2; None where torch's is faster, or all there is."""
    sets = getattr(ranking_kernels(device), 'instruction_sets', None)
    return ranking_kernels(device) if sets and sets() != 'baseline' else None


def operands(features, norms, precision):
    """part → the operand of those rows, rounded so that nothing else rounds it; and ρ (n,) float64, None if 0: products
    of two operands differ from those of their rows by (ρ(q) + ρ(g) + ρ(q) ρ(g)) ‖q‖ ‖g‖ at most, ρ being the norm that
    rounding takes of the row, relative to its own.

    What has to be converted is converted once where it fits, else at each use.
    """
    def made(part, out=None):
        part_rows = rows(features, part)
        if precision != 'tf32':
            return part_rows if out is None else out.copy_(part_rows)
        rounded = part_rows.new_empty(part_rows.shape) if out is None else out  # contiguous, unlike these rows
        kernels = ranking_kernels(features.device) if features.is_cuda else reference
        kernels.round_to_tf32(part_rows, norms[part], rounded, residual[part])
        return rounded
    is_ready = precision != 'tf32' and is_readable(features)
    if is_ready and precision == 'float32':
        return made, None
    residual = torch.zeros_like(norms)
    fitting = 0 if is_ready else once(features.device)
    whole = norms.new_empty(features.shape, dtype=torch.float32) if features.numel() <= fitting else None
    for part in spans(len(features), max(OPERANDS, fitting // 8) // max(features.shape[1], 1)):
        rounded = made(part, None if whole is None else whole[part])
        if precision in ('bfloat16', 'int16'):
            residual[part] = products_of(rounded[:0], precision, rounded.new_empty(0))(rounded, norms[part])[1]
    # Of rows outside the range the terms say nothing.
    known = residual.masked_fill(~in_range(norms), 0) if precision != 'float32' else None
    return (made if whole is None else whole.__getitem__), known


def products_of(query, precision, room):
    """A function of items (n, D) → (q, n) float32, within relative_error of the products of what was made operands.

    Given norms (n,) to write to, it also computes those of the items, and returns with the products their residuals,
    for bfloat16 and int16, else None. The result may lie in `room`, a tensor of the CPU: memory that is used again is
    in the cache.
    """
    if precision == 'tf32':
        torch.backends.cuda.matmul.fp32_precision = 'tf32'
    kernels = own_kernels(query.device) if precision != 'tf32' else None
    panels = kernels and kernels.pack_queries(query, precision)

    def products(items, norms=None):
        if kernels:
            dots = room[:len(query) * len(items)].view(len(query), len(items))
            residual = None if norms is None or precision == 'float32' else torch.empty_like(norms)
            kernels.products(panels, items, SUMMED[precision], dots, norms, residual)
            return dots, residual
        if norms is not None:
            ranking_kernels(query.device).canonical_norms(items, norms)
        return by_torch(query, items), None
    return products
