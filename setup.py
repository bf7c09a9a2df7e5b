"""Builds the extension: mgn._C (CPU) with any C++ compiler, mgn._cuda if nvcc and torch share a CUDA major version.

Both use LibTorch's stable ABI and Python's limited API: one build serves torch 2.10 and later, Python 3.10 and later.
No GPU is needed. Environment variables: CUDA_HOME, TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), MGN_CUDA=0 (CPU module only).
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import setup

if sys.platform == 'win32':
    sys.exit('mgn: Windows is not supported; install it on Linux or macOS, or in the Windows Subsystem for Linux')

LIMITED = not sysconfig.get_config_var('Py_GIL_DISABLED')  # free-threaded Python has no limited API
# One per generation; PTX of the last serves newer ones.
ARCHITECTURES = ['7.5', '8.0', '8.6', '9.0', '10.0', '11.0', '12.0']


def cuda_toolkit():
    """(home, version) of the toolkit to build with, or the reason why there is none as (None, reason)."""
    if os.environ.get('MGN_CUDA') == '0':
        return None, 'switched off by MGN_CUDA=0'
    if torch.version.cuda is None:
        return None, 'the torch it was built beside has no CUDA'
    home = os.environ.get('CUDA_HOME') or os.environ.get('CUDA_PATH')
    nvcc = f'{home}/bin/nvcc' if home else shutil.which('nvcc') or '/usr/local/cuda/bin/nvcc'
    if not os.path.exists(nvcc):
        return None, f'no nvcc at {nvcc}; install the CUDA {torch.version.cuda.split(".")[0]} toolkit, then mgn again'
    # nvcc itself says where its toolkit is: the one on PATH may be a script in a folder that is no toolkit.
    dryrun = subprocess.run([nvcc, '--dryrun', '-x', 'cu', os.devnull], capture_output=True, text=True)
    top = re.search(r'TOP=(.+)', dryrun.stdout + dryrun.stderr)
    home = os.path.realpath(top[1].strip()) if top else os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))
    if not any(Path(home).glob('lib*/libcudart.so*')) and not any(Path(home).glob('targets/*/lib/libcudart.so*')):
        return None, (f'{nvcc} belongs to {home}, which has no libcudart; '
                      'install the toolkit whole or name another in CUDA_HOME')
    version = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout
    release = re.search(r'release (\d+)\.(\d+)', version)
    if release is None or release[1] != torch.version.cuda.split('.')[0]:
        return None, (f'nvcc is of CUDA {release[1] + "." + release[2] if release else "?"}, '
                      f'torch of CUDA {torch.version.cuda}, and the majors must agree; '
                      'pip install --no-build-isolation . beside the torch in use')
    return home, release[1] + '.' + release[2]


def architectures(home):
    """TORCH_CUDA_ARCH_LIST, by default ARCHITECTURES as far as this nvcc knows them, and PTX of the newest."""
    listed = subprocess.run([f'{home}/bin/nvcc', '--list-gpu-arch'], capture_output=True, text=True, check=True).stdout
    known = [arch for arch in ARCHITECTURES if 'compute_' + arch.replace('.', '') in listed.split()]
    return ';'.join(known) + '+PTX'


def sources_of(pattern):
    return [str(path) for path in sorted(Path('csrc').rglob(pattern))]


def extensions():
    """What can be built here; why not the rest is said once, and remembered by mgn._C for `python -m mgn.ops`."""
    compiler = (os.environ.get('CXX') or sysconfig.get_config_var('CXX') or 'c++').split()[0]
    if not shutil.which(compiler):
        print(f'mgn: no C++ compiler {compiler} for the extension: operations run their slower PyTorch references',
              file=sys.stderr)
        return [], {}
    home, version = cuda_toolkit()
    if home:
        os.environ['CUDA_HOME'] = home  # before torch guesses, as it does on import
        os.environ.setdefault('TORCH_CUDA_ARCH_LIST', architectures(home))
    else:
        print(f'mgn: building without the CUDA module: {version}', file=sys.stderr)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = runpy.run_path('mgn/ops/native.py')['sources']()  # as it will be compared
    flags = ['-DTORCH_TARGET_VERSION=0x020a000000000000', f'-DMGN_SOURCES="{sources}"']
    info = f'-DMGN_CUDA_MODULE="{"built" if home else version}"'
    shared = {'py_limited_api': LIMITED, 'depends': [str(header) for header in Path('csrc').rglob('*.*h')]}
    built = [CppExtension('mgn._C', sources_of('*_cpu.cpp'), **shared,
                          extra_compile_args={'cxx': ['-O3', '-fvisibility=hidden', *flags, info]})]
    if home:
        build = f'-DMGN_CUDA_BUILD="CUDA {version}, {os.environ["TORCH_CUDA_ARCH_LIST"]}"'
        built.append(CUDAExtension('mgn._cuda', sources_of('*_cuda.cpp') + sources_of('*_cuda.cu'), **shared,
                                   extra_compile_args={'nvcc': ['-O3', '-DUSE_CUDA', *flags],
                                                       'cxx': ['-O3', '-fvisibility=hidden', '-DUSE_CUDA', *flags,
                                                               build]}))
    return built, {'build_ext': BuildExtension}


modules, commands = extensions()
options = {'bdist_wheel': {'py_limited_api': 'cp310'}} if modules and LIMITED else {}
setup(ext_modules=modules, cmdclass=commands, options=options)
