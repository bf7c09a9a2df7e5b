"""Ranks in a gallery whose parts lie on several processes: counts of non-matches add, so the gallery stays."""

import functools

import torch
import torch.distributed as dist

from mgn.ops.arguments import all_ids, as_junk_pid, shown
from mgn.ops.errors import UserError
from mgn.ops.private import uncompiled
from mgn.ops.ranking.counting import Matches
from mgn.ops.ranking.keys import compared, finite_norms, keys_in_order
from mgn.ops.ranking.ranks import MatchRanks, as_ranks, identities, in_order, nonmatches_between, sorted_matches


@uncompiled
def match_ranks_sharded(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric='cosine',
                        junk_pid=-1, precision='auto', group=None):
    """match_ranks of queries and a gallery that the processes of a group hold in parts: the same ranks, bit for bit.

    Every process calls it with its own part, and gets the ranks of all queries. Queries and items are numbered through
    the parts in the order of the processes. Query features travel to all, then the key and number of each match, then a
    count for each match; the gallery does not.

    Args:
        query: (q, D), gallery: (g, D), this process's part and its ids, as of match_ranks; q and g may differ and be 0.
        metric, junk_pid, precision: as of match_ranks, the same in every process.
        group: of torch.distributed, any backend; None: the default one.
    Returns:
        MatchRanks of all queries, in every process. Memory of a process: 256 MB, 32 bytes per own row and 96 per match
        of all queries, the features of all queries, beyond its part. Each receives Q·D numbers, 24 bytes a match, and
        takes part in adding 8 bytes a match.
    Raises:
        UserError: whatever match_ranks refuses, in every process, naming the one whose part it is; parts or options
            that do not go together.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise UserError('match_ranks_sharded needs a process group, but there is none; call '
                        'torch.distributed.init_process_group first, or match_ranks in a single process')
    if not isinstance(group, dist.ProcessGroup | None) or (rank := dist.get_rank(group)) < 0:
        raise UserError('match_ranks_sharded must be called by members of the group only, but this process is none of '
                        f'{shown(group)}; pass a group that torch.distributed.new_group returned to a member')

    def check():
        comparison = compared(query, gallery, metric, precision, streamed=True)
        ids = all_ids(len(query), len(gallery), query_pids, gallery_pids, query_camids, gallery_camids,
                      comparison.query.device)
        width, dtype = comparison.query.shape[1], comparison.query.dtype
        options = {'metric': metric, 'junk_pid': repr(as_junk_pid(junk_pid)), 'precision': precision,
                   'width D': width if len(query) or len(gallery) else None,
                   'type of queries': dtype if len(query) else None}
        return (comparison, ids), (len(query), len(gallery), options)
    (comparison, ids), parts = agreed(group, check)
    queries, items, options = zip(*parts)
    comparison, ids = with_all_queries(comparison, ids, queries, common(options), group)
    first = sum(items[:rank])

    def find():
        query_norms = finite_norms(comparison.query, 'query')
        excluded = identities(ids, junk_pid)
        matches = sorted_matches(excluded, ids, functools.partial(keys_in_order, comparison))
        owners = torch.repeat_interleave(matches.offsets.diff())
        own_matches = torch.stack((owners, matches.keys.view(torch.int64), matches.items + first), 1)
        return (query_norms, excluded.numbered_from(first), own_matches), len(owners)
    (query_norms, excluded, own_matches), counts = agreed(group, find)
    matches = all_matches(own_matches, counts, len(comparison.query), group)

    def count():
        steps, redecided = nonmatches_between(comparison, query_norms, first, matches, excluded)
        return steps.to(carrier(group)), redecided
    steps, redecided = agreed(group, count)
    dist.all_reduce(steps, group=group)
    return MatchRanks(matches.offsets.cpu().numpy(), as_ranks(steps.to(matches.offsets.device), matches.offsets),
                      sum(redecided))


def with_all_queries(comparison, ids, counts, options, group):
    """The queries of all processes, counts[r] of process r, and their ids, beside this process's own gallery."""
    query, gallery, *_ = comparison
    width = options['width D'] or 0
    all_queries = gathered(query.to(options['type of queries'] or query.dtype), counts, width, group).to(query.device)
    pids, camids = (gathered(own[:, None], counts, 1, group)[:, 0].to(query.device)
                    for own in (ids.query_pids, ids.query_camids))
    gallery = gallery if len(gallery) else gallery.new_empty(0, width)
    return comparison._replace(query=all_queries, gallery=gallery), ids._replace(query_pids=pids, query_camids=camids)


def all_matches(own, counts, queries, group):
    """Matches of all processes, whose own are rows (query, bits of the key, item)."""
    owners, keys, items = gathered(own, counts, 3, group).to(own.device).T.contiguous()
    keys = keys.view(torch.float64)
    ascending = in_order(keys, owners)  # ties keep their order, that of the processes and of their items
    offsets = torch.zeros(queries + 1, dtype=torch.int64, device=own.device)
    offsets[1:].index_add_(0, owners, torch.ones_like(owners))
    return Matches(offsets.cumsum_(0), keys[ascending], items[ascending])


def agreed(group, run):
    """run() → (kept, shared): what this process keeps, and what each shares. What one process raises, all raise."""
    kept = shared = failure = None
    try:
        kept, shared = run()
    except Exception as error:
        failure = error
    outcomes = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (shared, failure and (isinstance(failure, UserError), str(failure))), group)
    if failure:
        raise failure
    for rank, (_, failed) in enumerate(outcomes):
        if failed:
            raise (UserError if failed[0] else RuntimeError)(f'process {rank} of {len(outcomes)}: {failed[1]}')
    return kept, [shared for shared, _ in outcomes]


def common(options):
    """The options of all processes, which have to be the same; None says nothing."""
    result = {}
    for name in options[0]:
        values = {rank: chosen[name] for rank, chosen in enumerate(options) if chosen[name] is not None}
        if len(set(values.values())) > 1:
            choices = ', '.join(f'{value} in process {rank}' for rank, value in values.items())
            raise UserError(f'{name} must be the same in all processes, but is {choices}; pass the same')
        result[name] = next(iter(values.values()), None)
    return result


def gathered(own, counts, width, group):
    """The rows of all processes, counts[r] of process r, in their order: (sum of counts, width) of the own type."""
    whole = torch.empty(sum(counts), width, dtype=own.dtype, device=carrier(group))
    transfers = []
    for rank, part in enumerate(whole.split(counts)):
        if part.numel() == 0:
            continue
        if rank == dist.get_rank(group):
            part.copy_(own)
        transfers.append(dist.broadcast(part.view(torch.uint8), group_src=rank, group=group, async_op=True))
    for transfer in transfers:
        transfer.wait()
    return whole


def carrier(group):
    """The device whose tensors the group's backend sends."""
    if dist.get_backend(group) == 'nccl':
        return torch.device('cuda', torch.cuda.current_device())
    return torch.device('cpu')
