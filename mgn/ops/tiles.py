"""Features taken tile by tile: how large a tile is, its rows as the kernels read them, the canonical keys of single pairs."""

import contextlib
import ctypes
import functools
import mmap
import sys

import numpy as np
import torch

PRODUCTS = 2 ** 22           # of a tile: 16 MB
ITEMS = 2048                 # of a tile, at most
OPERANDS = 2 ** 23           # elements of the features of a tile, of queries and of items: 32 MB each, where they are converted
NEAR = 4                     # rows apart that are read from a file together


def spans(count, step):
    step = max(step, 1)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def rows(features, part):
    """The part as the kernels read it: float32, contiguous along D; a view wherever it is so already."""
    part = features[part].float()
    return part if part.shape[1] <= 1 or part.stride(1) == 1 else part.contiguous()


def tile_of(query, gallery):
    """(items, queries) of a tile: products that stay in the second-level cache of a GPU, features that fit where they are converted."""
    products = PRODUCTS
    if query.is_cuda:
        products = min(max(2 ** 20, torch.cuda.get_device_properties(query.device).L2_cache_size // 8), 2 ** 23)
    features = max(1, OPERANDS // max(query.shape[1], 1))
    items = min(ITEMS, features)
    return items, min(features, products // items)


def blocks_of(dist):
    """(slice, rows) of a matrix of distances as the kernels read them: float32 or float64, contiguous along a row; one block where they are."""
    readable = dist.dtype in (torch.float32, torch.float64) and (dist.shape[1] <= 1 or dist.stride(1) == 1)
    for block in spans(len(dist), len(dist) if readable else OPERANDS // max(dist.shape[1], 1)):
        some = dist[block]
        yield block, some if readable else some.to(torch.promote_types(dist.dtype, torch.float32)).contiguous()


def not_a_number(some, row, first):
    column = some[row].isnan().nonzero()[0].item()
    return ValueError(f'want distances that are numbers, got NaN at row {first + row}, column {column}; look for what made it')


def finite_norms(compiled, features, name):
    """Canonical norms (n,) float64; ValueError naming the row where a feature is not finite."""
    norms = torch.empty(len(features), dtype=torch.float64, device=features.device)
    for part in spans(len(features), OPERANDS // max(features.shape[1], 1)):
        compiled.canonical_norms(rows(features, part), norms[part])
    if not norms.isfinite().all():  # squares of float32 stay in float64's range
        raise not_finite(features, name)
    return norms


def keys_of_pairs(compiled, query, gallery, owners, items, cosine):
    """Canonical keys of (query owners[p], gallery items[p]), NumPy arrays of indices and keys. The gallery may lie on the CPU, the query elsewhere."""
    owners, items = torch.from_numpy(owners).to(query.device), torch.from_numpy(items).to(gallery.device)
    keys = torch.empty(len(items), dtype=torch.float64, device=query.device)
    readable = all(features.dtype == torch.float32 and (features.shape[1] <= 1 or features.stride(1) == 1) for features in (query, gallery))
    if readable and query.device == gallery.device:
        compiled.canonical_keys(query, gallery, owners, items, cosine, keys)
    else:
        for part in spans(len(items), OPERANDS // max(query.shape[1], 1)):
            numbers = torch.arange(part.stop - part.start, device=query.device)
            compiled.canonical_keys(rows(query, owners[part]), rows(gallery, items[part]).to(query.device), numbers, numbers, cosine, keys[part])
    return keys.cpu().numpy()


def read_ahead(features, runs):
    """Has the system begin to read rows first … last − 1 of each run (first, last) where they lie in a memory-mapped file; what is in memory stays as it is."""
    system = memory_advice()
    if system is None or features.device.type != 'cpu' or features.numel() == 0 or features.stride(1) != 1:
        return
    edges = features.data_ptr() + np.asarray(runs) * (features.stride(0) * features.element_size())
    begin, end = edges[:, 0] // mmap.PAGESIZE * mmap.PAGESIZE, edges[:, 1]
    for address, length in zip(begin.tolist(), (end - begin).tolist()):
        system(address, length, mmap.MADV_WILLNEED)


def runs_of(items):
    """Runs (first, last) of rows, n×2, from their numbers, ascending; near ones together with what lies between."""
    apart = np.flatnonzero(np.diff(items) > NEAR) + 1
    return np.stack((items[np.r_[0, apart]], items[np.r_[apart - 1, -1]] + 1), axis=1)


@functools.cache
def memory_advice():
    """The C library's madvise, None where there is none."""
    try:
        advise = ctypes.CDLL(None).madvise if hasattr(mmap, 'MADV_WILLNEED') else None
    except (OSError, TypeError, AttributeError):
        return None
    if advise:
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


def not_finite(features, name):
    row = next(part.start + odd.nonzero()[0].item() for part in spans(len(features), OPERANDS // features.shape[1])
               if (odd := ~features[part].isfinite().all(1)).any())
    return ValueError(f'want finite {name} features, got NaN or infinity in row {row}; look for what made it')


@contextlib.contextmanager
def denormals():
    """Denormals are numbers on this thread, whatever torch.set_flush_denormal has made of them."""
    flushed = np.array([1], np.uint32).view(np.float32).astype(np.float64)[0] == 0
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(bool(flushed))


def uncompiled(run):
    """run, as it is also within torch.compile, which would compile what an operator does in Python."""
    def call(*args):
        dynamo = sys.modules.get('torch._dynamo')
        return dynamo.disable(run)(*args) if dynamo else run(*args)
    return call
