"""The most memory that a call takes, measured in a process of its own."""

import sys

import pytest
from forks import run_program

only_linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='only Linux tells this peak')

HIGH_WATER = '''
def high_water(anew=False):
    if anew:
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')  # the mark falls to what is held now
    with open('/proc/self/status') as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) * 1024
'''


def printed(program, *args):
    """The integers that a program prints. It knows high_water(anew), the most bytes since the last anew=True."""
    done = run_program(HIGH_WATER + program, *args)
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))
