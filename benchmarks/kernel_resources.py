"""Registers and shared memory of every CUDA kernel for every architecture that nvcc knows from 7.5 up; needs no GPU.

    python -m benchmarks.kernel_resources

Compiles csrc/kernels/*.cu and prints two tables: registers for every architecture, and what the machine code for one
has of what makes it fast and right. An error (exit status 1) is a register spilled, local memory used, more registers
than the blocks that a kernel is bounded to fit with, more shared memory than a block may have, and a kernel without
what EXPECTED says.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

KERNELS = Path(__file__).parent.parent / 'csrc' / 'kernels'
REGISTERS, SHARED = 2 ** 16, 48 * 2 ** 10  # of a multiprocessor; bytes of a block, without asking for more
LOOKED_AT = '90'  # the architecture whose machine code is looked at
# What the machine code of kernels has to have, at least. In flight: loads from global memory that stand one after
# another before the first is used. Ahead: those that are under way while the main loop multiplies and adds.
EXPECTED = {
    'mine<float, 1>': {'ahead': 8, 'wide loads': 32, 'wide stores': 3, 'barriers': 7, 'fences': 4},
    'mine<float, 4>': {'ahead': 16, 'wide loads': 64, 'wide stores': 4, 'barriers': 7, 'fences': 4},
    'measure<float>': {'ahead': 16, 'wide loads': 64, 'wide stores': 4, 'barriers': 2},
    'select': {'in flight': 12, 'barriers': 8},
    'sum_pulls<float>': {'in flight': 4, 'wide loads': 16, 'barriers': 2},
}


def compile_sources(nvcc, sources, architectures):
    """[(architecture, kernel, {what: number})] as ptxas reports, and {kernel: its machine code} of LOOKED_AT."""
    targets = [f'-gencode=arch=compute_{number},code=sm_{number}' for number in architectures]
    entries, code = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            done = subprocess.run([nvcc, '-O3', f'--threads={os.cpu_count()}', *targets, '-Xptxas=-v', '-c', source,
                                   '-o', 'out.o'], capture_output=True, text=True, cwd=folder)
            if done.returncode:
                sys.exit(done.stderr)
            in_source = parse(done.stderr)
            if len(in_source) % len(architectures) or not in_source:
                sys.exit(f'{source}: ptxas reports {len(in_source)} kernels for {len(architectures)} architectures; '
                         'look whether its output has changed')
            bounds = launch_bounds(nvcc, source, folder)
            entries += [(architecture, name, {**numbers, **bounds[name]}) for architecture, name, numbers in in_source]
            code.update(disassembled(f'{folder}/out.o'))
    return entries, code


def launch_bounds(nvcc, source, folder):
    """{kernel: threads of a block, and how many blocks at least are to fit a multiprocessor}, as the source bounds."""
    subprocess.run([nvcc, f'-arch=compute_{LOOKED_AT}', '-ptx', source, '-o', 'out.ptx'], cwd=folder, check=True,
                   capture_output=True)
    bounds = {}
    for name, directives in re.findall(r'\.entry (\w+)\(.*?\)(.*?){', Path(folder, 'out.ptx').read_text(), re.S):
        threads = re.search(r'\.maxntid (\d+)', directives)
        blocks = re.search(r'\.minnctapersm (\d+)', directives)
        if not threads:
            sys.exit(f'{name} has no __launch_bounds__; say how many threads its blocks have')
        bounds[name] = {'threads': int(threads[1]), 'blocks': int(blocks[1]) if blocks else 1}
    return bounds


def tool(name):
    """Path of a tool of the CUDA toolkit: its own, or the one that comes with Triton, which torch brings."""
    triton = find_spec('triton')
    bundled = Path(triton.origin).parent / 'backends/nvidia/bin' / name if triton else None
    found = shutil.which(name) or (str(bundled) if bundled and bundled.exists() else None)
    if found is None:
        sys.exit(f'benchmarks.kernel_resources needs {name} on PATH; install the CUDA toolkit')
    return found


def disassembled(path):
    """{kernel: its instructions, (address, text)} of an object file for LOOKED_AT."""
    listing = subprocess.run([tool('cuobjdump'), '-sass', '-arch', f'sm_{LOOKED_AT}', path], capture_output=True,
                             text=True, check=True).stdout
    functions = re.findall(r'Function : (\w+)\n(.*?)(?=Function :|\Z)', listing, re.S)
    return {name: [(int(address, 16), text) for address, text in re.findall(r'/\*([0-9a-f]{4,})\*/ +([^;]*?) *;', body)]
            for name, body in functions}


def traits(code):
    """What of EXPECTED's kinds the instructions have."""
    def count(pattern):
        return sum(re.search(pattern, text) is not None for _, text in code)
    return {'in flight': pending_loads(code)[0], 'ahead': pending_loads(2 * main_loop(code))[1],
            'wide loads': count(r'\bLDS\.128'), 'wide stores': count(r'\bSTS\.128'),
            'barriers': count(r'\bBAR\.SYNC'), 'fences': count(r'\bMEMBAR')}


