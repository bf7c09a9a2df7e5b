"""Random small cases of each operation against loops in float64: ties, duplicates, zeros, strides, half types."""

import math

import numpy as np
import pytest
import test_batch_hard
import test_metrics
import test_pairwise_distance
import test_ranks_from_distance
import test_reranking
import test_topk
import torch
from implementations import IMPLEMENTATIONS, run_as
from mining import RELATIVE_ERROR, TYPES, assert_mined, naive, naive_loss
from rankings import METRICS, naive_expansion, naive_ranks, ranks_of, same

from benchmarks.reliability.driver import Row
from mgn import ops
from mgn.ops.arguments import PRECISIONS
from mgn.ops.errors import UserError

WIDTHS = 0, 1, 2, 5, 16, 17, 33, 70
KINDS = 'normal', 'levels', 'duplicates', 'zeros', 'near ties', 'scales', 'denormal'


def any_of(rng, choices):
    return choices[rng.integers(len(choices))]


def rows(rng, n, D, kind):
    """(n, D) float32."""
    x = rng.standard_normal((n, D))
    if kind == 'levels':
        x = np.round(x)
    elif kind == 'duplicates' and n:
        x = x[rng.integers(0, max(n // 3, 1), n)]
    elif kind == 'zeros':
        x *= rng.random((n, 1)) < 0.5
    elif kind == 'near ties' and n:  # equal but for the order of rounding
        x = rng.permuted(np.repeat(x[:1], n, 0), axis=1)
    elif kind == 'scales':
        x *= 10.0 ** rng.integers(-40, 37, (n, 1))
    elif kind == 'denormal':
        x *= 1e-41
    return x.astype(np.float32)


def passed(rng, x):
    """A matrix of any strides and type as users pass it, and the float64 numbers that this one holds."""
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    forms = [lambda: x, lambda: np.asfortranarray(x), lambda: np.repeat(x, 2, 0)[::2], lambda: x[::-1],
             lambda: np.repeat(x, 2, 1)[:, ::2], lambda: tensor, lambda: tensor.repeat_interleave(2, 1)[:, ::2],
             lambda: tensor.T.contiguous().T]
    if np.abs(x).max(initial=0) < 6e4:
        forms += [lambda: x.astype(np.float16), tensor.half, tensor.bfloat16]
    form = any_of(rng, forms)()
    return form, form.double().numpy() if isinstance(form, torch.Tensor) else form.astype(np.float64)


def ids_of(rng, Q, G):
    """Identities and cameras as users pass them; few, or spread over all of int64."""
    values = [any_of(rng, [lambda: rng.integers(-1, 4, n), lambda: rng.integers(0, 2, n),
                           lambda: any_of(rng, [-2 ** 63, -1, 2 ** 63 - 1]) * (rng.integers(0, 2, n) > 0)])()
              for n in (Q, G)] + [rng.integers(0, 3, n) for n in (Q, G)]
    form = any_of(rng, [lambda v: v, lambda v: v.tolist(), torch.from_numpy])
    return [form(np.asarray(v, np.int64)) for v in values]


def problem(rng, Q=6, G=40):
    """What is passed as query and gallery, the float64 numbers of both, ids and common options."""
    Q, G, D = rng.integers(0, Q), rng.integers(0, G), any_of(rng, WIDTHS)
    both = rows(rng, Q + G, D, any_of(rng, KINDS))
    (query, of_query), (gallery, of_gallery) = passed(rng, both[:Q]), passed(rng, both[Q:])
    options = {'metric': any_of(rng, METRICS), 'junk_pid': any_of(rng, [-1, 0, None])}
    return query, gallery, of_query, of_gallery, ids_of(rng, Q, G), options


def match_ranks(rng):
    query, gallery, of_query, of_gallery, ids, options = problem(rng)
    assert (ranks_of(query, gallery, *ids, **options, precision=any_of(rng, PRECISIONS))
            == naive_ranks(of_query, of_gallery, *ids, **options))


def k_reciprocal_ranks(rng):
    query, gallery, of_query, of_gallery, ids, options = problem(rng, 4, 16)
    k1, k2, weight = int(rng.integers(1, 9)), int(rng.integers(1, 9)), any_of(rng, [0, 1e-12, 0.1, 0.3, 1])
    got = ops.k_reciprocal_ranks(query, gallery, *ids, k1, k2, weight, **options)
    assert same(got, test_reranking.naive(*(x.astype(np.float32) for x in (of_query, of_gallery)), ids, k1, k2, weight,
                                          **options))


def matrix(rng, Q, G):
    """A matrix of distances, of any type and strides, and its float64 numbers."""
    x = rows(rng, Q, G, any_of(rng, KINDS))
    if rng.random() < 0.2:
        x[rng.random(x.shape) < 0.3] = any_of(rng, [np.inf, -np.inf])
    return passed(rng, x.astype(np.float64) if rng.random() < 0.3 else x)


def match_ranks_from_distance(rng):
    Q, G = rng.integers(0, 6), rng.integers(0, 40)
    (given, numbers), ids, junk_pid = matrix(rng, Q, G), ids_of(rng, Q, G), any_of(rng, [-1, 0, None])
    assert (test_ranks_from_distance.ranks_of(given, *ids, junk_pid=junk_pid)
            == test_ranks_from_distance.naive_ranks(numbers, *map(np.asarray, ids), junk_pid))


def evaluate_rank(rng):
    Q, G, longest = rng.integers(0, 6), rng.integers(1, 40), int(rng.integers(1, 50))
    (given, numbers), ids = matrix(rng, Q, G), ids_of(rng, Q, G)
    expected = Q and test_ranks_from_distance.naive_evaluate(numbers, *map(np.asarray, ids), min(longest, G))
    if not Q or not len(expected[1]):
        with pytest.raises(UserError, match='none has'):
            ops.evaluate_rank(given, *ids, max_rank=longest)
        return
    for got, want in zip(ops.evaluate_rank(given, *ids, max_rank=longest), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def topk(rng):
    query, gallery, of_query, of_gallery, _, options = problem(rng)
    metric, k, own = options['metric'], int(rng.integers(1, 50)), rng.random() < 0.3
    if own:
        query, of_query = gallery, of_gallery
    distances, indices = map(np.asarray, ops.topk(query, gallery, k, metric, any_of(rng, PRECISIONS), exclude_self=own))
    expected, keys = test_topk.naive(of_query, of_gallery, k, metric, own)
    assert indices.tolist() == expected
    keys = np.array(keys, np.float64).reshape(distances.shape)
    assert np.array_equal(distances, np.maximum(1 + keys, 0) if metric == 'cosine' else np.sqrt(keys))


def topk_from_distance(rng):
    given, numbers = matrix(rng, rng.integers(0, 6), rng.integers(0, 40))
    k = int(rng.integers(1, 50))
    distances, indices = ops.topk_from_distance(given, k)
    expected = np.argsort(numbers, 1, kind='stable')[:, :k]
    assert np.array_equal(np.asarray(indices), expected)
    distances = distances.double().numpy() if isinstance(distances, torch.Tensor) else distances
    assert np.array_equal(distances, np.take_along_axis(numbers, expected, 1))


def retrieval_metrics(rng):
    ranks = [sorted((rng.permutation(60)[:rng.integers(0, 9)] + 1).tolist()) for _ in range(rng.integers(0, 9))]
    if not any(ranks):
        with pytest.raises(UserError, match='none has'):
            test_metrics.metrics(ranks)
    else:
        test_metrics.check_means(ranks)


def expand_queries(rng):
    query, gallery, of_query, of_gallery, _, _ = problem(rng)
    query, gallery = map(torch.as_tensor, (query.copy() if isinstance(query, np.ndarray) else query,
                                           gallery.copy() if isinstance(gallery, np.ndarray) else gallery))
    k, alpha = int(rng.integers(1, 50)), any_of(rng, [0.0, 0.5, 1.0, 3.0])
    got = ops.expand_queries(query, gallery, k, alpha)
    np.testing.assert_allclose(got.numpy(), naive_expansion(of_query, of_gallery, k, alpha), rtol=0, atol=3e-7)


def labelled(rng, heads, n, D, kind, dtype):
    """(*heads, n, D) features of any strides and n labels."""
    x = torch.from_numpy(rows(rng, math.prod(heads) * n, D, kind).astype(np.float64)).reshape(*heads, n, D)
    if kind == 'far':
        x = 1e3 + 1e-2 * x
    elif kind in ('tiny', 'huge'):  # squares leave the range of float32, or of float64
        exponent = {torch.float64: 200, torch.float16: 4}.get(dtype, 25)
        x = x * 10.0 ** (exponent if kind == 'huge' else -exponent)
    x = x.to(dtype)
    if rng.random() < 0.3:
        x = x.mT.contiguous().mT
    return x, torch.from_numpy(rng.integers(0, any_of(rng, [1, 2, 5, 100]), n))


def mining_case(rng):
    """anchors, labels, then candidates and their labels or None, None."""
    heads, D, dtype = any_of(rng, [(), (1,), (3,), (2, 2)]), any_of(rng, WIDTHS), any_of(rng, TYPES)
    kind = any_of(rng, ['normal', 'levels', 'duplicates', 'zeros', 'far', 'tiny', 'huge'])
    own = labelled(rng, heads, rng.integers(0, 20), D, kind, dtype)
    others = (None, None) if rng.random() < 0.5 else labelled(rng, heads, rng.integers(0, 20), D, kind, dtype)
    return *own, *others


def batch_hard(rng):
    case = mining_case(rng)
    assert_mined(ops.batch_hard(*case), *case)


def batch_hard_triplet_loss(rng):
    anchors, labels, candidates, candidate_labels = mining_case(rng)
    margin, given = any_of(rng, [None, 0.0, 0.3, 1.2]), (anchors, labels, candidates, candidate_labels)
    inputs = [x.requires_grad_() for x in (anchors, candidates) if x is not None]
    loss = ops.batch_hard_triplet_loss(anchors, labels, margin, candidates, candidate_labels)
    expected, tolerance = naive_loss(*naive(*given)[:2], margin), RELATIVE_ERROR[anchors.dtype]
    spread = anchors.detach().double().abs().max().item() * math.sqrt(anchors.shape[-1]) if anchors.numel() else 0
    np.testing.assert_allclose(loss.detach().reshape(-1), expected, rtol=tolerance,
                               atol=tolerance * max([1, spread, *map(abs, expected)]))
    loss.sum().backward()
    coarse = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[anchors.dtype]
    for x, want in zip(inputs, test_batch_hard.gradients(anchors, labels, margin, candidates, candidate_labels)):
        torch.testing.assert_close(x.grad.double(), want, rtol=coarse, atol=coarse)


def pairwise_distance(rng):
    dtype, D, metric = any_of(rng, TYPES), any_of(rng, WIDTHS), any_of(rng, test_pairwise_distance.METRICS)
    kind = any_of(rng, [*KINDS[:4], 'far', 'scales' if dtype != torch.float16 else 'normal'])
    n, m = rng.integers(0, 20, 2)
    both, _ = labelled(rng, (), n + m, D, kind, dtype)
    x, y = both[:n].detach().requires_grad_(), both[n:].detach().requires_grad_()
    dist = ops.pairwise_distance(x, y, metric)
    test_pairwise_distance.assert_right(dist.detach(), x.detach(), y.detach(), metric)
    if kind == 'scales':  # gradients leave the range of the type
        return
    upstream = torch.from_numpy(rng.standard_normal((n, m)))
    (dist * upstream.to(dist.dtype)).sum().backward()
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for got, want in zip((x, y), test_pairwise_distance.gradients(x, y, metric, upstream)):
        zero = (got == 0).all(1, keepdim=True) & (metric == 'cosine')  # it has no gradient there and is given 0
        largest = want[~zero.expand_as(want)].abs().max().item() if (~zero).any() and D else 0
        torch.testing.assert_close(got.grad.double(), torch.where(zero, 0, want), rtol=tolerance,
                                   atol=tolerance * max(0.1 * largest, 1e-2))


MODULES = {batch_hard: 'triplet', batch_hard_triplet_loss: 'triplet', pairwise_distance: 'distance'}


def drawn(check, rng):
    """The check as one of the implementations here, on 1, 2 or 7 threads."""
    torch.set_num_threads(any_of(rng, [1, 2, 7]))
    with pytest.MonkeyPatch.context() as patch:
        run_as(any_of(rng, IMPLEMENTATIONS), MODULES.get(check, 'ranking.keys'), patch, 'cpu')
        check(rng)


def row_of(check):
    return Row(f'`{check.__name__}`{GRADIENT.get(check, "")}', 20_000, lambda rng, folder, number: drawn(check, rng))


GRADIENT = {batch_hard_triplet_loss: ' and gradient', pairwise_distance: ' and gradient'}
ROWS = {check.__name__: row_of(check) for check in (
    batch_hard, batch_hard_triplet_loss, pairwise_distance, match_ranks, match_ranks_from_distance, topk,
    topk_from_distance, k_reciprocal_ranks, evaluate_rank, retrieval_metrics, expand_queries)}
