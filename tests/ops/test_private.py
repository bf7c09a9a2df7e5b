"""The names of torch that are not public still do what mgn.ops uses them for."""

import warnings

import numpy as np
import pytest
import torch
from forks import run_program
from mining import random_features
from torch.utils._python_dispatch import TorchDispatchMode

from mgn.ops import (expand_queries, k_reciprocal_ranks, match_ranks, match_ranks_from_distance, pairwise_distance,
                     topk, topk_from_distance)
from mgn.ops import private
from mgn.ops.arguments import as_tensor


def test_the_modes_that_watch_operators_are_counted():
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))
    assert private.watching_modes() == 0
    with Watching():
        assert private.watching_modes() == 1
        with Watching():
            assert private.watching_modes() == 2


def test_below_autograd_nothing_is_recorded():
    x = torch.ones(3, requires_grad=True)
    with private.below_autograd():
        assert (x * 2).grad_fn is None
    assert (x * 2).grad_fn is not None


def test_sums_of_differences_are_those_of_the_formula():
    weight, x, y = (random_features(*shape, dtype=torch.float64) for shape in ((4, 6), (4, 3), (6, 3)))
    divisor = weight.abs() + 1
    divisor[1, 2] = 0
    terms = (weight / divisor)[..., None] * (x[:, None] - y)
    terms[1, 2] = 0
    torch.testing.assert_close(private.sum_of_differences(weight, x, y, divisor), terms.sum(1))


def test_the_cpus_capabilities_have_the_names_that_are_looked_up():
    if not hasattr(torch.cpu, 'get_capabilities'):
        pytest.skip('torch 2.10 does not tell what the CPU can do')
    capabilities = private.cpu_capabilities()
    assert capabilities['architecture'] != 'x86_64' or {'avx512_bf16', 'amx_tile'} <= set(capabilities)


def test_without_the_compiler_it_stays_unloaded_and_with_it_nothing_is_compiled():
    done = run_program('''
import sys, torch
from mgn.ops import private
compiled = []

@private.uncompiled
def function(x, *, k=1):
    """Its docstring."""
    compiled.append(torch.compiler.is_compiling())
    return inner(x, k)

def inner(x, k):
    compiled.append(torch.compiler.is_compiling())
    return x.numpy() + k

assert function(torch.ones(2), k=2).tolist() == [3, 3]
assert "torch._dynamo" not in sys.modules
assert (function.__name__, function.__doc__) == ("function", "Its docstring.")
assert torch.compile(lambda x: function(x * 2, k=2), backend="eager")(torch.ones(2)).tolist() == [4, 4]
assert "torch._dynamo" in sys.modules, "the compiler has another name"
assert torch.compile(function, backend="eager")(torch.ones(2)).tolist() == [2, 2]
print(compiled)
''')
    assert done.stdout == f'{[False] * 6}\n', done.stderr


def test_importing_the_operations_loads_neither_the_compiler_nor_what_training_needs():
    done = run_program('''
import sys
from mgn import ops
print([name for name in ("gin", "absl", "torchvision", "torch._dynamo") if name in sys.modules])
''')
    assert done.stdout == '[]\n', done.stderr


def test_read_only_arrays_are_taken_as_they_lie_and_the_callers_warnings_stay_told_once():
    """warnings.catch_warnings would make what is told once be told again."""
    array = np.arange(12.0).reshape(3, 4)
    array.flags.writeable = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        for _ in range(3):
            warnings.warn('told once')
            tensor = as_tensor(array[:, 1:], "array")
    assert [str(warning.message) for warning in caught] == ['told once']
    assert tensor.data_ptr() == array.ctypes.data + 8 and tensor.tolist() == array[:, 1:].tolist()
    del array
    assert tensor.tolist() == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]  # its memory is held


def test_ranks_and_neighbours_are_the_same_whatever_the_default_device():
    query, gallery = random_features(20, 40), random_features(90, 40, seed=1)
    pids = torch.arange(20), torch.arange(90) % 20
    ids = *pids, *(torch.full_like(each, camid) for camid, each in enumerate(pids))

    def results():
        dist = pairwise_distance(query, gallery)
        ranks = (*match_ranks(query, gallery, *ids), *match_ranks_from_distance(dist, *ids),
                 *k_reciprocal_ranks(query, gallery, *ids))
        return [*topk(query, gallery, 3), *topk_from_distance(dist, 3), expand_queries(query, gallery, 2),
                *(torch.from_numpy(part) for part in ranks if not isinstance(part, int))]
    expected = results()
    torch.set_default_device('meta')
    try:
        got = results()
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, got, expected))
