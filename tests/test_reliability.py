"""benchmarks.reliability: what goes wrong in a case is counted, an interrupted call continues, the page tells both."""

import json
import re

import pytest
from forks import ROOT, run_program

PROGRAM = """
import os, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests', sys.argv[1] + '/tests/ops']
from benchmarks.reliability import __main__ as reliability
from benchmarks.reliability.driver import Row

def case(rng, folder, number):
    with open('ran', 'a') as file:
        print(number, file=file)
    assert (folder / 'prepared').exists()
    if number % 6 == 1:
        raise ValueError('a wrong number')
    if number % 6 == 2:
        os.kill(os.getpid(), 11)
    if number % 6 == 3:
        time.sleep(60)
    if number % 6 == 4:
        bytearray(2 ** 34)

row = Row('a row of six', 12, case, lambda folder: (folder / 'prepared').write_text(''), seconds=1, memory=2 ** 30)
reliability.PARTS['Files']['six'] = reliability.ROWS['six'] = row
sys.argv[1:] = sys.argv[2:]
reliability.main()
"""


def reliability(folder, *flags, program=PROGRAM):
    ended = run_program(program, ROOT, '--page=reliability.md', *flags, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / 'reliability.json').read_text()), (folder / 'reliability.md').read_text()


def test_each_kind_of_failure_is_counted_and_the_next_call_skips_what_is_done(tmp_path):
    results, page = reliability(tmp_path, '--rows=six', '--scale=0.5')
    result = results['six']
    assert (result['done'], result['cases'], result['found']) == (6, 6, 4)
    assert [failure['case'] for failure in result['failures']] == [1, 2, 3, 4]
    for failure, message in zip(result['failures'], ('ValueError: a wrong number', 'the process ended with SIGSEGV',
                                                     'took more than 1 s', 'MemoryError: ')):
        assert failure['message'].startswith(message)
    assert 'Open failures: 4**' in page and '| `topk` | topk | 0 of 20,000 |' in page
    assert re.search(r'\| a row of six \| six \| 6 of 12 \| 4 \| \d+ \|', page)
    assert '- 1 ×, e.g. case 2: the process ended with SIGSEGV' in page
    results, _ = reliability(tmp_path, '--rows=six', '--scale=0.67')  # two more
    assert (tmp_path / 'ran').read_text().split() == [str(number) for number in range(8)]
    assert (results['six']['done'], results['six']['found'], results['six']['failures'][0]['count']) == (8, 5, 2)


def test_a_row_finds_nothing_in_an_operation_that_is_right_and_much_in_one_that_is_not(tmp_path):
    assert reliability(tmp_path, '--rows=topk', '--scale=0.0005')[0]['topk']['found'] == 0
    wrong = PROGRAM.replace('sys.argv[1:] = ', '''
from mgn import ops
right = ops.topk
ops.topk = lambda *args, **options: (lambda got: got._replace(indices=got.indices + 1))(right(*args, **options))
sys.argv[1:] = ''')
    result = reliability(tmp_path, '--rows=topk', '--scale=0.001', '--anew', program=wrong)[0]['topk']
    assert (result['done'], result['found'] > 10) == (20, True)


@pytest.mark.long
def test_rows_of_operations_files_and_runs_run(tmp_path):
    results, _ = reliability(tmp_path, '--rows=full disk,metrics,last,match_ranks,bindings', '--scale=0.01')
    assert {name: result['done'] for name, result in results.items()} == {
        'full disk': 3, 'metrics': 100, 'last': 100, 'match_ranks': 200, 'bindings': results['bindings']['cases']}
    assert results['full disk']['found'] == results['last']['found'] == results['match_ranks']['found'] == 0
