"""What several processes do together, started by torchrun with 2 and 3 of them (together_….py)."""

import pytest
from together import checks, outcomes


@pytest.fixture(scope='module')
def told(tmp_path_factory):
    """Outcomes by number of processes, which are started at most once."""
    known = {}

    def told(processes):
        if processes not in known:
            known[processes] = outcomes(processes, tmp_path_factory.mktemp(f'together{processes}'))
        return known[processes]
    return told


@pytest.mark.parametrize('processes', [2, 3, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize('check', [check for _, check in checks()])
def test_together(told, processes, check):
    assert told(processes)[check] == 'passed'
