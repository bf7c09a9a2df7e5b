"""Evaluation and extraction need no training images; training says which of them it lacks."""

import logging
import re
import shutil

import pytest
from conftest import write_market
from test_datasets import PARTS, write_msmt, write_names
from thin import thin, train  # noqa: F401 (a fixture)

from mgn import config, evaluation
from mgn.data import datasets
from mgn.data.datasets import check_trainable
from mgn.ops.errors import MissingFile

ONE_EACH = ['0002_c1s1_1.jpg'], ['0001_c2s1_1.jpg'], ['0001_c1s1_1.jpg']


@pytest.mark.parametrize('read', [datasets.market1501, datasets.dukemtmcreid, datasets.market_layout])
def test_a_market_layout_without_training_images_is_read(tmp_path, read, caplog):
    write_names(tmp_path, [], *ONE_EACH[1:])
    dataset = read(str(tmp_path))
    assert [len(part) for part in dataset[2:5]] == [0, 1, 1]
    differing = re.findall(r'should have \d+ (\w+) as published, but has (\d+)', caplog.text)
    assert differing == ([] if read is datasets.market_layout else [('query', '1'), ('gallery', '1'), ('cameras', '2')])
    with pytest.raises(MissingFile) as error:
        check_trainable(dataset)
    assert error.value.message.startswith('No folder holds bounding_box_train, query, bounding_box_test; looked into')
    assert f'{tmp_path} (lacks bounding_box_train)\n' in error.value.message


def test_a_folder_that_has_training_images_is_preferred(tmp_path):
    for alias, train_names in (('Market-1501-v15.09.15', []), ('Market-1501', ONE_EACH[0])):
        write_names(tmp_path / alias, train_names, *ONE_EACH[1:])
    dataset = datasets.market1501(str(tmp_path))
    assert dataset.root == f'{tmp_path}/Market-1501' and not dataset.not_to_train
    check_trainable(dataset)
    shutil.rmtree(tmp_path / 'Market-1501' / PARTS[0])
    assert datasets.market1501(str(tmp_path)).root == f'{tmp_path}/Market-1501-v15.09.15'


def test_every_one_of_joined_data_sets_needs_them(tmp_path):
    for name, train_names in (('with', ONE_EACH[0]), ('without', [])):
        write_names(tmp_path / name, train_names, *ONE_EACH[1:])
    both = tuple(datasets.market_layout(str(tmp_path / name)) for name in ('with', 'without'))
    for parts in (both, both[::-1]):
        with pytest.raises(MissingFile, match=f'{tmp_path}/without .lacks bounding_box_train.'):
            datasets.joined(parts)


@pytest.mark.parametrize('missing', ['list_train.txt', 'list_val.txt', 'train'])
def test_msmt17_without_a_list_or_images_to_train_on_is_read(tmp_path, missing, caplog):
    write_msmt(tmp_path)
    path = tmp_path / missing
    path.rmdir() if missing == 'train' else path.unlink()
    dataset = datasets.msmt17(str(tmp_path))
    assert [len(part) for part in dataset[2:5]] == [0, 1, 1]
    assert 'train' not in ''.join(record.message for record in caplog.records if record.levelno == logging.WARNING)
    with pytest.raises(MissingFile, match=rf'{tmp_path} .lacks {missing}.'):
        check_trainable(dataset)


def test_images_of_msmt17s_version_2_are_taken_where_there_are_none_of_version_1(tmp_path):
    write_msmt(tmp_path, folders=('mask_train_v2', 'mask_test_v2'))
    dataset = datasets.msmt17(str(tmp_path))
    assert '/mask_train_v2/' in dataset.train[0].path and '/mask_test_v2/' in dataset.query[0].path
    shutil.rmtree(tmp_path / 'mask_train_v2')
    dataset = datasets.msmt17(str(tmp_path))
    assert dataset.train == [] and '/mask_test_v2/' in dataset.query[0].path
    (tmp_path / 'test').mkdir()
    assert '/test/' in datasets.msmt17(str(tmp_path)).query[0].path


def test_a_checkpoint_is_evaluated_and_extracted_without_them_and_not_trained_further(tmp_path, thin):  # noqa: F811
    root, run = write_market(tmp_path / 'data', size=(16, 8)), tmp_path / 'run'
    train(root, run, 'total_steps = 1')
    bindings = [f"weights = '{run}/last.pth'", f"output_dir = '{tmp_path}'", f"features_dir = '{tmp_path}/features'"]

    def evaluated(*bindings):
        results = evaluation.evaluate_checkpoint(config.load_checkpoint([], bindings))
        return {name: results[name] for name in ('mAP', 'queries', 'gallery')}
    before = evaluated(*bindings[:2])
    shutil.rmtree(root / 'bounding_box_train')
    assert evaluated(*bindings[:2]) == before
    evaluation.extract_checkpoint(config.load_checkpoint([], [bindings[0], bindings[2]]))
    assert evaluated(*bindings) == before
    with pytest.raises(MissingFile, match='lacks bounding_box_train.'):
        train(root, run, 'total_steps = 2')
