"""What a run reports: its summary, and progress on terminals and elsewhere."""

import fcntl
import os
import pty
import struct
import termios

import pytest

from mgn.ops.metrics import METRICS
from mgn.runs import log


def test_the_summary_shows_every_measure_of_the_first_the_best_and_the_last_evaluation(tmp_path):
    run_log = log.RunLog(str(tmp_path), 0)
    assert run_log.summary() == f'{tmp_path}/metrics.jsonl holds no evaluation'
    for step, mAP in enumerate((0.25, 0.75, 0.5, 0.125)):
        run_log.write({'step': step, 'loss': 1.0})
        run_log.write({'step': step, **{name: mAP if name == 'mAP' else 0.1 for name in METRICS}})
    heading, *rows, note = run_log.summary().splitlines()
    assert heading.split() == ['step', *METRICS]
    assert [(row.split()[0], row.split()[1 + METRICS.index('mAP')]) for row in rows] == [
        ('0', '25.00'), ('1', '75.00'), ('3', '12.50')]
    assert all(len(row) == len(heading) for row in rows) and note.endswith(str(tmp_path))


@pytest.mark.parametrize('columns, shown', [(80, True), (0, False)])
def test_a_terminal_without_a_size_gets_plain_lines(monkeypatch, columns, shown):
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack('4H', 24, columns, 0, 0))  # rows, columns
    with os.fdopen(inner, 'w') as stdout:
        monkeypatch.setattr('sys.stdout', stdout)
        with log.progress(3) as bar:
            assert bar.disable != shown
        monkeypatch.undo()
    os.close(terminal)
