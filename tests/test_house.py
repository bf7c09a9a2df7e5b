"""The house itself: sizes of files, functions and lines, the direction of imports, and no cycle among them."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
           for path in sorted((ROOT / 'mgn').rglob('*.py'))}
KERNELS = sorted(path for path in (ROOT / 'csrc').rglob('*') if path.suffix in ('.h', '.cuh', '.cpp', '.cu'))
FLOORS = ('mgn.ops', 'mgn.runs', 'mgn.data')  # each imports from itself and from those before it
BINARIES = ('mgn.train', 'mgn.eval', 'mgn.extract', 'mgn.search', 'mgn.report', 'mgn.export', 'mgn.convert')


def imports(module):
    """The modules of this package that a module imports, also within its functions."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{module} imports relatively; write the name out'
            submodules = {f'{node.module}.{alias.name}' for alias in node.names}
            names |= {name if name in MODULES else node.module for name in submodules}
    return {name for name in names if name in MODULES}


def python_functions():
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f'{path.name}:{node.lineno} {node.name}', node.end_lineno - node.lineno + 1


def kernel_functions(text):
    """(first line, lines) of each block that follows a parameter list and lies in no other such block."""
    comments_and_strings = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\''
    text = re.sub(comments_and_strings, lambda match: '\n' * match[0].count('\n'), text, flags=re.S)
    opened, inside = [], None
    for place, character in enumerate(text):
        if character == '{':
            function = re.search(r'\)\s*(const|noexcept|\s)*(->[^;{}]*)?$', text[:place][-200:]) is not None
            opened.append((place, function and inside is None))
            inside = place if opened[-1][1] else inside
        elif character == '}':
            begin, function = opened.pop()
            if function:
                inside = None
                yield text[:begin].count('\n') + 1, text[begin:place].count('\n') + 1


def test_no_import_cycle():
    tuple(TopologicalSorter({module: imports(module) for module in MODULES}).static_order())


@pytest.mark.parametrize('floor', range(len(FLOORS)))
def test_a_floor_imports_nothing_from_above(floor):
    allowed = tuple(name + end for name in FLOORS[:floor + 1] for end in ('', '.'))
    for module in MODULES:
        if module == FLOORS[floor] or module.startswith(FLOORS[floor] + '.'):
            above = {name for name in imports(module) - {'mgn', *allowed} if not name.startswith(allowed[1::2])}
            assert not above, f'{module} imports {above}'


def test_nothing_imports_a_binary():
    for module in MODULES:
        assert not imports(module) & set(BINARIES), module


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in (*MODULES.values(), *KERNELS)}
    assert {path: lines for path, lines in lengths.items() if lines > 350} == {}


def test_lines_are_short():
    others = [path for folder in ('tests', 'benchmarks', 'gin') for path in (ROOT / folder).rglob('*.*')
              if path.suffix in ('.py', '.gin', '.h', '.cpp', '.cu')]
    long = [f'{path}:{number}' for path in (*MODULES.values(), *KERNELS, *others, ROOT / 'setup.py')
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert long == []


def test_functions_fit_a_screen():
    assert {name: lines for name, lines in python_functions() if lines > 60} == {}
    kernels = {f'{path.name}:{line}': lines for path in KERNELS for line, lines in kernel_functions(path.read_text())}
    assert len(kernels) > 100
    assert {name: lines for name, lines in kernels.items() if lines > 80} == {}
