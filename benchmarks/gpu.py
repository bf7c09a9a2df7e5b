"""Everything to be checked and measured on a machine with a GPU, in steps of at most 8 minutes each.

    python -m benchmarks.gpu [STEP …] [--out=build/gpu] [--list]

Steps named run alone, in this order; all of them otherwise. FOLDER of --out gets a JSON line per step in steps.jsonl as
soon as the step has ended, its output in log.txt, and at the end a table of all lines, also of earlier calls, in
table.md. Figures go to docs/gpu.json and from there into docs/gpu.md. Nothing is downloaded: what a step lacks is
named. Needs the CUDA toolkit (nvcc, compute-sanitizer) and what `pip install -e '.[test]'` installs; fast-reid and
torchreid (`make peers`) are compared with where they are installed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TOOLKIT = [f'{os.environ[name]}/bin' for name in ('CUDA_HOME', 'CUDA_PATH') if name in os.environ]
PATH = os.pathsep.join([os.environ['PATH'], *TOOLKIT, '/usr/local/cuda/bin'])
PACKAGES = {'torchvision': 'torchvision', 'gin': 'gin-config', 'absl': 'absl-py', 'numpy': 'numpy', 'PIL': 'pillow',
            'simplejpeg': 'simplejpeg', 'tqdm': 'tqdm', 'ninja': 'ninja', 'setuptools': 'setuptools',
            'pytest': 'pytest', 'xdist': 'pytest-xdist', 'hypothesis': 'hypothesis'}


class Step(NamedTuple):
    limit: int          # seconds
    command: list
    environment: dict = {}


def python(*arguments):
    return [sys.executable, *arguments]


def tests(*arguments, processes=4):
    """pytest on the GPU tests of some files: tests/conftest.py leaves out those that take no device."""
    return python('-m', 'pytest', '-n', str(processes), '-p', 'no:cacheprovider', '--device=cuda', *arguments)


def times(family, *arguments):
    return python('-m', 'benchmarks.gpu_times', family, *arguments)


FILES = {
    'mining': ['tests/ops/test_batch_hard.py', 'tests/ops/test_batch_hard_cuda.py',
               'tests/ops/test_batch_hard_input.py'],
    'distances': ['tests/ops/test_pairwise_distance.py', 'tests/ops/test_pairwise_distance_cuda.py'],
    'ranking': ['tests/ops/test_match_ranks.py', 'tests/ops/test_match_ranks_cuda.py',
                'tests/ops/test_neighbours_cuda.py', 'tests/ops/test_topk.py', 'tests/ops/test_topk_from_distance.py',
                'tests/ops/test_reranking.py', 'tests/ops/test_query_expansion.py'],
    'training': ['tests/test_training_cuda.py', 'tests/data/test_augmentation.py'],
}
TOOLS = ('memcheck', 'racecheck', 'initcheck', 'synccheck')
# Memory is freed and allocated anew each time, else an overrun ends in memory that torch keeps; graphs cannot be
# captured so. References run no kernel of ours, and 'auto' is one of the other precisions. What is large, or many small
# calls, takes too long here, and cuBLAS's kernels for large products confuse racecheck, and hide writes from initcheck.
LEFT_OUT = ('graph', 'reference', 'thousands', 'large', 'near_duplicates_among', '5000', 'opcheck', 'torch_compile',
            'tracer', 'finite_differences', 'current_stream', '-auto')
SANITIZED = {'mining': FILES['mining'], 'distances': FILES['distances'],
             'ranking': ['tests/ops/test_match_ranks_cuda.py', 'tests/ops/test_neighbours_cuda.py']}


def sanitizer(tool, kernels='3mgn'):
    """compute-sanitizer, on kernels with this in their mangled names; the default: those of namespace mgn.

    initcheck looks at all kernels: it takes what others write for unwritten. To the other tools cuBLAS's kernels are
    minutes of work. torch asks the driver for functions that it may lack, so errors of the interface are not reported.
    """
    watched = [] if tool == 'initcheck' else [f'--kernel-name=kernel_substring={kernels}']
    return ['compute-sanitizer', f'--tool={tool}', *watched, '--report-api-errors=no', '--error-exitcode=1']


def sanitized(tool, files):
    selected = ' and '.join(f'not {word}' for word in LEFT_OUT)
    return Step(480, [*sanitizer(tool), *tests('-x', '-m', 'not long', '-k', selected, *files, processes=0)],
                {'PYTORCH_NO_CUDA_MEMORY_CACHING': '1', 'MGN_TIMES': '0.05'})


def steps(out):
    """{name: Step}, those first that say most in little time."""
    named = {
        'build': Step(480, python('setup.py', 'build_ext', '--inplace')),
        'loads': Step(60, python('-c', 'from mgn import ops; name = ops.implementation("cuda"); print(name); '
                                       'assert name.startswith("compiled")')),
        **{f'test-{name}': Step(480, tests('-m', 'not long', *files), {'MGN_TIMES': '1'})
           for name, files in FILES.items()},
        'launches': Step(240, times('launches')),
        **{f'time-{family}': Step(480, times(family)) for family in ('mining', 'distances', 'ranks', 'neighbours',
                                                                     're-ranking')},
        'time-training': Step(480, times('training', f'--trace={out / "trace.json.gz"}')),
        'time-peers': Step(480, times('peers')),
        'test-long': Step(480, tests('-m', '', *FILES['mining'], *FILES['distances']), {'MGN_TIMES': '10'}),
    }
    named['planted-faults'] = Step(120, python('-m', 'benchmarks.gpu_faults'))
    for tool in TOOLS:
        named.update({f'{tool}-{name}': sanitized(tool, files) for name, files in SANITIZED.items()})
    return named


def program(name):
    """Its path, also where it lies in the CUDA toolkit but not on PATH; None where it is missing."""
    return shutil.which(name, path=PATH)


def lacking(step):
    """What is not here that the step needs, in a sentence; '' where nothing is."""
    if program(step.command[0]) is None:
        return f'no {step.command[0]} on PATH or in CUDA_HOME; it is a part of the CUDA toolkit'
    packages = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if 'setuptools' not in packages and int(importlib.metadata.version('setuptools').partition('.')[0]) < 77:
        packages.append("'setuptools>=77'")  # older ones do not read pyproject.toml
    if packages:
        return (f'bring these wheels, since nothing is downloaded here: pip download --no-deps {" ".join(packages)} '
                f'(elsewhere, for Python {sys.version_info[0]}.{sys.version_info[1]}), then pip install --no-index '
                f'--no-deps *.whl')
    return ''


def run(step, log, environment):
    """(result, seconds, output) of a step; its output goes to the file, too. Whatever it started ends with it."""
    start, begin = time.perf_counter(), log.stat().st_size if log.exists() else 0
    command = [program(step.command[0]), *step.command[1:]]
    with open(log, 'ab') as file:
        process = subprocess.Popen(command, cwd=ROOT, env={**environment, **step.environment}, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(step.limit)
            result = 'passed' if status == 0 else f'failed, exit status {status}'
        except subprocess.TimeoutExpired:
            result = f'stopped after {step.limit} s'
        finally:
            end_group(process)
    with open(log, 'rb') as file:
        file.seek(begin)
        return result, time.perf_counter() - start, file.read().decode(errors='replace')


def end_group(process):
    """Ends the process and all that it started, which are of its process group."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, way)
            process.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def figures_of(output):
    """The JSON objects among the lines of an output."""
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"row"') and line.endswith('}')]


