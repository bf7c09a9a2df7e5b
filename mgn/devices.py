"""The device that a configuration names, and the precision of forward passes on it."""

import os
from typing import Literal

import torch

from mgn.ops.errors import UserError
from mgn.ops.private import cpu_capabilities
from mgn.runs import processes
from mgn.runs.log import logger

Precision = Literal['auto', 'float32', 'bfloat16', 'float16']


def find_device(name):
    """torch.device of 'auto' (cuda, else mps, else cpu) or of a device's name; UserError where this machine lacks it.

    If several processes run on a machine, each gets the GPU of its own number.
    """
    several = processes.count() > 1
    if name == 'auto':
        mps = torch.backends.mps.is_available() and not several
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    if several and (name == 'mps' or name.startswith('cuda:')):
        raise UserError(f"{processes.count()} processes need the device 'cuda' or 'cpu', found {name!r}; "
                        f"bind device = 'cuda' for one GPU each")
    try:
        device = torch.device(f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if several and name == 'cuda' else name)
        if device.type not in ('cpu', 'cuda', 'mps'):
            raise RuntimeError('mgn runs on cpu, cuda and mps')
        device = torch.empty(0, device=device).device  # with its number
    except (RuntimeError, AssertionError) as error:  # CPU builds of torch assert
        where, remedy = ('for each process', ', or start fewer processes') if several else ('here', '')
        raise UserError(f'The device {name!r} is not available {where}: this machine or this build of torch lacks it '
                        f"({str(error).splitlines()[0]}); bind device = 'cpu' or 'auto'{remedy}") from None
    if several and device.type == 'cuda':
        torch.cuda.set_device(device)
    return device


def resolve_precision(precision, device, name):
    """'float32', 'bfloat16' or 'float16': `precision` itself, or what 'auto' means on `device`, a torch.device.

    'auto' is bfloat16 where the device computes fast in it, else float32; the log says why. Where it is float32, the
    whole process computes its float32 products and convolutions in float32: torch's default for the latter is TF32.
    `name` is the binding that `precision` comes from, for the log.
    """
    if precision == 'auto':
        precision = 'bfloat16' if has_bfloat16(device) else 'float32'
        logger.info("%s = 'auto' means %s by what %s has units for", name, precision, device)
    if precision == 'float32':
        # The older of torch's two kinds of settings: it sets the newer ones too, and torch.compile refuses a mixture.
        torch.set_float32_matmul_precision('highest')
        torch.backends.cudnn.allow_tf32 = False
    return precision


def has_bfloat16(device):
    """Whether the device has units for bfloat16, as far as is known."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0) and torch.version.hip is None
    return device.type == 'cpu' and any(cpu_capabilities().get(name) for name in ('avx512_bf16', 'amx_tile'))
