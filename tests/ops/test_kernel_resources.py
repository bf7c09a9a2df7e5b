"""benchmarks.kernel_resources reports spills and reads machine code; benchmarks.gpu says that it needs a GPU."""

import itertools
import subprocess
import sys

import pytest
import torch
from emulation import ROOT, need

from benchmarks.kernel_resources import (EXPECTED, KERNELS, LOOKED_AT, compile_sources, faults, launch_bounds, missing,
                                         parse, readable, traits)

SPILLING = '''
__global__ void spills(const float* x, float* out) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = x[i * blockDim.x + threadIdx.x];
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 64; ++i) for (int j = 0; j < 64; ++j) sum = sum * kept[i] + kept[j];
  out[threadIdx.x] = sum;
}
__global__ void local_memory(const float* x, float* out, int at) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[(i * at) % 64] = x[i];
  out[threadIdx.x] = kept[at];
}
__global__ void frugal(float* out) { out[threadIdx.x] = 1; }
'''


def test_ptxas_tells_of_spills_and_they_are_read(tmp_path):
    nvcc = need('nvcc', 'which compiles CUDA kernels')
    (tmp_path / 'kernels.cu').write_text(SPILLING)
    done = subprocess.run([nvcc, '-O3', '-gencode=arch=compute_80,code=sm_80', '-gencode=arch=compute_90,code=sm_90',
                           '-maxrregcount=24', '-Xptxas=-v', '-c', 'kernels.cu'],
                          cwd=tmp_path, capture_output=True, text=True)
    entries = parse(done.stderr)
    names = readable([name for _, name, _ in entries])
    resources = {(architecture, names[name]): numbers for architecture, name, numbers in entries}
    expected = itertools.product(('80', '90'), ('spills', 'local_memory', 'frugal'))
    assert set(resources) == set(expected), done.stderr
    for (_, name), numbers in resources.items():
        assert 2 <= numbers['registers'] <= 24
        assert (numbers['stack'] > 0) == (name != 'frugal')
        assert (numbers['stores'] > 0) == (numbers['loads'] > 0) == (name == 'spills')


# Two slices a round through shared memory; the one ahead has the next under way while it multiplies.
LOADING = '''
template <bool kAhead> __device__ void work(const float* x, float* out, int n) {
  __shared__ float4 slice[256];
  float4 next = {}, sum = {};
  auto load = [&](int at) { return float4{x[at], x[at + n], x[at + 2 * n], x[at + 3 * n]}; };
  if (kAhead) next = load(threadIdx.x);
#pragma unroll 1
  for (int at = threadIdx.x; at < n; at += 256) {
    if (!kAhead) next = load(at);
    __syncthreads();
    slice[threadIdx.x] = next;
    __syncthreads();
    if (kAhead) next = load(at + 256);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const float4 other = slice[(threadIdx.x + i) % 256];
      sum.x += other.x * other.y, sum.y += other.y * other.z, sum.z += other.z * other.w, sum.w += other.w * other.x;
    }
  }
  __threadfence();
  reinterpret_cast<float4*>(out)[blockIdx.x * 256 + threadIdx.x] = sum;
}
__global__ void __launch_bounds__(256, 3) ahead(const float* x, float* out, int n) { work<true>(x, out, n); }
__global__ void __launch_bounds__(256) in_turn(const float* x, float* out, int n) { work<false>(x, out, n); }
'''


def test_machine_code_is_read(tmp_path):
    nvcc = need('nvcc', 'which compiles CUDA kernels')
    (tmp_path / 'kernels.cu').write_text(LOADING)
    entries, code = compile_sources(nvcc, [tmp_path / 'kernels.cu'], [LOOKED_AT])
    names = readable([name for _, name, _ in entries])
    resources = {names[name]: numbers for _, name, numbers in entries}
    assert {name: (numbers['threads'], numbers['blocks']) for name, numbers in resources.items()} == {
        'ahead': (256, 3), 'in_turn': (256, 1)}
    found = {names[name]: traits(lines) for name, lines in code.items()}
    assert found['ahead']['ahead'] == 4 and found['in_turn']['ahead'] == 0
    for has in found.values():
        assert has['in flight'] >= 4 and has['wide loads'] >= 32 and has['wide stores'] == 1
        assert has['barriers'] == 2 and has['fences'] == 1


def test_a_kernel_without_bounds_is_named(tmp_path):
    nvcc = need('nvcc', 'which compiles CUDA kernels')
    (tmp_path / 'kernels.cu').write_text('__global__ void unbounded(float* out) { out[threadIdx.x] = 1; }')
    with pytest.raises(SystemExit, match='unbounded.* has no __launch_bounds__'):
        launch_bounds(nvcc, 'kernels.cu', tmp_path)


def test_what_is_too_much_or_missing_is_said():
    fine = {'registers': 128, 'shared': 48 << 10, 'stack': 0, 'stores': 0, 'loads': 0, 'threads': 256, 'blocks': 2}
    assert list(faults('f', '90', fine)) == []
    for change, message in (({'registers': 129}, 'takes 69632 registers in the 2 blocks'), ({'stores': 4}, 'spills'),
                            ({'stack': 8}, 'local memory'), ({'shared': (48 << 10) + 1}, 'bytes of shared memory')):
        assert [message in sentence for sentence in faults('f', '90', {**fine, **change})] == [True]
    assert len(list(missing('mine<float, 4>', []))) == len(EXPECTED['mine<float, 4>'])
    assert list(missing('other', [])) == []


@pytest.mark.long  # CI runs benchmarks.kernel_resources, which says the same of all kernels
def test_the_tile_loader_is_ahead_and_the_last_block_has_fences():
    nvcc = need('nvcc', 'which compiles CUDA kernels')
    entries, code = compile_sources(nvcc, [KERNELS / 'batch_hard_cuda.cu'], [LOOKED_AT])
    names = readable([name for _, name, _ in entries])
    assert len(names) == 8
    for architecture, name, numbers in entries:
        assert not [*faults(names[name], architecture, numbers), *missing(names[name], code[name])]


def test_the_script_for_gpus_needs_one():
    if torch.cuda.is_available():
        pytest.skip('there is a GPU: python -m benchmarks.gpu runs everything on it')
    done = subprocess.run([sys.executable, '-m', 'benchmarks.gpu'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith('benchmarks.gpu needs a GPU, but torch sees none')
