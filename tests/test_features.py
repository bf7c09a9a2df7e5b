"""Features as files: what is written, and that files of anything else are refused with what differs."""

import json
import os
import re
import resource
import shutil

import numpy as np
import pytest
import torch
from conftest import write_market
from thin import thin  # noqa: F401

from mgn.data.datasets import market_layout
from mgn.evaluation import evaluate
from mgn.feature_files import PARTS, read_features, write_features
from mgn.features import Extractor
from mgn.model import MGN
from mgn.ops.errors import FileError, UserError
from mgn.runs import processes

pytestmark = pytest.mark.usefixtures('thin')

CPU, SIZE = torch.device('cpu'), (48, 24)


def extractor(size=SIZE, flip_test=False, precision='float32'):
    return Extractor(CPU, size, 4, 0, flip_test, precision)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_market(tmp_path_factory.mktemp('data') / 'own', identities=2, images=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MGN(0, embedding_dim=8)


@pytest.fixture
def written(model, root, tmp_path):
    folder = tmp_path / 'features'
    write_features(model, market_layout(str(root)), extractor(), str(folder))
    return folder


def test_processes_of_another_precision_make_no_features_together(model, root, monkeypatch):
    """As 'auto' may mean on another GPU: the manifest would tell one of them."""
    monkeypatch.setattr(processes, 'count', lambda: 2)
    monkeypatch.setattr(processes, 'gather', lambda value: [value, 'bfloat16'])
    with pytest.raises(UserError, match="same precision of features, but it differs between process 0 and 1. Bind fea"):
        extractor().gathered(model, market_layout(str(root)).query)


@pytest.mark.parametrize('flip_test', [False, True])
@pytest.mark.parametrize('storage', ['float32', 'float16'])
def test_files_hold_features_ids_and_paths_in_order(model, root, tmp_path, flip_test, storage):
    dataset, folder, own = market_layout(str(root)), tmp_path / 'features', extractor(flip_test=flip_test)
    write_features(model, dataset, own, str(folder), storage=storage)
    for part, got in zip(('query', 'gallery'), read_features(str(folder), model, dataset, own)):
        samples = getattr(dataset, part)
        assert got.dtype == storage and np.array_equal(got, own.features(model, samples).numpy().astype(storage))
        assert np.load(folder / f'{part}_pids.npy').tolist() == [s.pid for s in samples]
        assert np.load(folder / f'{part}_camids.npy').tolist() == [s.camid for s in samples]
        paths = np.load(folder / f'{part}_paths.npy')
        assert [f'{root}/{path.decode()}' for path in paths] == [s.path for s in samples]
    results, plain = (evaluate(model, dataset, own, features_dir=place) for place in (str(folder), None))
    assert results['features_dir'] == str(folder) and plain['features_dir'] is None
    if storage == 'float32':
        assert all(results[name] == plain[name] for name in ('rank1', 'mAP', 'mINP'))


@pytest.mark.parametrize('precision, flip_test', [('bfloat16', False), ('float16', True)])
def test_the_forward_pass_runs_in_the_precision_asked_for(model, root, tmp_path, precision, flip_test):
    dataset, folder = market_layout(str(root)), tmp_path / 'features'
    own = extractor(flip_test=flip_test, precision=precision)
    write_features(model, dataset, own, str(folder))
    assert json.loads((folder / 'manifest.json').read_text())['precision'] == precision
    got = read_features(str(folder), model, dataset, own)[1]
    exact = extractor(flip_test=flip_test).features(model, dataset.gallery).numpy()
    assert got.dtype == np.float32 and np.array_equal(got, own.features(model, dataset.gallery).numpy())
    assert 0 < np.abs(got - exact).max() < (0.1 if precision == 'bfloat16' else 0.01)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)  # normalised in float32
    results = evaluate(model, dataset, own, features_dir=str(folder))
    assert results['precision'] == precision
    assert results['mAP'] == evaluate(model, dataset, own)['mAP']


