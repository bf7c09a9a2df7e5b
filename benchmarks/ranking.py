"""Evaluation from features and from distances, against a matrix product alone, fast-reid's and torchreid's ranking.

    make peers && python -m benchmarks.ranking [work …] [--device=cuda] [--rounds=5] [--precision=float32]

Works: subspace, large, isotropic, tf32, metrics, distances, matches, file, msmt17; all by default. Sides alternate;
prints medians and ratios. --precision is that of subspace, large and isotropic; CPUs with neither AMX nor VNNI take
float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.machine import cpu_model
from benchmarks.peers import fastreid_evaluate_rank, torch_products, torchreid_evaluate_rank
from mgn.ops import evaluate_rank, implementation, match_ranks, retrieval_metrics
from mgn.ops.arguments import PRECISIONS, all_ids
from mgn.ops.ranking import product
from mgn.ops.ranking.ranks import identities, sorted_matches

G, D, IDENTITIES, CAMERAS = 82_161, 2048, 3_060, 15  # MSMT17's gallery


def problem(queries, dimensions=64, noise=1.3, gallery=G, identities=IDENTITIES, cameras=CAMERAS):
    """Cluster centres and noise in a random subspace, L2-normalised. 64 dimensions, 1.3: mAP 26 %; 2048, 5.3: 1.5 %."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((identities, dimensions), np.float32)
    basis = torch.from_numpy(rng.standard_normal((dimensions, D), np.float32))
    pids = [rng.integers(0, identities, n) for n in (queries, gallery)]
    camids = [rng.integers(0, cameras, n) for n in (queries, gallery)]
    features = []
    for identity in pids:
        rows = torch.empty(len(identity), D)
        for start in range(0, len(identity), 4096):
            block = torch.from_numpy(centres[identity[start:start + 4096]])
            block += noise * torch.from_numpy(rng.standard_normal(block.shape, np.float32))
            rows[start:start + 4096] = F.normalize(block if dimensions == D else block @ basis)
        features.append(rows)
    return *features, *pids, *camids


