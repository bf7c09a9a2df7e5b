"""The compiled modules: built, loaded, told of, missed; and that they bind torch's stable ABI alone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from emulation import ROOT, need
from forks import run_program

import mgn
from mgn.ops import native, implementation

MODULES = sorted(Path(mgn.__file__).parent.glob('_*.so'))
PROGRAM = '''
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    from mgn import ops
    x, labels = torch.arange(12.).view(6, 2), torch.arange(6) // 2
    for _ in range(3):
        ops.batch_hard_triplet_loss(x.requires_grad_(), labels).backward()
print(ops.batch_hard(x.detach(), labels).neg_idx.tolist(), ops.implementation('cpu'))
print(*[warning.message for warning in caught], sep='\\n')
'''


# An editable install finds the modules in the checkout, wherever the package itself was copied.
COPY_ALONE = '''
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
'''


def run(*command, **options):
    options = {'cwd': ROOT, **options, 'env': {**os.environ, **options.get('env', {})}}
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_cpu_module_is_compiled_here():
    need('c++', 'which the CPU module needs')
    assert native.missing('_C') is None
    units = [f'{s}{unit}' for s in ('avx512', 'avx2', 'baseline') for unit in (' and AMX', ' and VNNI', '')]
    assert implementation('cpu') in [f'compiled for {s}' for s in units]


def test_the_cuda_module_is_compiled_wherever_nvcc_fits_and_loads_without_a_gpu():
    """In CI both are there."""
    need('nvcc', 'which the CUDA module needs')
    reason = torch.ops.mgn_cpu.cuda_module()
    if torch.version.cuda is None or 'majors' in reason or 'MGN_CUDA=0' in reason:
        assert native.missing('_cuda') and not os.environ.get('CI')
        return
    assert reason == 'built' and native.missing('_cuda') is None
    assert re.fullmatch(r'CUDA \d+\.\d+, 7\.5;.*\+PTX',
                        torch.ops.mgn_cuda.build()) or 'TORCH_CUDA_ARCH_LIST' in os.environ


def test_a_cuda_module_beside_a_torch_of_another_major_is_left_alone(monkeypatch):
    """Even where the other CUDA's libraries are found and it would load."""
    if native.missing('_cuda'):
        pytest.skip(f'no CUDA module here: {native.missing("_cuda")}')
    monkeypatch.setattr(torch.version, 'cuda', '9.1')
    assert re.match(r'it was compiled for CUDA \d+\.\d+, .*, and torch is of CUDA 9.1; pip install',
                    native.missing.__wrapped__('_cuda'))


def test_without_a_gpu_cuda_is_told_to_be_missing():
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    assert implementation('cuda') == 'reference: torch sees no CUDA device'


def test_the_operations_import_torch_and_numpy_alone():
    done = run(sys.executable, '-c', '''
import sys
from mgn import ops
print([name for name in ("gin", "absl", "torchvision") if name in sys.modules])
''')
    assert done.stdout == '[]\n', done.stderr


