"""benchmarks.kernel_resources reports spills; benchmarks.gpu says that it needs a GPU."""

import itertools
import subprocess
import sys

import pytest
import torch
from emulation import ROOT, need

from benchmarks.kernel_resources import parse, readable


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


def test_the_script_for_gpus_needs_one():
    if torch.cuda.is_available():
        pytest.skip('there is a GPU: python -m benchmarks.gpu runs everything on it')
    done = subprocess.run([sys.executable, '-m', 'benchmarks.gpu'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith('benchmarks.gpu needs a GPU, but torch sees none')