def alternate(sides, rounds):
    """{name: median seconds} of functions without arguments, after a warm-up of each."""
    times = {name: [] for name in sides}
    for turn in range(-1, rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def against_product(queries, rounds, device, dimensions=64, noise=1.3, precision='auto'):
    """Ranks from features against the fastest float32 product of that shape that torch has here, alone: in one call, or
    in tiles, whose results stay in a cache."""
    args = problem(queries, dimensions, noise)
    features = [x.to(device) for x in args[:2]]
    query, gallery = (x.split(2048) for x in features)

    def in_tiles(gemm):
        for items in gallery:
            for block in query:
                gemm(block, items)
    alone = {}
    for name, gemm in torch_products(features[0].device).items():
        alone[f'product by {name}'] = lambda gemm=gemm: gemm(*features)
        alone[f'{name} in tiles'] = lambda gemm=gemm: in_tiles(gemm)
    results = []
    sides = {'match_ranks': lambda: results.append(match_ranks(*features, *args[2:], precision=precision)), **alone}
    seconds = alternate(sides, rounds)
    ours = seconds.pop('match_ranks')
    print(', '.join(f'{name} {value:.3f} s' for name, value in seconds.items()))
    result = results[-1]
    print(f'match_ranks {ours:.3f} s: {ours / min(seconds.values()):.2f}× the fastest product; '
          f'mAP {retrieval_metrics(*result[:2])["mAP"]:.1%}, {result.redecided / queries:.0f} pairs a query by key')
    if precision == 'tf32':
        exact = match_ranks(*features, *args[2:], precision='float32')
        assert np.array_equal(result.ranks, exact.ranks), 'another precision, other ranks'


def evaluation_sides():
    compiled = fastreid_evaluate_rank()

    def ours(query, gallery, *ids):
        return retrieval_metrics(*match_ranks(query, gallery, *ids, junk_pid=None)[:2])

    def fastreid(query, gallery, *ids):
        return compiled((1 - torch.mm(query, gallery.t())).numpy(), *ids)
    return {'mgn': ours, 'fast-reid': fastreid}


def metrics(rounds):
    """Features → metrics, against fast-reid's 1 − mm and compiled ranking; peak memories of one call each in a process
    of its own."""
    args = problem(512)
    sides = evaluation_sides()
    got, expected = (side(*args) for side in sides.values())
    same_precision = abs(got['mAP'] - expected[1].mean()) < 1e-5
    assert same_precision and abs(got['mINP'] - expected[2].mean()) < 1e-5, 'other metrics'
    seconds = alternate({name: lambda side=side: side(*args) for name, side in sides.items()}, rounds)
    peaks = {}
    for name in sides:
        command = [sys.executable, '-m', 'benchmarks.ranking', f'--peak={name}']
        peaks[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ratio = seconds['fast-reid'] / seconds['mgn']
    print(f'mgn {seconds["mgn"]:.3f} s, fast-reid {seconds["fast-reid"]:.3f} s: {ratio:.1f}× faster; '
          f'peak beyond the features: mgn {peaks["mgn"]:.0f} MB, fast-reid {peaks["fast-reid"]:.0f} MB')


def peak_mb(anew=False):
    """The most that this process has held, from now on if `anew`. Linux."""
    if anew:
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')
    with open('/proc/self/status') as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 2 ** 10


def peak(side):
    """MB beyond features and warm libraries of one evaluation."""
    args = problem(512)
    run = evaluation_sides()[side]
    run(*(x[:64] for x in args))
    before = peak_mb(anew=True)
    run(*args)
    print(peak_mb() - before)


def distances(rounds):
    """A given distance matrix → metrics, against fast-reid's compiled ranking and torchreid's."""
    query, gallery, *ids = problem(512)
    dist = (1 - query @ gallery.T).numpy()
    sides = {'mgn': evaluate_rank, 'fast-reid': fastreid_evaluate_rank()}
    cmc, precision, penalty = evaluate_rank(dist, *ids)
    expected = sides['fast-reid'](dist, *ids)
    assert np.allclose(cmc, expected[0],
                       atol=2e-3) and abs(precision.mean() - expected[1].mean()) < 1e-5, 'other metrics'
    seconds = alternate({name: lambda side=side: side(dist, *ids) for name, side in sides.items()}, rounds)
    start = time.perf_counter()  # once: it takes minutes
    assert abs(torchreid_evaluate_rank()(dist, *ids)[1] - precision.mean()) < 1e-5, 'other metrics'
    torchreid = time.perf_counter() - start
    print(f'mgn {seconds["mgn"]:.4f} s; fast-reid {seconds["fast-reid"]:.2f} s, '
          f'{seconds["fast-reid"] / seconds["mgn"]:.0f}× as long; torchreid (in Python, once) {torchreid:.1f} s, '
          f'{torchreid / seconds["mgn"]:.0f}×')


def matches(rounds):
    """What match_ranks does before its products at MSMT17's size, the keys of matches aside."""
    rng = np.random.default_rng(0)
    pids, camids = ([rng.integers(0, below, n) for n in (11_659, G)] for below in (IDENTITIES, CAMERAS))
    keys = torch.from_numpy(rng.standard_normal(500_000))

    def prepare():
        ids = all_ids(11_659, G, *pids, *camids)
        return sorted_matches(identities(ids, -1), ids, lambda queries, items: keys[:len(items)])
    seconds = alternate({'matches': prepare}, rounds)['matches']
    print(f'{1000 * seconds:.0f} ms for {len(prepare().items):,} matches')


def file(rounds):
    """2 GB of gallery: in memory, in a file that the system has cached, and in one that it has to read."""
    rows = 2 ** 31 // (4 * D)
    query, gallery, *ids = problem(512, gallery=rows)
    with tempfile.TemporaryDirectory(dir='.') as folder:
        path = os.path.join(folder, 'gallery.npy')
        np.save(path, gallery.numpy())
        in_memory, expected = gallery, match_ranks(query, gallery, *ids)

        def forget():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

        def read():
            """The file alone, as fast as it comes."""
            with open(path, 'rb', buffering=0) as stream:
                buffer = bytearray(2 ** 24)
                while stream.readinto(buffer):
                    pass

        def ranks(features=None):
            features = np.load(path, mmap_mode='r') if features is None else features
            assert np.array_equal(match_ranks(query, features, *ids).ranks, expected.ranks), 'other ranks'
        times = alternate({'memory': lambda: ranks(in_memory), 'cached': ranks}, rounds)
        cold = {'read': [], 'ranks': []}
        for _ in range(rounds):
            for name, run in (('read', read), ('ranks', ranks)):
                forget()
                start = time.perf_counter()
                run()
                cold[name].append(time.perf_counter() - start)
        cold = {name: statistics.median(seconds) for name, seconds in cold.items()}
    print(f'512 × {rows} × {D} (2 GB): in memory {times["memory"]:.3f} s, file in the cache {times["cached"]:.3f} s '
          f'({times["cached"] / times["memory"]:.2f}×), file on disk {cold["ranks"]:.3f} s; reading the file alone '
          f'{cold["read"]:.3f} s')


def msmt17(device):
    """The full size, once."""
    args = problem(11_659)
    features = [x.to(device) for x in args[:2]]
    before, start = peak_mb(anew=True), time.perf_counter()
    result = match_ranks(*features, *args[2:])
    seconds = time.perf_counter() - start
    flops = 2 * 11_659 * G * D
    print(f'{seconds:.1f} s ({flops / seconds / 1e9:.0f} GFLOP/s of the product), {peak_mb() - before:.0f} MB beyond '
          f'the features, '
          f'mAP {retrieval_metrics(*result[:2])["mAP"]:.1%}, {result.redecided / 11_659:.0f} pairs a query by key')


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('works', nargs='*')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--precision', default='auto', choices=PRECISIONS)
    parser.add_argument('--peak', help='of one side, in this process: what the work `metrics` starts')
    args = parser.parse_args()
    if args.peak:
        return peak(args.peak)
    works = {
        'subspace': lambda: against_product(512, args.rounds, args.device, precision=args.precision),
        'large': lambda: against_product(4096, max(args.rounds // 2, 1), args.device, precision=args.precision),
        'isotropic': lambda: against_product(512, args.rounds, args.device, D, 5.3, args.precision),
        'tf32': lambda: against_product(4096, max(args.rounds // 2, 1), args.device, precision='tf32'),
        'metrics': lambda: metrics(args.rounds),
        'distances': lambda: distances(args.rounds),
        'matches': lambda: matches(args.rounds),
        'file': lambda: file(args.rounds),
        'msmt17': lambda: msmt17(args.device),
    }
    name = f'{cpu_model()}, {torch.get_num_threads()} threads'
    if args.device.startswith('cuda'):
        name = torch.cuda.get_device_name(args.device)
    print(f'{name}; torch {torch.__version__}; mgn.ops {implementation(args.device)}')
    for work in args.works or works:
        if work == 'tf32' and product.available('tf32', torch.device(args.device), D) != 'tf32':
            print('tf32: this device ranks by float32 products')
            continue
        print(f'{work}: ', end='', flush=True)
        works[work]()


if __name__ == '__main__':
    main()
