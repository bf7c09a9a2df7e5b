"""Programs in processes of their own, forked from one that has imported torch and done nothing else: to save time.

For the binaries of this project there is another one, which has imported all that they need.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
SERVER = '''
import json, os, sys
import IMPORTED
while line := sys.stdin.readline():
    program, arguments, folder, environment, outputs = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for number, path in enumerate(outputs, 1):
    os.dup2(os.open(path, os.O_WRONLY), number)
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
sys.argv = ['-c', *arguments]
exec(compile(program, '<string>', 'exec'), {'__name__': '__main__'})
'''
# What python FILE or python -m MODULE does.
BINARY = '''
import runpy, sys
sys.argv[:] = sys.argv[1:]
if sys.argv[0].endswith('.py'):
    runpy.run_path(sys.argv[0], run_name='__main__')
else:
    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
'''


@functools.cache
def server(imported):
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    return subprocess.Popen([sys.executable, '-c', SERVER.replace('IMPORTED', imported)], text=True, cwd=ROOT, **pipes)


def run_binary(*command, program=BINARY, **options):
    """command: a module of the project, or a Python file, with its flags; or the flags of `program`."""
    return run_program(program, *command, imported='numpy, torch, torchvision, mgn.config', **options)


def run_program(program, *arguments, cwd=ROOT, env=None, imported='numpy, torch', stdout=None):
    """As subprocess.run([sys.executable, '-c', program, *arguments], capture_output=True, text=True).

    cwd: the project's folder by default. env: variables beside those of the environment. imported: modules. stdout: a
    path, of a terminal for example.
    """
    environment, arguments = {**os.environ, **(env or {})}, list(map(str, arguments))
    if not sys.platform.startswith('linux'):  # elsewhere a fork may not use what its parent has loaded
        command = [sys.executable, '-c', program, *arguments]
        with open(stdout, 'w') if stdout else nullcontext(subprocess.PIPE) as out:
            return subprocess.run(command, cwd=cwd, env=environment, stdout=out, stderr=subprocess.PIPE, text=True)
    with tempfile.NamedTemporaryFile('r') as out, tempfile.NamedTemporaryFile('r') as err:
        request = json.dumps([program, arguments, os.path.abspath(cwd), environment, [stdout or out.name, err.name]])
        process = server(imported)
        process.stdin.write(request + '\n')
        process.stdin.flush()
        status = int(process.stdout.readline())
        return SimpleNamespace(returncode=status, stdout=out.read(), stderr=err.read())


@contextmanager
def another_process(run):
    """A process that has run `run`, holds what it returned and waits; it is killed on the way out."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            held = [run()]
            os.write(write, b'.')
            signal.pause()
            held.clear()
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b'.'
    os.close(read)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def lock(folder):
    """The lock on a folder that a command writes to."""
    from mgn.runs.folder import locked  # and torch

    held = locked(str(folder))
    held.__enter__()
    return held
