"""The compiled modules `mgn._C` (CPU) and `mgn._cuda`: loaded where they can be, else the reason why not."""

import functools
import hashlib
import importlib
import importlib.util
import os
import warnings
from pathlib import Path

import torch

REBUILD = 'pip install --no-build-isolation -e . (or .) builds it anew'


@functools.cache
def missing(name):
    """Why `mgn.<name>` cannot be used; None where it can."""
    if os.environ.get('MGN_REFERENCE') == '1':
        return 'switched off by MGN_REFERENCE=1'
    if name == '_cuda' and torch.version.cuda is None:
        return 'this torch has no CUDA'
    if importlib.util.find_spec(f'mgn.{name}') is None:
        built = torch.ops.mgn_cpu.cuda_module() if name == '_cuda' and missing('_C') is None else 'built'
        return f'not compiled when mgn was installed: {"no C++ compiler" if built == "built" else built}; {REBUILD}'
    try:
        importlib.import_module(f'mgn.{name}')
    except (ImportError, OSError) as error:
        return f'it does not load: {error}; {REBUILD}'
    built_from = (torch.ops.mgn_cpu if name == '_C' else torch.ops.mgn_cuda).sources()
    if sources() not in (None, built_from):
        return f'csrc/ has changed since it was compiled; {REBUILD}'
    if name == '_cuda':
        built, running = torch.ops.mgn_cuda.build(), torch.version.cuda
        if built.split()[1].split('.')[0] != running.split('.')[0]:
            return f'it was compiled for {built}, and torch is of CUDA {running}; {REBUILD} beside this torch'
    return None


def sources():
    """The hash of csrc/ that setup.py compiles into the modules; None where no csrc/ lies beside the package."""
    folder = Path(__file__).parent.parent.parent / 'csrc'
    files = sorted(path for path in folder.rglob('*') if path.suffix in ('.h', '.cuh', '.cpp', '.cu'))
    return hashlib.sha256(b''.join(path.read_bytes() for path in files)).hexdigest()[:16] if files else None


@functools.cache
def _unusable(device):
    """Why tensors of this device take the references; None where they take compiled kernels."""
    if device.type == 'cpu':
        return missing('_C')
    if device.type != 'cuda':
        return f'there are no kernels for {device.type}'
    if not torch.cuda.is_available():
        return 'torch sees no CUDA device'
    return missing('_cuda') or torch.ops.mgn_cuda.unusable(
        torch.cuda.current_device() if device.index is None else device.index) or None


@functools.cache
def kernels(device):
    """torch.ops.mgn_cpu or mgn_cuda for tensors of this device; None, with one warning, where references must do."""
    reason = _unusable(device)
    if reason:
        warnings.warn(f'mgn.ops runs its PyTorch references on {device.type}, which are exact but slower: {reason}',
                      stacklevel=2)
        return None
    return torch.ops.mgn_cpu if device.type == 'cpu' else torch.ops.mgn_cuda


def implementation(device):
    """What runs on tensors of this device, e.g. 'compiled for avx512' or 'reference: this torch has no CUDA'."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        from mgn.ops.arguments import UserError, shown  # here, since setup.py runs this file alone
        raise UserError(f"device must be the name of one, such as 'cpu' or 'cuda:0', not {shown(device)}; python -m "
                        f'mgn.ops lists those of this machine') from None
    reason = _unusable(device)
    if reason:
        return f'reference: {reason}'
    if device.type == 'cpu':
        cpu = torch.ops.mgn_cpu
        units = {'bfloat16': ' and AMX', 'int16': ' and VNNI'}.get(cpu.fastest_precision(), '')
        return f'compiled for {cpu.instruction_sets().split()[0]}{units}'
    return f'compiled for {torch.ops.mgn_cuda.build()}'
