"""Whether every tool of compute-sanitizer finds a planted fault through the filter that benchmarks.gpu gives it.

    python -m benchmarks.gpu_faults

A filter that selects no kernel would look like kernels without a fault. Needs a GPU, nvcc and compute-sanitizer.
"""

import subprocess
import sys
import tempfile

from benchmarks import gpu

SOURCE = gpu.ROOT / 'benchmarks' / 'gpu_faults.cu'


def status(faults, tool, *kernels):
    """The exit status of the tool, on the kernel with the fault that it is to find: 1 if it does."""
    compute_sanitizer, *options = gpu.sanitizer(tool, *kernels)
    done = subprocess.run([gpu.program(compute_sanitizer), *options, faults, tool], capture_output=True, text=True)
    print(done.stdout, done.stderr, sep='', flush=True)
    return done.returncode


def compiled(folder):
    lacking = [name for name in ('nvcc', 'compute-sanitizer') if gpu.program(name) is None]
    if lacking:
        sys.exit(f'no {" and no ".join(lacking)} on PATH or in CUDA_HOME; install the CUDA toolkit whole')
    faults = f'{folder}/faults'
    subprocess.run([gpu.program('nvcc'), '-arch=native', '-lineinfo', '-o', faults, SOURCE], check=True)
    return faults


def check(faults):
    missed = [tool for tool in gpu.TOOLS if status(faults, tool) != 1]
    outside = status(faults, 'memcheck', 'no_such_kernel')
    if missed or outside != 0:
        sys.exit(f'planted faults that were not found: {", ".join(missed) or "none"}; exit status outside the filter: '
                 f'{outside}, expected 0; look at sanitizer() in benchmarks/gpu.py')
    print('each tool finds its fault, and looks at nothing outside its filter')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as temporary:
        check(compiled(temporary))
