"""How a binary ends: errors of the system as sentences, one process or several, what of its log is told."""

import errno
import re

import gin
import pytest
from forks import run_program

from mgn.command_line import of_the_system

LACK = {'of torch on a GPU': 'raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")',
        'of torch on a CPU': 'torch.empty(10 ** 15)', 'of NumPy': 'numpy.empty(10 ** 15)',
        'of Python': 'bytearray(10 ** 17)', 'of the system': 'raise OSError(12, "Cannot allocate memory")'}


@pytest.mark.parametrize('lack', LACK)
def test_lack_of_memory_ends_a_binary_by_a_sentence(lack):
    done = run_program(f'import numpy, torch\nfrom mgn import command_line\n'
                       f'def main(files, bindings):\n    {LACK[lack]}\ncommand_line.run(main)')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert re.fullmatch(r'error: Memory ran out \(.+\)\. Free some, or bind a smaller P for training, a smaller '
                        r'Extractor.batch_size for evaluation\.\n', done.stderr)


@pytest.mark.parametrize('several', [False, True])
def test_a_command_of_one_process_ends_under_torchrun(several):
    done = run_program(f'from mgn import command_line\nfrom mgn.runs import processes\n'
                       f'processes.join = processes.leave = lambda: None\nprocesses.count = lambda: 2\n'
                       f'processes.number = lambda: 0\n'
                       f'command_line.run(lambda files, bindings: print("ran"), several={several})')
    assert done.returncode == (not several) and done.stdout == 'ran\n' * several
    refusal = 'error: This command is one process, found 2; start it without torchrun\n'
    assert done.stderr == ('' if several else refusal)


def test_other_libraries_tell_warnings_alone():
    """onnxscript tells dozens of steps of an export to the root logger, which absl prints."""
    done = run_program('import logging\nfrom mgn import command_line\ndef main(files, bindings):\n'
                       '    logging.getLogger("onnxscript").info("a step")\n'
                       '    logging.getLogger("onnxscript").warning("a fault")\n'
                       '    logging.getLogger("mgn").info("ours")\ncommand_line.run(main)')
    assert done.returncode == 0 and 'a fault' in done.stderr and 'a step' not in done.stderr
    assert 'ours' in done.stdout


def test_log_lines_that_cannot_be_written_are_left_out_and_the_work_goes_on():
    done = run_program('import logging, os, sys\nfrom mgn import command_line\ndef main(files, bindings):\n'
                       '    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)\n'
                       '    [logging.getLogger("mgn").info("a line") for _ in range(3)]\n'
                       '    os.write(2, b"done")\n    os._exit(0)\ncommand_line.run(main)')
    assert (done.returncode, done.stderr) == (0, 'done')


def test_a_file_that_may_not_be_read_is_named():
    error = PermissionError(errno.EACCES, 'Permission denied', 'runs/last.pth')
    assert of_the_system(error) == ("A file cannot be used: [Errno 13] Permission denied: 'runs/last.pth'. "
                                    'Allow it, free space, or give another path.')
    assert of_the_system(FileNotFoundError(errno.ENOENT, 'No such file', 'a')) is None  # whose fault, it cannot say
    assert of_the_system(PermissionError(errno.EACCES, 'Permission denied')) is None  # of no file


def test_a_file_that_may_not_be_read_is_named_where_gin_has_called_what_reads_it():
    @gin.configurable(module='of_this_test')
    def read_what_is_forbidden():
        raise PermissionError(errno.EACCES, 'Permission denied', 'runs/last.pth')
    with pytest.raises(PermissionError) as raised:
        read_what_is_forbidden()
    assert of_the_system(raised.value) == ("A file cannot be used: [Errno 13] Permission denied: 'runs/last.pth'. "
                                           'Allow it, free space, or give another path.')
