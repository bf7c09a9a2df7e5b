"""Registers and shared memory of every CUDA kernel for every architecture that nvcc knows from 7.5 up; needs no GPU.

    python -m benchmarks.kernel_resources

Compiles csrc/kernels/*.cu and prints a table. A register spilled or local memory used is an error: exit status 1.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KERNELS = Path(__file__).parent.parent / 'csrc' / 'kernels'


def compile_all(nvcc):
    """[(architecture, kernel, {what: number})] as ptxas reports, for all sources and architectures."""
    listed = subprocess.run([nvcc, '--list-gpu-arch'], capture_output=True, text=True, check=True).stdout
    architectures = sorted(int(name) for name in re.findall(r'compute_(\d+)\b', listed) if int(name) >= 75)
    targets = [f'-gencode=arch=compute_{number},code=sm_{number}' for number in architectures]
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(KERNELS.glob('*.cu')):
            done = subprocess.run([nvcc, '-O3', f'--threads={os.cpu_count()}', *targets, '-Xptxas=-v', '-c', source,
                                   '-o', f'{folder}/out.o'], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            in_source = parse(done.stderr)
            if len(in_source) % len(architectures) or not in_source:
                sys.exit(f'{source}: ptxas reports {len(in_source)} kernels for {len(architectures)} architectures; '
                         'look whether its output has changed')
            entries += in_source
    return entries


def parse(text):
    """The output of ptxas → one entry per kernel and architecture."""
    entries = []
    kernel = r"Compiling entry function '(\w+)' for 'sm_(\w+)'\n(.*?)(?=ptxas info +: Compiling|\Z)"
    units = {'registers': 'registers', 'shared': 'bytes smem', 'stack': 'bytes stack frame',
             'stores': 'bytes spill stores', 'loads': 'bytes spill loads'}
    for name, architecture, report in re.findall(kernel, text, re.S):
        if 'registers' not in report:
            sys.exit(f'ptxas reports no registers for {name}: {report}')
        matches = {resource: re.search(rf'(\d+) {unit}', report) for resource, unit in units.items()}
        numbers = {resource: int(match[1]) if match else 0 for resource, match in matches.items()}
        entries.append((architecture, name, numbers))
    return entries


def readable(names):
    """_ZN3mgn…4mineIfLi4EE… → mine<float, 4>"""
    texts = subprocess.run(['c++filt', *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: re.sub(r'^void |mgn::|\(.*$', '', re.sub(r'\(int\)|\(anonymous namespace\)::', '', text))
            for name, text in zip(names, texts)}


def main():
    nvcc = shutil.which('nvcc')
    if nvcc is None:
        sys.exit('benchmarks.kernel_resources needs nvcc on PATH; install the CUDA toolkit')
    entries = compile_all(nvcc)
    architectures = sorted({architecture for architecture, _, _ in entries}, key=int)
    kernels = readable(sorted({name for _, name, _ in entries}))
    version = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout
    release = re.search(r'release ([\d.]+)', version)[1]
    print(f'nvcc {release}; registers a thread (shared memory of a block, bytes)\n')
    print(f'| kernel | {" | ".join(f"sm_{architecture}" for architecture in architectures)} |')
    print('|---' * (len(architectures) + 1) + '|')
    for name, short in sorted(kernels.items(), key=lambda item: item[1]):
        cells = {architecture: numbers for architecture, kernel, numbers in entries if kernel == name}
        shared = cells[architectures[0]]['shared']
        registers = (str(cells[architecture]['registers']) for architecture in architectures)
        print(f'| `{short}` ({shared}) | {" | ".join(registers)} |')
    spilled = [f'{kernels[name]} on sm_{architecture}: {numbers}' for architecture, name, numbers in entries
               if numbers['stack'] or numbers['stores'] or numbers['loads']]
    print(f'\n{len(entries)} kernels compiled, {len(spilled)} with spills or local memory')
    if spilled:
        sys.exit('\n'.join(spilled))


if __name__ == '__main__':
    main()
