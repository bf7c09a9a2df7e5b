"""Launches and waits of mining, distances, ranks and neighbours on a GPU, held against benchmarks.roofline."""

import functools

import torch

from benchmarks import roofline
from benchmarks.gpu_profile import counted, tell
from benchmarks.training import K
from mgn.ops import batch_hard_triplet_loss, match_ranks, pairwise_distance, topk
from mgn.ops.ranking.nearest import GPU_SELECTED
from mgn.ops.ranking.tiles import GPU_PRODUCTS, spans, tile_of


def launches(device, small):
    """Launches and waits of a call; for ranks of a tile, as the difference of two galleries. Fails where there are more
    than roofline.LAUNCHES says, or any wait."""
    features, x, y = (torch.randn(*shape, 256, device=device, requires_grad=True) for shape in ((3, 64), (64,), (64,)))
    labels, upstream = torch.arange(64, device=device) // K, torch.ones(64, 64, device=device)
    failures = []

    def check(row, launched, waits, allowed):
        tell(row, 'launches', launches=launched, waits=waits, allowed=allowed)
        if launched > allowed or waits > 0:
            failures.append(f'{row}: {launched:g} launches, {waits:g} waits')
    for row, run in (
            ('mining', lambda: torch.autograd.grad(batch_hard_triplet_loss(features, labels, margin=1.2), features,
                                                   upstream[0, :3])),
            ('distance', lambda: pairwise_distance(x.detach(), y.detach())),
            ('distance with gradient', lambda: torch.autograd.grad(pairwise_distance(x, y), (x, y), upstream))):
        launched, waits, busy = counted(run, device)
        check(row, launched, waits, roofline.LAUNCHES[row])
        tell(row, 'kernels', seconds=busy)
    # Queries that fill a tile: for fewer cuBLAS sums in parts, with more launches. Short rows: many of them are rounded
    # and measured at a time, in launches that are no tile's.
    queries, *counts = (64, 64, 192) if small else (2560, 2 ** 17, 2 ** 19)
    query, gallery = (torch.randn(n, 64, device=device) for n in (queries, counts[1]))
    query_ids, ids = ([torch.randint(high, (n,)) for high in (3060, 15)] for n in (queries, counts[1]))
    for name, operation, products in (('match_ranks', lambda x, y, of: match_ranks(x, y, *of), GPU_PRODUCTS),
                                      ('topk', lambda x, y, of: topk(x, y, 30), GPU_SELECTED)):
        found = []
        for count in counts:
            of = query_ids[0], ids[0][:count], query_ids[1], ids[1][:count]
            found.append(counted(functools.partial(operation, query, gallery[:count], of), device)[:2])
        fewer, more = (len(spans(count, tile_of(query, products)[0])) for count in counts)
        launched, waits = (round((b - a) / max(more - fewer, 1)) for a, b in zip(*found))
        check(f'{name}, a tile', launched, waits, roofline.LAUNCHES[f'{name}, a tile'])
    if failures:
        raise SystemExit('more launches or waits than roofline.LAUNCHES allows: ' + '; '.join(failures))
