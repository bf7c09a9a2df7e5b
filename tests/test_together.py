"""What several processes do together, started by torchrun with 2, 3 and 5 of them (together_….py)."""

import pytest
from together import checks, outcomes


@pytest.fixture(scope='module')
def outcomes_of(tmp_path_factory):
    """Outcomes by number of processes, which are started at most once."""
    known = {}

    def outcomes_of(processes):
        if processes not in known:
            known[processes] = outcomes(processes, tmp_path_factory.mktemp(f'together{processes}'))
        return known[processes]
    return outcomes_of


@pytest.mark.parametrize('processes', [2, *(pytest.param(number, marks=pytest.mark.long) for number in (3, 5))])
@pytest.mark.parametrize('check', [check for _, check in checks()])
def test_together(outcomes_of, processes, check):
    assert outcomes_of(processes)[check] == 'passed'
