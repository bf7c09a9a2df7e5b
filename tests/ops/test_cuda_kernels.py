"""The CUDA kernels on the host, under the emulator and sanitizers, against loops over pairs."""

import itertools

import pytest
import torch
from emulation import FUSED, ORDERS, TYPES, batch_hard, missed_lines, need, pairwise_distance, start
from hypothesis import HealthCheck, given, settings
from mining import (RELATIVE_ERROR, assert_mined, cases, examples, naive, naive_loss, random_candidates,
                    random_features, random_labels)

from mgn.ops import native
from mgn.ops.distance import DISTANCES as METRICS, pairwise_distance_reference
from mgn.ops.triplet import backward_reference, batch_hard_reference, pairs_by_candidate, triplet_loss_reference


def sorted_always(pos_idx, neg_idx, m):
    return pairs_by_candidate(pos_idx, neg_idx, m, scanned=-1)


def check(process, anchors, labels, candidates=(), margin=0.3, with_loss=True, entries=None, tile=0,
          parts=0):
    """Forward and backward of one case are right."""
    mined, loss, slope, gradients = batch_hard(process, anchors, labels, *candidates, margin=margin,
                                               with_loss=with_loss, entries=entries, tile=tile,
                                               parts=parts)
    assert_mined(mined, anchors, labels, *candidates)
    wide = mined.dist_ap.dtype
    upstream = torch.arange(1, len(anchors) + 1, dtype=wide)
    tolerance = RELATIVE_ERROR[anchors.dtype]
    if with_loss:
        expected = naive_loss(*naive(anchors, labels, *candidates)[:2], margin)
        size = 1 + (anchors.double().abs().max().item() * anchors.shape[-1] ** 0.5 if anchors.numel() else 0)
        assert loss.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance * size)
        torch.testing.assert_close(slope, triplet_loss_reference(*mined, margin)[1])
        grads = (upstream, None, slope)
    else:
        grads = (upstream[:, None].expand_as(mined.dist_ap), -0.5 * upstream[:, None].expand_as(mined.dist_ap), None)
    x, y = (rows.to(wide) for rows in (anchors, candidates[0] if candidates else anchors))
    expected = backward_reference(x, y, *mined, *grads)
    expected = list(expected) if candidates else [sum(expected)]
    coarse = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[anchors.dtype]
    assert len(gradients) == len(expected)
    for gradient, correct in zip(gradients, expected):
        torch.testing.assert_close(gradient.double(), correct, rtol=coarse, atol=coarse)


def features_of(n, m, width, dtype, heads=2, classes=4):
    """Anchors, labels and (candidates, their labels), or () for m None."""
    candidates = random_candidates((heads,), m, width, dtype, classes)
    return random_features(heads, n, width, dtype=dtype), random_labels(n, classes), candidates


LONG_RACES = pytest.param('thread', 'forward', marks=pytest.mark.long)
# Anchors, candidates, dimensions: around the sizes of tiles (16 or 64 anchors, 64 candidates, 32 dimensions, 128
# columns of a warp).
SIZES = [(1, None, 1), (16, 65, 33), (33, None, 31), (64, 1, 32), (17, 64, 129)]
SHORT = [(*size, dtype, tile, 0.3 if number % 2 else None, number % 3 > 0, number % 4 < 2)
         for number, (size, dtype, tile) in enumerate(itertools.product(SIZES, TYPES, [16, 64]))]
FULL = list(itertools.product([1, 15, 17, 33, 64, 65], [None, 1, 63, 65, 130], [1, 31, 33, 129, 256], TYPES, [16, 64],
                              [0.3, None], [True, False], [True, False]))
KINDS = [*itertools.product(['plain'], ORDERS), ('address', 'forward'), ('thread', '1'), FUSED]


