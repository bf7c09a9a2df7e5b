"""What precision 'auto' means on a device, that the log says why, and that unknown names are refused."""

import logging

import pytest
import torch
from forks import run_program
from torch._subclasses.fake_tensor import FakeTensorMode

from mgn.devices import find_device, resolve_precision
from mgn.ops.errors import UserError

CPU = torch.device('cpu')


@pytest.fixture
def cpu_with(monkeypatch):
    def cpu_with(avx512_bf16, amx):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': avx512_bf16, 'amx_tile': amx})
    return cpu_with


@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16'])
def test_a_precision_asked_for_is_taken(precision, cpu_with, caplog):
    cpu_with(False, False)
    assert resolve_precision(precision, CPU, 'evaluate.precision') == precision
    assert not caplog.records


@pytest.mark.parametrize('units, want', [
    ((False, False), 'float32'), ((True, False), 'bfloat16'), ((False, True), 'bfloat16')])
def test_auto_on_a_cpu_is_bfloat16_where_it_has_units_for_it(units, want, cpu_with, caplog):
    cpu_with(*units)
    with caplog.at_level(logging.INFO, 'mgn'):
        assert resolve_precision('auto', CPU, 'evaluate.precision') == want
    said, = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"evaluate.precision = 'auto' means {want} by what cpu has units for")


@pytest.mark.parametrize('capability, want', [((7, 5), 'float32'), ((8, 0), 'bfloat16'), ((9, 0), 'bfloat16')])
def test_auto_on_a_gpu_goes_by_its_capability(capability, want, monkeypatch):
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert resolve_precision('auto', torch.device('cuda:0'), 'evaluate.precision') == want


def test_auto_elsewhere_is_float32():
    assert resolve_precision('auto', torch.device('mps'), 'evaluate.precision') == 'float32'


@pytest.mark.parametrize('environment', [{}, {'TORCH_ALLOW_TF32_CUBLAS_OVERRIDE': '1'}])
def test_float32_is_no_tf32_on_a_gpu(environment):
    """torch's settings can be read without one. torch.compile reads the older ones, which raise where they disagree."""
    done = run_program("""
import torch
from mgn.devices import resolve_precision
from mgn.ops.ranking.product import exact_float32

def allowed():
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
            *(setting.fp32_precision == 'tf32' for setting in settings)]

resolve_precision('bfloat16', torch.device('cpu'), 'train.precision')
print(any(allowed()), end=' ')
resolve_precision('float32', torch.device('cpu'), 'train.precision')
print(any(allowed()), end=' ')
with exact_float32():
    pass
print(any(allowed()), torch.get_float32_matmul_precision())
""", env=environment)
    assert done.stdout == 'True False False highest\n', done.stderr


def test_a_gpu_has_its_number(monkeypatch):
    """Without it the device would be the present one of each thread."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)  # torch 2.11 would ask a real one for memory
    with FakeTensorMode():
        assert find_device('cuda') == torch.device('cuda:0') and find_device('cuda:1') == torch.device('cuda:1')
    assert find_device('cpu') == CPU


@pytest.mark.parametrize('name', ['', 'gpu', 'meta', 'CPU', 'cuda:-1', 'cuda:9999999999999', 'hpu', 'xla', 'opengl',
                                  'mkldnn', 'privateuseone', 'cpu\0', '\udcff'])
def test_a_device_that_nothing_runs_on_is_a_sentence(name):
    with pytest.raises(UserError, match="^The device .* is not available here: .*; bind device = 'cpu' or 'auto'$"):
        find_device(name)
