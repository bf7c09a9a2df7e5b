"""Times and launches of every operation on a GPU, beside torch's own operations and fast-reid's; JSON, a line each.

    python -m benchmarks.gpu_times FAMILY … [--device=cuda] [--small] [--trace=FILE]

Families: mining, distances, ranks, neighbours, re-ranking, peers, launches, training. Each line is printed as soon as
it is known: {"row", "side", "seconds"}, rows named as in benchmarks.roofline. Seconds are medians of what the caller
waits for, sides alternating; first each side's result is compared. --small: sizes of seconds on a CPU, a dry run.
"""

import argparse
import functools
import importlib
import importlib.util
import itertools
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import peers, roofline
from benchmarks.gpu_launches import launches
from benchmarks.gpu_profile import counted, finish, profiled, show_kernels, tell
from benchmarks.ranking import problem
from benchmarks.training import ADAM, IDENTITIES, SIZE, K, new_model, our_step, peer_step
from mgn.data.augmentation import Augmentation
from mgn.data.images import TrainBatch
from mgn.devices import find_device
from mgn.ops import (batch_hard_triplet_loss, evaluate_rank, expand_queries, k_reciprocal_ranks, match_ranks,
                     match_ranks_from_distance, pairwise_distance, retrieval_metrics, topk, topk_from_distance)
from mgn.ops.ranking.product import available, exact_float32
from mgn.optim import make_optimizer

MARGIN, PRECISIONS = 1.2, ('float32', 'tf32')


