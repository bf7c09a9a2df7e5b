"""The configuration in a checkpoint: saved, it comes back; it is data, which names and imports nothing unknown."""

import logging
import os
import re
import sys

import gin
import pytest
from test_config import RECIPES, value, write

from mgn import config
from mgn.ops.errors import FileError, UserError
from mgn.runs import checkpoint

pytestmark = pytest.mark.usefixtures('clean_gin')


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_saved_configuration_comes_back_in_all_that_evaluation_uses(recipe, tmp_path, monkeypatch, caplog):
    config.load([f'gin/{recipe}'], ["data_root = 'data'", 'MGN.parts = (1, 4)', 'lr = 1e-5', 'SGD.momentum = 0.1',
                                    'mgn_losses.margin = None', 'evaluate.alpha = 1.25', 'own = 3', 'train.P = %own'])
    before, saved = bound(), checkpoint.configuration()
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    config.load([], [], saved=saved)
    before['', 'mgn.data.datasets.pedestrians']['draw'] = 'False'  # reading a checkpoint writes nothing
    before['device', 'gin.macro']['value'] = 'auto'  # this machine's
    del before['own', 'gin.macro']  # which only training uses
    assert {key: bindings for key, bindings in bound().items() if key[1].split('.')[-1] not in config.TRAINING} == {
        key: bindings for key, bindings in before.items() if key[1].split('.')[-1] not in config.TRAINING}
    assert value('MGN.parts') == (1, 4) and value('evaluate.alpha') == 1.25 and str(value('%dataset')) in saved
    assert [record.message for record in caplog.records if 'set aside' in record.message] == [
        record.message for record in caplog.records]
    assert len(caplog.records) == 1 and 'mgn_losses' in caplog.text and 'MGN,' not in caplog.text


def bound():
    """All bindings, as text."""
    return {key: {name: str(value) for name, value in bindings.items()}
            for key, bindings in gin.config._CONFIG.items()}


def test_the_device_of_the_training_machine_is_left_out():
    config.load([], ["device = 'cuda:1'"])
    saved = checkpoint.configuration(portable=True)
    assert "device = 'cuda:1'" in saved
    config.load([], [], saved=saved)
    assert value('%device') == 'auto'


def test_files_and_bindings_override_a_saved_configuration_but_for_its_output_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.load([], ["output_dir = 'run'", 'P = 5', 'K = 5', 'seed = 5'])
    saved = checkpoint.configuration()
    config.load([], [], saved=saved)
    assert value('%output_dir') is None
    config.load([write(tmp_path / 'mine.gin', 'K = 6\nseed = 6')], ["output_dir = 'there'", 'seed = 7'], saved=saved)
    assert [value(name) for name in ('%P', '%K', '%seed')] == [5, 6, 7]
    assert value('%output_dir') == str(tmp_path / 'there')


SAVED = """# Macros:
# ==============================================================================
data_root = '/data'
input_size = (64, 32)

# Parameters for Extractor:
# ==============================================================================
Extractor.input_size = %input_size
Extractor.precision = \\
    'bfloat16'

# Parameters for MGN:
# ==============================================================================
MGN.last_strides = \\
    (1,
     2)
MGN.parts = (1, 2)
"""


def test_a_configuration_in_gins_own_lines_is_read():
    config.load([], [], saved=SAVED)
    assert gin.query_parameter('Extractor.precision') == 'bfloat16'
    assert gin.get_bindings('MGN') == {'parts': (1, 2), 'last_strides': (1, 2)}
    today = bound()
    config.load([], [], saved=checkpoint.configuration())
    assert {key: today[key] for key in bound()} == bound()


def test_a_name_that_a_configuration_of_an_earlier_version_has_is_an_error_that_tells_it():
    with pytest.raises(UserError, match="'evaluate' doesn't have a parameter named 'flip_test'"):
        config.load([], [], saved=SAVED + 'evaluate.flip_test = True\n')


@pytest.mark.parametrize('line', [
    'import json.tool', 'import module_of_mine', 'from __gin__ import dynamic_registration',
    'from json import tool as p', "include '{mark}'", 'include "gin/demo.gin"'])
def test_a_checkpoints_configuration_carries_nothing_out(tmp_path, monkeypatch, line):
    (tmp_path / 'module_of_mine.py').write_text("open('executed', 'w')")
    (tmp_path / 'mark').write_text('P = 3')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    line = line.format(mark=tmp_path / 'mark')
    with pytest.raises(UserError) as raised:
        config.load([], [], saved=f'lr = 1.0\n{line}\n')
    assert f'its line 2 is {line!r}' in str(raised.value)
    assert not (tmp_path / 'executed').exists() and 'module_of_mine' not in sys.modules


