"""The tables of docs/gpu.md: bytes, operations and launches of every operation, the time they should take, the time
that `make gpu` has measured.

    python -m benchmarks.roofline

Writes them anew into the page, from the formulas below and from docs/gpu.json, which `make gpu` writes. Needs no GPU.
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ranking import D, G
from mgn.losses import mgn_losses
from mgn.model import MGN, MGNOutput
from mgn.ops.ranking.nearest import GPU_SELECTED
from mgn.ops.ranking.tiles import GPU_PRODUCTS, spans, tile_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / 'docs' / 'gpu.md'
MEASURED = PAGE.with_suffix('.json')

Q, MATCHES, OPEN = 11_659, 292_412, 109  # MSMT17; pairs a query that a float32 product leaves open (docs/benchmarks.md)
K1, K = 20, 30
IMAGES, SIZE, IDENTITIES = 64, (384, 128), 751

# Assumptions. Large kernels reach this share of the peaks; a launch takes the host this long, in seconds.
REACHED, LAUNCH = 0.8, 5e-6
# Launches of one call, or of one tile of products; `make gpu` counts them (step `launches`) but the last two.
LAUNCHES = {'mining': 3, 'distance': 1, 'distance with gradient': 3, 'match_ranks, a tile': 4, 'topk, a tile': 3,
            're-ranking, a tile': 6, 'beside the tiles': 120}


class Device(NamedTuple):
    """Peaks: bytes a second of memory and of the link to the host; operations a second, a multiply-add being one."""
    memory: float
    link: float    # one way
    rates: dict    # by unit: float32, float64, tf32, bfloat16, and conversions between float32 and float64
    source: str


def device(memory, link, teraflops, multiprocessors, gigahertz, conversions, source):
    """A Device from its data sheet; conversions: a clock and multiprocessor, of the CUDA C++ Programming Guide."""
    rates = {unit: value / 2 * 1e12 for unit, value in teraflops.items()}
    rates['conversion'] = multiprocessors * gigahertz * 1e9 * conversions
    return Device(memory * 1e9, link * 1e9, rates, source)


# TFLOP/s of dense matrices: data sheets give twice that for tensor cores, "with sparsity".
DEVICES = {
    'H200': device(4800, 64, {'float32': 67, 'float64': 34, 'tf32': 494.5, 'bfloat16': 989.5}, 132, 1.98, 16,
                   'NVIDIA H200 data sheet (SXM)'),
    'A100': device(2039, 32, {'float32': 19.5, 'float64': 9.7, 'tf32': 156, 'bfloat16': 312}, 108, 1.41, 16,
                   'NVIDIA A100 data sheet (80 GB, SXM)'),
    'RTX 4090': device(1008, 32, {'float32': 82.6, 'float64': 1.29, 'tf32': 82.6, 'bfloat16': 165.2}, 128, 2.52, 2,
                       'NVIDIA Ada GPU architecture white paper, appendix A'),
    'T4': device(320, 16, {'float32': 8.1, 'float64': 0.253}, 40, 1.59, 2,
                 'NVIDIA T4 product brief PB-09256; float64: Turing architecture white paper'),
}
UNITS = ('float32', 'tf32', 'bfloat16', 'float64', 'conversion')


class Phase(NamedTuple):
    """What runs before the next can begin."""
    moved: float             # bytes between memory and multiprocessors, each operand once
    operations: dict = {}    # by unit
    downloaded: float = 0    # bytes between device and host


class Work(NamedTuple):
    launches: int
    phases: list

    def total(self, unit):
        return sum(phase.operations.get(unit, 0) for phase in self.phases)

    def seconds(self, device):
        """The larger of launching and working; None where the device lacks a unit."""
        if any(unit not in device.rates for phase in self.phases for unit in phase.operations):
            return None
        working = sum(max(phase.moved / device.memory, phase.downloaded / device.link,
                          *(count / device.rates[unit] for unit, count in phase.operations.items()), 0)
                      for phase in self.phases)
        return max(working / REACHED, self.launches * LAUNCH)


def mining(heads, n, d):
    """batch_hard_triplet_loss, forward and backward. The selected pairs are measured in float64."""
    features, selected = heads * n * d, 2 * heads * n * d
    return Work(LAUNCHES['mining'], [
        Phase(4 * features + 28 * heads * n, {'float32': 2 * n * features}),  # subtract, multiply-add
        Phase(8 * selected, {'conversion': 2 * selected, 'float64': 2 * selected}),
        Phase(8 * features + 8 * selected, {'conversion': 4 * selected, 'float64': 2 * selected})])


def distance(n, m, d, gradient):
    pairs = n * m * d
    phases = [Phase(4 * (n + m) * d + 4 * n * m, {'float32': 2 * pairs})]
    if gradient:  # to both operands, from differences, in float64
        phases.append(Phase(2 * (8 * n * m + 8 * (n + m) * d), {'float64': 2 * 2 * pairs}))
    return Work(LAUNCHES['distance with gradient' if gradient else 'distance'], phases)


@functools.cache
def tiles(queries, items, products=GPU_PRODUCTS):
    """How many tiles of products are made, and their queries and items at most; of a matrix with itself about half."""
    with FakeTensorMode():
        width, height = tile_of(torch.empty(queries, D, device='cuda'), products)
    if queries == items:
        width = height = math.isqrt(width * height)
    blocks, parts = spans(queries, height), spans(items, width)
    number = len(blocks) * (len(blocks) + 1) // 2 if queries == items else len(blocks) * len(parts)
    return number, blocks[0].stop, parts[0].stop


def relative_error(precision):
    """Of a product of D terms, as mgn/ops/ranking/product.py bounds it: tensor cores may truncate."""
    lost = 0.424 * 2.0 ** -11  # by rounding rows of normal numbers to tf32, of their norm
    return {'float32': D * 2.0 ** -24, 'tf32': D * 2.0 ** -22 + 2 * lost}[precision]


def product(precision, queries, items, products=GPU_PRODUCTS):
    """queries × items products of D terms, in tiles; written, and read once."""
    number, height, width = tiles(queries, items, products)
    made = queries * items * (0.5 + width / items / 2 if queries == items else 1)  # half, and the diagonal's other half
    return Phase(number * (height + width) * D * 4 + 8 * made, {precision: made * D})


def keys(pairs, rows=1):
    """Canonical keys; of `rows` of the two rows of a pair it matters that they come from memory."""
    return Phase(rows * pairs * D * 4, {'conversion': 2 * pairs * D, 'float64': pairs * D})


def prepared(precision, rows):
    """Norms, and operands rounded once."""
    rounded = 0 if precision == 'float32' else 8 * rows * D
    return Phase(4 * rows * D + rounded, {'conversion': rows * D, 'float64': rows * D})


def match_ranks(precision):
    number, *_ = tiles(Q, G)
    compared = Phase(0, {'float32': 16 * Q * G})  # instructions a product, about
    return Work(LAUNCHES['beside the tiles'] + number * LAUNCHES['match_ranks, a tile'], [
        keys(MATCHES, rows=2), prepared(precision, Q + G), product(precision, Q, G), compared,
        keys(OPEN * Q * relative_error(precision) / relative_error('float32'))])


def topk(precision):
    number, *_ = tiles(Q, G, GPU_SELECTED)
    return Work(LAUNCHES['beside the tiles'] + number * LAUNCHES['topk, a tile'], [
        prepared(precision, Q + G), product(precision, Q, G, GPU_SELECTED), Phase(0, {'float32': 8 * Q * G}),
        keys(Q * (K + max(16, K // 2)))])


def re_ranking(precision):
    """The GPU's part: neighbours among all, and the products that the CPU counts."""
    rows = Q + G
    number = tiles(rows, rows, GPU_SELECTED)[0] + tiles(Q, G)[0]
    return Work(LAUNCHES['beside the tiles'] + number * LAUNCHES['re-ranking, a tile'], [
        prepared(precision, rows), product(precision, rows, rows, GPU_SELECTED),
        Phase(0, {'float32': 8 * rows * rows}), keys(rows * (K1 + 1 + 16)),
        product(precision, Q, G), Phase(0, downloaded=4 * Q * G + 4 * rows * D)])


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, and how many run; views do not count."""

    def __init__(self):
        super().__init__()
        self.matrices = self.others = self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if all(out.alias_info is None or out.alias_info.is_write for out in function._schema.returns):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            is_matrix = any(word in str(function) for word in ('convolution', '.mm.', 'addmm'))
            moved = sum(x.nbytes for x in tensors)
            self.matrices, self.others = self.matrices + moved * is_matrix, self.others + moved * (not is_matrix)
            self.launches += 1
        return result


@functools.cache
def step(dtype):
    """(multiply-adds, Traffic, parameters) of a step of MGN, counted on tensors without data."""
    with torch.device('meta'):
        model = MGN(IDENTITIES, pretrained=False).train().to(dtype)
        images, labels = torch.empty(IMAGES, 3, *SIZE, dtype=dtype), torch.empty(IMAGES, dtype=torch.int64)
    traffic, flops = Traffic(), FlopCounterMode(display=False)
    with flops, traffic:
        output = model(images)
        output = MGNOutput(tuple(x.float() for x in output.logits), output.embeddings.float(), output.features)
        sum(mgn_losses(output, labels).values()).backward()
    return flops.get_total_flops() / 2, traffic, sum(x.numel() for x in model.parameters())


def training_step(precision):
    """Adam reads weight, gradient and two moments and writes three, float32. tf32 is torch's default for
    convolutions."""
    multiply_adds, traffic, parameters = step(torch.bfloat16 if precision == 'bfloat16' else torch.float32)
    return Work(traffic.launches, [Phase(traffic.matrices, {precision: multiply_adds}), Phase(traffic.others),
                                   Phase(7 * 4 * parameters)])


def rows():
    """{name of a row: function → Work}. benchmarks.gpu_times measures rows of these names."""
    partial, named = functools.partial, {}
    for heads, n, d in ((3, 64, 256), (1, 1024, 256)):
        named[f'mining, {heads} × {n} × {d}'] = partial(mining, heads=heads, n=n, d=d)
    for n in (64, 1024):
        for gradient in (False, True):
            what = 'distances and gradients' if gradient else 'distances'
            named[f'{what}, {n} × {n} × 256'] = partial(distance, n=n, m=n, d=256, gradient=gradient)
    for name, function in (('match_ranks', match_ranks), ('topk, k = 30', topk), ('re-ranking', re_ranking)):
        for precision in ('float32', 'tf32'):
            named[f'{name}, {precision}'] = partial(function, precision=precision)
    for precision in ('float32', 'tf32', 'bfloat16'):
        named[f'training step, {precision}'] = partial(training_step, precision=precision)
    return named


def shown(seconds):
    """Milliseconds in three digits, – for None."""
    return '–' if seconds is None else f'{1000 * seconds:.3g}' if seconds < 1 else f'{1000 * seconds:,.0f}'


def amount(number):
    """Billions in three digits."""
    return f'{number / 1e9:,.0f}' if number >= 1e12 else f'{number / 1e9:.3g}'


def read_measured():
    """{'device': …, 'seconds': {row: …}, 'in_graph': {row: …}} of docs/gpu.json; nothing where there is none."""
    nothing = {'device': None, 'seconds': {}, 'in_graph': {}}
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else nothing


def expected_table(measured):
    where = f' on {measured["device"]}' if measured['device'] else ''
    expected = ' | '.join(f'{name}, expected' for name in DEVICES)
    lines = [f'| operation | launches | GB moved | 10⁹ operations | {expected} | '
             f'measured{where} |',
             '|---' * (len(DEVICES) + 5) + '|']
    for name, made in rows().items():
        work = made()
        operations = ', '.join(f'{unit} {amount(work.total(unit))}' for unit in UNITS if work.total(unit))
        moved = amount(sum(phase.moved for phase in work.phases))
        times = [shown(work.seconds(device)) for device in DEVICES.values()]
        found = shown(measured['seconds'][name]) if name in measured['seconds'] else ''
        if name in measured['in_graph']:
            found += f', in a graph {shown(measured["in_graph"][name])}'
        cells = [name, f'{work.launches:,}', moved, operations, *times, found]
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def peaks_table():
    lines = ['| device | memory, GB/s | link, GB/s | TFLOP/s: float32, float64, tf32, bfloat16 | '
             '10⁹ conversions/s | source |', '|---|---|---|---|---|---|']
    for name, peak in DEVICES.items():
        rates = ', '.join(f'{2 * peak.rates[unit] / 1e12:.3g}' if unit in peak.rates else '–'
                          for unit in ('float32', 'float64', 'tf32', 'bfloat16'))
        cells = [name, f'{peak.memory / 1e9:.0f}', f'{peak.link / 1e9:.0f}', rates,
                 f'{peak.rates["conversion"] / 1e9:,.0f}', peak.source]
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def with_tables(page, measured):
    """The page with the tables under these two headings made anew."""
    for heading, lines in (('Expected and measured', expected_table(measured)), ('Peaks', peaks_table())):
        table = '\n'.join(lines)
        page, count = re.subn(rf'(?ms)(^## {heading}\n(?:(?!^## ).)*?\n)(?:^\|[^\n]*\n)+',
                              lambda match: f'{match[1]}{table}\n', page)
        if count != 1:
            raise SystemExit(f'docs/gpu.md needs a heading "## {heading}" with a table below it; write both anew')
    return page


def main():
    PAGE.write_text(with_tables(PAGE.read_text(), read_measured()))
    print(f'{PAGE.relative_to(ROOT)} is written')


if __name__ == '__main__':
    main()