def run_all(process, table):
    for n, m, width, dtype, tile, margin, with_loss, is_sorted in table:
        anchors, labels, candidates = features_of(n, m, width, dtype)
        check(process, anchors, labels, candidates, margin, with_loss, sorted_always if is_sorted else None, tile)


@pytest.mark.parametrize('kind, order', [*KINDS, LONG_RACES])
def test_sizes_and_types(kernels, kind, order):
    with kernels(kind, order) as process:
        run_all(process, SHORT)


@pytest.mark.parametrize('blocks, order', [(2, '1'), (3, '2'), (4, '3')])
def test_blocks_at_the_same_time(kernels, blocks, order):
    with kernels('plain', order, blocks=blocks) as process:
        run_all(process, SHORT[::3])
        for tile, parts in ((16, 3), (64, 2)):
            anchors, labels, candidates = features_of(40, 200, 9, torch.float32)
            check(process, anchors, labels, candidates, tile=tile, parts=parts)


@pytest.mark.long
@pytest.mark.parametrize('kind', ['plain', 'address', 'thread'])
@pytest.mark.parametrize('order', ORDERS)
def test_all_sizes_and_types(kernels, kind, order):
    """The orders share the cases out among them; under a sanitizer every thirteenth."""
    table = FULL[ORDERS.index(order)::len(ORDERS)]
    with kernels(kind, order) as process:
        run_all(process, table if kind == 'plain' else table[::13])


def test_many_anchors_take_the_large_tiles(kernels):
    """From 8192 anchors in all heads a block owns 64 of them, unless the caller sets another number."""
    anchors, labels, candidates = features_of(1025, 70, 5, torch.float32, heads=8, classes=9)
    with kernels('plain') as process:
        results = [batch_hard(process, anchors, labels, *candidates, tile=tile) for tile in (0, 64, 16)]
    expected = batch_hard_reference(anchors, labels, *candidates)
    for mined, loss, _, (to_anchors, to_candidates) in results:
        assert torch.equal(mined.pos_idx, expected[2]) and torch.equal(mined.neg_idx, expected[3])
        torch.testing.assert_close(loss, triplet_loss_reference(*expected, 0.3)[0], rtol=1e-5, atol=0)
        first = *results[0][0], *results[0][3]
        assert all(torch.equal(*pair) for pair in zip((*mined, to_anchors, to_candidates), first))


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(largest=40))
def test_random_cases(kernels, case):
    anchors, labels, candidates, candidate_labels, margin = case
    anchors = anchors.reshape(anchors.shape[:-2].numel(), *anchors.shape[-2:])
    if candidates is not None:
        candidates = candidates.reshape(len(anchors), *candidates.shape[-2:])
    with kernels('plain', '7') as process:
        check(process, anchors, labels, () if candidates is None else (candidates, candidate_labels), margin)


EMPTY = [(2, 0, None, 3), (2, 0, 5, 3), (2, 5, 0, 3), (2, 5, None, 0), (0, 5, None, 3)]


@pytest.mark.parametrize('heads, n, m, width', EMPTY)
def test_empty_batches(kernels, heads, n, m, width):
    for kind in ('plain', 'address'):
        with kernels(kind) as process:
            anchors, labels, candidates = features_of(n, m, width, torch.float32, heads)
            check(process, anchors, labels, candidates)
            check(process, anchors, labels, candidates, entries=sorted_always)


def test_ties_go_to_the_lowest_index(kernels):
    anchors, labels, candidates = features_of(50, 130, 4, torch.float32)
    anchors, candidates = anchors.round().clamp(-1, 1), (candidates[0].round().clamp(-1, 1), candidates[1])
    for order in ORDERS:
        with kernels('plain', order) as process:
            mined = batch_hard(process, anchors, labels, *candidates)[0]
        expected = naive(anchors, labels, *candidates)
        assert mined.pos_idx.tolist() == expected[2].tolist() and mined.neg_idx.tolist() == expected[3].tolist()