@pytest.mark.parametrize('saved', [
    'dataset = @subprocess.getoutput()', "dataset = @os.system()\nos.system.command = 'touch executed'",
    'dataset = @getoutput()', 'MGN.parts = @subprocess.getoutput()', 'evaluate.alpha = %nothing',
    'dataset = @evaluate_checkpoint()', 'dataset = @train()', 'dataset = @Extractor()', 'dataset = @MGN()'])
def test_a_checkpoints_references_reach_what_may_stand_there_alone(tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='No configurable matching|must be|has no value'):
        config.load([], [], saved=saved)
    assert not os.listdir(tmp_path)


def test_a_users_own_names_in_a_checkpoint_are_known_with_their_gin_file(tmp_path, monkeypatch):
    (tmp_path / 'names_of_mine.py').write_text(
        'import gin\n\n@gin.configurable\ndef my_losses(weight=1): pass\n\n'
        "@gin.configurable\ndef my_data(root='x'): pass\n")
    mine = write(tmp_path / 'mine.gin', 'import names_of_mine\ntrain.losses = @my_losses\nmy_losses.weight = %heavy\n'
                                        'heavy = 3\ndataset = @my_data()\n')
    monkeypatch.syspath_prepend(tmp_path)
    config.load([mine], [])
    saved = checkpoint.configuration()
    assert 'import' not in saved and '@my_losses' in saved
    unknown = saved.replace('my_losses', 'other_losses').replace('my_data', 'other_data')
    config.load([mine], [], saved=saved)
    assert str(value('%dataset')) == '@my_data()'
    with pytest.raises(UserError, match='other_data.*--gin_file'):
        config.load([], [], saved=unknown)
    config.load([], ['dataset = @market1501()'], saved=unknown)  # what only training needs is not missed
    assert 'other_losses' not in gin.config_str()


def test_a_portable_configuration_holds_no_absolute_path():
    config.load([], ["data_root = '/home/me/data'", "output_dir = 'runs/a'", "MGN.pretrained = '/home/me/resnet.pth'",
                     'evaluate.alpha = 2.0', "dataset = @own/market_layout()",
                     f"own/market_layout.root = '/home/me/{'long/' * 30}'"])
    assert checkpoint.configuration().count('/home/me') == 3
    portable = checkpoint.configuration(portable=True)
    assert not re.search('/home|runs/|long', portable) and 'evaluate.alpha = 2.0' in portable
    config.load([], [], saved=portable)
    config.load([], ["data_root = '~/data'"])
    assert "data_root = '~/data'" in checkpoint.configuration(portable=True)


def test_an_import_in_a_checkpoint_is_passed_over_where_a_gin_file_of_the_user_has_made_it(tmp_path, monkeypatch):
    (tmp_path / 'module_of_long_ago.py').write_text('import gin\n\n@gin.configurable\ndef data_of_long_ago(): pass\n')
    mine = write(tmp_path / 'mine.gin', 'import module_of_long_ago\n')
    saved = 'import module_of_long_ago\ndataset = @data_of_long_ago()\n'
    with pytest.raises(UserError, match='its line 1 is .* import the module in a --gin_file of your own'):
        config.load([], [], saved=saved)
    monkeypatch.syspath_prepend(tmp_path)
    config.load([mine], [])  # as config.bound_weights does first
    config.load([mine], [], saved=saved)
    assert str(value('%dataset')) == '@data_of_long_ago()'


def test_a_macro_of_training_alone_names_what_evaluation_need_not_know():
    config.load([], [], saved='loss = @loss_of_somebody\ntrain.losses = %loss\nlr = 0.5\n')
    assert value('%lr') == 0.5 and 'loss_of_somebody' not in gin.config_str()


def test_a_checkpoint_draws_no_pedestrians(tmp_path):
    root = f"pedestrians.root = '{tmp_path}/drawn'"
    config.load([], [], saved=f'dataset = @pedestrians()\n{root}\npedestrians.draw = True\n')
    with pytest.raises(FileError, match='No folder holds'):
        config.configurables()['pedestrians'](**gin.get_bindings('pedestrians'))
    assert not (tmp_path / 'drawn').exists()
