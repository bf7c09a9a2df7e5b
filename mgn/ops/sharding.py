"""Ranks in a gallery that lies in parts on several processes: counts of non-matches add, so the gallery stays where it is."""

import numpy as np
import torch
import torch.distributed as dist

from mgn.ops import ranking_reference
from mgn.ops.arguments import all_ids, as_junk_pid, feature_pair
from mgn.ops.counting import Matches
from mgn.ops.native import kernels
from mgn.ops.ranking import MatchRanks, as_ranks, identities, keys_in_order, nonmatches_between, on_float64_device, sorted_matches
from mgn.ops.tiles import finite_norms, uncompiled


def match_ranks_sharded(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric='cosine', junk_pid=-1,
                        precision='float32', group=None):
    """match_ranks of queries and a gallery that the processes of a group hold in parts: the same ranks, bit for bit.

    Every process calls it with its own part, and gets the ranks of all queries. Queries and items are numbered through the parts in the
    order of the processes. Query features travel to all, then the key and number of each match, then a count for each match; the gallery does not.

    Args:
        query: (q, D), gallery: (g, D), this process's part and its ids, as of match_ranks; q and g may differ and be 0.
        metric, junk_pid, precision: as of match_ranks, the same in every process.
        group: of torch.distributed, any backend; None: the default one.
    Returns:
        MatchRanks of all queries, in every process. Memory of a process: 256 MB, 32 bytes per own row and 96 per match of all queries, the
        features of all queries, beyond its part. Each receives Q·D numbers, 24 bytes a match, and takes part in adding 8 bytes a match.
    Raises:
        ValueError: whatever match_ranks refuses, in every process, naming the one whose part it is; parts or options that do not go together.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError('want a process group, got none; call torch.distributed.init_process_group first, or match_ranks in a single process')
    if dist.get_rank(group) < 0:
        raise ValueError('want a group that this process is in, got one of others; call it from its members only')
    return uncompiled(_match_ranks_sharded)(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric, junk_pid, precision, group)


def _match_ranks_sharded(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric, junk_pid, precision, group):
    rank = dist.get_rank(group)

    def check():
        q, g = on_float64_device(*feature_pair(query, gallery, metric, precision, streamed=True))
        ids = all_ids(len(q), len(g), query_pids, gallery_pids, query_camids, gallery_camids)
        rows = {'queries': len(q), 'items': len(g)}
        alike = {'metric': metric, 'junk_pid': repr(as_junk_pid(junk_pid)), 'precision': precision,
                 'width D': q.shape[1] if len(q) or len(g) else None, 'type of queries': q.dtype if len(q) else None}
        return (q, g, *ids), (rows, alike)
    (query, gallery, query_pids, gallery_pids, query_camids, gallery_camids), parts = agreed(group, check)
    alike = common([alike for _, alike in parts])
    queries, items = ([rows[name] for rows, _ in parts] for name in ('queries', 'items'))
    first, width, cosine = sum(items[:rank]), alike['width D'] or 0, metric == 'cosine'
    query = everyones(query.to(alike['type of queries'] or query.dtype), queries, width, group).to(query.device)
    query_pids, query_camids = (everyones(ids[:, None], queries, 1, group)[:, 0].cpu().numpy() for ids in (query_pids, query_camids))
    gallery = gallery if len(gallery) else gallery.new_empty(0, width)

    def find():
        compiled = kernels(query.device) or ranking_reference
        query_norms = finite_norms(compiled, query, 'query')
        excluded = identities(query_pids, gallery_pids.numpy(), junk_pid)
        offsets, keys, found = sorted_matches(excluded, query_camids, gallery_camids.numpy(),
                                              lambda owners, found: keys_in_order(compiled, query, gallery, owners, found, cosine))
        owners = np.repeat(np.arange(len(query)), np.diff(offsets))
        matches = torch.from_numpy(np.stack((owners, keys.view(np.int64), found + first), axis=1))
        return (query_norms, excluded.numbered_from(first), matches), len(matches)
    (query_norms, excluded, matches), counts = agreed(group, find)
    owners, keys, found = everyones(matches, counts, 3, group).cpu().T.contiguous().numpy()
    keys = keys.view(np.float64)
    ascending = np.lexsort((found, keys, owners))
    offsets = np.concatenate(([0], np.cumsum(np.bincount(owners, minlength=len(query)))))
    matches = Matches(offsets, keys[ascending], found[ascending])

    def count():
        steps, redecided = nonmatches_between(query, query_norms, gallery, first, matches, excluded, cosine, precision)
        return steps.to(carrier(group)), redecided.item()
    steps, redecided = agreed(group, count)
    dist.all_reduce(steps, group=group)
    return MatchRanks(offsets, as_ranks(steps.cpu(), offsets).numpy(), sum(redecided))


def agreed(group, run):
    """run() → (kept, shared) in every process: what this one keeps, and what each shares. What one raises, all raise."""
    kept = shared = failure = None
    try:
        kept, shared = run()
    except Exception as error:
        failure = error
    told = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (shared, failure and (isinstance(failure, ValueError), str(failure))), group)
    if failure:
        raise failure
    for rank, (_, failed) in enumerate(told):
        if failed:
            raise (ValueError if failed[0] else RuntimeError)(f'process {rank} of {len(told)}: {failed[1]}')
    return kept, [shared for shared, _ in told]


def common(options):
    """The options of all processes, which have to be the same; None says nothing."""
    result = {}
    for name in options[0]:
        values = {rank: of[name] for rank, of in enumerate(options) if of[name] is not None}
        if len(set(values.values())) > 1:
            raise ValueError(f'want one {name} in all processes, got {", ".join(f"{value} in process {rank}" for rank, value in values.items())}; '
                             f'pass the same')
        result[name] = next(iter(values.values()), None)
    return result


def everyones(mine, counts, width, group):
    """The rows of all processes, counts[r] of process r, in their order: (sum of counts, width) of mine's type."""
    whole = torch.empty(sum(counts), width, dtype=mine.dtype, device=carrier(group))
    under_way = []
    for rank, part in enumerate(whole.split(counts)):
        if part.numel() == 0:
            continue
        if rank == dist.get_rank(group):
            part.copy_(mine)
        under_way.append(dist.broadcast(part.view(torch.uint8), group_src=rank, group=group, async_op=True))
    for one in under_way:
        one.wait()
    return whole


def carrier(group):
    """The device whose tensors the group's backend sends."""
    return torch.device('cuda', torch.cuda.current_device()) if dist.get_backend(group) == 'nccl' else torch.device('cpu')
