"""The names of torch that are not public, each with its purpose. tests/ops/test_private.py fails when one changes."""

import contextlib
import functools
import sys

import torch

# How many modes watch the operators, as tracers do. Without any, batch-hard mining skips a second dispatch.
watching_modes = torch._C._len_torch_dispatch_stack

# A context in which operators skip autograd, for an autograd.Function that calls the operator it differentiates.
below_autograd = torch._C._AutoDispatchBelowAutograd


def cpu_capabilities():
    """{name of an instruction set: whether this CPU has it}; empty on torch 2.10, where only private names tell."""
    return getattr(torch.cpu, 'get_capabilities', dict)()


def sum_of_differences(weight, x, y, divisor):
    """(N, D) Σⱼ weight[i, j] (x[i] − y[j]) / divisor[i, j], 0 where the divisor is 0, without a tensor (N, M, D)."""
    return torch.ops.aten._cdist_backward(weight, x, y, 2.0, divisor)


def uncompiled(function):
    """torch.compiler.disable, without its import of the compiler (seconds) before someone else has imported it.

    Within the function new tensors are on the CPU unless it says otherwise, whatever torch.set_default_device has made
    the default.
    """
    @functools.wraps(function)
    def run(*args, **options):
        compiler_is_loaded = 'torch._dynamo' in sys.modules
        with contextlib.nullcontext() if torch.get_default_device().type == 'cpu' else torch.device('cpu'):
            return (torch.compiler.disable(function) if compiler_is_loaded else function)(*args, **options)
    return run
