"""Top-k against torch.topk and faiss, re-ranking against torchreid's, in time and memory.

    make peers && python -m benchmarks.neighbours [work …] [--rounds=5] [--precision=float32]

Works: distances, features, market, msmt17; all by default, on the CPU. Sides alternate; prints medians and ratios.
--precision is of our products: float32 is what CPUs with neither AMX nor VNNI take.
"""

import argparse
import functools
import statistics
import time
from contextlib import contextmanager

import numpy as np
import torch

from benchmarks.machine import cpu_model
from benchmarks.peers import torch_products, torchreid_re_ranking
from benchmarks.ranking import D, alternate, peak_mb, problem
from mgn.ops import (implementation, k_reciprocal_ranks, match_ranks, match_ranks_from_distance, retrieval_metrics,
                     topk, topk_from_distance)
from mgn.ops.arguments import PRECISIONS
from mgn.ops.ranking import product

MARKET = {'queries': 3_368, 'gallery': 15_913, 'identities': 750, 'cameras': 6}
MSMT17 = {'queries': 11_659, 'gallery': 82_161, 'identities': 3_060, 'cameras': 15}


def distances(rounds, _):
    """k = 30 of a given matrix, against torch.topk."""
    dist = torch.from_numpy(np.random.default_rng(0).random((4096, 82_161), np.float32))
    sides = {'mgn': lambda: topk_from_distance(dist, 30), 'torch.topk': lambda: torch.topk(dist, 30, largest=False)}
    assert torch.equal(sides['mgn']().distances, sides['torch.topk']().values), 'other neighbours'
    seconds = alternate(sides, rounds)
    print(f'mgn {seconds["mgn"]:.3f} s, torch.topk {seconds["torch.topk"]:.3f} s: '
          f'{seconds["torch.topk"] / seconds["mgn"]:.1f}× faster; {dist.nbytes / seconds["mgn"] / 1e9:.1f} GB/s')


def features(rounds, precision):
    """k = 30 of MSMT17's gallery for 4,096 queries, against faiss's exact index (by float32 products), and products
    alone."""
    import faiss

    query, gallery, *_ = problem(4096)
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(D)
    index.add(gallery.numpy())
    sides = {'mgn': lambda: topk(query, gallery, 30, precision=precision),
             'faiss': lambda: index.search(query.numpy(), 30)}
    (_, ours), (_, theirs) = (side() for side in sides.values())
    agree = (ours.numpy() == theirs).mean()
    assert agree > 0.999, f'other neighbours: {1 - agree:.2%}'
    products = {name: (lambda gemm=gemm: [gemm(query, tile) for tile in gallery.split(2048)])
                for name, gemm in torch_products(query.device).items()}
    products["NumPy's OpenBLAS"] = lambda: [query.numpy() @ tile.numpy().T for tile in gallery.split(2048)]
    seconds = alternate({**sides, **products}, rounds)
    alone = ', '.join(f'{name} {seconds[name]:.2f} s' for name in products)
    print(f'mgn {seconds["mgn"]:.2f} s, faiss IndexFlatIP {seconds["faiss"]:.2f} s: '
          f'{seconds["faiss"] / seconds["mgn"]:.2f}× its speed; products alone: {alone}; '
          f"{1 - agree:.4%} of faiss's neighbours in another place")


@contextmanager
def products_timed():
    """Yields a list that gets the seconds of every matrix product of mgn.ops."""
    seconds, products_of = [], product.products_of

    def timed(products, *args):
        start = time.perf_counter()
        result = products(*args)
        seconds.append(time.perf_counter() - start)
        return result
    product.products_of = lambda *args: functools.partial(timed, products_of(*args))
    try:
        yield seconds
    finally:
        product.products_of = products_of


def market(rounds, precision):
    """Re-ranking of Market-1501's size, against one product of all features and torchreid's function."""
    args = problem(**MARKET)
    every = torch.cat(args[:2])
    products = {name: (lambda gemm=gemm: gemm(every, every)) for name, gemm in torch_products(every.device).items()}
    k_reciprocal_ranks(*(x[:256] for x in args))  # warms up
    total, inside, alone = [], [], {name: [] for name in products}
    for _ in range(rounds):
        before = peak_mb(anew=True)
        with products_timed() as seconds:
            start = time.perf_counter()
            ours = k_reciprocal_ranks(*args, precision=precision)
            total.append(time.perf_counter() - start)
        inside.append(sum(seconds))
        peak = peak_mb() - before
        for name, run in products.items():
            start = time.perf_counter()
            run()
            alone[name].append(time.perf_counter() - start)
    total, inside, rest = (statistics.median(x) for x in (total, inside, [t - i for t, i in zip(total, inside)]))
    alone = min(map(statistics.median, alone.values()))
    plain = retrieval_metrics(*match_ranks(*args)[:2])['mAP']
    print(f'mgn {total:.2f} s, {inside:.2f} of them products: {total / alone:.2f}× one N×N product ({alone:.2f} s); '
          f'{peak:.0f} MB beyond the features; mAP {retrieval_metrics(*ours[:2])["mAP"]:.1%}, plain {plain:.1%}')
    before = peak_mb(anew=True)
    start = time.perf_counter()
    query, gallery = args[:2]
    matrices = [(1 - a @ b.T).numpy() for a, b in ((query, gallery), (query, query), (gallery, gallery))]
    made = time.perf_counter() - start
    start = time.perf_counter()
    theirs = torchreid_re_ranking()(*matrices)
    seconds = time.perf_counter() - start
    got, expected = (retrieval_metrics(*ranks[:2])['mAP']
                     for ranks in (ours, match_ranks_from_distance(theirs, *args[2:])))
    assert abs(got - expected) < 1e-3, f'mAP {got} and {expected}'
    print(f'torchreid re_ranking {seconds:.1f} s after {made:.1f} s for its matrices, {peak_mb() - before:.0f} MB: '
          f'what is not products '
          f'{seconds / rest:.1f}× faster here ({rest:.2f} s), all of it {(made + seconds) / total:.1f}×; mAP '
          f'{expected:.1%}')


def msmt17(_, precision):
    """Re-ranking of MSMT17's size, once."""
    args = problem(**MSMT17)
    plain = retrieval_metrics(*match_ranks(*args)[:2])['mAP']
    before = peak_mb(anew=True)
    with products_timed() as seconds:
        start = time.perf_counter()
        ranks = k_reciprocal_ranks(*args, precision=precision)
        total = time.perf_counter() - start
    print(f'mgn {total:.1f} s, {sum(seconds):.1f} of them products, {peak_mb() - before:.0f} MB beyond the features; '
          f'mAP {retrieval_metrics(*ranks[:2])["mAP"]:.1%}, plain {plain:.1%}')


WORKS = {'distances': distances, 'features': features, 'market': market, 'msmt17': msmt17}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('works', nargs='*', choices=[*WORKS, []])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--precision', choices=PRECISIONS, default='auto')
    args = parser.parse_args()
    print(f'{cpu_model()}, {torch.get_num_threads()} threads; torch {torch.__version__}; mgn.ops '
          f'{implementation("cpu")}')
    for work in args.works or WORKS:
        print(f'{work}: ', end='', flush=True)
        WORKS[work](args.rounds, args.precision)


if __name__ == '__main__':
    main()
