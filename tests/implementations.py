"""Each way to run the operations of mgn.ops: as compiled and run here, as reference, and for each instruction set by
float32 products."""

import functools

import pytest
import torch

from mgn.ops import native

COMPILED = torch.ops.mgn_cpu.instruction_sets().split() if native.missing('_C') is None else []
FASTEST = torch.ops.mgn_cpu.fastest_precision() if COMPILED else 'float32'
IMPLEMENTATIONS = ['compiled', 'reference', *COMPILED[FASTEST == 'float32':]]  # 'compiled': the first set, and FASTEST
PRODUCTS = [(precision, number) for precision in ('float32', 'bfloat16', 'int16') for number in range(len(COMPILED))
            if torch.ops.mgn_cpu.multiplies(precision, instruction_set=number)]  # precision, instruction set


class OneInstructionSet:
    """torch.ops.mgn_cpu, for one instruction set wherever an operation has a choice."""

    def __init__(self, number):
        self.number = number

    def __getattr__(self, name):
        if name == 'fastest_precision':
            return lambda: 'float32'
        operation = getattr(torch.ops.mgn_cpu, name)
        if all(argument.name != 'instruction_set' for argument in operation.default._schema.arguments):
            return operation
        run = functools.partial(operation, instruction_set=self.number)
        run.default = run
        return run


def run_as(name, module, monkeypatch, device):
    """mgn.ops.<module> runs its operations on the device as one of IMPLEMENTATIONS."""
    if name == 'reference':
        monkeypatch.setattr(f'mgn.ops.{module}.kernels', lambda device: None)
    elif name == 'compiled':
        assert native.kernels(torch.device(device)) is not None, native.implementation(device)
        monkeypatch.setattr('mgn.ops.ranking.product.NARROW', {})  # AMX and VNNI for small cases, too
    elif device != 'cpu':
        pytest.skip(f'{name} is of the CPU')
    else:
        monkeypatch.setattr(f'mgn.ops.{module}.kernels', lambda device: OneInstructionSet(COMPILED.index(name)))
    return name
