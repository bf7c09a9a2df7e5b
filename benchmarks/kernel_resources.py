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
    """[(architecture, kernel, {what: number})] as ptxas tells, for all sources and architectures."""
    listed = subprocess.run([nvcc, '--list-gpu-arch'], capture_output=True, text=True, check=True).stdout
    architectures = sorted(int(name) for name in re.findall(r'compute_(\d+)\b', listed) if int(name) >= 75)
    wanted = [f'-gencode=arch=compute_{number},code=sm_{number}' for number in architectures]
    told = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(KERNELS.glob('*.cu')):
            done = subprocess.run([nvcc, '-O3', f'--threads={os.cpu_count()}', *wanted, '-Xptxas=-v', '-c', source, '-o', f'{folder}/out.o'],
                                  capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found = parse(done.stderr)
            if len(found) % len(architectures) or not found:
                sys.exit(f'{source}: {len(found)} kernels told for {len(architectures)} architectures; has ptxas changed its words?')
            told += found
    return told


def parse(text):
    """ptxas's words → one entry per kernel and architecture."""
    entries = []
    for name, architecture, words in re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'\n(.*?)(?=ptxas info +: Compiling|\Z)", text, re.S):
        numbers = {what: int(found[1]) if (found := re.search(rf'(\d+) {pattern}', words)) else 0 for what, pattern in {
            'registers': 'registers', 'shared': 'bytes smem', 'stack': 'bytes stack frame', 'stores': 'bytes spill stores',
            'loads': 'bytes spill loads'}.items()}
        if 'registers' not in words:
            sys.exit(f'no registers told for {name}: {words}')
        entries.append((architecture, name, numbers))
    return entries


def readable(names):
    """_ZN3mgn…4mineIfLi4EE… → mine<float, 4>"""
    told = subprocess.run(['c++filt', *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: re.sub(r'^void |mgn::|\(anonymous namespace\)::|\(.*$', '', text.replace('(int)', '').replace('(anonymous namespace)::', ''))
            for name, text in zip(names, told)}


def main():
    nvcc = shutil.which('nvcc')
    if nvcc is None:
        sys.exit('no nvcc on PATH')
    told = compile_all(nvcc)
    architectures = sorted({architecture for architecture, _, _ in told}, key=int)
    kernels = readable(sorted({name for _, name, _ in told}))
    release = re.search(r'release ([\d.]+)', subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout)[1]
    print(f'nvcc {release}; registers a thread (shared memory of a block, bytes)\n')
    print(f'| kernel | {" | ".join(f"sm_{architecture}" for architecture in architectures)} |')
    print('|---' * (len(architectures) + 1) + '|')
    for name, short in sorted(kernels.items(), key=lambda item: item[1]):
        cells = {architecture: numbers for architecture, kernel, numbers in told if kernel == name}
        shared = cells[architectures[0]]['shared']
        print(f'| `{short}` ({shared}) | {" | ".join(str(cells[architecture]["registers"]) for architecture in architectures)} |')
    spilled = [f'{kernels[name]} on sm_{architecture}: {numbers}' for architecture, name, numbers in told
               if numbers['stack'] or numbers['stores'] or numbers['loads']]
    print(f'\n{len(told)} kernels compiled, {len(spilled)} with spills or local memory')
    if spilled:
        sys.exit('\n'.join(spilled))


if __name__ == '__main__':
    main()