def table(records):
    """Markdown of JSON lines: the steps, the last of each name, and their figures."""
    latest = {record['step']: record for record in records}
    lines = ['| step | result | seconds | said last | on |', '|---|---|---|---|---|']
    for name, record in latest.items():
        said = record['said'].replace('|', '\\|')
        lines.append(f'| {name} | {record["result"]} | {record["seconds"]:.0f} | {said} | {record["device"]} |')
    lines += ['', '| measured | side | ms | launches | waits |', '|---|---|---|---|---|']
    for record in latest.values():
        for figure in record['figures']:
            milliseconds = f'{1000 * figure["seconds"]:.4g}' if 'seconds' in figure else ''
            counts = (f'{figure[name]:g}' if name in figure else '' for name in ('launches', 'waits'))
            lines.append(f'| {figure["row"]} | {figure["side"]} | {milliseconds} | {" | ".join(counts)} |')
    return '\n'.join(lines)


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def keep(records, out):
    """The table of all steps, and what was measured in docs/gpu.json and docs/gpu.md, copied to the folder.

    What earlier calls have measured on the same device stays there until it is measured anew.
    """
    (out / 'table.md').write_text(table(records) + '\n')
    on = {name: records[-1][name] for name in ('device', 'torch')}
    found = {(figure['side'], figure['row']): figure['seconds'] for record in records
             if on.items() <= record.items() for figure in record['figures'] if 'seconds' in figure}
    if not found:
        return
    from benchmarks import roofline  # here: it needs packages that may be lacking

    before = roofline.read_measured()
    measured = {**on, 'seconds': {}, 'in_graph': {}, **(before if on.items() <= before.items() else {})}
    for column, side in (('seconds', 'mgn'), ('in_graph', 'mgn, a CUDA graph')):
        measured[column].update({name: found[side, name] for name in roofline.rows() if (side, name) in found})
    roofline.MEASURED.write_text(json.dumps(measured, indent=1) + '\n')
    roofline.main()
    for page in (roofline.MEASURED, roofline.PAGE):
        shutil.copy(page, out)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('steps', nargs='*', metavar='STEP')
    parser.add_argument('--out', type=Path, default=ROOT / 'build' / 'gpu', metavar='FOLDER')
    parser.add_argument('--list', action='store_true', help='names of the steps, and their commands')
    options = parser.parse_args(arguments)
    out = options.out.absolute()
    named = steps(out)
    if options.list:
        return print('\n'.join(f'{name}: {" ".join(step.command)}' for name, step in named.items()))
    unknown = [name for name in options.steps if name not in named]
    if unknown:
        parser.error(f'there is no step {", ".join(unknown)}; there are: {", ".join(named)}')
    import torch  # here, so that --help and --list are there at once

    if not torch.cuda.is_available():
        sys.exit('benchmarks.gpu needs a GPU, but torch sees none; `pytest` runs the kernels under an emulator instead')
    out.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    environment = {**os.environ, 'PATH': PATH, 'TORCH_CUDA_ARCH_LIST': f'{major}.{minor}', 'PYTHONUNBUFFERED': '1',
                   'PYTHONPATH': os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])}
    failed = False
    for name in named if not options.steps else [name for name in named if name in options.steps]:
        print(f'=== {name}: {" ".join(named[name].command)}', flush=True)
        result, seconds, output = 'not run', 0.0, lacking(named[name])
        if not output:
            result, seconds, output = run(named[name], out / 'log.txt', environment)
        said = ([line for line in output.splitlines() if line.strip() and not line.startswith('{"row"')] or [''])[-1]
        record = {'step': name, 'result': result, 'seconds': seconds, 'said': said[:300],
                  'figures': figures_of(output), 'device': torch.cuda.get_device_name(), 'torch': torch.__version__}
        with open(out / 'steps.jsonl', 'a') as file:
            file.write(json.dumps(record) + '\n')
        print(f'{output[-2000:]}\n{name}: {result}', flush=True)
        failed |= result != 'passed'
    keep(read(out / 'steps.jsonl'), out)
    print((out / 'table.md').read_text())
    sys.exit(failed)


if __name__ == '__main__':
    main()
