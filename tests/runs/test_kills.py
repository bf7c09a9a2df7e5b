"""A run survives SIGKILL anywhere; `python tests/kills.py` is the long version."""

import re

import pytest
from forks import ROOT, run_binary


@pytest.mark.parametrize('kills', [2, pytest.param(6, marks=pytest.mark.long)])
def test_a_run_killed_at_random_places_ends_with_the_files_of_an_uninterrupted_one(kills):
    program = f'import sys; sys.path.insert(0, sys.argv[1]); sys.argv = ["kills", "--kills={kills}"]; ' \
              f'import kills; kills.main()'
    ended = run_binary(ROOT / 'tests', program=program)
    assert ended.returncode == 0, ended.stderr
    pattern = rf'{kills // 2} kills, (\d) of them while writing; files as of an uninterrupted run'
    killed_writing = re.findall(pattern, ended.stdout)
    assert len(killed_writing) == 2 and sum(map(int, killed_writing)) > 0, ended.stdout
