"""A run survives SIGKILL anywhere; `python tests/kills.py` is the long version."""

import re

from forks import ROOT, run_program


def test_a_run_killed_at_random_places_ends_with_the_files_of_an_uninterrupted_one():
    program = 'import sys; sys.path.insert(0, sys.argv[1]); sys.argv = ["kills", "--kills=6"]; import kills; kills.main()'
    ended = run_program(program, ROOT / 'tests')
    assert ended.returncode == 0, ended.stderr
    killed_writing = re.findall(r'3 kills, (\d) of them while writing; files as of an uninterrupted run', ended.stdout)
    assert len(killed_writing) == 2 and sum(map(int, killed_writing)) > 0, ended.stdout
