"""Compiles CUDA sources for the emulator, plain or under a sanitizer, and passes cases through the kernels."""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mgn.ops import BatchHard
from mgn.ops.distance import DISTANCES as METRICS

ROOT = Path(__file__).parent.parent
FLAGS = {
    'plain': ['-O1'],
    'coverage': ['-O0', '--coverage'],
    'address': ['-O0', '-g1', '-fsanitize=address,undefined', '-fno-sanitize-recover=undefined'],
    'thread': ['-O1', '-g1', '-fsanitize=thread'],
    'fused': ['-O2', '-mfma', '-ffp-contract=fast'],
    # Loads and stores call the functions of banks.cpp. Unoptimised, so that one of 16 bytes stays one.
    'banks': ['-O0', '-g1', '-no-pie', '-fno-threadsafe-statics', '-fsanitize=thread', '-U__SANITIZE_THREAD__',
              '--param', 'tsan-instrument-func-entry-exit=0'],
}
FILES = {'ranking': ('ranking', 'nearest')}  # kernels of one executable, by the beginning of their names
FUSED = pytest.param('fused', 'forward', marks=pytest.mark.long)  # a key of FLAGS, one of ORDERS
ORDERS = ['forward', 'reverse', '1', '2', '3']
TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # as FeatureType counts them


def need(tool, why):
    """Path of a program; skips the test where it is missing, but fails in CI, where only a GPU may be."""
    path = shutil.which(tool)
    if path is None:
        (pytest.fail if os.environ.get('CI') else pytest.skip)(f'no {tool} here, {why}')
    return path


def compile_for_emulator(folder, name, sources, flags):
    """g++ under the emulator's headers → the executable; skips where g++, the sanitizer or FMA is missing."""
    if flags == FLAGS['fused'] and ' fma ' not in Path('/proc/cpuinfo').read_text():
        pytest.skip('this CPU has no fused multiply-add of x86')
    compiler = need('g++', 'which compiles kernels for the emulator')
    command = [compiler, '-std=c++17', '-U_FORTIFY_SOURCE', '-w', *flags, '-I', ROOT / 'tests/cuda_emulator',
               '-I', ROOT / 'csrc/kernels']
    is_counted, counter = flags == FLAGS['banks'], ROOT / 'tests/cuda_emulator/banks.cpp'
    sources = [*sources, counter] if is_counted else sources
    own = {counter: ['-O1', '-fno-sanitize=thread']}
    objects = [f'{name}-{Path(source).stem}.o' for source in sources]
    compiling = [subprocess.Popen([*command, *own.get(source, []), '-c', '-o', out, '-x', 'c++', source], cwd=folder,
                                  stderr=subprocess.PIPE, text=True) for source, out in zip(sources, objects)]
    errors = [process.communicate()[1] for process in compiling]
    assert all(process.returncode == 0 for process in compiling), '\n'.join(errors)
    without_library = ['-fno-sanitize=thread'] if is_counted else []
    done = subprocess.run([*command, *without_library, '-o', name, *objects], cwd=folder, capture_output=True,
                          text=True)
    if done.returncode and 'cannot find' in done.stderr and 'san' in done.stderr and not os.environ.get('CI'):
        pytest.skip(f'no library for {flags} here: {done.stderr.splitlines()[-2]}')
    assert done.returncode == 0, done.stderr
    return Path(folder) / name


def start(executable, *arguments, order='forward', blocks=1, mutant=0, banks=''):
    """The executable with pipes, `blocks` of a kernel at a time.

    Its address space is not randomised: ThreadSanitizer needs the usual layout.
    """
    plain = [shutil.which('setarch'), '-R'] if shutil.which('setarch') else []
    return subprocess.Popen([*plain, executable, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            env={**os.environ, 'EMULATOR_ORDER': order, 'EMULATOR_BLOCKS': str(blocks),
                                 'EMULATOR_MUTANT': str(mutant), 'EMULATOR_BANKS': str(banks),
                                 'TSAN_OPTIONS': 'atexit_sleep_ms=0'})


def to_bytes(tensor):
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()


def receive(process, dtype, *shape):
    raw = torch.int16 if dtype == torch.bfloat16 else dtype
    count = int(np.prod(shape)) * torch.empty(0, dtype=raw).element_size()
    data = process.stdout.read(count)
    if len(data) < count:
        raise AssertionError(f'the kernels stopped: {process.communicate()[1].decode()}')
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=raw).view(dtype).view(shape)


def batch_hard(process, anchors, labels, candidates=None, candidate_labels=None, margin=0.3, with_loss=True,
               entries=None, tile=0, parts=0):
    """(heads, N, D) through forward and backward → (BatchHard, loss, slope, gradients).

    The upstream gradients are 1, 2, … per head.
    entries: pairs_by_candidate if the backward kernel shall read sorted pairs.
    tile: anchors of a block, parts: blocks that share the candidates; 0 for the usual choice on 132 multiprocessors.
    """
    heads, n, d = anchors.shape
    m = n if candidates is None else candidates.shape[1]
    wide = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    process.stdin.write(struct.pack('11qd', TYPES.index(anchors.dtype), heads, n, m, d, candidates is None, with_loss,
                                    margin is None, entries is not None, tile, parts, margin or 0))
    given = [anchors, labels] if candidates is None else [anchors, candidates, labels, candidate_labels]
    process.stdin.write(b''.join(map(to_bytes, given)))
    process.stdin.flush()
    mined = BatchHard(*(receive(process, dtype, heads, n) for dtype in (wide, wide, torch.int64, torch.int64)))
    loss = receive(process, wide, heads) if with_loss else None
    slope = receive(process, wide, heads, n) if with_loss else None
    upstream = torch.arange(1, heads + 1, dtype=wide)
    of_anchors = upstream[:, None].expand(heads, n)
    grads = (upstream,) if with_loss else (of_anchors, -0.5 * of_anchors)
    sorted_pairs = entries(mined.pos_idx, mined.neg_idx, m) if entries else ()
    process.stdin.write(b''.join(map(to_bytes, [*grads, *sorted_pairs])))
    process.stdin.flush()
    gradients = [receive(process, anchors.dtype, heads, n, d)]
    if candidates is not None:
        gradients.append(receive(process, anchors.dtype, heads, m, d))
    return mined, loss, slope, gradients


