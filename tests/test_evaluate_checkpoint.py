"""Evaluation of a checkpoint alone, and what bindings of the command line change in it."""

import json
import re
from pathlib import Path

import gin
import pytest
from test_evaluation import folder, model, naive_results, naive_stages  # noqa: F401
from thin import thin  # noqa: F401

from mgn import config, evaluation
from mgn.ops.metrics import METRICS
from mgn.results import table
from mgn.runs import checkpoint

pytestmark = pytest.mark.usefixtures('thin')


@pytest.fixture
def saved(model, folder, tmp_path):
    """A checkpoint of `model` as training writes it."""
    config.load([], [f"data_root = '{folder}'", 'dataset = @market_layout()', 'input_size = (48, 24)', 'workers = 0',
                     "output_dir = '/nowhere'", "device = 'cpu'", "MGN.pretrained = 'gone.pth'"])
    path = str(tmp_path / 'best.pth')
    checkpoint.save(path, {'config': gin.config_str(), 'num_classes': 5, 'step': 33, 'mAP': 0.5,
                           'model': model.state_dict()})
    return path


def test_a_checkpoint_alone_rebuilds_model_and_data(model, folder, saved, tmp_path, monkeypatch, capsys):
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    content = checkpoint.load(saved)
    config.load([], [f"weights = '{saved}'"], saved=content['config'])
    got = evaluation.evaluate_checkpoint(content)
    want, _ = naive_results(model, folder)
    assert {name: got[name] for name in METRICS} == pytest.approx(want, abs=1e-12)
    assert json.loads(Path('eval.json').read_text()) == got
    assert (got['weights'], got['step'], got['data_root'], got['dataset']) == (saved, 33, str(folder), 'own')
    assert (got['input_size'], got['flip_test'], got['cross_camera']) == ([48, 24], False, True)
    assert set(METRICS) | {'queries', 'queries_without_match', 'gallery', 'features_s', 'ranking_s'} <= got.keys()
    assert 0 <= got['redecided'] < 0.5
    shown = capsys.readouterr().out
    for name in METRICS:
        assert re.search(rf'\b{100 * want[name]:.2f}\b', shown) and name in shown
    assert '5 queries, 0 of them without a match; 22 in the gallery' in shown


def test_bindings_override_what_a_checkpoint_carries(model, folder, saved, market, tmp_path):
    content = checkpoint.load(saved)
    config.load([], [f"weights = '{saved}'", f"data_root = '{market}'", f"output_dir = '{tmp_path / 'out'}'",
                     'flip_test = True', 'Extractor.batch_size = 3'], saved=content['config'])
    got = evaluation.evaluate_checkpoint(content)
    want, _ = naive_results(model, market, flip_test=True)
    assert {name: got[name] for name in METRICS} == pytest.approx(want, abs=1e-12)
    assert got['data_root'] == str(market) and got['flip_test'] is True
    assert json.loads((tmp_path / 'out' / 'eval.json').read_text()) == got


def test_query_expansion_and_re_ranking_are_bound_by_macros(model, folder, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = checkpoint.load(saved)
    config.load([], [f"weights = '{saved}'", 'query_expansion = 3', 'rerank = True', 'evaluate.alpha = 2.0',
                     'evaluate.k1 = 5', 'evaluate.k2 = 3', 'evaluate.lambda_value = 0.5'], saved=content['config'])
    got = evaluation.evaluate_checkpoint(content)
    assert json.loads(Path('eval.json').read_text()) == got
    plain, _ = naive_results(model, folder)
    expanded, reranked = naive_stages(model, folder, 3, 2.0, 5, 3, 0.5)
    for figures, want in ((got, plain), (got['query_expansion'], expanded), (got['rerank'], reranked)):
        assert {name: figures[name] for name in METRICS} == pytest.approx(want, abs=1e-12)
    assert table(got) in capsys.readouterr().out

    config.load([], [f"weights = '{saved}'", 'evaluate.rerank = True'], saved=content['config'])
    got = evaluation.evaluate_checkpoint(content)
    assert 'query_expansion' not in got and not got['rerank']['expanded'] and got['rerank']['k1'] == 20


def test_weights_of_another_architecture_are_an_error(saved):
    content = checkpoint.load(saved)
    config.load([], [f"weights = '{saved}'", 'MGN.parts = (1, 2)', 'MGN.last_strides = (2, 1)'],
                saved=content['config'])
    with pytest.raises(ValueError, match='(?s)best.pth do not fit.*branches.2.*is unexpected.*heads.7.*is unexpected'):
        evaluation.evaluate_checkpoint(content)
