"""Batch-hard mining by loops in float64, what a right result is, and the cases that every implementation is tried
on."""

import hashlib
import math
import os

import numpy as np
import torch
from hypothesis import strategies as st

TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5,
                  torch.bfloat16: 1e-5}  # half types: of what they hold


def distances(head, candidates):
    """(N, D), (M, D) → (N, M) in float64, scaled so that no square leaves its range."""
    difference = np.abs(head[:,
                             None] - candidates[None]) if head.shape[1] else np.zeros((len(head), len(candidates), 1))
    largest = difference.max(-1, initial=0)
    with np.errstate(invalid='ignore', divide='ignore'):
        scaled = np.where(largest[..., None] > 0, difference / largest[..., None], 0)
    return largest * np.sqrt((scaled ** 2).sum(-1))


COMPUTED = {}  # results of naive by what they are of, for every implementation alike


def naive(anchors, labels, candidates=None, candidate_labels=None):
    """(..., N, D) finite features → dist_ap, dist_an, pos_idx, neg_idx as lists of one list per head, a pair at a
    time."""
    given = [x if x is None else (x.double() if x.is_floating_point() else x).detach().cpu()
             for x in (anchors, labels, candidates, candidate_labels)]
    of = hashlib.sha256(b''.join(b'none' if x is None else f'{x.dtype} {x.shape}'.encode() + x.numpy().tobytes()
                                 for x in given)).digest()
    if of not in COMPUTED:
        COMPUTED[of] = naive_anew(anchors, labels, candidates, candidate_labels)
    return tuple(column.copy() for column in COMPUTED[of])


def naive_anew(anchors, labels, candidates, candidate_labels):
    candidates, candidate_labels = (anchors, labels) if candidates is None else (candidates, candidate_labels)
    heads = math.prod(anchors.shape[:-2])
    of_anchors = anchors.detach().cpu().double().numpy().reshape(heads, *anchors.shape[-2:])
    of_candidates = candidates.detach().cpu().double().numpy().reshape(heads, *candidates.shape[-2:])
    labels, candidate_labels = labels.tolist(), candidate_labels.tolist()
    results = []
    for x, y in zip(of_anchors, of_candidates):
        for label, row in zip(labels, distances(x, y)):
            ap, an, pos, neg = -math.inf, math.inf, -1, -1
            for j, (other, dist) in enumerate(zip(candidate_labels, row.tolist())):
                if other == label and (pos < 0 or dist > ap):
                    ap, pos = dist, j
                if other != label and (neg < 0 or dist < an):
                    an, neg = dist, j
            results.append((ap, an, pos, neg))
    columns = np.array(results, dtype=np.float64).reshape(heads, len(labels), 4)
    return columns[..., 0], columns[..., 1], columns[..., 2].astype(int), columns[..., 3].astype(int)


def naive_loss(dist_ap, dist_an, margin):
    """Distances (heads, N) of naive → losses (heads,)."""
    losses = []
    for ap_row, an_row in zip(dist_ap.tolist(), dist_an.tolist()):
        terms = []
        for ap, an in zip(ap_row, an_row):
            if ap == -math.inf or an == math.inf:
                continue
            gap = ap - an + (margin or 0)
            terms.append(max(gap, 0.0) + (math.log1p(math.exp(-abs(gap))) if margin is None else 0.0))
        losses.append(sum(terms) / len(terms) if terms else 0.0)
    return losses


