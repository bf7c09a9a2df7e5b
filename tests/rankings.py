"""Ranks by Python loops over every canonical key, sorted, and the problems that every implementation is tried on."""

import math

import numpy as np

from mgn.ops import match_ranks
from mgn.ops.ranking import product

METRICS = ['cosine', 'euclidean']


def canonical_sum(terms):
    """16 interleaved partial sums, element i into sum i mod 16, then halved; Python floats are float64."""
    sums = [0.0] * 16
    for i, term in enumerate(terms):
        sums[i % 16] += term
    for half in (8, 4, 2, 1):
        sums = [sums[j] + sums[j + half] for j in range(half)]
    return sums[0]


def naive_key(q, g, metric='cosine'):
    if metric == 'euclidean':
        return canonical_sum([(a - b) * (a - b) for a, b in zip(q, g)])
    norm_q, norm_g = (math.sqrt(canonical_sum([x * x for x in v])) for v in (q, g))
    if norm_q * norm_g == 0:
        return 0.0
    return -(canonical_sum([a * b for a, b in zip(q, g)]) / (norm_q * norm_g))


def naive_keys(query, gallery, metric='cosine'):
    """naive_key of all pairs at once, bit for bit: one element of the rows at a time, each into its partial sum. (Q, G)
    float64."""
    query, gallery = (np.asarray(features, np.float64) for features in (query, gallery))

    def sum_of(term, *shape):
        sums = np.zeros((16, *shape))
        for i in range(query.shape[1]):
            sums[i % 16] += term(i)
        for half in (8, 4, 2, 1):
            sums = sums[:half] + sums[half:]
        return sums[0]
    pairs = len(query), len(gallery)
    if metric == 'euclidean':
        return sum_of(lambda i: np.square(query[:, None, i] - gallery[:, i]), *pairs)
    norms = np.multiply.outer(*(np.sqrt(sum_of(lambda i: np.square(x[:, i]), len(x))) for x in (query, gallery)))
    dots = sum_of(lambda i: query[:, None, i] * gallery[:, i], *pairs)
    return np.where(norms == 0, 0.0, -(dots / np.where(norms == 0, 1, norms)))


def naive_ranks(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, metric='cosine', junk_pid=-1):
    """The ranks of each query, by sorting pure Python numbers."""
    gallery_pids, gallery_camids = (list(map(int, ids)) for ids in (gallery_pids, gallery_camids))
    result = []
    for keys, pid, camid in zip(naive_keys(query, gallery, metric).tolist(), map(int, query_pids),
                                map(int, query_camids)):
        ranked = []
        for index, key in enumerate(keys):
            own_view = gallery_pids[index] == pid and gallery_camids[index] == camid
            if gallery_pids[index] != junk_pid and not own_view:
                ranked.append((key, index))
        ranked.sort()
        result.append([rank for rank, (_, index) in enumerate(ranked, 1) if gallery_pids[index] == pid])
    return result


def naive_expansion(query, gallery, k, alpha):
    """α query expansion of (Q, D) and (G, D) arrays, one query and one item at a time; float64."""
    def unit(row):
        norm = np.sqrt((row * row).sum())
        return row / norm if norm else row
    query, gallery = (np.asarray(features, np.float64) for features in (query, gallery))
    expanded = np.zeros_like(query)
    for q, (row, keys) in enumerate(zip(query, naive_keys(query, gallery).tolist())):
        nearest = sorted((key, index) for index, key in enumerate(keys))[:k]
        expanded[q] = unit(unit(row) + sum(max(-key, 0) ** alpha * unit(gallery[index]) for key, index in nearest))
    return expanded


def ranks_of(*args, **options):
    offsets, ranks, _ = match_ranks(*args, **options)
    assert offsets.dtype == ranks.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(ranks)
    return [ranks[a:b].tolist() for a, b in zip(offsets, offsets[1:])]


def problem(Q, G, D, pids=5, cameras=3, seed=0, levels=None):
    """Random features and ids; with `levels`, features of few values, so that many keys are equal."""
    rng = np.random.default_rng(seed)
    query, gallery = (rng.standard_normal((n, D)) for n in (Q, G))
    if levels:
        query, gallery = (np.round(x * levels / 2) for x in (query, gallery))
    return (query.astype(np.float32), gallery.astype(np.float32), rng.integers(0, pids, Q), rng.integers(0, pids, G),
            rng.integers(0, cameras, Q), rng.integers(0, cameras, G))


