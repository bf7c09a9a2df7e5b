"""GPUs that are none: tensors that say they are on cuda:0 or cuda:1, and are computed on the CPU.

For programs around the operations: it shows tensors of two devices that meet, conversions to NumPy and devices without
a number. It shows no streams, no kernels (mgn.ops runs its references) and no times.
"""

import contextlib
import unittest.mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.data import DataLoader

from mgn.ops import native
from mgn.ops.ranking import product

COUNT = 2
MOVING = ('aten::copy_', 'aten::_to_copy', 'aten::lift_fresh')  # these take tensors of several devices
INDEXING = ('aten::index', 'aten::index_put_', 'aten::_index_put_impl_')  # indices may be on the CPU
_present = [0]  # the number of the present GPU


def numbered(device):
    device = torch.device(device)
    if device.type != 'cuda':
        return device
    device = torch.device('cuda', _present[0] if device.index is None else device.index)
    if device.index >= COUNT:
        raise RuntimeError('CUDA error: invalid device ordinal')
    return device


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU; `here` has its values."""

    @staticmethod
    def __new__(cls, here, _):
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, here.stride(), here.storage_offset(),
                                                   dtype=here.dtype, device='meta')

    def __init__(self, here, place):
        self.here, self.place = here, place

    device = property(lambda self: self.place)
    is_cuda, is_cpu, is_meta = property(lambda _: True), property(lambda _: False), property(lambda _: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def numpy(self, **_):
        raise TypeError(f"can't convert {self.place} device type tensor to numpy")

    def __array__(self, *_):
        return self.numpy()

    def tolist(self):
        return self.detach().cpu().tolist()

    def __deepcopy__(self, _):
        return self.detach().clone()

    def __repr__(self):
        return f'{self.place}: {self.here}'

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return carried_out(operator, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """So that what is made on a GPU, from nothing, is one of its tensors."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return carried_out(operator, args, kwargs or {})


def carried_out(operator, args, kwargs):
    """The operator's result, on the device that torch would put it on."""
    name, tensors = operator._schema.name, [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    places = {x.device for x in tensors if isinstance(x, OnGPU)}
    refuse_mixture(name, tensors, places, args)
    place = args[0].device if name in MOVING + INDEXING else min(places, default=torch.device('cpu'), key=str)
    if asked := kwargs.get('device'):
        kwargs = {**kwargs, 'device': torch.device('cpu')}
        if torch.device(asked).type != 'meta':  # else torch itself asks for that of a tensor, mostly of an argument
            place = numbered(asked)
        elif not places and name != 'aten::scalar_tensor':
            place = numbered('cuda')  # of an argument that is not seen: wrong where that is on another than the present
    kwargs = {name: value for name, value in kwargs.items() if name != 'pin_memory'}
    here = tree_map_only(OnGPU, lambda x: x.here, (args, kwargs))
    result = operator(*here[0], **here[1])
    if operator._schema.is_mutable and isinstance(result, torch.Tensor):
        return kwargs.get('out', args[0])
    return result if place.type == 'cpu' else tree_map_only(torch.Tensor, lambda x: OnGPU(x, place), result)


def refuse_mixture(name, tensors, places, args):
    """Raises as torch does: numbers (tensors of no dimension) may be on the CPU, but not for fused optimizers."""
    here = [x for x in tensors if not isinstance(x, OnGPU)]
    if name in INDEXING:
        mixed = places and not isinstance(args[0], OnGPU)
    else:
        mixed = name not in MOVING and places and any(x.dim() or '_fused_' in name for x in here)
    if mixed or len(places) > 1 and name not in MOVING:
        raise RuntimeError(f'Expected all tensors to be on the same device, but {name} got '
                           f'{[str(x.device) for x in tensors]}')
    if name == 'aten::_upsample_bicubic2d_aa' and places and tensors[0].dtype == torch.uint8:
        raise RuntimeError('"upsample_bicubic2d_aa" not implemented for \'Byte\'')


class Stream:

    def __init__(self, *_):
        pass

    def record_event(self):
        return self

    wait_stream = synchronize = __init__


def saved(content):
    """What torch.save writes of tensors of a GPU."""
    if isinstance(content, dict):
        return {name: saved(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [saved(value) for value in content]
    return content.detach().cpu() if isinstance(content, OnGPU) else content


@contextlib.contextmanager
def pretended_gpus():
    """Within the block torch says that there are two GPUs, and runs on them."""
    to, save, loader, available = torch.Tensor.to, torch.save, DataLoader.__init__, product.available

    def moved(tensor, *args, **kwargs):
        if args and isinstance(args[0], OnGPU):
            args = args[0].device, args[0].dtype, *args[1:]
        args = [numbered(x) if isinstance(x, (str, torch.device)) else x for x in args]
        return to(tensor, *args, **{name: numbered(x) if name == 'device' else x for name, x in kwargs.items()})

    def unusable(device, real=native._unusable):
        return 'it is pretended' if device.type == 'cuda' else real(device)
    instead = {
        torch.cuda: {
            'is_available': lambda: True, 'is_initialized': lambda: True,
            'device_count': lambda: COUNT, 'current_device': lambda: _present[0],
            'set_device': lambda device: _present.__setitem__(0, torch.device(device).index),
            'get_device_capability': lambda _: (9, 0), 'is_current_stream_capturing': lambda: False,
            'manual_seed_all': lambda _: None, 'Stream': Stream, 'current_stream': Stream,
            'stream': lambda _: contextlib.nullcontext()},
        torch.Tensor: {'to': moved, 'record_stream': lambda *_: None},
        torch: {'save': lambda content, file: save(saved(content), file)},
        DataLoader: {'__init__': lambda self, *args, pin_memory=False, **kwargs: loader(self, *args, **kwargs)},
        native: {'_unusable': unusable},
        product: {'available': lambda asked, device, width: 'float32' if device.type == 'cuda' else available(
            asked, device, width)}}
    for name in ('_accelerator_graph_capture_health_check', '_cuda_graph_capture_health_check'):  # by torch's version
        if hasattr(torch.optim.Optimizer, name):
            instead.setdefault(torch.optim.Optimizer, {})[name] = lambda _: None
    native.kernels.cache_clear()  # it remembers whether there are kernels
    with contextlib.ExitStack() as stack:
        for owner, values in instead.items():
            for name, value in values.items():
                stack.enter_context(unittest.mock.patch.object(owner, name, value))
        stack.callback(native.kernels.cache_clear)
        stack.callback(_present.__setitem__, 0, 0)
        stack.enter_context(Everywhere())
        yield
