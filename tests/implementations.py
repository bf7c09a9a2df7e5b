"""Each way to run the operations of mgn.ops: compiled for the best instruction set here, as reference, compiled for
every other set."""

import functools

import pytest
import torch

from mgn.ops import native

COMPILED = torch.ops.mgn_cpu.instruction_sets().split() if native.missing('_C') is None else []
SPLITS = bool(COMPILED) and torch.ops.mgn_cpu.multiplies_split()  # whether this CPU has AMX
IMPLEMENTATIONS = ['compiled', 'reference', *COMPILED[not SPLITS:]]  # 'compiled' is the first of those, with AMX


class OneInstructionSet:
    """torch.ops.mgn_cpu, for one instruction set wherever an operation has a choice."""

    def __init__(self, number):
        self.number = number

    def __getattr__(self, name):
        if name == 'multiplies_split':
            return lambda: False
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
        monkeypatch.setattr('mgn.ops.ranking.product.NARROW', 1)  # AMX, which is for wide rows, for small cases too
    elif device != 'cpu':
        pytest.skip(f'{name} is of the CPU')
    else:
        monkeypatch.setattr(f'mgn.ops.{module}.kernels', lambda device: OneInstructionSet(COMPILED.index(name)))
    return name
