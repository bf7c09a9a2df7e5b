"""Programs in processes of their own, forked from one that has imported torch and done nothing else: to save time."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
SERVER = '''
import json, os, sys
import numpy, torch
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


@functools.cache
def server():
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    return subprocess.Popen([sys.executable, '-c', SERVER], text=True, cwd=ROOT, **pipes)


def run_program(program, *arguments, cwd=ROOT, env=None):
    """As subprocess.run([sys.executable, '-c', program, *arguments], capture_output=True, text=True).

    cwd: the project's folder by default. env: variables beside those of the environment.
    """
    environment, arguments = {**os.environ, **(env or {})}, list(map(str, arguments))
    if not sys.platform.startswith('linux'):  # elsewhere a fork may not use what its parent has loaded
        command = [sys.executable, '-c', program, *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    with tempfile.NamedTemporaryFile('r') as out, tempfile.NamedTemporaryFile('r') as err:
        request = json.dumps([program, arguments, os.path.abspath(cwd), environment, [out.name, err.name]])
        server().stdin.write(request + '\n')
        server().stdin.flush()
        status = int(server().stdout.readline())
        return SimpleNamespace(returncode=status, stdout=out.read(), stderr=err.read())