def assert_mined(got, anchors, labels, candidates=None, candidate_labels=None):
    """The result is of hardest pairs to within the type's error, measured on those very pairs, the first of
    duplicates."""
    tolerance = RELATIVE_ERROR[anchors.dtype]
    wide = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    assert got.dist_ap.dtype == got.dist_an.dtype == wide and got.pos_idx.dtype == got.neg_idx.dtype == torch.int64
    assert all(tensor.shape == anchors.shape[:-1] for tensor in got)
    expected = naive(anchors, labels, candidates, candidate_labels)
    y, candidate_labels = (anchors, labels) if candidates is None else (candidates, candidate_labels)
    heads = math.prod(anchors.shape[:-2])
    x, y = (rows.detach().cpu().double().numpy().reshape(heads, *rows.shape[-2:]) for rows in (anchors, y))
    labels, candidate_labels = np.array(labels.tolist()), np.array(candidate_labels.tolist())
    for positive, dist, idx, best, best_idx in ((True, got.dist_ap, got.pos_idx, expected[0], expected[2]),
                                                (False, got.dist_an, got.neg_idx, expected[1], expected[3])):
        dist, idx = dist.detach().cpu().double().numpy().reshape(best.shape), idx.cpu().numpy().reshape(best.shape)
        np.testing.assert_array_equal(idx < 0, best_idx < 0)
        np.testing.assert_array_equal(dist[idx < 0], best[idx < 0])
        np.testing.assert_allclose(dist, best, rtol=tolerance)
        for head, i in zip(*np.nonzero(idx >= 0)):
            j = idx[head, i]
            assert j < len(candidate_labels) and (candidate_labels[j] == labels[i]) == positive
            np.testing.assert_allclose(dist[head, i], distances(x[head, i:i + 1], y[head, j:j + 1])[0, 0],
                                       rtol=max(tolerance / 10, 1e-14))
            same = (y[head, :j] == y[head, j]).all(-1) & ((candidate_labels[:j] == labels[i]) == positive)
            assert not same.any(), f'candidate {j} was taken, its duplicate {same.argmax()} stands before it'


def random_features(*shape, dtype=torch.float32, seed=0, device='cpu'):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def random_labels(n, classes=4, seed=0, device='cpu'):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed)).to(device)


def random_candidates(heads, m, width, dtype=torch.float32, classes=4, device='cpu'):
    """(features, labels) of M candidates; () for m None: none, so the anchors are their own."""
    return () if m is None else (random_features(*heads, m, width, dtype=dtype, seed=1, device=device),
                                 random_labels(m, classes, 1, device))


def examples(usual):
    """How many random cases hypothesis tries: half of the usual, `make long` asks for 10 times the usual."""
    return max(int(usual * float(os.environ.get('MGN_TIMES', 0.5))), 1)


@st.composite
def cases(draw, largest=70):
    """(anchors, labels, candidates or None, their labels or None, margin): sizes, types, ties, duplicates, scales,
    offsets."""
    dtype = draw(st.sampled_from(TYPES))
    heads = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    n, width = draw(st.integers(0, largest)), draw(st.sampled_from([0, 1, 3, 31, 33, 130]))
    m = draw(st.one_of(st.none(), st.integers(0, largest)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(['normal', 'small integers', 'duplicates', 'far', 'tiny', 'huge', 'collapsed']))

    def features(rows):
        x = torch.randn(*heads, rows, width, generator=generator, dtype=torch.float64)
        if kind == 'small integers':
            x = x.round().clamp(-1, 1)
        elif kind == 'duplicates' and rows:
            x = x[..., torch.randint(max(rows // 3, 1), (rows,), generator=generator), :]
        elif kind == 'far':
            x = 1e3 + 1e-2 * x
        elif kind in ('tiny', 'huge'):  # squares leave the range of float32, or of float64
            exponent = {torch.float64: 200, torch.float16: 4}.get(dtype, 25)
            x = x * 10.0 ** (exponent if kind == 'huge' else -exponent)
        elif kind == 'collapsed':
            x = torch.ones_like(x)
        return x.to(dtype)

    classes = draw(st.sampled_from([1, 2, 5, 100]))
    anchors, labels = features(n), torch.randint(classes, (n,), generator=generator)
    candidates, candidate_labels = (None, None) if m is None else (features(m),
                                                                   torch.randint(classes, (m,), generator=generator))
    return anchors, labels, candidates, candidate_labels, draw(st.sampled_from([None, 0.0, 0.3, 1.2]))
