"""What a run reports: progress on terminals and elsewhere."""

import fcntl
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
