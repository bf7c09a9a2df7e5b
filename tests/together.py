"""Checks that several processes make together. torchrun starts them once for all checks; pytest asks for each outcome.

A check is a function check_…(folder) of a module together_….py. It runs in every process at once, with a gloo group.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in HERE.glob('together_*.py'))


def checks():
    for module in MODULES:
        source = (HERE / f'{module}.py').read_text()
        yield from ((module, line.split('(')[0].removeprefix('def ')) for line in source.splitlines()
                    if line.startswith('def check_'))


def torchrun(processes, *command, options=(), **keywords):
    """`torchrun --nproc-per-node processes command…` → its CompletedProcess; one thread in each process."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get('PYTHONPATH')])])
    start = [sys.executable, '-m', 'torch.distributed.run', f'--nproc-per-node={processes}', '--rdzv-backend=c10d',
             '--rdzv-endpoint=localhost:0', *options, *command]
    return subprocess.run(start, text=True, capture_output=True, timeout=300, **keywords,
                          env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'})


def outcomes(processes, folder):
    """{check: 'passed' or what one of the processes says}, all checks."""
    run = torchrun(processes, str(HERE / 'together.py'), str(folder))
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob('?.json'))]
    missing = f'no outcome; {len(reports)} of {processes} processes ended:\n{run.stdout}\n{run.stderr}'

    def outcome(check):
        results = [report[check] for report in reports if check in report]
        failed = [result for result in results if result != 'passed']
        return '\n'.join(failed) if failed else 'passed' if len(results) == processes else missing
    return {check: outcome(check) for _, check in checks()}


def main(folder):
    dist.init_process_group('gloo', timeout=timedelta(seconds=60))
    report = {}
    for module, check in checks():
        try:
            getattr(importlib.import_module(module), check)(Path(folder))
            report[check] = 'passed'
        except BaseException:
            report[check] = traceback.format_exc()
            break  # the others would wait for this process in vain
    Path(folder, f'{dist.get_rank()}.json').write_text(json.dumps(report))
    if all(outcome == 'passed' for outcome in report.values()):
        dist.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1])
