"""mgn.eval on several data sets: results are printed and written as they come, so that a later failure takes none."""

import json
import re
import shutil

import gin
import pytest
import torch
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