def alternate(row, sides, rounds, device, calls=1):
    """Tells the median seconds of a call of each side, after a warm-up. `calls`: made before the device is awaited."""
    times = {side: [] for side in sides}
    for turn, (side, run) in itertools.product(range(-1, rounds), sides.items()):
        finish(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        finish(device)
        if turn >= 0:
            times[side].append((time.perf_counter() - start) / calls)
    for side, seconds in times.items():
        tell(row, side, seconds=statistics.median(seconds))


def replayed(function, device):
    """The function as a CUDA graph, so that Python takes no time; {} on a CPU."""
    if device.type != 'cuda':
        return {}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return {'mgn, a CUDA graph': graph.replay}


def there(*modules):
    """Whether the modules of a peer are installed; says once what is missing otherwise."""
    lacking = [name for name in modules if name not in sys.modules and importlib.util.find_spec(name) is None]
    if lacking:
        print(f'not installed, so not compared with: {", ".join(lacking)}', file=sys.stderr, flush=True)
    return not lacking


def torch_mining(features, labels):
    dist = torch.cdist(features, features)
    positive = labels[:, None] == labels
    ap, an = dist.masked_fill(~positive, -torch.inf).amax(-1), dist.masked_fill(positive, torch.inf).amin(-1)
    return F.relu(ap - an + MARGIN).mean(-1)


def mining(device, small):
    for heads, n, d in ((3, 64, 256), (1, 1024, 256)):
        n = 16 if small else n
        features = torch.randn(heads, n, d, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        labels = (torch.arange(n) // K).to(device)
        losses = {'mgn': lambda x, of: batch_hard_triplet_loss(x, of, MARGIN), 'torch': torch_mining}
        if there('fastreid'):
            fastreid = peers.fastreid_triplet_loss()
            losses['fast-reid'] = lambda x, of: torch.stack([fastreid(head, of, MARGIN, False, True) for head in x])
        expected = losses['mgn'](features, labels).detach()  # a graph that lives forbids the capture of another
        for side, loss in losses.items():
            torch.testing.assert_close(loss(features, labels), expected, rtol=1e-4, atol=1e-4, msg=f'{side}: others')

        def step(loss):
            return torch.autograd.grad(loss(features, labels).sum(), features)[0]
        sides = {side: functools.partial(step, loss) for side, loss in losses.items()}
        sides |= replayed(sides['mgn'], device)
        alternate(f'mining, {heads} × {n} × {d}', sides, 3 if small else 20, device, 1 if small else 20)


def distances(device, small):
    for n in (64, 16 if small else 1024):
        x, y = (torch.randn(n, 256, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()
                for seed in (0, 1))
        upstream = torch.ones(n, n, device=device)
        sides = {'mgn': pairwise_distance, 'torch.cdist': torch.cdist}
        if there('fastreid'):
            peers.without_init('fastreid', 'fastreid.modeling', 'fastreid.modeling.losses')
            sides['fast-reid'] = importlib.import_module('fastreid.modeling.losses.utils').euclidean_dist
        for side, distance in sides.items():
            torch.testing.assert_close(distance(x, y), sides['mgn'](x, y), rtol=1e-3, atol=1e-2, msg=f'{side}: others')

        def forward(distance):
            with torch.no_grad():
                distance(x, y)

        def both(distance):
            torch.autograd.grad(distance(x, y), (x, y), upstream)
        for what, run in (('distances', forward), ('distances and gradients', both)):
            runs = {side: functools.partial(run, distance) for side, distance in sides.items()}
            runs |= replayed(runs['mgn'], device)
            alternate(f'{what}, {n} × {n} × 256', runs, 2 if small else 10, device, 1 if small else 10)


def features_and_ids(device, small):
    """MSMT17's size: query and gallery on the device, ids."""
    args = problem(64, gallery=500, identities=40) if small else problem(roofline.Q)
    return *(x.to(device) for x in args[:2]), *args[2:]


def precisions(device):
    return [precision for precision in PRECISIONS if available(precision, device, 2048) == precision]


def in_blocks(query, gallery, use, rows=1024):
    """use(products of a block of queries) of each block: what a ranking by torch alone does."""
    return [use(block @ gallery.T) for block in query.split(rows)]


@exact_float32()
def product_alone(query, gallery, precision):
    if precision == 'tf32':
        torch.backends.cuda.matmul.fp32_precision = 'tf32'
    in_blocks(query, gallery, lambda products: None, 4096)


def ranks(device, small):
    """The features are L2-normalised, so products order the gallery as cosine distances do."""
    query, gallery, *ids = features_and_ids(device, small)
    plain = match_ranks(query, gallery, *ids)
    for precision in precisions(device):
        assert np.array_equal(match_ranks(query, gallery, *ids, precision=precision).ranks, plain.ranks), precision
        sides = {'mgn': functools.partial(match_ranks, query, gallery, *ids, precision=precision),
                 'torch, the product alone': functools.partial(product_alone, query, gallery, precision)}
        alternate(f'match_ranks, {precision}', sides, 1 if small else 5, device)
    alternate('match_ranks, default', {'mgn': functools.partial(match_ranks, query, gallery, *ids)}, 1 if small else 5,
              device)
    show_kernels(functools.partial(match_ranks, query, gallery, *ids), device)
    first, host = min(512, len(query)), gallery.cpu()
    here = match_ranks(query[:first].cpu(), host, ids[0][:first], ids[1], ids[2][:first], ids[3])
    assert np.array_equal(here.ranks, plain.ranks[:len(here.ranks)]), 'the CPU finds other ranks'
    assert np.array_equal(match_ranks(query, host, *ids).ranks, plain.ranks), 'a gallery in host memory has other ranks'
    alternate('match_ranks, float32', {
        'torch, product and argsort': lambda: in_blocks(query, gallery, lambda x: x.argsort(1, descending=True)),
        'mgn, gallery in host memory': functools.partial(match_ranks, query, host, *ids),
    }, 1 if small else 2, device)


def neighbours(device, small):
    query, gallery, *_ = features_and_ids(device, small)
    expected = topk(query, gallery, 30)
    for precision in precisions(device):
        got = topk(query, gallery, 30, precision=precision)
        assert torch.equal(got.indices, expected.indices), precision
        sides = {'mgn': functools.partial(topk, query, gallery, 30, precision=precision),
                 'torch, the product alone': functools.partial(product_alone, query, gallery, precision)}
        alternate(f'topk, k = 30, {precision}', sides, 1 if small else 5, device)
    show_kernels(functools.partial(topk, query, gallery, 30), device)
    alternate('topk, k = 30, float32', {
        'torch, product and torch.topk': lambda: in_blocks(query, gallery, lambda products: products.topk(30), 4096),
    }, 1 if small else 3, device)
    dist = torch.rand(64 if small else 4096, len(gallery), device=device)
    alternate('topk_from_distance, 4,096 rows', {'mgn': lambda: topk_from_distance(dist, 30),
                                                 'torch.topk': lambda: torch.topk(dist, 30, largest=False)}, 2, device)
    alternate('expand_queries, k = 5', {'mgn': lambda: expand_queries(query, gallery, 5)}, 2, device)


def re_ranking(device, small):
    args = features_and_ids(device, small)
    results = []
    for precision in precisions(device):
        def run():
            results.append(k_reciprocal_ranks(*args, precision=precision).ranks)
        alternate(f're-ranking, {precision}', {'mgn': run}, 1, device)
    threads = torch.get_num_threads()
    for count in (1, max(threads // 2, 1)):  # much of the work is the CPU's: what do its threads bring?
        torch.set_num_threads(count)
        alternate(f're-ranking, {count} of {threads} threads', {'mgn': run}, 1, device)
    torch.set_num_threads(threads)
    assert all(np.array_equal(results[0], other) for other in results), 'another precision, other ranks'
    show_kernels(functools.partial(k_reciprocal_ranks, *args), device)


def against_peers(device, small):
    """Those that rank on the CPU, with NumPy: fewer rows, features from the device to measures."""
    query, gallery, *ids = problem(64, gallery=500, identities=40) if small else problem(512)
    query, gallery = query.to(device), gallery.to(device)
    sides = {'mgn': lambda: retrieval_metrics(*match_ranks(query, gallery, *ids, junk_pid=None)[:2])['mAP']}
    if there('fastreid', 'Cython', 'yacs'):
        compiled = peers.fastreid_evaluate_rank()
        sides['fast-reid'] = lambda: compiled((1 - query @ gallery.T).cpu().numpy(), *ids)[1].mean()
    else:
        sides['mgn.ops.evaluate_rank'] = lambda: evaluate_rank((1 - query @ gallery.T).cpu(), *ids)[1].mean()
    found = [run() for run in sides.values()]
    assert np.ptp(found) < 1e-4, f'other mAP: {found}'
    alternate(f'features to mAP, {len(query)} × {len(gallery)}', sides, 1 if small else 3, device)

    query, gallery, *ids = problem(32 if small else 1000, gallery=300 if small else 5000, identities=40)
    query, gallery = query.to(device), gallery.to(device)
    sides = {'mgn': lambda: k_reciprocal_ranks(query, gallery, *ids)}
    if there('torchreid'):
        theirs = peers.torchreid_re_ranking()

        def by_matrices():
            pairs = ((query, gallery), (query, query), (gallery, gallery))
            return match_ranks_from_distance(theirs(*((1 - a @ b.T).cpu().numpy() for a, b in pairs)), *ids)
        sides['torchreid'] = by_matrices
        found = [retrieval_metrics(*run()[:2])['mAP'] for run in sides.values()]
        assert np.ptp(found) < 2e-3, f'other mAP: {found}'
    alternate(f're-ranking, {len(query)} + {len(gallery)}', sides, 1, device)


def training(device, small, trace_file):
    """Steps of 64 images in memory, in each precision; `trace_file` gets the profiler's trace of the last."""
    images = torch.randint(0, 256, (8 if small else 64, 3, *((64, 32) if small else SIZE)), dtype=torch.uint8)
    labels = (torch.arange(len(images)) // K).to(device)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    augmentation = Augmentation()
    draws = [draw.to(device) for draw in augmentation.draw(0, 0, len(images), tuple(images.shape[2:]))]
    batches = itertools.repeat(TrainBatch(images, labels, draws, []))
    model = new_model(device).train()
    optimizer = make_optimizer(model, ADAM)

    def whole(make):
        return lambda: [None for _ in make()]  # every phase of a step

    def with_tf32(make):
        def run():
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            try:
                whole(make)()
            finally:
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return run
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = device.type == 'cuda'  # as mgn.training has it
    step = {precision: functools.partial(our_step, model, optimizer, augmentation, precision, batches, device)
            for precision in ('float32', 'bfloat16')}
    sides = {'float32': whole(step['float32']), 'tf32': with_tf32(step['float32']), 'bfloat16': whole(step['bfloat16'])}
    if small:
        del sides['tf32'], sides['bfloat16']
    for precision, run in sides.items():
        alternate(f'training step, {precision}', {'mgn': run}, 1 if small else 10, device)
    if not small and there('fastreid', 'yacs', 'termcolor'):
        pixels = images.float(memory_format=torch.contiguous_format)
        theirs = functools.partial(peer_step, *peers.fastreid_mgn(IDENTITIES, device.type), pixels, labels)
        alternate('training step, float32', {'fast-reid': whole(theirs)}, 5, device)
    precision, run = list(sides.items())[-1]
    launched, waits, busy = counted(run, device)
    tell(f'training step, {precision}', 'launches', launches=launched, waits=waits)
    tell(f'training step, {precision}', 'kernels', seconds=busy)
    if trace_file:
        profiled(run, 2, device).export_chrome_trace(trace_file)


FAMILIES = {'mining': mining, 'distances': distances, 'ranks': ranks, 'neighbours': neighbours,
            're-ranking': re_ranking, 'peers': against_peers, 'launches': launches, 'training': training}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('families', nargs='+', choices=FAMILIES, metavar='FAMILY')
    parser.add_argument('--device', default='cuda', type=torch.device)
    parser.add_argument('--small', action='store_true')
    parser.add_argument('--trace', help='of the family training: a file, .json or .json.gz')
    options = parser.parse_args(arguments)
    device = find_device(str(options.device))
    if device.type == 'cuda':
        torch.cuda.set_device(device)  # streams and events are of the present one
    for family in options.families:
        more = (options.trace,) if family == 'training' else ()
        FAMILIES[family](device, options.small, *more)


if __name__ == '__main__':
    main()
