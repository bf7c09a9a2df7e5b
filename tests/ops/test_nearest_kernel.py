"""select_nearest, the CUDA kernel on the host and the CPU's, against sorting all values by (value, item)."""

import numpy as np
import pytest
import torch
from emulation import FILES, FUSED, ORDERS, missed_lines, need, ranking_kernels
from hypothesis import HealthCheck, given, settings, strategies as st
from mining import examples

from mgn.ops.native import kernels as compiled_kernels


def first_of(tiles, capacity, row):
    """The `capacity` first (value, item) of a row of all tiles, ascending; NaN as −inf, −0 as 0."""
    pairs = []
    for dots, scale, shift, first in tiles:
        values = (dots[row] * scale + shift).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        pairs += zip((values + 0.0).tolist(), range(first, first + len(values)))
    return sorted(pairs)[:capacity]


def check(select, tiles, capacity):
    """Tile after tile through select, as (value, item) pairs of each row: the first of all, the rest (inf, −1)."""
    queries = len(tiles[0][0])
    values, items = torch.full((queries, capacity), torch.inf), torch.full((queries, capacity), -1)
    for tile in tiles:
        select(*tile, values, items)
    for row in range(queries):
        expected = first_of(tiles, capacity, row)
        got = sorted((value, item) for value, item in zip(values[row].tolist(), items[row].tolist()) if item >= 0)
        assert got == expected
        assert values[row][items[row] < 0].eq(torch.inf).all()


def tiles_of(widths, queries=3, levels=None, seed=0):
    """Tiles of those widths; scales are powers of two and products small, so that nothing is rounded, fused or not."""
    rng, tiles, first = np.random.default_rng(seed), [], 0
    for width in widths:
        dots = torch.from_numpy(rng.integers(-2 ** 20, 2 ** 20, (queries, width)) if levels is None else
                                rng.integers(-levels, levels + 1, (queries, width))).float()
        for value in (torch.nan, torch.inf, -torch.inf, -0.0):
            dots[torch.from_numpy(rng.random((queries, width)) < 0.02)] = value
        scale = torch.from_numpy(2.0 ** rng.integers(-2, 3, width) * (-1) ** rng.integers(0, 2, width)).float()
        tiles.append((dots, scale, torch.from_numpy(rng.integers(-1, 2, width)).float(), first))
        first += width
    return tiles


# Around the 256 threads and spans of 1,024; the last two in a buffer in global memory, which overflows.
CASES = [([1], 1), ([5], 40), ([300, 40, 700], 17), ([1030, 1024, 3], 46), ([2048, 2048], 1500), ([4000, 1500], 2040),
         ([1500, 6000], 2100), ([6200], 2060)]


@pytest.mark.parametrize('kind, order', [*(('plain', order) for order in ORDERS), ('address', '1'),
                                         pytest.param('thread', '1', marks=pytest.mark.long), FUSED])
@pytest.mark.parametrize('levels', [None, 1])
def test_widths_capacities_and_ties(kernels, kind, order, levels):
    with kernels(kind, order, 'ranking') as process:
        for widths, capacity in CASES[::1 if kind == 'plain' else 3]:
            check(ranking_kernels(process).select_nearest, tiles_of(widths, 2, levels), capacity)


def descending(*widths):
    """Tiles in which every value joins, since it is below all before it."""
    lasts = np.cumsum(widths)
    return [(-torch.arange(last - width, last).float()[None], torch.ones(width), torch.zeros(width), int(last - width))
            for width, last in zip(widths, lasts)]


@pytest.mark.parametrize('kind', ['plain', 'address'])
def test_a_buffer_that_is_filled_to_its_end(kernels, kind):
    with kernels(kind, of='ranking') as process:
        check(ranking_kernels(process).select_nearest, descending(2050, 2048, 3000), 2050)
        check(ranking_kernels(process).select_nearest, descending(2048, 1024, 1000), 2048)


def test_tiles_in_any_order(kernels):
    """Where query and gallery are one tensor, a block of queries sees its tiles in the order of others."""
    tiles = tiles_of([40, 500, 300, 7], levels=2)
    with kernels('plain', '2', 'ranking') as process:
        for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
            check(ranking_kernels(process).select_nearest, [tiles[i] for i in order], 30)


def test_nothing_is_written_where_nothing_joins(kernels):
    dots, scale, shift, first = tiles_of([600], 1)[0]
    values, items = torch.full((1, 20), -torch.inf), torch.arange(20)[None] + 5000
    with kernels('plain', '1', 'ranking') as process:
        ranking_kernels(process).select_nearest(dots.nan_to_num(0), scale, shift, 6000, values, items)
    assert (values == -torch.inf).all() and items.tolist() == [list(range(5000, 5020))]


def test_the_cpu_selects_the_same():
    compiled = compiled_kernels(torch.device('cpu'))
    for widths, capacity in CASES:
        for levels in (None, 1):
            check(compiled.select_nearest, tiles_of(widths, 2, levels), capacity)


@pytest.mark.parametrize('queries', [1, 15, 16, 50])
def test_the_cpu_takes_products_by_item(queries):
    """Transposed, as those of two tiles of one tensor are for the second."""
    compiled = compiled_kernels(torch.device('cpu'))
    for widths in ([1], [5], [1, 300, 40], [2500]):
        tiles = [(dots.T.contiguous().T, *rest) for dots, *rest in tiles_of(widths, queries, 1)]
        check(compiled.select_nearest, tiles, 17)
    with pytest.raises(RuntimeError, match='contiguous along rows'):
        dots, *rest = tiles_of([9], 5)[0]
        selected = torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.int64)
        compiled.select_nearest(dots.repeat(2, 2)[::2, ::2], *rest, *selected)
    with pytest.raises(RuntimeError, match='expected room for at least 1 value'):
        compiled.select_nearest(*tiles_of([9], 5)[0], torch.zeros(5, 0), torch.zeros(5, 0, dtype=torch.int64))


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(widths=st.lists(st.integers(1, 1100), min_size=1, max_size=4), capacity=st.integers(1, 600),
       levels=st.sampled_from([None, 0, 1, 300]), seed=st.integers(0, 2 ** 32 - 1), order=st.sampled_from(ORDERS))
def test_random_cases(kernels, widths, capacity, levels, seed, order):
    with kernels('plain', order, 'ranking') as process:
        check(ranking_kernels(process).select_nearest, tiles_of(widths, 1, levels, seed), capacity)


def test_every_line_of_the_kernel_is_run(kernels):
    need('gcov', 'which counts the lines that were run')
    with kernels('coverage', of='ranking') as process:
        for widths, capacity in CASES:
            check(ranking_kernels(process).select_nearest, tiles_of(widths, 1), capacity)
    assert missed_lines(process.args[-1].parent, FILES['ranking'][1:]) == []
