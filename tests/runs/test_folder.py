"""One run at a time writes in a folder, and temporary files of a killed one are removed."""

import os
import resource
import signal
import socket

import pytest
from forks import another_process, lock
from thin import thin, train  # noqa: F401 (a fixture)

from mgn.ops.errors import FileError, UserError
from mgn.runs import checkpoint, folder as runfolder
from mgn.runs.folder import locked


@pytest.mark.usefixtures('thin')
def test_the_second_run_in_a_folder_is_refused_by_the_name_of_the_first(market, tmp_path):
    folder = tmp_path / 'run'
    with another_process(lambda: lock(folder)) as process:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match=f'Another command is writing to output_dir {folder}: process {process} '
                                             f'on {socket.gethostname()}. Wait for it'):
            train(market, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    train(market, folder, 'total_steps = 1')  # the lock of a dead process is none


def test_a_holder_that_has_not_written_its_name_yet_is_one_all_the_same(tmp_path):
    def lock_namelessly():
        held = lock(tmp_path)
        os.truncate(tmp_path / runfolder.LOCK, 0)
        return held
    message = 'Another command is writing to .*: another process'
    with another_process(lock_namelessly), pytest.raises(ValueError, match=message):
        with locked(str(tmp_path)):
            pass


def test_children_of_a_killed_run_do_not_hold_its_folder(tmp_path):
    read, write = os.pipe()

    def lock_and_fork():
        held = lock(tmp_path)
        child = os.fork()
        if child == 0:
            signal.pause()
        os.write(write, str(child).encode())
        return held
    with another_process(lock_and_fork):
        child = int(os.read(read, 20))
    try:
        with locked(str(tmp_path)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    import fcntl

    def refuse(*_):
        raise OSError(95, 'Operation not supported')
    monkeypatch.setattr(fcntl, 'lockf', refuse)
    with locked(str(tmp_path)):
        assert 'cannot be locked' in caplog.text and 'Operation not supported' in caplog.text


def test_a_lock_that_a_file_system_refuses_as_forbidden_is_taken(tmp_path, monkeypatch):
    """POSIX lets fcntl say EACCES, as some network file systems do, in place of EAGAIN."""
    def refuse(*_):
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('fcntl.lockf', refuse)
    with pytest.raises(ValueError, match='Another command is writing'), locked(str(tmp_path)):
        pass


@pytest.mark.parametrize('keep_last, left', [(0, [12, 20]), (1, [11, 12, 20]), (4, [9, 10, 11, 12, 20])])
def test_the_last_by_number_of_the_checkpoints_passed_are_kept_and_so_are_all_later_ones(tmp_path, keep_last, left):
    for step in (9, 10, 11, 12, 20):
        (tmp_path / f'step_{step}.pth').write_text('')
    (tmp_path / 'step_8.pth.damaged').write_text('')  # set aside by an earlier run
    runfolder.remove_older(str(tmp_path), 12, keep_last)
    assert [*runfolder.older(str(tmp_path))] == left


def test_without_resume_an_older_checkpoint_alone_is_a_run_too(tmp_path):
    (tmp_path / 'step_3.pth').write_text('')
    with pytest.raises(UserError, match='train.resume = False needs an output_dir without a run, but .*step_3.pth'):
        runfolder.newest(str(tmp_path), resume=False)


def test_any_mAP_is_better_than_one_that_is_no_number(tmp_path):
    content = {'config': '', 'num_classes': 1, 'step': 0, 'model': {}, 'mAP': float('nan')}
    checkpoint.save(str(tmp_path / 'best.pth'), content)
    assert runfolder.best_so_far(str(tmp_path)) == -1


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(tmp_path):
    for name in ('last.pth.123.tmp', 'metrics.jsonl.9.tmp', 'notes.tmp', 'last.pth', 'x.123.tmp.txt', 'x.2024.tmp'):
        (tmp_path / name).write_text('')
    with locked(str(tmp_path)):
        assert sorted(os.listdir(tmp_path)) == sorted(['last.pth', 'notes.tmp', 'run.lock', 'x.123.tmp.txt',
                                                       'x.2024.tmp'])
    (tmp_path / 'last.pth.123.tmp').mkdir()
    with locked(str(tmp_path)):
        assert (tmp_path / 'last.pth.123.tmp').is_dir()


def test_a_disk_that_is_full_before_a_run_begins_is_a_clear_error(tmp_path):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(FileError, match='run.lock could not be written: .*Free disk space'):
            with locked(str(tmp_path)):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='run.lock could not be written: .*file.*Bind another output_dir'):
        with locked(str(tmp_path / 'file' / 'run')):
            pass