@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('where', ['anchor', 'candidate'])
def test_no_odd_feature_is_silently_passed_over(kernels, dtype, value, where):
    anchors, labels, (candidates, candidate_labels) = features_of(20, 70, 9, dtype, classes=3)
    (anchors if where == 'anchor' else candidates)[1, 7, 3] = value
    expected = batch_hard_reference(anchors, labels, candidates, candidate_labels)
    with kernels('plain', 'reverse') as process:
        mined, loss, slope, gradients = batch_hard(process, anchors, labels, candidates, candidate_labels)
    odd = (torch.arange(20) == 7) if where == 'anchor' else (labels == candidate_labels[7]), (
        torch.arange(20) == 7) if where == 'anchor' else (labels != candidate_labels[7])
    for dist, idx, want, want_idx, is_odd in zip(mined[:2], mined[2:], expected[:2], expected[2:], odd):
        assert dist[1].isnan().tolist() == is_odd.tolist() and (idx[1] == -1).tolist() == is_odd.tolist()
        torch.testing.assert_close(dist, want, rtol=1e-6, atol=0, equal_nan=True)
        assert torch.equal(idx, want_idx)
    assert loss[0].isfinite() and loss[1].isnan()
    assert gradients[0][0].isfinite().all() and gradients[0][1, odd[0] | odd[1]].isnan().all()


@pytest.mark.parametrize('label', [0, 1])
def test_an_odd_candidate_makes_the_loss_nan_where_it_is_all_there_is(kernels, label):
    """Its own pair is NaN, and of the other kind there is none."""
    anchors, labels = random_features(1, 5, 9), torch.zeros(5, dtype=torch.int64)
    with kernels('plain') as process:
        mined, loss, _, (gradient, _) = batch_hard(process, anchors, labels, torch.full((1, 1, 9), torch.nan),
                                                   torch.tensor([label]))
    assert loss.isnan().all() and gradient.isnan().all()
    assert mined[label].isnan().all() and mined[1 - label].isinf().all()


@pytest.mark.parametrize('kind', ['plain', pytest.param('address', marks=pytest.mark.long)])
def test_squares_beyond_the_range_of_their_type(kernels, kind):
    """Distances that float32 holds and squares that it does not, and the same of float64."""
    with kernels(kind) as process:
        for dtype, exponent in ((torch.float32, 25), (torch.float64, 200)):
            for scale in (10.0 ** exponent, 10.0 ** -exponent):
                anchors, labels, candidates = features_of(20, 70, 9, torch.float64)
                scaled = (scale * candidates[0]).to(dtype), candidates[1]
                check(process, (scale * anchors).to(dtype), labels, scaled, with_loss=False)


def check_distances(process, x, y, metric):
    got, want = pairwise_distance(process, x, y, metric), pairwise_distance_reference(x, y, metric)
    torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-12 if x.dtype == torch.float64 else 1e-6,
                               atol=1e-20 * (metric == 'cosine'), equal_nan=True)


# Rows, columns, dimensions: around the 64 × 64 × 32 of a tile.
DISTANCES = list(itertools.product([(1, 70, 33), (65, 3, 1), (64, 64, 32), (5, 66, 70)], TYPES, METRICS))


def odd_rows(dtype):
    """Near duplicates far from the origin, duplicates, zeros, values whose squares overflow, NaN and infinity."""
    x, y = (1e2 + random_features(rows, 9, dtype=torch.float64, seed=rows) for rows in (20, 70))
    y[:20] = x + 1e-3 * y[:20]
    y[20:30], y[30] = x[:10], 0
    exponent = {torch.float64: 180, torch.float16: 2}.get(dtype, 30)
    x[15] *= 10.0 ** exponent
    x[16:18] *= 10.0 ** -exponent
    y[40:42] = x[16:18] * 1.5
    x[18, 3], x[19, 4], y[31, 5] = torch.inf, torch.nan, -torch.inf
    return x.to(dtype), y.to(dtype)


