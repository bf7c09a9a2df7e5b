"""Every barrier, fence, atomic and bounds check of the CUDA kernels is needed: without it, some test fails."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from emulation import FILES, FLAGS, ROOT, batch_hard, compile_for_emulator, finish, ranking_kernels, start
from mutants import write_mutants
from rankings import METRICS, near_ties, problem, ranks_of
from test_cuda_kernels import check, check_distances, check_gradients, features_of, odd_rows, sorted_always
from test_nearest_kernel import check as check_selected, descending, tiles_of
from test_ranking_kernels import check as check_ranks, check_rounding

from mgn.ops.distance import DISTANCES
from mgn.ops.ranking import keys, ranks

SECONDS = 120  # for a kernel that does not end
# Those that change no result, and why.
HARMLESS = {
    'bound batch_hard_backward_cuda.cu: partner >= b.m':
        'the forward writes no index beyond the candidates; this is for a caller who changed them',
    'bound squares_cuda.cuh: rows < kRows': 'keeps an int from overflowing, from 2^31 rows on',
    'bound squares_cuda.cuh: columns < kColumns': 'keeps an int from overflowing, from 2^31 rows on',
}


def mine(process):
    """Tiles at their edges, parts, ties, doubtful squares, sorted pairs, a loss of several blocks."""
    for n, m, width, dtype, tile, parts in ((17, 65, 33, torch.float32, 16, 2), (65, 130, 31, torch.float32, 64, 2),
                                            (20, None, 40, torch.float64, 16, 1), (33, 1, 129, torch.float16, 16, 1)):
        anchors, labels, candidates = features_of(n, m, width, dtype)
        for entries in (None, sorted_always):
            check(process, anchors, labels, candidates, tile=tile, parts=parts, entries=entries)
    anchors, labels, candidates = features_of(20, 70, 9, torch.float64)
    check(process, (1e25 * anchors).float(), labels, ((1e25 * candidates[0]).float(), candidates[1]), with_loss=False)


def measure(process):
    for metric in DISTANCES:
        for n, m, width, dtype in ((9, 70, 33, torch.float32), (65, 5, 257, torch.float64)):
            x, y = features_of(n, m, width, dtype, heads=1)[::2]
            check_distances(process, x[0], y[0][0], metric)
            check_gradients(process, x[0], y[0][0], metric)
        check_distances(process, *odd_rows(torch.float32), metric)
        check_gradients(process, *odd_rows(torch.float64), metric)


def rank(process):
    problems = []
    check_rounding(process, 17, 33)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, 'kernels', lambda device: ranking_kernels(process))
        patch.setattr(ranks, 'tile_of', lambda query: (2300, 4))
        for metric in METRICS:
            check_ranks(*problem(5, 40, 17), metric=metric, junk_pid=1)
            check_ranks(*near_ties(3, 60, 33), metric=metric)
        # Counted in shared memory, and in global memory; with ties at the farthest match.
        for matches, levels in ((1024, 1), (1400, 1), (1400, None)):
            pids = (np.arange(2300) < 2300 - matches).astype(int)  # to the end, beyond the first span
            features = problem(2, 2300, 2, levels=levels)[:2]
            problems.append((*features, np.zeros(2, int), pids, np.ones(2, int), np.zeros(2300, int)))
        got = [ranks_of(*each) for each in problems]
    assert got == [ranks_of(*each) for each in problems]
    for widths, capacity in (([5], 40), ([1030, 700], 46), ([300, 2048], 1500), ([4400], 2060)):
        for levels in (None, 1):
            check_selected(ranking_kernels(process).select_nearest, tiles_of(widths, 2, levels), capacity)
    check_selected(ranking_kernels(process).select_nearest, descending(2050, 2048), 2050)


GROUPS = {'batch_hard': mine, 'pairwise_distance': measure, 'ranking': rank}
# What finds a fault of each kind, the fastest first: how compiled, in which order, blocks at a time.
PLAIN, ADDRESS, THREAD = ('plain', 'reverse', 1), ('address', 'forward', 1), ('thread', '1', 1)
TOGETHER = [('plain', str(seed), 2 + seed % 3) for seed in range(32)]
ORDERS = [('plain', order, 1) for order in ('forward', '1', '2')]
FINDERS = {'fence': TOGETHER, 'atomic': [PLAIN, *TOGETHER, THREAD], 'bound': [PLAIN, ADDRESS, *ORDERS],
           'barrier': [PLAIN, THREAD, *ORDERS, *TOGETHER]}


@pytest.fixture(scope='module')
def mutated(tmp_path_factory):
    """(all mutants, run): run(group, finder, number) says whether the group's cases pass with that mutant."""
    folder, built = tmp_path_factory.mktemp('mutants'), {}
    mutants = write_mutants(folder)

    @contextmanager
    def stopped_in_time(process):
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass

    def run(group, finder, number):
        kind, order, blocks = finder
        if (group, kind) not in built:
            sources = [path for path in sorted(folder.glob('*.cu')) if path.name.startswith(FILES.get(group, group))]
            sources.append(ROOT / f'tests/cuda_emulator/{group}_main.cpp')
            flags = [*FLAGS[kind], '-I', folder]
            built[group, kind] = compile_for_emulator(folder, f'{group}_{kind}', sources, flags)
        process = start(built[group, kind], order=order, blocks=blocks, mutant=number)
        with stopped_in_time(process):
            try:
                GROUPS[group](process)
                finish(process)
            except (AssertionError, BrokenPipeError, ValueError, IndexError, RuntimeError):
                return False
        return True
    return mutants, run


def groups_of(mutant):
    shared = mutant.place.startswith('squares')
    return [group for group in GROUPS if mutant.place.startswith(FILES.get(group, group)) or
            shared and group != 'ranking']


def survives(run, mutant):
    return all(run(group, finder, mutant.number) for finder in FINDERS[mutant.kind] for group in groups_of(mutant))


@pytest.mark.long
@pytest.mark.parametrize('group', GROUPS)
def test_without_a_mutant_everything_passes(mutated, group):
    assert all(mutated[1](group, finder, 0) for finder in dict.fromkeys(sum(FINDERS.values(), [])))


@pytest.mark.long
def test_every_mutant_is_found(mutated):
    mutants, run = mutated
    assert len(mutants) > 60 and {mutant.kind for mutant in mutants} == set(FINDERS)
    survivors = [f'{mutant.kind} {mutant.place}, line {mutant.line}' for mutant in mutants if survives(run, mutant)]
    assert [name for name in survivors if name.split(', line')[0] not in HARMLESS] == []


@pytest.mark.parametrize('kind', ['fence', 'atomic', 'bound'])
def test_mutants_of_mining_are_found(mutated, kind):
    mutants, run = mutated
    chosen = [mutant for mutant in mutants if mutant.kind == kind and mutant.place.startswith('batch_hard_cuda')]
    assert run('batch_hard', PLAIN, 0) and chosen and not any(survives(run, mutant) for mutant in chosen[-2:])
