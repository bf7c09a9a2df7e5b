"""Matrices taken tile by tile: how large a tile is, its rows as the kernels read them, and files read ahead."""

import contextlib
import ctypes
import functools
import mmap

import numpy as np
import torch

from mgn.ops.errors import UserError

PRODUCTS = 2 ** 22           # of a tile: 16 MB
ITEMS = 2048                 # of a tile, at most
OPERANDS = 2 ** 23           # elements of a tile's queries and of its items, where they are converted: 32 MB each
NEAR = 4                     # rows apart that are read from a file together


def spans(count, step):
    step = max(step, 1)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def is_readable(matrix, types=(torch.float32,)):
    """Whether the kernels read it as it lies: one of the types, contiguous along its rows."""
    return matrix.dtype in types and (matrix.shape[1] <= 1 or matrix.stride(1) == 1)


def rows(features, part):
    """The part as the kernels read it, float32; a view wherever it is so already."""
    part = features[part].float()
    return part if is_readable(part) else part.contiguous()


def tile_of(query, gallery):
    """(items, queries) of a tile: products that stay in a GPU's second-level cache, features that fit if converted."""
    products = PRODUCTS
    if query.is_cuda:
        products = min(max(2 ** 20, torch.cuda.get_device_properties(query.device).L2_cache_size // 8), 2 ** 23)
    features = max(1, OPERANDS // max(query.shape[1], 1))
    items = min(ITEMS, features)
    return items, min(features, products // items)


def blocks_of(dist):
    """(slice, rows) of a matrix of distances as the kernels read them, float32 or float64; one block where they are."""
    readable = is_readable(dist, (torch.float32, torch.float64))
    for block in spans(len(dist), len(dist) if readable else OPERANDS // max(dist.shape[1], 1)):
        distances = dist[block]
        if not readable:
            distances = distances.to(torch.promote_types(dist.dtype, torch.float32)).contiguous()
        yield block, distances


def refuse_nan(row, distances, block):
    """UserError with the place of NaN in the row that a kernel names; −1 where there is none."""
    if row >= 0:
        column = distances[row].isnan().nonzero()[0].item()
        raise UserError(f'Distances must be numbers, but row {block.start + row}, column {column} is NaN; '
                        'look for what made it')


@contextlib.contextmanager
def denormals():
    """Denormals are numbers on this thread, whatever torch.set_flush_denormal has made of them."""
    flushed = np.array([1], np.uint32).view(np.float32).astype(np.float64)[0] == 0
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(bool(flushed))


def read_ahead(features, runs):
    """Has the system begin to read rows first … last − 1 of each run (first, last), where they lie in a mapped file."""
    advise = memory_advice()
    if advise is None or features.device.type != 'cpu' or features.numel() == 0 or features.stride(1) != 1:
        return
    edges = features.data_ptr() + np.asarray(runs) * (features.stride(0) * features.element_size())
    begin, end = edges[:, 0] // mmap.PAGESIZE * mmap.PAGESIZE, edges[:, 1]
    for address, length in zip(begin.tolist(), (end - begin).tolist()):
        advise(address, length, mmap.MADV_WILLNEED)


def runs_of(items):
    """Runs (first, last) of rows, n×2, from their numbers, ascending; near ones together with what lies between."""
    apart = np.flatnonzero(np.diff(items) > NEAR) + 1
    return np.stack((items[np.r_[0, apart]], items[np.r_[apart - 1, -1]] + 1), axis=1)


@functools.cache
def memory_advice():
    """The C library's madvise, None where there is none."""
    if not hasattr(mmap, 'MADV_WILLNEED'):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
