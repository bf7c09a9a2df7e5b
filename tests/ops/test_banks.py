"""How the CUDA kernels use the banks of shared memory: which accesses of a warp wait for each other."""

import itertools

import pytest
import torch
from emulation import (FILES, FLAGS, ROOT, TYPES, batch_hard, compile_for_emulator, finish, need, pairwise_distance,
                       passes_over_banks, ranking_kernels, start)
from mining import random_features, random_labels
from rankings import problem
from test_nearest_kernel import tiles_of
from test_ranking_kernels import check as check_ranks

from mgn.ops.distance import DISTANCES
from mgn.ops.ranking import keys


# Stores whose places the data choose. The emulator's threads append one after another; on a GPU those of a warp do
# it in step, to neighbouring places.
BY_DATA = {('nearest_cuda.cu', 'store'), ('ranking_cuda.cu', 'store')}


def mine(process):
    labels = random_labels(70, 4)
    for dtype, tile in itertools.product(TYPES[:3], (16, 64)):
        batch_hard(process, random_features(1, 70, 33, dtype=dtype), labels, tile=tile, parts=2)


def measure(process):
    for dtype, metric in itertools.product(TYPES[:2], DISTANCES):
        x, y = random_features(33, 33, dtype=dtype), random_features(65, 33, dtype=dtype, seed=1)
        dist = pairwise_distance(process, x, y, metric)
        pairwise_distance(process, x, y, metric, (dist, torch.ones_like(dist)))


def rank(process):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, 'kernels', lambda device: ranking_kernels(process))
        check_ranks(*problem(3, 400, 8))
    for *tile, first in tiles_of([2048, 300]):
        values, items = torch.full((3, 46), torch.inf), torch.full((3, 46), -1)
        ranking_kernels(process).select_nearest(*tile, first, values, items)


@pytest.fixture(scope='module')
def passes(tmp_path_factory):
    """passes(group, cases) → passes_over_banks of the group's kernels."""
    folder = tmp_path_factory.mktemp('banks')

    def passes(group, cases):
        need('addr2line', 'which finds lines of sources')
        sources = [path for path in sorted((ROOT / 'csrc/kernels').glob('*.cu'))
                   if path.name.startswith(FILES.get(group, group))]
        executable = compile_for_emulator(folder, group, [*sources, ROOT / f'tests/cuda_emulator/{group}_main.cpp'],
                                          FLAGS['banks'])
        process = start(executable, banks=folder / 'counts')
        cases(process)
        finish(process)
        return passes_over_banks(executable, folder / 'counts')
    return passes


@pytest.mark.parametrize('group, cases', [
    ('batch_hard', mine), pytest.param('pairwise_distance', measure, marks=pytest.mark.long),
    pytest.param('ranking', rank, marks=pytest.mark.long)])
def test_conflicts_are_those_that_are_known(passes, group, cases):
    table = passes(group, cases)
    print(f'\n| source | line | access | passes | fewest |\n|{"---|" * 5}')
    for (source, text, access), (taken, fewest) in sorted(table.items()):
        print(f'| {source} | `{text[:70]}` | {access} | {taken} | {fewest} |')
    if group != 'ranking':
        loader = [access for source, _, access in table if source == 'squares_cuda.cuh']
        assert {'load', 'store'} == set(loader), 'the tile loader was run'
    assert {(source, access) for (source, _, access), counts in table.items() if counts[0] > counts[1]} <= BY_DATA
