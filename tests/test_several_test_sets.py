"""mgn.eval on several data sets: results are printed and written as they come, so that a later failure takes none."""

import json
import re
import shutil

import gin
import pytest
import torch
from forks import run_program
from thin import BINDINGS, thin, train  # noqa: F401 (thin is a fixture)

from mgn import config, evaluation, training
from mgn.model import MGN
from mgn.ops.errors import UserError
from mgn.ops.metrics import METRICS
from mgn.runs import checkpoint

pytestmark = pytest.mark.usefixtures('thin')


@pytest.fixture
def evaluate_on(market, tmp_path, monkeypatch):
    """evaluate_on(roots of the further data sets, binding…): mgn.eval of a checkpoint, from an empty folder."""
    config.load([], [*BINDINGS, f"data_root = '{market}'", 'dataset = @market_layout()'])
    torch.manual_seed(0)
    saved = {'config': gin.config_str(), 'num_classes': 5, 'step': 3, 'mAP': 0.5, 'model': MGN(5).state_dict()}
    checkpoint.save(str(tmp_path / 'best.pth'), saved)
    (tmp_path / 'out').mkdir()
    monkeypatch.chdir(tmp_path / 'out')

    def evaluate_on(roots, *bindings):
        sets = [f"set{i}/market_layout.root = '{root}'" for i, root in enumerate(roots)]
        references = ''.join(f'@set{i}/market_layout(), ' for i in range(len(roots)))
        return evaluation.evaluate_checkpoint(config.load_checkpoint([], [
            f"weights = '{tmp_path}/best.pth'", *sets, f'test_sets = ({references})', *bindings]))
    return evaluate_on


@pytest.fixture
def others(market, tmp_path):
    """Two copies of the images; in that of the second one image is damaged."""
    roots = [shutil.copytree(market, tmp_path / name) for name in ('good', 'bad')]
    damaged = sorted((roots[1] / 'query').iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:200])
    return roots, damaged


def shown(out):
    """The names and figures of the rows that were printed."""
    return [line.split() for line in out.splitlines() if re.match(r'(market1501|good) ', line)]


def written():
    with open('eval.json') as file:
        return json.load(file)


def test_each_data_set_has_a_table_and_its_results_in_the_file(market, evaluate_on, others, capsys):
    results = evaluate_on([others[0][0]], 'rerank = True', 'evaluate.k1 = 3', 'evaluate.k2 = 2')
    assert results == written() and len(results['test_sets']) == 1
    second, = results['test_sets']
    assert (second['dataset'], second['data_root']) == ('good', str(others[0][0])) and 'rerank' in second
    assert {name: second[name] for name in METRICS} == {name: results[name] for name in METRICS}  # the same images
    out = capsys.readouterr().out
    figures = [f'{100 * results[name]:.2f}' for name in METRICS]
    assert shown(out) == [['market1501', *figures], ['good', *figures]] and out.count('+ re-ranking') == 2


def test_a_data_set_that_fails_takes_nothing_from_those_before_it(evaluate_on, others, capsys):
    roots, damaged = others
    with pytest.raises(UserError, match=f'Evaluation needs every image, .*\n  {re.escape(str(damaged))}: '):
        evaluate_on([*roots, roots[0]], 'report = True')
    results = written()
    assert [each['dataset'] for each in (results, *results['test_sets'])] == ['market1501', 'good']
    assert shown(capsys.readouterr().out) == [[each['dataset'], *(f'{100 * each[name]:.2f}' for name in METRICS)]
                                              for each in (results, *results['test_sets'])]
    with open('report.html') as page:  # of the first
        assert 'market1501' in page.read()


def test_a_data_set_that_is_missing_is_told_before_any_feature_is_made(evaluate_on, others, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, 'load_for_features', lambda *_: pytest.fail('work that is lost'))
    with pytest.raises(UserError, match='No folder holds .*; looked into\n  .*nowhere .no such folder'):
        evaluate_on([others[0][0], tmp_path / 'nowhere'])


def test_results_are_written_although_nobody_reads_the_table(evaluate_on, monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError
    monkeypatch.setattr('builtins.print', gone)
    with pytest.raises(BrokenPipeError):
        evaluate_on([])
    assert written()['dataset'] == 'market1501'


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


def test_lack_of_memory_in_an_evaluation_of_training_leaves_the_checkpoint_to_resume_from(market, tmp_path,
                                                                                         monkeypatch):
    calls, real = [], training.evaluate

    def evaluate(*args):
        calls.append(0)
        if len(calls) == 2:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return real(*args)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(training, 'evaluate', evaluate)
        train(market, tmp_path)
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 4
    first = checkpoint.load(str(tmp_path / 'best.pth'))
    train(market, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'mAP' in line] == [0, 4, 7]
    assert first['step'] == 0 and checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 7
