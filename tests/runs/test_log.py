"""What a run reports: metrics.jsonl, progress on terminals and elsewhere."""

import fcntl
import json
import os
import pty
import struct
import termios

import pytest

from mgn.runs import log


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


def test_a_closed_stdout_is_no_terminal(monkeypatch):
    monkeypatch.setattr('sys.stdout', None)
    with log.progress(3) as bar:
        assert bar.disable


def test_a_log_drops_a_torn_line_and_the_lines_of_later_steps(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 0, "mAP": 0.1}\n{"step": 2, "loss": 1.5}\n{"step": 3, "loss": 1.25}\n{"step": 4, "lo')
    records = log.RunLog(str(tmp_path), 2)
    assert 0 in records.evaluated and 2 not in records.evaluated
    records.write({'step': 3, 'loss': 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {'step': 0, 'mAP': 0.1}, {'step': 2, 'loss': 1.5}, {'step': 3, 'loss': 0.5}]


def test_a_damaged_line_within_a_log_is_an_error_that_names_it(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 0}\n{"st\n{"step": 1}\n')
    with pytest.raises(ValueError, match='Line 2 of .*metrics.jsonl'):
        log.read_records(str(path))