OF_DISTANCES = [('plain', 'forward'), ('plain', 'reverse'), ('plain', '1'), ('address', 'forward'),
                pytest.param('thread', '1', marks=pytest.mark.long)]


@pytest.mark.parametrize('kind, order', OF_DISTANCES)
def test_distances(kernels, kind, order):
    with kernels(kind, order, 'pairwise_distance') as process:
        for (n, m, width), dtype, metric in DISTANCES[::1 if kind == 'plain' else 5]:
            x, y = random_features(n, width, dtype=dtype), random_features(m, width, dtype=dtype, seed=1)
            check_distances(process, x, y, metric)
        for dtype, metric in itertools.product(TYPES, METRICS):
            check_distances(process, *odd_rows(dtype), metric)
        for n, m, width in ((0, 3, 2), (3, 0, 2), (3, 4, 0)):
            check_distances(process, torch.ones(n, width), torch.ones(m, width), 'cosine')


def check_gradients(process, x, y, metric):
    """Of x, and of y by the transposed matrices, against the torch operations that CPUs run."""
    dist = pairwise_distance_reference(x, y, metric)
    dist = dist.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    grad = random_features(len(x), len(y), dtype=dist.dtype, seed=2) + 0.5
    coarse = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[x.dtype]
    for rows, others, matrices in ((x, y, (dist, grad)), (y, x, (dist.T, grad.T))):
        expected = torch.ops.mgn.pairwise_distance_gradient(
            rows, others, matrices[0] if metric == 'euclidean' else None, matrices[1], metric)
        got = pairwise_distance(process, rows, others, metric, matrices)
        torch.testing.assert_close(got, expected, rtol=coarse, atol=coarse * expected.abs().nan_to_num(0, 0, 0).max(),
                                   equal_nan=True)


# Around 8 rows x, 64 rows y and 256 dimensions of a block.
GRADIENTS = list(itertools.product([(1, 70, 33), (9, 64, 257), (17, 5, 256)], TYPES, METRICS))


@pytest.mark.parametrize('kind, order', OF_DISTANCES)
def test_gradients_of_distances(kernels, kind, order):
    with kernels(kind, order, 'pairwise_distance') as process:
        for (n, m, width), dtype, metric in GRADIENTS[::1 if kind == 'plain' else 4]:
            x, y = random_features(n, width, dtype=dtype), random_features(m, width, dtype=dtype, seed=1)
            y[0] = x[0]
            check_gradients(process, x, y, metric)
        for metric in METRICS:  # far from the origin: nothing cancels
            x = 100 + random_features(5, 40, dtype=torch.float64)
            check_gradients(process, x, torch.cat((x + 1e-6 * x.flip(0), x, 0 * x)), metric)
            check_gradients(process, *odd_rows(torch.float64), metric)


@pytest.mark.parametrize('metric', METRICS)
def test_gradients_of_no_rows_and_of_rows_without_dimensions(kernels, metric):
    with kernels('address', of='pairwise_distance') as process:
        for n, m, width in ((0, 3, 2), (3, 0, 2), (3, 4, 0)):
            matrices = torch.zeros(n, m), torch.ones(n, m)
            got = pairwise_distance(process, torch.ones(n, width), torch.ones(m, width), metric, matrices)
            assert got.shape == (n, width) and (got == 0).all()