def test_a_missing_module_is_told_before_cuda_is_initialised(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(native, 'missing', lambda name: f'no {name}')
    assert native._unusable.__wrapped__(torch.device('cuda')) == 'no _cuda'


def test_it_tells_what_is_compiled_and_what_runs_on_each_device():
    done = run(sys.executable, '-m', 'mgn.ops')
    assert done.returncode == 0, done.stderr
    assert re.search(r'^mgn\._C .*\nmgn\._cuda .*\n', done.stdout, re.M)
    assert re.search(r'^cpu: compiled for [\w ]+\n', done.stdout, re.M)


def test_references_on_request():
    done = run_program(PROGRAM, env={'MGN_REFERENCE': '1'})
    assert done.stdout.splitlines() == [
        '[2, 2, 1, 4, 3, 3] reference: switched off by MGN_REFERENCE=1',
        'mgn.ops runs its PyTorch references on cpu, which are exact but slower: '
        'switched off by MGN_REFERENCE=1'], done.stderr


@pytest.mark.parametrize('content, reason',
                         [(None, 'not compiled when mgn was installed: no C\\+\\+ compiler'),
                          (b'no library', 'it does not load: ')])
def test_without_a_module_that_loads_the_references_run_and_say_so_once(tmp_path, content, reason):
    shutil.copytree(ROOT / 'mgn', tmp_path / 'mgn', ignore=shutil.ignore_patterns('*.so', '__pycache__'))
    if content:
        for name in ('_C', '_cuda'):
            (tmp_path / 'mgn' / f'{name}.abi3.so').write_bytes(content)
    done = run_program(COPY_ALONE + PROGRAM, cwd=tmp_path)
    result, *warned = done.stdout.splitlines()
    assert re.match(rf'\[2, 2, 1, 4, 3, 3\] reference: {reason}', result), done.stderr
    assert len(warned) == 1 and 'pip install --no-build-isolation' in warned[0]
    told = run_program(COPY_ALONE + 'import runpy; runpy.run_module("mgn.ops", run_name="__main__")', cwd=tmp_path)
    assert told.returncode == 0 and re.search(rf'mgn\._cuda +({reason}|this torch has no CUDA)',
                                              told.stdout), told.stdout + told.stderr


def test_modules_compiled_from_other_sources_are_left_alone(tmp_path):
    shutil.copytree(ROOT / 'mgn', tmp_path / 'mgn', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT / 'csrc', tmp_path / 'csrc')
    done = run_program(COPY_ALONE + PROGRAM, cwd=tmp_path)
    assert '] compiled for' in done.stdout, done.stdout + done.stderr
    with open(tmp_path / 'csrc/kernels/batch_hard_loops.h', 'a') as file:
        file.write('// an edit\n')
    done = run_program(COPY_ALONE + PROGRAM, cwd=tmp_path)
    assert '] reference: csrc/ has changed since it was compiled; pip install --no-build-isolation' in done.stdout


def test_a_source_distribution_has_every_source_wherever_it_is_made(tmp_path):
    """Also where no CUDA module could be built, which does not name its sources then."""
    done = run_program(f'import setuptools.build_meta as backend; print(backend.build_sdist({str(tmp_path)!r}))',
               env={'MGN_CUDA': '0'})
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        packed = {name.split('/', 1)[1] for name in archive.getnames() if '/' in name}
    wanted = {str(path.relative_to(ROOT)) for folder in ('csrc', 'mgn', 'tests', 'gin', 'benchmarks')
              for path in (ROOT / folder).rglob('*')
              if path.is_file() and '__pycache__' not in path.parts and path.suffix not in ('.so', '.pyc')}
    assert len(wanted) > 50 and wanted <= packed


@pytest.mark.parametrize('library', MODULES, ids=lambda path: path.name)
def test_the_modules_bind_the_stable_abi_alone(library):
    """Symbols of at::, c10:: or torch:: would tie a wheel to one torch, those outside Python's limited API to one
    Python."""
    done = run(need('nm', 'which lists symbols'), '-D', '--undefined-only', library)
    symbols = [line.split()[-1].split('@')[0] for line in done.stdout.splitlines()]
    assert len(symbols) > 20 and '.abi3.' in library.name
    assert [name for name in symbols if re.match(r'_ZNK?\d*(2at|3c10|5torch)', name)] == []
    assert {name for name in symbols if name.startswith(('Py', '_Py'))} <= {'PyModule_Create2'}


def setup_py(*arguments, **options):
    return run_program('import runpy, sys; sys.argv[0] = "setup.py"; runpy.run_path("setup.py", run_name="__main__")',
                       *arguments, **options)


def fake_nvcc(folder, release):
    script = folder / 'bin' / 'nvcc'
    script.parent.mkdir(parents=True)
    (folder / 'lib64').mkdir()
    (folder / 'lib64' / 'libcudart.so').touch()
    script.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.1"\n')
    script.chmod(0o755)
    return folder


@pytest.mark.skipif(torch.version.cuda is None, reason='this torch has no CUDA, so setup.py looks for no toolkit')
@pytest.mark.parametrize('case, message', [
    ('none', 'no nvcc at .*/bin/nvcc; install the CUDA .* toolkit, then mgn again'),
    ('older', 'nvcc is of CUDA 9.1, torch of CUDA .*, and the majors must agree; pip install --no-build-isolation .'),
    ('incomplete', 'which has no libcudart; install the toolkit whole'),
    ('off', 'switched off by MGN_CUDA=0'),
])
def test_an_install_without_a_fitting_toolkit_says_why_in_one_line(tmp_path, case, message):
    home = tmp_path / 'cuda'
    if case in ('older', 'incomplete'):
        fake_nvcc(home, '9.1')
    if case == 'incomplete':
        (home / 'lib64' / 'libcudart.so').unlink()
    done = setup_py('--version', env={'CUDA_HOME': str(home), 'MGN_CUDA': '0' if case == 'off' else '1'})
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == mgn.__version__
    lines = [line for line in done.stderr.splitlines() if line.startswith('mgn: ')]
    assert len(lines) == 1 and re.match('mgn: building without the CUDA module: .*' + message, lines[0])


def test_windows_is_refused_in_one_sentence():
    done = run_program("import runpy, setuptools, sys, torch; sys.platform = 'win32'; runpy.run_path('setup.py')")
    assert done.returncode == 1
    assert done.stderr == ('mgn: Windows is not supported; install it on Linux or macOS, or in the Windows Subsystem '
                           'for Linux\n')


def test_an_install_without_a_compiler_says_so_in_one_line():
    done = setup_py('--version', env={'CXX': '/nowhere/c++'})
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if line.startswith('mgn: ')] == [
        'mgn: no C++ compiler /nowhere/c++ for the extension: operations run their slower PyTorch references']


@pytest.mark.long  # compiles the whole module
def test_built_beside_a_toolkit_of_another_major_the_module_remembers_why(tmp_path):
    """A whole build: CPU only, and it succeeds. Without optimisation, which would take most of the time."""
    compiler = tmp_path / 'c++'
    compiler.write_text(f'#!/bin/sh\nexec "{need("c++", "which the CPU module needs")}" "$@" -O0\n')
    compiler.chmod(0o755)
    done = setup_py('-q', 'build_ext', '--build-lib', tmp_path, '--build-temp', tmp_path / 'objects',
                    env={'CXX': str(compiler), 'CUDA_HOME': str(fake_nvcc(tmp_path / 'cuda', '9.1'))})
    assert done.returncode == 0, done.stderr
    (library,) = (tmp_path / 'mgn').iterdir()
    told = run_program(f'import torch; torch.ops.load_library({str(library)!r}); '
                       'print(torch.ops.mgn_cpu.cuda_module())')
    no_cuda, other_major = 'the torch it was built beside has no CUDA', 'nvcc is of CUDA 9.1, torch of CUDA'
    expected = no_cuda if torch.version.cuda is None else other_major
    assert told.stdout.startswith(expected), told.stderr