def pairwise_distance(process, x, y, metric, dist_and_grad=()):
    """(N, D), (M, D) through the kernel → (N, M); with (N, M) distances and gradients → (N, D), the gradient of x.

    They may both be transposed.
    """
    transposed = any(matrix.stride(0) < matrix.stride(1) for matrix in dist_and_grad)
    process.stdin.write(struct.pack('7q', TYPES.index(x.dtype), METRICS.index(metric), len(x), len(y), x.shape[1],
                                    transposed, bool(dist_and_grad)))
    process.stdin.write(to_bytes(x) + to_bytes(y))
    process.stdin.write(b''.join(to_bytes(matrix.T if transposed else matrix) for matrix in dist_and_grad))
    process.stdin.flush()
    if dist_and_grad:
        return receive(process, x.dtype, *x.shape)
    return receive(process, torch.float64 if x.dtype == torch.float64 else torch.float32, len(x), len(y))


def ranking_kernels(process):
    """The kernels of ranking, with the arguments that mgn.ops.ranking passes to those of a device."""
    def call(number, integers, arrays, changed):
        head = number, len(integers), len(arrays), *map(int, integers)
        process.stdin.write(struct.pack(f'{len(head)}q', *head))
        for tensor in arrays:
            data = to_bytes(tensor)
            process.stdin.write(struct.pack('q', len(data)) + data)
        process.stdin.flush()
        for tensor in changed:
            tensor.copy_(receive(process, tensor.dtype, *tensor.shape))

    def rows(features):
        """Count, width and stride; the memory from the first row to the end of the last."""
        (count, width), stride = features.shape, features.stride(0)
        return [count, width, stride], features.as_strided(((count - 1) * stride + width if count else 0,), (1,))

    def canonical_norms(features, norms):
        shape, memory = rows(features)
        call(0, shape, [memory, norms], [norms])

    def canonical_keys(query, gallery, queries, items, cosine, keys):
        (of_query, query), (of_gallery, gallery) = rows(query), rows(gallery)
        call(1, [*of_query, *of_gallery, len(keys), cosine], [query, gallery, queries, items, keys], [keys])

    def count_nonmatches(tile, cosine, first, filter_terms, matches, excluded, steps, redecided):
        (of_query, query), (of_gallery, gallery) = rows(tile.query), rows(tile.gallery)
        call(2, [*of_query, *of_gallery, cosine, first, len(excluded.junk), len(matches.keys)],
             [query, gallery, tile.query_norms, tile.gallery_norms, *filter_terms, *matches, steps, *excluded,
              redecided], [steps, redecided])

    def select_nearest(dots, item_scale, item_shift, first, values, items):
        call(3, [*dots.shape, first, values.shape[1]], [dots, item_scale, item_shift, values, items], [values, items])

    def round_to_tf32(features, norms, rounded, residual):
        shape, memory = rows(features)
        call(4, shape, [memory, norms, rounded, residual], [rounded, residual])

    return SimpleNamespace(canonical_norms=canonical_norms, canonical_keys=canonical_keys, round_to_tf32=round_to_tf32,
                           count_nonmatches=count_nonmatches, select_nearest=select_nearest)


def passes_over_banks(executable, file):
    """What banks.cpp wrote: {(source, text of its line, 'load' or 'store'): (passes over the banks, the fewest)}."""
    counts = [line.split() for line in file.read_text().splitlines()]
    codes = [hex(int(code, 16) - 1) for code, *_ in counts]  # what is known is where a call returns to
    places = subprocess.run(['addr2line', '-e', executable, *codes], capture_output=True, text=True, check=True).stdout
    table = {}
    for (_, stores, _, passes, fewest), place in zip(counts, places.splitlines()):
        path, number = place.split(' ')[0].split(':')
        text = Path(path).read_text().splitlines()[int(number) - 1].strip()
        key = Path(path).name, text, 'store' if stores == '1' else 'load'
        before = table.get(key, (0, 0))
        table[key] = before[0] + int(passes), before[1] + int(fewest)
    return table


def missed_lines(folder, names):
    """By gcov: the lines of the .cu and .cuh files whose names start so that compile to anything and were never run."""
    done = subprocess.run(['gcov', '--json-format', '--stdout', *folder.glob('*.gcda')], capture_output=True, text=True,
                          cwd=folder)
    runs = {}
    for report in done.stdout.splitlines():
        for file in json.loads(report)['files']:
            path = Path(file['file'])
            if path.suffix in ('.cu', '.cuh') and path.name.startswith(tuple(names)):
                for line in file['lines']:  # once per instantiation of a template
                    place = path, line['line_number']
                    runs[place] = runs.get(place, 0) + line['count']
    expected = {path for path in (ROOT / 'csrc/kernels').glob('*.cu') if path.name.startswith(tuple(names))}
    assert {path for path, _ in runs} >= expected and len(runs) > 50
    return [f'{path.name}:{number}: {path.read_text().splitlines()[number - 1].strip()}'
            for (path, number), count in sorted(runs.items()) if count == 0]


def finish(process):
    """Ends the executable; fails with the report of a sanitizer, if there is one."""
    process.stdin.close()
    report = process.stderr.read().decode()
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 0 and not report, report
