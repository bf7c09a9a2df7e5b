"""What users pass to the operations, checked and as tensors."""

import operator
import warnings

import numpy as np
import torch

from mgn.ops import filter

HALF = torch.float16, torch.bfloat16


def feature_pair(query, gallery, metric, precision, streamed=False):
    """Query and gallery as detached tensors that fit each other; the options checked. `streamed`: the gallery may lie on the CPU, the query not."""
    if metric not in ('cosine', 'euclidean'):
        raise ValueError(f"want metric 'cosine' or 'euclidean', got {metric!r}; of other distances pass the matrix, to match_ranks_from_distance "
                         'or topk_from_distance')
    if precision not in filter.PRECISIONS:
        raise ValueError(f'want precision {" or ".join(map(repr, filter.PRECISIONS))}, got {precision!r}; it changes the time only')
    one = query is gallery
    query = as_features(query, 'query')
    gallery = query if one else as_features(gallery, 'gallery')
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f'want query and gallery of one width, got {tuple(query.shape)} and {tuple(gallery.shape)}; '
                         'take both from one network')
    if query.device != gallery.device and not (streamed and gallery.device.type == 'cpu'):
        raise ValueError(f'want query and gallery on one device, got {query.device} and {gallery.device}; move one with .to()')
    return query, gallery


def as_features(features, name):
    features = as_tensor(features)
    if features.dim() != 2 or features.dtype not in (torch.float32, *HALF):
        raise ValueError(f'want {name} features (n, D) of float32 or half precision, got shape {tuple(features.shape)} of {features.dtype}; '
                         f'cast, e.g. {name}.astype("float32") or {name}.float()')
    return features


def as_distances(dist, wanted):
    dist = as_tensor(dist)
    if dist.dim() != 2 or dist.dtype not in (torch.float64, torch.float32, *HALF):
        raise ValueError(f'want {wanted} of floating point, got shape {tuple(dist.shape)} of {dist.dtype}; cast or reshape')
    return dist


def as_tensor(array):
    """An array or tensor as a detached tensor, on the same memory where torch can look at it."""
    if isinstance(array, torch.Tensor):
        return array.detach()
    array = np.asarray(array)
    if array.dtype.kind not in 'fiub' or array.dtype.itemsize > 8:
        raise ValueError(f'want numbers that torch has a type for, got {array.dtype}; cast, e.g. with .astype("float32")')
    array = array.astype(array.dtype.newbyteorder('='), copy=False)
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()  # torch cannot look at it
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # read-only memory is only read
        return torch.from_numpy(array)


def all_ids(queries, items, query_pids, gallery_pids, query_camids, gallery_camids):
    return (as_ids(query_pids, queries, 'query_pids'), as_ids(gallery_pids, items, 'gallery_pids'),
            as_ids(query_camids, queries, 'query_camids'), as_ids(gallery_camids, items, 'gallery_camids'))


def as_ids(ids, length, name):
    wanted = f'want {name} of shape ({length},) and an integer type'
    try:
        if not isinstance(ids, torch.Tensor) and len(ids) == 0:
            ids = np.empty(0, np.int64)  # an empty list would come as float64
        ids = as_tensor(ids).cpu()
    except (TypeError, ValueError):  # None, a single number, strings, integers that no type holds
        raise ValueError(f'{wanted}, got {ids!r:.60}; number the ids, e.g. with numpy.unique(…, return_inverse=True)') from None
    if ids.shape != (length,) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f'{wanted}, got shape {tuple(ids.shape)} of {ids.dtype}; pass one integer for each row')
    if ids.dtype == torch.uint64 and (ids.view(torch.int64) < 0).any():
        raise ValueError(f'want {name} below 2⁶³, got larger ones; number them anew, e.g. with numpy.unique(…, return_inverse=True)')
    return ids.to(torch.int64)


def as_junk_pid(junk_pid):
    if junk_pid is None:
        return None
    if isinstance(junk_pid, bool) or not hasattr(junk_pid, '__index__') or not -2 ** 63 <= operator.index(junk_pid) < 2 ** 63:
        raise ValueError(f'want junk_pid as an integer of 64 bits or None, got {junk_pid!r}; None makes no id special')
    return operator.index(junk_pid)
