"""CUDA kernels with faults to choose from: every barrier, fence, atomic and bounds check of them, one at a time.

The sources are compiled once; EMULATOR_MUTANT=number takes the check of that number away when they run.
"""

import re
from pathlib import Path
from typing import NamedTuple

from emulation import ROOT


class Mutant(NamedTuple):
    number: int   # from 1
    kind: str     # 'barrier', 'fence', 'atomic' or 'bound'
    place: str    # file: the text that is taken away
    line: int


# What is compared with a size, or with the last row. The conditions of loops are none: without them nothing ends.
SIZE = (r'(?:2 \* b\.n|b\.heads \* rows \* slices|[tg]\.n \+ [tg]\.m|n\.rows\.count|p\.count|[a-z]\.(?:n|m|d|items)|'
        r'\b(?:n|m|d|open|end|items|last|left|room|kPackets|kRows|kColumns|kSpan|kLevels)\b)(?! *[.*])')
PATTERNS = {
    'barrier': (r'__syncthreads\(\)', 'if (emulator::mutant() != {number}) {text}'),
    'fence': (r'__threadfence\(\)', 'if (emulator::mutant() != {number}) {text}'),
    'atomic': (r'atomicAdd\(', 'emulator::add({number}, '),
    'bound': (rf'(?P<left>\b[\w.]+(?:\[\w+\])?(?: [+-] \w+)?) (?P<sign><=?|>=?) {SIZE}', None),
}
LOOP = re.compile(r'for \([^;]*;[^;&]*')  # to its condition, as far as the first &&


def mutate(line, kind, first):
    """The line with a number for each of its mutants, from `first` on, and the texts that they take away."""
    pattern, replacement = PATTERNS[kind]
    texts = []

    def change(match):
        if kind == 'bound' and any(loop.start() <= match.start() < loop.end() for loop in LOOP.finditer(line)):
            return match[0]
        number = first + len(texts)
        texts.append(match[0])
        if kind != 'bound':
            return replacement.format(number=number, text=match[0])
        sign = '== {} ||' if match['sign'].startswith('<') else '!= {} &&'
        return f'(emulator::mutant() {sign.format(number)} {match[0]})'
    if line.lstrip().startswith(('//', '#', 'template', 'static_assert', 'constexpr')):
        return line, []
    return re.sub(pattern, change, line), texts


def write_mutants(folder):
    """The kernels with all mutants, in the folder; the list of these."""
    mutants = []
    for path in sorted((ROOT / 'csrc/kernels').glob('*')):
        lines = path.read_text().splitlines()
        if path.suffix in ('.cu', '.cuh'):
            for i, line in enumerate(lines):
                if 'cudaError_t' in line or 'MiningPlan' in line:  # the host's part, to the end of the function
                    continue
                for kind in PATTERNS:
                    lines[i], texts = mutate(lines[i], kind, len(mutants) + 1)
                    mutants += [Mutant(len(mutants) + 1 + n, kind, f'{path.name}: {text}', i + 1)
                                for n, text in enumerate(texts)]
        if path.suffix in ('.cu', '.cuh', '.h'):
            (Path(folder) / path.name).write_text('\n'.join(lines) + '\n')
    return mutants