def test_moved_data_and_other_classifiers_fit(written, model, root, tmp_path):
    shutil.copytree(root, tmp_path / 'moved')
    more = MGN(5, embedding_dim=8)
    more.load_state_dict({**more.state_dict(), **model.state_dict()})
    assert len(read_features(str(written), more, market_layout(str(tmp_path / 'moved')), extractor())[1]) == 10


def test_what_differs_is_named(written, model, root, tmp_path):
    dataset = market_layout(str(root))

    def refused(message, model=model, dataset=dataset, **settings):
        with pytest.raises(ValueError, match=f'other weights, settings or images; what differs is {message}. Bind '):
            read_features(str(written), model, dataset, extractor(**settings))
    refused('weights', model=MGN(0, embedding_dim=8))
    for other in ({'pooling': 'avg'}, {'last_strides': (2, 2, 1)}):  # which no weight shows
        lookalike = MGN(0, embedding_dim=8, **other)
        lookalike.load_state_dict(model.state_dict())
        refused(next(iter(other)), model=lookalike)
    refused('input_size', size=(48, 32))
    refused('flip_test', flip_test=True)
    refused('precision', precision='bfloat16')
    refused('gallery pids, gallery camids, gallery paths',
            dataset=dataset._replace(gallery=dataset.gallery[1:]))
    refused('query pids, query paths',
            dataset=dataset._replace(query=[*dataset.query[1::-1], *dataset.query[2:]]))
    refused('query camids',
            dataset=dataset._replace(query=[dataset.query[0], dataset.query[1]._replace(camid=7), dataset.query[2]]))


def test_features_that_are_not_finite_are_not_written(model, root, tmp_path):
    torch.nn.init.constant_(model.heads[0].norm.running_mean, torch.nan)
    for precision, remedy in (('float32', 'this image$'), ('bfloat16', "this image, or bind feature_precision = ")):
        with pytest.raises(UserError, match='3 of a batch of 3 have NaN or .*, first that of .*/query/0') as raised:
            write_features(model, market_layout(str(root)), extractor(precision=precision), str(tmp_path / 'features'))
        assert re.search(remedy, raised.value.message)
    assert not (tmp_path / 'features' / 'manifest.json').exists()


def test_an_extraction_that_was_stopped_is_no_features_and_may_be_repeated(written, model, root):
    (written / 'manifest.json').unlink()
    with pytest.raises(FileNotFoundError, match='holds no complete extraction: there is no .*manifest.json'):
        read_features(str(written), model, market_layout(str(root)), extractor())
    write_features(model, market_layout(str(root)), extractor(), str(written))
    assert len(read_features(str(written), model, market_layout(str(root)), extractor())[0]) == 3


def test_features_are_not_overwritten_and_options_are_checked(written, model, root, tmp_path):
    dataset = market_layout(str(root))
    with pytest.raises(ValueError, match='The features_dir holds features: .*manifest.json; remove'):
        write_features(model, dataset, extractor(), str(written))
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='file/x/run.lock could not be written: .*Bind another features_dir'):
        write_features(model, dataset, extractor(), str(tmp_path / 'file' / 'x'))


def test_a_file_that_cannot_be_written_to_the_end_is_an_error_and_no_signal(model, root, tmp_path):
    """As on a full disk, where a memory map would end the process by a signal."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # bytes of a file: less than the gallery's
    try:
        with pytest.raises(FileError, match='features could not be written: .*File too large. Free disk space'):
            write_features(model, market_layout(str(root)), extractor(), str(tmp_path / 'features'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / 'features' / 'query_features.npy').exists()
    assert not (tmp_path / 'features' / 'manifest.json').exists()


def test_features_are_on_the_disk_before_the_manifest(model, root, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, 'fsync', lambda file: (synced.append(os.fstat(file).st_ino), fsync(file)))
    write_features(model, market_layout(str(root)), extractor(), str(tmp_path / 'features'))
    names = [f'{part}_features.npy' for part in PARTS] + ['manifest.json']
    numbers = [os.stat(tmp_path / 'features' / name).st_ino for name in names]
    assert [number for number in synced if number in numbers] == numbers
