"""What the kernels of re-ranking do with sparse rows, in NumPy: the same arguments, the same bits; and the published formula, dense.

Sparse rows are offsets (n+1,) int64, columns int32, ascending within a row, and values float64.
"""

import numpy as np
import torch


def reciprocal(items, half):
    """Expanded k-reciprocal neighbours of every row. items: (N, k1 + 1) int64, nearest first. half: how many are asked of a neighbour."""
    items = items.numpy()

    def mutual(i, k):
        near = items[i, :k]
        return near[(items[near, :k] == i).any(1)]
    rows = []
    for i in range(len(items)):
        own = mutual(i, items.shape[1])
        expanded = [own]
        for j in own:
            of_other = mutual(j, half)
            if 3 * np.isin(of_other, own).sum() > 2 * len(of_other):
                expanded.append(of_other)
        rows.append(np.unique(np.concatenate(expanded)))
    return together(rows)


def mean_rows(offsets, columns, values, items):
    """Means of the rows that items (N, k2) name."""
    dense, rows, means = np.zeros(len(offsets) - 1), [], []
    for near in items.numpy():
        touched = []
        for row in near:
            of, found = of_row(offsets, columns, values, row)
            dense[of] += found
            touched.append(of)
        rows.append(np.unique(np.concatenate(touched)))
        means.append(dense[rows[-1]] / len(near))
        dense[rows[-1]] = 0
    return *together(rows), flat(means, np.float64)


def transpose(offsets, columns, values, width):
    order = np.argsort(columns.numpy(), kind='stable')
    rows = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets.numpy()))
    counts = np.bincount(columns.numpy(), minlength=width)
    return torch.from_numpy(np.concatenate(([0], np.cumsum(counts)))), torch.from_numpy(rows[order]), values[torch.from_numpy(order)]


def overlap(offsets, columns, values, column_offsets, column_rows, column_values, items):
    """Jaccard distances of each sparse row to those of `items` others, given as columns, that it overlaps; again as sparse rows."""
    dense, rows, jaccard = np.zeros(items), [], []
    for row in range(len(offsets) - 1):
        touched = [np.empty(0, np.int32)]
        for column, value in zip(*of_row(offsets, columns, values, row)):
            of, found = of_row(column_offsets, column_rows, column_values, column)
            dense[of] += np.minimum(value, found)
            touched.append(of)
        rows.append(np.unique(np.concatenate(touched)))
        jaccard.append(1 - dense[rows[-1]] / (2 - dense[rows[-1]]))
        dense[rows[-1]] = 0
    return *together(rows), flat(jaccard, np.float64)


def of_row(offsets, columns, values, row):
    part = slice(offsets[row], offsets[row + 1])
    return columns[part].numpy(), values[part].numpy()


def together(rows):
    return torch.from_numpy(np.cumsum([0, *map(len, rows)])), flat(rows, np.int32)


def flat(rows, dtype):
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *rows]).astype(dtype))


def final_distances(keys, squares, queries, k1=20, k2=6, lambda_value=0.3):
    """The published formula as it stands, dense, every sum in ascending order. keys: (N, N), whose order is the neighbours'; squares: (N, N)
    squared distances; row i is of item i, queries first. Returns (queries, N − queries) float64."""
    maxima = squares.max(1, keepdims=True, initial=0)
    squares = np.divide(squares, maxima, out=np.zeros_like(squares), where=maxima > 0)
    near = np.argsort(keys, 1, kind='stable')
    encodings = np.zeros_like(squares)
    for i in range(len(near)):
        own = [j for j in near[i, :k1 + 1] if i in near[j, :k1 + 1]]
        expanded = set(own)
        half = round(k1 / 2) + 1
        for j in own:
            of_other = {c for c in near[j, :half] if j in near[c, :half]}
            if len(of_other & set(own)) > 2 / 3 * len(of_other):
                expanded |= of_other
        if expanded:
            columns = sorted(expanded)
            weights = np.exp(-squares[i, columns])
            encodings[i, columns] = weights / total(weights)
    if k2 != 1 and len(near):
        encodings = np.stack([total(encodings[near[i, :k2]]) / min(k2, len(near)) for i in range(len(near))])
    smallest = np.array([[total(np.minimum(encodings[q], other)) for other in encodings[queries:]] for q in range(queries)])
    smallest = smallest.reshape(queries, len(near) - queries)
    return (1 - lambda_value) * (1 - smallest / (2 - smallest)) + lambda_value * squares[:queries, queries:]


def total(terms):
    return np.cumsum(terms, 0)[-1]  # NumPy's own sum is pairwise
