"""What users pass to the operations, checked and as tensors."""

import math
import numbers
import operator
import types
from typing import NamedTuple

import numpy as np
import torch

from mgn.ops.errors import UserError

HALF_TYPES = torch.float16, torch.bfloat16
FLOAT_TYPES = {*HALF_TYPES, torch.float32, torch.float64}
INTEGER_TYPES = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32,
                 torch.uint64}
PRECISIONS = 'auto', 'float32', 'tf32'
LARGEST_K = 4096
NUMBER_THEM = 'pass an integer for each row, e.g. by numpy.unique(…, return_inverse=True)'


def shown(value):
    """The value in at most 60 characters, or its type: Python writes no integers of thousands of digits."""
    try:
        return f'{value!r:.60}'
    except Exception:  # anything may be passed, and say no word about itself
        return f'a {type(value).__name__}'


def integer(value, name, low, high, remedy):
    """The value as an int, from low to high."""
    is_integer = hasattr(value, '__index__') and not isinstance(value, bool) and getattr(value, 'shape', ()) == ()
    try:
        number = operator.index(value) if is_integer else None
    except (TypeError, RuntimeError):  # arrays and tensors have __index__, whatever their type
        number = None
    if number is None or not low <= number <= high:
        raise UserError(f'{name} must be an integer from {low} to {high}, not {shown(value)}; {remedy}')
    return number


def real(value, name, low, high, remedy):
    """The value as a float: a finite number from low to high."""
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not (low <= number <= high and -math.inf < number < math.inf):  # isfinite is not traced
        limits = f' from {low} to {high}' if high < math.inf else f' from {low}' if low > -math.inf else ''
        raise UserError(f'{name} must be a finite number{limits}, not {shown(value)}; {remedy}')
    return number


def truth(value, name, remedy):
    if not isinstance(value, bool):
        raise UserError(f'{name} must be True or False, not {shown(value)}; {remedy}')
    return value


def choice(value, name, choices, remedy):
    if not isinstance(value, str) or value not in choices:
        raise UserError(f'{name} must be {" or ".join(map(repr, choices))}, not {shown(value)}; {remedy}')


def neighbours(k):
    return integer(k, 'k', 1, LARGEST_K, 'for longer lists sort the distances, e.g. those of pairwise_distance')


def check_rows(rows, name, heads=False):
    """Rows must be a tensor of a real floating type and the shape (rows, D), or (..., rows, D) with heads."""
    check_tensor(rows, name)
    if rows.dim() < 2 or rows.dim() > 2 and not heads or rows.dtype not in FLOAT_TYPES:
        shape = '(..., rows, D)' if heads else '(rows, D)'
        raise UserError(f'{name} must have the shape {shape} and a real floating type, not {tuple(rows.shape)} and '
                        f'{rows.dtype}; reshape the tensor, or cast it with .float()')


def check_tensor(value, name):
    if not isinstance(value, torch.Tensor):
        raise UserError(f'{name} must be a tensor, not {type(value).__name__}; torch.as_tensor makes one')
    if value.layout != torch.strided or value.is_nested:
        raise UserError(f'{name} must be a dense tensor, not one of the layout {value.layout}; make it dense, e.g. '
                        f'with .to_dense()')


def check_device(value, name, other, other_name):
    if value.device != other.device:
        raise UserError(f'{name} must be on {other.device} like {other_name}, not on {value.device}; move with .to()')


def check_alike(rows, name, other, other_name):
    """Both agree in device, type and all but the number of rows."""
    check_device(rows, name, other, other_name)
    if rows.dtype != other.dtype or rows.shape[:-2] != other.shape[:-2] or rows.shape[-1] != other.shape[-1]:
        raise UserError(f'{name} must be like {other_name}, {tuple(other.shape)} of {other.dtype}, in all but the '
                        f'number of rows, not {tuple(rows.shape)} of {rows.dtype}; cast or reshape one of them')


