"""What precision 'auto' means on a device, that the log says why, and that unknown names are refused."""

import logging

import pytest
import torch

from mgn.devices import DTYPES, peak_memory, resolve_precision

CPU = torch.device('cpu')


@pytest.fixture
def cpu_with(monkeypatch):
    def cpu_with(avx512_bf16, amx):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': avx512_bf16, 'amx_tile': amx})
    return cpu_with


@pytest.mark.parametrize('precision', DTYPES)
def test_a_precision_asked_for_is_taken(precision, cpu_with, caplog):
    cpu_with(False, False)
    assert resolve_precision(precision, CPU, 'evaluate.precision') == precision
    assert not caplog.records


@pytest.mark.parametrize('units, want', [
    ((False, False), 'float32'), ((True, False), 'bfloat16'), ((False, True), 'bfloat16')])
def test_auto_on_a_cpu_is_bfloat16_where_it_has_units_for_it(units, want, cpu_with, caplog):
    cpu_with(*units)
    with caplog.at_level(logging.INFO, 'mgn.devices'):
        assert resolve_precision('auto', CPU, 'evaluate.precision') == want
    units = f"{'' if any(units) else 'not '}a CPU with AVX512-BF16 or AMX"
    said = f"evaluate.precision = 'auto' means {want}: cpu is {units}"
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.parametrize('capability, want', [((7, 5), 'float32'), ((8, 0), 'bfloat16'), ((9, 0), 'bfloat16')])
def test_auto_on_a_gpu_goes_by_its_capability(capability, want, monkeypatch):
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert resolve_precision('auto', torch.device('cuda:0'), 'evaluate.precision') == want


def test_auto_elsewhere_is_float32():
    assert resolve_precision('auto', torch.device('mps'), 'evaluate.precision') == 'float32'


@pytest.mark.parametrize('precision', ['int8', None, 16, ['float32']])
def test_other_names_are_refused(precision):
    choices = "'auto', 'float32', 'bfloat16', 'float16'"
    with pytest.raises(ValueError, match=f"evaluate.precision must be one of {choices}, found .*; 'float32' runs"):
        resolve_precision(precision, CPU, 'evaluate.precision')


def test_the_peak_of_memory_covers_what_was_held_before():
    before = peak_memory(CPU)['peak_memory_mb']
    block = torch.ones(2 ** 28, dtype=torch.uint8)
    del block
    after = peak_memory(CPU)
    assert after.keys() == {'peak_memory_mb'} and max(before, 256) <= after['peak_memory_mb'] < 10 ** 6
