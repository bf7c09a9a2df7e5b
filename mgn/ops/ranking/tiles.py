"""Matrices taken tile by tile: how large a tile is, and its rows as the kernels of a device read them."""

import contextlib

import numpy as np
import torch

from mgn.ops.errors import UserError

PRODUCTS = 2 ** 22           # of a tile: 16 MB, which stay in a CPU's cache
GPU_PRODUCTS = 2 ** 24       # 64 MB: the larger, the faster is the product itself; counting lists 8 bytes for each
ITEMS = 2048                 # of a tile; with few queries up to four times as many
OPERANDS = 2 ** 23           # elements of a tile's queries and of its items, where converted: 32 MB each, on a GPU 128
ONCE = 3 * 2 ** 26           # numbers converted once for all tiles, on a GPU: 768 MB


def spans(count, step):
    """Slices that cover `count`, of at most `step`: of one length but the last, as thin matrix products are slow."""
    step = max(step, 1)
    if parts := -(-count // step):
        step = min(step, -(-count // (64 * parts)) * 64)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def is_readable(matrix, types=(torch.float32,)):
    """Whether the kernels read it as it lies: one of the types, contiguous along its rows."""
    return matrix.dtype in types and (matrix.shape[1] <= 1 or matrix.stride(1) == 1)


def rows(features, part):
    """The part as the kernels read it, float32; a view wherever it is so already."""
    part = features[part].float()
    return part if is_readable(part) else part.contiguous()


def once(device):
    """How many numbers of features are converted once for all tiles; what is more is converted for each."""
    return ONCE if device.type == 'cuda' else OPERANDS


def tile_of(query, of_gpu=GPU_PRODUCTS):
    """(items, queries) of a tile, of at most so many products on a GPU."""
    features = max(1, OPERANDS // max(query.shape[1], 1)) * (4 if query.is_cuda else 1)  # that fit if converted
    products = of_gpu if query.is_cuda else PRODUCTS
    items = min(max(ITEMS, products // max(len(query), 1)), 4 * ITEMS, features)
    # Queries that are converted lie beside the product's panels of them.
    return items, min(max(1, features // (1 if is_readable(query) else 2)), products // items)


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


def exact(features):
    """Floating point → float64 of the same values; torch.set_flush_denormal would make denormals 0 on the way."""
    if features.dtype == torch.float64:
        return features
    bits = features.float().contiguous().view(torch.int32)
    denormal = (bits & 0x7fffffff < 0x800000) & (bits & 0x7fffffff > 0)
    values = features.double()
    if denormal.any():
        fraction = (bits & 0x7fffff).double() * 2.0 ** -149
        values = torch.where(denormal, torch.where(bits < 0, -fraction, fraction), values)
    return values


@contextlib.contextmanager
def denormals():
    """Denormals are numbers on this thread, whatever torch.set_flush_denormal has made of them."""
    flushed = np.array([1], np.uint32).view(np.float32).astype(np.float64)[0] == 0
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(bool(flushed))


def on_device(gallery, parts, device):
    """Yields the rows of each part of the gallery, a slice or ascending numbers, as the kernels of the device read it.

    From main memory to a GPU they go through pinned memory on a stream of their own: while the device computes with a
    part, the next is copied. No more than two are there at once.
    """
    if gallery.device == device:
        yield from (rows(gallery, part) for part in parts)
        return
    copies, used = torch.cuda.Stream(device), []
    for part in parts:
        if len(used) > 1:
            used.pop(0).synchronize()
        with torch.cuda.stream(copies):
            part_rows = in_pinned_memory(gallery, part).to(device, non_blocking=True)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copies)
        part_rows.record_stream(computing)
        yield rows(part_rows, slice(None))
        used.append(computing.record_event())


def in_pinned_memory(tensor, part=slice(None), waiting=False):
    """A copy of the part, a slice or numbers of rows, in page-locked memory, without which copies between main memory
    and a GPU wait for each other, and take thirty times as long.
    """
    if not isinstance(part, slice):  # not tensor[part]: new memory that is not page-locked takes ten times as long
        room = torch.empty(len(part), *tensor.shape[1:], dtype=tensor.dtype, pin_memory=True)
        return torch.index_select(tensor, 0, part, out=room)
    tensor = tensor[part]
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=not waiting)
