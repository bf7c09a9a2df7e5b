"""mgn.ops.match_ranks_sharded: the ranks of one process, from parts of any size, for any data; mistakes are told
everywhere."""

import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mining import examples
from rankings import METRICS, clustered, extremes, near_ties, problem, same

from mgn import ops


def bounds(rng, count, style):
    """Where the processes' parts begin and end; the same in all of them."""
    processes = dist.get_world_size()
    if style == 'even':
        return [count * r // processes for r in range(processes + 1)]
    if style == 'one has all':
        return [0] * (owner := rng.integers(1, processes + 1)) + [count] * (processes + 1 - owner)
    return [0, *sorted(rng.integers(0, count + 1, processes - 1)), count]


def part_of(problem, rng, style):
    """This process's part of (query, gallery, query_pids, gallery_pids, query_camids, gallery_camids)."""
    rank, queries, items = dist.get_rank(), bounds(rng, len(problem[0]), style), bounds(rng, len(problem[1]), style)
    of = [slice(queries[rank], queries[rank + 1]), slice(items[rank], items[rank + 1])]
    return [array[of[i % 2]] for i, array in enumerate(problem)]


PROBLEMS = {
    'usual': lambda seed: problem(20, 300, 33, seed=seed),
    'many ties': lambda seed: problem(10, 200, 5, seed=seed, levels=2),
    'apart by rounding alone': lambda seed: near_ties(4, 60, 129, seed),
    'huge, denormal, zero': lambda seed: extremes(9, 60, 20, seed),
    'more than a tile': lambda seed: clustered(G=7000, seed=seed),
    'fewer images than processes': lambda seed: problem(1, 2, 8, pids=1, seed=seed),
    'no query': lambda seed: problem(0, 30, 8, seed=seed),
    'no gallery': lambda seed: problem(5, 0, 8, seed=seed),
    'nothing': lambda seed: problem(0, 0, 8, seed=seed),
}


def check_ranks_are_those_of_one_process(folder):
    for seed in range(examples(6)):  # three at least: both metrics, each junk id
        for number, (name, make) in enumerate(PROBLEMS.items()):
            whole, rng = make(seed), np.random.default_rng((seed, number))
            for style in ('even', 'one has all', 'random'):
                options = {'metric': METRICS[seed % 2], 'junk_pid': [-1, 0, None][seed % 3]}
                got = ops.match_ranks_sharded(*part_of(whole, rng, style), **options)
                assert same(got, ops.match_ranks(*whole, **options)), (name, style, seed)


def check_every_type_and_container_and_the_reference(folder):
    whole, rng = problem(12, 90, 40, levels=4), np.random.default_rng(0)
    want = ops.match_ranks(*whole)
    for convert in (torch.from_numpy, lambda x: torch.from_numpy(x).half(), lambda x: torch.from_numpy(x).bfloat16(),
                    np.asfortranarray,
                    lambda x: np.repeat(x, 2, 1)[:, ::2]):
        mine = part_of(whole, rng, 'random')
        assert same(ops.match_ranks_sharded(convert(mine[0]), convert(mine[1]), *mine[2:]), want)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mgn.ops.ranking.keys.kernels', lambda device: None)
        assert same(ops.match_ranks_sharded(*part_of(whole, rng, 'even')), want)


def check_a_process_without_images_need_not_know_width_or_type(folder):
    whole = problem(6, 50, 16)
    mine = whole if dist.get_rank() == 1 else (np.empty((0, 0), np.float16), np.empty((0, 0), np.float32), [], [], [],
                                               [])
    assert same(ops.match_ranks_sharded(*mine), ops.match_ranks(*whole))


def check_a_group_of_the_users_own(folder):
    last = dist.get_world_size() - 1
    group = dist.new_group([0, last])
    whole = problem(10, 80, 16, levels=3)
    if dist.get_rank() in (0, last):
        mine = [array[:len(array) // 3] if dist.get_rank() == 0 else array[len(array) // 3:] for array in whole]
        assert same(ops.match_ranks_sharded(*mine, group=group), ops.match_ranks(*whole))
    elif last > 1:
        with pytest.raises(ValueError, match='must be called by members of the group only, but this process is none'):
            ops.match_ranks_sharded(*whole, group=group)
    dist.barrier()


def check_what_one_process_gets_wrong_is_told_in_all(folder):
    whole, rng, rank = problem(15, 90, 8), np.random.default_rng(0), dist.get_rank()

    def refused(message, alter=lambda mine: mine, **options):
        mine = part_of(whole, rng, 'even')
        if rank == 1:
            mine = alter(mine)
        with pytest.raises(ValueError, match=(r'^' if rank == 1 else r'process 1 of \d: ') + message):
            ops.match_ranks_sharded(*mine, **options)

    def with_nan(which):
        return lambda mine: [np.where(np.arange(len(x))[:, None] == 2, np.float32('nan'), x) if i == which else x for i,
                             x in enumerate(mine)]
    refused('query and gallery must have rows of one width', lambda mine: [mine[0][:, :5], *mine[1:]])
    refused('query_pids must have the shape', lambda mine: [*mine[:2], mine[2][1:], *mine[3:]])
    refused('gallery features must have .* float32', lambda mine: [mine[0], mine[1].astype(np.float64), *mine[2:]])
    refused('gallery features must be finite, but row 2 has NaN or infinity', with_nan(1))
    refused("metric must be 'cosine' or 'euclidean', not 'l2'", metric='l2' if rank == 1 else 'cosine')
    want = rf'query features must be finite, but row {len(whole[0]) // dist.get_world_size() + 2} has NaN'
    with pytest.raises(ValueError, match=want):  # all have them
        mine = part_of(whole, rng, 'even')
        ops.match_ranks_sharded(*(with_nan(0)(mine) if rank == 1 else mine))
    for name, options, altered in (('metric', {'metric': 'euclidean'}, 'euclidean'),
                                   ('junk_pid', {'junk_pid': None}, 'None')):
        with pytest.raises(ValueError,
                           match=f'{name} must be the same in all processes, but is .*{altered} in process 1.*; pass '
                                 f'the same'):
            ops.match_ranks_sharded(*part_of(whole, rng, 'even'), **(options if rank == 1 else {}))
    mine = part_of(whole, rng, 'even')
    for name, altered in (('width D', [x[:, :5] for x in mine[:2]]),
                          ('type of queries', [mine[0].astype(np.float16), mine[1]])):
        with pytest.raises(ValueError, match=f'{name} must be the same in all processes, but is .* in process 1'):
            ops.match_ranks_sharded(*(altered if rank == 1 else mine[:2]), *mine[2:])
    assert same(ops.match_ranks_sharded(*mine), ops.match_ranks(*whole))  # and they are in step still


def check_only_queries_and_matches_travel(folder):
    """By the counters of the loopback interface, where there are any."""
    def travelled():
        return int(re.search(r'lo:\s*(\d+)', open('/proc/net/dev').read())[1])
    try:
        travelled()
    except (OSError, TypeError):
        return
    whole = problem(8, 30_000, 64, pids=3000)
    mine, processes = part_of(whole, np.random.default_rng(0), 'even'), dist.get_world_size()
    ops.match_ranks_sharded(*mine)
    dist.barrier()
    before = travelled()
    dist.barrier()
    matches = len(ops.match_ranks_sharded(*mine).ranks)
    dist.barrier()
    assert travelled() - before < processes * (8 * 64 * 4 + 32 * matches + 200_000) < 30_000 * 64 * 4 / 4