def near_ties(Q, G, D, seed=0, pids=3):
    """Queries of equal elements, gallery rows that permute one of three: keys equal but for the order of rounding."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((3, D)).astype(np.float32)
    gallery = np.stack([rng.permutation(rows[i % 3]) for i in range(G)])
    gallery[G // 2:] = gallery[rng.integers(0, G // 2, G - G // 2)]  # and exact duplicates
    query = np.repeat(rng.standard_normal((Q, 1)).astype(np.float32), D, 1)
    gallery_pids = rng.integers(0, pids, G)
    query_pids = gallery_pids[rng.integers(0, G, Q)]
    return query, gallery, query_pids, gallery_pids, rng.integers(0, 2, Q), rng.integers(1, 3, G)


def extremes(Q, G, D, seed=0):
    """Rows of very different norms: huge, denormal, zero, duplicates of each other."""
    query, gallery, *ids = problem(Q, G, D, seed=seed)
    scales = np.array([1, 1e20, 1e-20, 1e-41, 0, 3e37, 1e-38], np.float32)
    query, gallery = (x * scales[np.arange(len(x)) % len(scales), None] for x in (query, gallery))
    gallery[G // 2:G // 2 + 3] = gallery[:3]
    return query, gallery, *ids


def same(a, b):
    """Whether two MatchRanks are the same ranks."""
    return np.array_equal(a.offsets, b.offsets) and np.array_equal(a.ranks, b.ranks)


def clustered(Q=40, G=3000, D=64, pids=60, seed=0, copies=300):
    """Features as training leaves them, and many non-matches near each match; naive loops would take too long."""
    rng = np.random.default_rng(seed)
    centres, basis = rng.standard_normal((pids, 8)), rng.standard_normal((8, D))
    ids = rng.integers(0, pids, Q), rng.integers(-1, pids, G), rng.integers(0, 3, Q), rng.integers(0, 3, G)
    query, gallery = ((centres[of] + rng.standard_normal((len(of), 8))) @ basis for of in ids[:2])
    gallery[rng.integers(0, G, copies)] = gallery[rng.integers(0, G, copies)]
    return query.astype(np.float32), gallery.astype(np.float32), *ids


def published_distances(keys, squares, queries, k1=20, k2=6, lambda_value=0.3):
    """The published formula of k-reciprocal re-ranking as it stands, dense, every sum in ascending order.

    keys: (N, N), whose order is the neighbours'; squares: (N, N) squared distances; row i is of item i, queries first.
    Returns (queries, N − queries) float64.
    """
    maxima = squares.max(1, keepdims=True, initial=0)
    squares = np.divide(squares, maxima, out=np.zeros_like(squares), where=maxima > 0)
    near = np.argsort(keys, 1, kind='stable')
    encodings = np.zeros_like(squares)
    for i in range(len(near)):
        own = [j for j in near[i, :k1 + 1] if i in near[j, :k1 + 1]]
        expanded = set(own)
        half = round(k1 / 2) + 1
        for j in own:
            others = {c for c in near[j, :half] if j in near[c, :half]}
            if len(others & set(own)) > 2 / 3 * len(others):
                expanded |= others
        if expanded:
            columns = sorted(expanded)
            weights = np.exp(-squares[i, columns])
            encodings[i, columns] = weights / ascending_sum(weights)
    if k2 != 1 and len(near):
        encodings = np.stack([ascending_sum(encodings[near[i, :k2]]) / min(k2, len(near)) for i in range(len(near))])
    smallest = np.array([[ascending_sum(np.minimum(encodings[q], other)) for other in encodings[queries:]]
                         for q in range(queries)]).reshape(queries, len(near) - queries)
    return (1 - lambda_value) * (1 - smallest / (2 - smallest)) + lambda_value * squares[:queries, queries:]


def ascending_sum(terms):
    return np.cumsum(terms, 0)[-1]  # NumPy's own sum is pairwise


def on_tensor_cores(monkeypatch, products=None):
    """Every precision filters on the CPU too: products(q, g) of rounded operands, float32's unless given."""
    take, products_of = products or (lambda q, g: q @ g.T), product.products_of
    monkeypatch.setattr(product, 'available',
                        lambda precision, device, width: 'float32' if precision == 'auto' or not width else precision)
    monkeypatch.setattr(product, 'products_of', lambda query, precision, room: (
        products_of(query, precision, room) if precision == 'float32' else lambda items: (take(query, items), None)))


def by_torch(monkeypatch, products=None):
    """Float32 products are not our own kernel's, but torch's, or those of products(q, g)."""
    monkeypatch.setattr(product, 'own_kernels', lambda device: None)
    if products:
        monkeypatch.setattr(product, 'by_torch', products)