def test_no_split_of_the_candidates_changes_a_bit(kernels):
    """Tiny and huge squares among them: what is then selected in double depends on the best of all parts."""
    for dtype, exponent in ((torch.float32, 25), (torch.float64, 200)):
        anchors, labels, (candidates, of_candidates) = features_of(20, 200, 9, torch.float64, heads=1)
        candidates[0, 60:70], candidates[0, 70] = anchors[0, :10], 0
        scale = torch.full((200,), 1.0, dtype=torch.float64)
        scale[::9], scale[1::9] = 10.0 ** exponent, 10.0 ** -exponent
        anchors[0, 15:] *= 10.0 ** -exponent
        candidates = (candidates * scale[:, None]).to(dtype)
        with kernels('plain', '1') as process:
            results = [batch_hard(process, anchors.to(dtype), labels, candidates, of_candidates, tile=tile, parts=parts)
                       for tile, parts in ((16, 1), (16, 2), (16, 3), (64, 1), (64, 4), (64, 7))]
        assert_mined(results[0][0], anchors.to(dtype), labels, candidates, of_candidates)
        for mined, loss, slope, gradients in results:
            first = *results[0][0], *results[0][1:3], *results[0][3]
            assert all(torch.equal(*pair) for pair in zip((*mined, loss, slope, *gradients), first))


@pytest.mark.parametrize('heads, n, m, multiprocessors, expected', [
    (3, 64, 64, 132, (16, 4, 1)),       # one tile of candidates: nothing to split
    (1, 1024, 1024, 132, (16, 64, 4)),  # 256 blocks of four tiles
    (1, 2048, 2048, 132, (64, 32, 8)),
    (8, 8192, 8192, 132, (64, 128, 1)),
    (1, 16, 100_000, 132, (16, 1, 261)),
    (1, 5, 0, 132, (16, 1, 1)),
])
def test_every_multiprocessor_has_work(kernels, heads, n, m, multiprocessors, expected):
    with kernels('plain') as process:
        printed = start(process.args[-1], heads, n, m, multiprocessors).communicate()[0].decode()
    anchors, tiles, parts = plan = tuple(map(int, printed.split()))
    assert plan == expected and heads * tiles * parts >= min(multiprocessors, heads * tiles * -(-m // 64))


def test_the_cuda_module_takes_what_python_passes():
    """Tensors of the CPU get as far as the search for a kernel of their device: the arguments fit the schema."""
    if native.missing('_cuda'):
        pytest.skip(native.missing('_cuda'))
    x, y, grad = torch.ones(3, 4), torch.ones(5, 4), torch.ones(3, 5)
    items = torch.zeros(3, 2, dtype=torch.int64)
    for operator, arguments in ((torch.ops.mgn_cuda.pairwise_distance_gradient, (x, y, None, grad, 1, x)),
                                (torch.ops.mgn_cuda.select_nearest, (grad, grad[0], grad[0], 0, x[:, :2], items))):
        with pytest.raises(NotImplementedError, match="'CPU' backend"):
            operator.default(*arguments)


def test_every_line_of_the_kernels_is_run(kernels, tmp_path_factory):
    """By gcov: each line of the .cu and .cuh files that compiles to anything."""
    need('gcov', 'which counts the lines that were run')
    with kernels('coverage') as process:
        run_all(process, SHORT)
        for special in (torch.nan, 1e25, 1e-25):
            anchors, labels, candidates = features_of(20, 70, 9, torch.float32)
            candidates[0][1, 7] = special
            anchors[0] *= 1e-25
            batch_hard(process, anchors, labels, *candidates)
            anchors[0, 3] = special
            batch_hard(process, anchors, labels, *candidates)
        anchors, labels, candidates = features_of(20, None, 9, torch.float64)
        batch_hard(process, 1e-200 * anchors, labels)
        batch_hard(process, *features_of(20, 200, 9, torch.float64)[:2], parts=3)
        run_all(process, [(0, 3, 3, torch.float32, 0, 0.3, True, False)])
    with kernels('coverage', of='pairwise_distance') as process:
        for dtype, metric in itertools.product((torch.float32, torch.float64), METRICS):
            check_distances(process, *odd_rows(dtype), metric)
            check_gradients(process, *odd_rows(dtype), metric)
    folder = process.args[-1].parent
    assert missed_lines(folder, ['batch_hard', 'pairwise_distance', 'squares']) == []