def main_loop(code):
    """The instructions of the loop with barriers that has the largest share of multiply-adds."""
    def weight(body):
        texts = [text for _, text in body]
        share = sum(re.search(r'\b[FD]FMA\b', text) is not None for text in texts) / max(len(texts), 1)
        return any('BAR.SYNC' in text for text in texts) * share
    loops = [[]]
    for address, text in code:
        jump = re.search(r'\bBRA (?:`\(\S+\) *)?(?:UP\w+, *)?0x([0-9a-f]+)', text)
        if jump and int(jump[1], 16) < address:
            loops.append([line for line in code if int(jump[1], 16) <= line[0] <= address])
    return max(loops, key=weight)


def pending_loads(code):
    """The most loads from global memory that are begun and not yet used: at another load, at a multiply-add."""
    in_flight, ahead, pending = 0, 0, set()
    for _, text in code:
        name, _, operands = re.sub(r'^@!?U?P\w+ +', '', text).partition(' ')
        registers = [int(number) for number in re.findall(r'\bR(\d+)\b', operands)]
        data, others = registers[:1], registers[1:]
        if name.startswith(('ST', 'RED')):  # address, then data
            data, others = registers[-1:], registers[:-1]
        width = 4 if '.128' in name else 2 if '.64' in name else 1
        moved = {first + i for first in data for i in range(width)}
        pending.difference_update(others, moved)
        if name.startswith('LDG'):
            pending |= moved
            in_flight = max(in_flight, len(pending))
        if name.startswith(('FFMA', 'DFMA')):
            ahead = max(ahead, len(pending))
    return in_flight, ahead


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


def faults(name, architecture, numbers):
    """What is wrong with a kernel's resources, as sentences."""
    if numbers['stack'] or numbers['stores'] or numbers['loads']:
        yield f'{name} on sm_{architecture} spills registers or uses local memory: {numbers}'
    if numbers['shared'] > SHARED:
        yield f'{name} on sm_{architecture} has {numbers["shared"]} bytes of shared memory, more than {SHARED}'
    registers = (numbers['registers'] + 7) // 8 * 8 * numbers['threads'] * numbers['blocks']
    if registers > REGISTERS:
        yield (f'{name} on sm_{architecture} takes {registers} registers in the {numbers["blocks"]} blocks that it is '
               f'bounded to, more than {REGISTERS}')


def missing(name, code):
    """What EXPECTED wants of a kernel and its machine code lacks, as sentences."""
    has = traits(code)
    for trait, least in EXPECTED.get(name, {}).items():
        if has[trait] < least:
            yield f'{name} on sm_{LOOKED_AT} has {has[trait]} {trait}, fewer than {least}'


def main():
    nvcc = shutil.which('nvcc')
    if nvcc is None:
        sys.exit('benchmarks.kernel_resources needs nvcc on PATH; install the CUDA toolkit')
    listed = subprocess.run([nvcc, '--list-gpu-arch'], capture_output=True, text=True, check=True).stdout
    architectures = sorted({name for name in re.findall(r'compute_(\d+)\b', listed) if int(name) >= 75}, key=int)
    entries, code = compile_sources(nvcc, sorted(KERNELS.glob('*.cu')), architectures)
    kernels = readable(sorted({name for _, name, _ in entries}))
    version = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout
    release = re.search(r'release ([\d.]+)', version)[1]
    print(f'nvcc {release}; registers a thread (shared memory of a block, bytes)\n')
    print(f'| kernel | {" | ".join(f"sm_{architecture}" for architecture in architectures)} |')
    print('|---' * (len(architectures) + 1) + '|')
    in_order = sorted(kernels.items(), key=lambda item: item[1])
    for name, short in in_order:
        cells = {architecture: numbers for architecture, kernel, numbers in entries if kernel == name}
        shared = cells[architectures[0]]['shared']
        registers = (str(cells[architecture]['registers']) for architecture in architectures)
        print(f'| `{short}` ({shared}) | {" | ".join(registers)} |')
    print(f'\nmachine code for sm_{LOOKED_AT}; loads in flight before the first is used, wide ones of shared memory\n')
    print(f'| kernel | {" | ".join(traits([]))} |')
    print('|---' * (len(traits([])) + 1) + '|')
    for name, short in in_order:
        print(f'| `{short}` | {" | ".join(map(str, traits(code[name]).values()))} |')
    bad = [sentence for architecture, name, numbers in entries
           for sentence in faults(kernels[name], architecture, numbers)]
    bad += [sentence for name, short in in_order for sentence in missing(short, code[name])]
    bad += [f'there is no kernel {name}, of which EXPECTED speaks' for name in EXPECTED.keys() - kernels.values()]
    print(f'\n{len(entries)} kernels compiled, {len(bad)} faults')
    if bad:
        sys.exit('\n'.join(bad))


if __name__ == '__main__':
    main()