def as_features(features, name):
    features = as_tensor(features, f'{name} features')
    if features.dim() != 2 or features.dtype not in (torch.float32, *HALF_TYPES):
        raise UserError(f'{name} features must be (n, D) of float32 or half precision, not {tuple(features.shape)} of '
                        f'{features.dtype}; cast them, e.g. {name}.astype("float32") or {name}.float()')
    return features


def as_distances(dist, name):
    dist = as_tensor(dist, name)
    if dist.dim() != 2 or dist.dtype not in FLOAT_TYPES:
        raise UserError(f'{name} must be a matrix of floating-point numbers, not {tuple(dist.shape)} of {dist.dtype}; '
                        'cast or reshape it')
    return dist


def as_tensor(array, name):
    """An array or tensor as a detached tensor, on the same memory where torch can look at it."""
    if isinstance(array, torch.Tensor):
        check_tensor(array, name)
        if array.device.type == 'meta':
            raise UserError(f'{name} must have values, but tensors on the device meta have none; move with .to()')
        return array.detach().resolve_neg()
    try:
        if np.ma.is_masked(array):
            raise ValueError('it has masked entries; fill them with .filled(…)')
        array = np.asarray(array)
    except Exception as error:  # rows of several lengths, tensors that no array can show
        raise UserError(f'{name} must be an array or a tensor, not {shown(array)} ({error}); make it one') from None
    if array.dtype.kind not in 'fiub' or array.dtype.itemsize > 8:
        raise UserError(f'{name} must be numbers that torch has a type for, not {array.dtype}; cast them, e.g. with '
                        f'.astype("float32")')
    array = array.astype(array.dtype.newbyteorder('='), copy=False)
    array = array.view(array.dtype.str)  # NumPy has two types of 64 bits, of which torch knows one
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()  # torch cannot look at it
    if not array.flags.writeable:  # torch would warn, but this memory is only read
        interface = {**array.__array_interface__, 'data': (array.ctypes.data, False)}
        array = np.asarray(types.SimpleNamespace(__array_interface__=interface, owner=array))
    return torch.from_numpy(array)


class Ids(NamedTuple):
    """int64 tensors, contiguous, of the device that prepares the matches."""
    query_pids: torch.Tensor      # (Q,)
    gallery_pids: torch.Tensor    # (G,)
    query_camids: torch.Tensor    # (Q,)
    gallery_camids: torch.Tensor  # (G,)

    def of_queries(self, block):
        return self._replace(query_pids=self.query_pids[block], query_camids=self.query_camids[block])


def all_ids(queries, items, *ids, device='cpu'):
    """ids: as the fields of Ids, of a number of queries and of items."""
    arrays = map(as_ids, ids, (queries, items) * 2, Ids._fields)
    return Ids(*(torch.from_numpy(array).contiguous().to(device) for array in arrays))


def as_ids(ids, length, name, remedy=NUMBER_THEM):
    """NumPy array of int64. `length`: a number, or the name of a length that may be any."""
    expected = f'{name} must have the shape ({length},) and an integer type'
    try:
        tensor = as_tensor(ids, name).cpu()
    except UserError:  # None, strings, integers that no type holds
        raise UserError(f'{expected}, not {shown(ids)}; {remedy}') from None
    if tensor.shape == (0,) and not isinstance(ids, torch.Tensor):
        tensor = tensor.long()  # an empty list comes as float64
    fits = tensor.dim() == 1 and (isinstance(length, str) or len(tensor) == length)
    if not fits or tensor.dtype not in INTEGER_TYPES:
        raise UserError(f'{expected}, not {tuple(tensor.shape)} and {tensor.dtype}; {remedy}')
    if tensor.dtype == torch.uint64 and (tensor.view(torch.int64) < 0).any():
        raise UserError(f'{name} must be below 2⁶³, but some are larger; {remedy}')
    return tensor.to(torch.int64).numpy()


def as_junk_pid(junk_pid):
    return None if junk_pid is None else integer(junk_pid, 'junk_pid', -2 ** 63, 2 ** 63 - 1, 'None: no id is special')
