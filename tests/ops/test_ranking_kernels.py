"""The CUDA kernels of ranking on the host, under the emulator and sanitizers, through mgn.ops.match_ranks."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from emulation import (FLAGS, FUSED, ORDERS, ROOT, compile_for_emulator, finish, missed_lines, need, ranking_kernels,
                       start)
from hypothesis import HealthCheck, given, settings, strategies as st
from mining import examples
from rankings import METRICS, extremes, naive_ranks, near_ties, problem, ranks_of

from mgn.ops import match_ranks, topk
from mgn.ops.ranking import keys, ranks, reference

# Queries, gallery, dimensions: around 16 lanes a pair, 16 pairs a block, 256 threads, tiles of 7 queries and 300 items.
SIZES = [(1, 1, 1), (3, 17, 16), (8, 40, 15), (2, 301, 33), (5, 570, 3)]
KINDS = [*(('plain', order) for order in ORDERS), ('address', 'forward'), ('thread', '1'),
         pytest.param('thread', 'forward', marks=pytest.mark.long), FUSED]


@pytest.fixture
def emulated(kernels, monkeypatch):
    """with emulated(kind, order): mgn.ops.match_ranks runs the CUDA kernels, on small tiles."""
    @contextmanager
    def emulated(kind='plain', order='forward', items=300, queries=7):
        with kernels(kind, order, 'ranking') as process, monkeypatch.context() as patch:
            patch.setattr(keys, 'kernels', lambda device: ranking_kernels(process))
            patch.setattr(ranks, 'tile_of', lambda query: (items, queries))
            yield process
    return emulated


def check(*args, **options):
    assert ranks_of(*args, **options) == naive_ranks(*args, **options)


def check_all():
    for Q, G, D in SIZES:
        for metric in METRICS:
            check(*problem(Q, G, D), metric=metric)
    for metric in METRICS:
        check(*near_ties(4, 60, 33), metric=metric)
        check(*problem(4, 60, 5, levels=2), metric=metric, junk_pid=1)
        check(*extremes(3, 40, 17), metric=metric)


@pytest.mark.parametrize('kind, order', KINDS)
def test_sizes_and_ties(emulated, kind, order):
    with emulated(kind, order):
        check_all()


def check_rounding(process, n, width, stride=0, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy((rng.standard_normal((n, width + stride)) * 2.0 ** rng.integers(-150, 100)).astype(np.float32))
    for value in (0.0, -0.0, 1e-45, -1e-39, 3.4028234e38, 1 + 2.0 ** -11, -1 - 3 * 2.0 ** -11):  # ties, and to infinity
        x[torch.from_numpy(rng.random(x.shape) < 0.05)] = value
    x = x[:, :width]
    got, expected = ((torch.empty(n, width), torch.empty(n, dtype=torch.float64)) for _ in range(2))
    norms = torch.from_numpy(rng.random(n))
    ranking_kernels(process).round_to_tf32(x, norms, *got)
    reference.round_to_tf32(x, norms, *expected)
    assert torch.equal(got[0].view(torch.int32), expected[0].view(torch.int32))  # −0 stays −0
    torch.testing.assert_close(got[1], expected[1], rtol=1e-13, atol=0)


@pytest.mark.parametrize('kind, order', KINDS)
def test_rounding_to_tf32(kernels, kind, order):
    with kernels(kind, order, 'ranking') as process:
        for n, width, stride in ((0, 5, 0), (1, 1, 0), (17, 16, 0), (16, 33, 3), (35, 100, 1)):
            check_rounding(process, n, width, stride)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2 ** 32 - 1), n=st.integers(0, 40), width=st.integers(1, 70), stride=st.integers(0, 3),
       order=st.sampled_from(ORDERS))
def test_rounding_of_random_cases(kernels, seed, n, width, stride, order):
    with kernels('plain', order, 'ranking') as process:
        check_rounding(process, n, width, stride, seed)


@pytest.mark.parametrize('metric', METRICS)
def test_spans_of_a_long_row_and_more_matches_than_shared_memory_counts(emulated, metric):
    query, gallery, *_ = problem(3, 4200, 2)
    pids = [np.array([0, 1, 2]), np.arange(4200) % 3]  # 1,400 matches each: all but those of the query's camera
    camids = [np.zeros(3, int), np.arange(4200) % 500]
    with emulated(items=4200):
        got = ranks_of(query, gallery, *pids, *camids, metric=metric)
    assert got == ranks_of(query, gallery, *pids, *camids, metric=metric)


@pytest.mark.parametrize('metric', METRICS)
def test_neighbours_by_the_same_kernels(emulated, monkeypatch, metric):
    for make in (problem, near_ties, extremes):
        query, gallery, *_ = make(5, 90, 17)
        expected = topk(query, gallery, 20, metric), topk(gallery, gallery, 20, metric, exclude_self=True)
        with emulated() as process, monkeypatch.context() as patch:
            patch.setattr(keys, 'kernels', lambda device: ranking_kernels(process))
            got = topk(query, gallery, 20, metric), topk(gallery, gallery, 20, metric, exclude_self=True)
        assert all(np.array_equal(a, b) for pair in zip(got, expected) for a, b in zip(*pair))


def test_all_go_by_key_where_all_are_equal(emulated):
    query, gallery, *ids = problem(5, 400, 9, pids=9)
    query[:], gallery[:] = 1, 1
    with emulated():
        result = match_ranks(query, gallery, *ids)
        check(query, gallery, *ids)
    matched = np.diff(result.offsets) > 0
    assert result.redecided == sum(int((ids[1] != pid).sum()) for pid in ids[0][matched])


def keys_and_norms(process, metric):
    kernels = ranking_kernels(process)
    query, gallery = (torch.from_numpy(features) for features in problem(4, 60, 33)[:2])
    queries, items = (pairs.flatten() for pairs in torch.meshgrid(torch.arange(4), torch.arange(60), indexing='ij'))
    norms, of_pairs = (torch.empty(n, dtype=torch.float64) for n in (60, 240))
    kernels.canonical_norms(gallery, norms)
    kernels.canonical_keys(query, gallery, queries, items, metric == 'cosine', of_pairs)
    return torch.cat((norms, of_pairs)).view(torch.int64)


@pytest.mark.parametrize('metric', METRICS)
def test_a_compiler_that_fuses_what_it_can_changes_no_bit(kernels, metric):
    results = []
    for kind in ('plain', 'fused'):
        with kernels(kind, of='ranking') as process:
            results.append(keys_and_norms(process, metric))
    assert torch.equal(*results)


@pytest.mark.long
def test_without_the_intrinsics_that_round_it_would(kernels, tmp_path):
    for path in (ROOT / 'csrc/kernels').glob('*'):
        text = path.read_text().replace('__dmul_rn(a - b, a - b)', '(a - b) * (a - b)')
        (tmp_path / path.name).write_text(text)
    driver = ROOT / 'tests/cuda_emulator/ranking_main.cpp'
    sources = [tmp_path / 'ranking_cuda.cu', tmp_path / 'nearest_cuda.cu', driver]
    process = start(compile_for_emulator(tmp_path, 'fused', sources, FLAGS['fused']))
    fused = keys_and_norms(process, 'euclidean')
    finish(process)
    with kernels('plain', of='ranking') as process:
        assert not torch.equal(keys_and_norms(process, 'euclidean'), fused)


def test_features_that_are_not_finite_are_named(emulated):
    for which, name in ((0, 'query'), (1, 'gallery')):
        args = list(problem(5, 33, 7))
        args[which][4, 3] = np.nan
        with emulated(), pytest.raises(ValueError, match=f'{name} features must be finite, but row 4 has NaN'):
            match_ranks(*args)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2 ** 32 - 1), Q=st.integers(0, 9), G=st.integers(0, 40), D=st.integers(1, 40),
       pids=st.integers(1, 9), levels=st.sampled_from([None, 1, 2]), metric=st.sampled_from(METRICS),
       items=st.integers(1, 50), order=st.sampled_from(ORDERS))
def test_random_cases(emulated, seed, Q, G, D, pids, levels, metric, items, order):
    with emulated('plain', order, items, 4):
        check(*problem(Q, G, D, pids, seed=seed, levels=levels), metric=metric, junk_pid=0)


def test_every_line_of_the_kernels_is_run(emulated):
    need('gcov', 'which counts the lines that were run')
    with emulated('coverage', items=4200) as process:
        check_all()
        check_rounding(process, 17, 16)
        query, gallery, *_ = problem(3, 4200, 2)
        ranks_of(query, gallery, np.arange(3), np.arange(4200) % 3, np.zeros(3, int), np.arange(4200) % 500)
        folder = process.args[-1].parent
    assert missed_lines(folder, ['ranking']) == []
