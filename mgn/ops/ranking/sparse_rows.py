"""What the kernels of re-ranking do with sparse rows, in NumPy: the same arguments, the same bits.

Sparse rows are offsets (n+1,) int64, columns int32, ascending within a row, and values float64.
"""

import numpy as np
import torch


def reciprocal(items, half):
    """Expanded k-reciprocal neighbours of every row.

    items: (N, k1 + 1) int64, nearest first. half: how many of a neighbour's own are looked at.
    """
    items = items.numpy()

    def mutual(i, k):
        near = items[i, :k]
        return near[(items[near, :k] == i).any(1)]
    rows = []
    for i in range(len(items)):
        own = mutual(i, items.shape[1])
        expanded = [own]
        for j in own:
            others = mutual(j, half)
            if 3 * np.isin(others, own).sum() > 2 * len(others):
                expanded.append(others)
        rows.append(np.unique(np.concatenate(expanded)))
    return joined(rows)


def mean_rows(offsets, columns, values, items):
    """Means of the rows that items (N, k2) name."""
    near = ((row_of(offsets, columns, values, row) for row in rows) for rows in items.numpy())
    starts, touched, sums = sums_of(near, len(offsets) - 1)
    return starts, touched, sums / items.shape[1]


def transpose(offsets, columns, values, width):
    order = np.argsort(columns.numpy(), kind='stable')
    rows = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets.numpy()))
    starts = np.concatenate(([0], np.cumsum(np.bincount(columns.numpy(), minlength=width))))
    return torch.from_numpy(starts), torch.from_numpy(rows[order]), values[torch.from_numpy(order)]


def overlap(offsets, columns, values, column_offsets, column_rows, column_values, items):
    """Jaccard distances of each row to those of `items` others, given as columns, that it overlaps; sparse rows."""
    def minima(row):
        for column, value in zip(*row_of(offsets, columns, values, row)):
            others, other_values = row_of(column_offsets, column_rows, column_values, column)
            yield others, np.minimum(value, other_values)
    offsets, others, shared = sums_of(map(minima, range(len(offsets) - 1)), items)
    return offsets, others, 1 - shared / (2 - shared)


def sums_of(rows, width):
    """Sparse rows of `width` columns, each the sum of several (columns, values)."""
    dense, columns, sums = np.zeros(width), [], []
    for terms in rows:
        touched = [np.empty(0, np.int32)]
        for term_columns, term_values in terms:
            dense[term_columns] += term_values
            touched.append(term_columns)
        columns.append(np.unique(np.concatenate(touched)))
        sums.append(dense[columns[-1]])
        dense[columns[-1]] = 0
    return *joined(columns), flat(sums, np.float64)


def row_of(offsets, columns, values, row):
    part = slice(offsets[row], offsets[row + 1])
    return columns[part].numpy(), values[part].numpy()


def joined(rows):
    return torch.from_numpy(np.cumsum([0, *map(len, rows)])), flat(rows, np.int32)


def flat(rows, dtype):
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *rows]).astype(dtype))
