"""Everything to be checked on a machine with a GPU, in one go; prints each step's output, then one table.

    python -m benchmarks.gpu

Needs nvcc and compute-sanitizer (both of the CUDA toolkit), `pip install -e '.[test]'` and `make peers`.
"""

import os
import shutil
import subprocess
import sys
import time

import torch

from mgn.ops import implementation

PYTHON, PYTEST = [sys.executable], [sys.executable, '-m', 'pytest', '-n', '0', '--device=cuda']
# Under a tool that slows kernels down a hundredfold: every kernel, fewer random cases.
SANITIZED = [*PYTEST, '-p', 'no:cacheprovider', '-x', 'tests/ops/test_batch_hard.py',
             'tests/ops/test_batch_hard_cuda.py', 'tests/ops/test_pairwise_distance.py',
             'tests/ops/test_pairwise_distance_cuda.py', 'tests/ops/test_match_ranks_cuda.py', '-k',
             'compiled or test_match_ranks_cuda or test_batch_hard_cuda or test_pairwise_distance_cuda', '--deselect',
             'tests/ops/test_batch_hard.py::test_thousands_of_anchors_equal_the_loop_on_some']
STEPS = {
    'build': [*PYTHON, '-m', 'pip', 'install', '-q', '--no-build-isolation', '--no-deps', '-e', '.'],
    'python -m mgn.ops': [*PYTHON, '-m', 'mgn.ops'],
    'the whole suite on CUDA': [*PYTEST, '-m', ''],
    'memcheck': ['compute-sanitizer', '--tool=memcheck', '--error-exitcode=1', *SANITIZED],
    'racecheck': ['compute-sanitizer', '--tool=racecheck', '--error-exitcode=1', *SANITIZED],
    # PyTorch's own kernels copy padding that nothing has written; only this project's are looked at.
    'initcheck': ['compute-sanitizer', '--tool=initcheck', '--kernel-name=kernel_substring=mgn', '--error-exitcode=1',
                  *SANITIZED],
    'benchmarks.kernel_resources': [*PYTHON, '-m', 'benchmarks.kernel_resources'],
    'benchmarks.triplet on CUDA': [*PYTHON, '-m', 'benchmarks.triplet', '--device=cuda'],
    'benchmarks.triplet': [*PYTHON, '-m', 'benchmarks.triplet'],
    'benchmarks.ranking on CUDA': [*PYTHON, '-m', 'benchmarks.ranking', 'subspace', 'large', 'isotropic', 'bfloat16',
                                   'msmt17', '--device=cuda'],
    'benchmarks.ranking': [*PYTHON, '-m', 'benchmarks.ranking'],
    'benchmarks.neighbours': [*PYTHON, '-m', 'benchmarks.neighbours'],
    'benchmarks.training on CUDA': [*PYTHON, '-m', 'benchmarks.training', '--batch=64', '--precision=bfloat16',
                                    '--device=cuda'],
    'benchmarks.loading': [*PYTHON, '-m', 'benchmarks.loading'],
    'benchmarks.convolutions': [*PYTHON, '-m', 'benchmarks.convolutions'],
}


def main():
    if not torch.cuda.is_available():
        sys.exit('benchmarks.gpu needs a GPU, but torch sees none; `pytest` runs the kernels under an emulator instead')
    rows = []
    for name, command in STEPS.items():
        print(f'\n=== {name}: {" ".join(command)}', flush=True)
        start = time.perf_counter()
        if shutil.which(command[0]) is None:
            result = f'no {command[0]} on PATH'
        else:
            environment = {**os.environ, 'MGN_TIMES': '1' if 'sanitizer' in command[0] else '10'}
            status = subprocess.run(command, env=environment).returncode
            result = 'passed' if status == 0 else f'FAILED, exit status {status}'
        rows.append((name, result, time.perf_counter() - start))
    built = subprocess.run([*PYTHON, '-c', 'from mgn import ops; print(ops.implementation("cuda"))'],
                           capture_output=True, text=True).stdout
    print(f'\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {built.strip() or implementation("cuda")}\n\n'
          '| step | result | minutes |\n|---|---|---|')
    for name, result, seconds in rows:
        print(f'| {name} | {result} | {seconds / 60:.1f} |')
    sys.exit(any(result != 'passed' for _, result, _ in rows))


if __name__ == '__main__':
    main()
