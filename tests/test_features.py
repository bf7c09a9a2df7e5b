"""Features as files: what is written, and that files of anything else are refused, saying what differs."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import write_market
from thin import thin  # noqa: F401

from mgn.data.datasets import market_layout
from mgn.evaluation import evaluate
from mgn.features import extract_features, read_features, write_features
from mgn.model import MGN

pytestmark = pytest.mark.usefixtures('thin')

CPU, SIZE = torch.device('cpu'), (48, 24)


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
    write_features(model, market_layout(str(root)), CPU, str(folder), SIZE, 4, 0)
    return folder


@pytest.mark.parametrize('flip_test', [False, True])
@pytest.mark.parametrize('storage', ['float32', 'float16'])
def test_files_hold_features_ids_and_paths_in_order(model, root, tmp_path, flip_test, storage):
    dataset, folder = market_layout(str(root)), tmp_path / 'features'
    write_features(model, dataset, CPU, str(folder), SIZE, 4, 0, flip_test, storage=storage)
    for part, got in zip(('query', 'gallery'), read_features(str(folder), model, dataset, SIZE, flip_test)):
        samples = getattr(dataset, part)
        want = extract_features(model, samples, CPU, SIZE, 4, 0, flip_test)
        assert got.dtype == storage and np.array_equal(got, want.numpy().astype(storage))
        assert np.load(folder / f'{part}_pids.npy').tolist() == [s.pid for s in samples]
        assert np.load(folder / f'{part}_camids.npy').tolist() == [s.camid for s in samples]
        assert [f'{root}/{path.decode()}' for path in np.load(folder / f'{part}_paths.npy')] == [s.path for s in samples]
    results, plain = (evaluate(model, dataset, CPU, SIZE, 4, 0, flip_test, features_dir=of) for of in (str(folder), None))
    assert results['features_dir'] == str(folder) and plain['features_dir'] is None
    if storage == 'float32':
        assert all(results[name] == plain[name] for name in ('rank1', 'mAP', 'mINP'))


@pytest.mark.parametrize('precision, flip_test', [('bfloat16', False), ('float16', True)])
def test_the_forward_pass_runs_in_the_precision_asked_for(model, root, tmp_path, precision, flip_test):
    dataset, folder = market_layout(str(root)), tmp_path / 'features'
    write_features(model, dataset, CPU, str(folder), SIZE, 4, 0, flip_test, precision)
    assert json.loads((folder / 'manifest.json').read_text())['precision'] == precision
    got = read_features(str(folder), model, dataset, SIZE, flip_test, precision)[1]
    exact, want = (extract_features(model, dataset.gallery, CPU, SIZE, 4, 0, flip_test, of).numpy() for of in ('float32', precision))
    assert got.dtype == np.float32 and np.array_equal(got, want)
    assert 0 < np.abs(got - exact).max() < (0.1 if precision == 'bfloat16' else 0.01)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)  # normalised in float32
    results = evaluate(model, dataset, CPU, SIZE, 4, 0, flip_test, precision, features_dir=str(folder))
    assert results['precision'] == precision
    assert results['mAP'] == evaluate(model, dataset, CPU, SIZE, 4, 0, flip_test, precision)['mAP']


def test_moved_data_and_other_classifiers_fit(written, model, root, tmp_path):
    shutil.copytree(root, tmp_path / 'moved')
    more = MGN(5, embedding_dim=8)
    more.load_state_dict({**more.state_dict(), **model.state_dict()})
    assert len(read_features(str(written), more, market_layout(str(tmp_path / 'moved')), SIZE, False)[1]) == 10


def test_what_differs_is_told(written, model, root, tmp_path):
    dataset = market_layout(str(root))

    def refused(message, model=model, dataset=dataset, size=SIZE, flip_test=False, precision='float32'):
        with pytest.raises(ValueError, match=f'(?s)want features of these weights and this data set.*got others:.*{message}.*extract them again'):
            read_features(str(written), model, dataset, size, flip_test, precision)
    refused('weights: want [0-9a-f]{64}, got [0-9a-f]{64}', model=MGN(0, embedding_dim=8))
    for other in ({'pooling': 'avg'}, {'last_strides': (2, 2, 1)}):  # which no weight tells
        lookalike = MGN(0, embedding_dim=8, **other)
        lookalike.load_state_dict(model.state_dict())
        refused(next(iter(other)), model=lookalike)
    refused(r'input_size: want \[48, 32\], got \[48, 24\]', size=(48, 32))
    refused('flip_test: want True, got False', flip_test=True)
    refused('precision: want bfloat16, got float32', precision='bfloat16')
    refused('gallery images: want 9, got 10', dataset=dataset._replace(gallery=dataset.gallery[1:]))
    refused(r"query paths: 2 of 3 differ, the first at 0: want b'query/0102_.*got b'query/0101_",
            dataset=dataset._replace(query=[*dataset.query[1::-1], *dataset.query[2:]]))
    refused('query camids: 1 of 3 differ, the first at 1: want 7, got 1',
            dataset=dataset._replace(query=[dataset.query[0], dataset.query[1]._replace(camid=7), dataset.query[2]]))


def cut(folder):
    path = folder / 'gallery_features.npy'
    path.write_bytes(path.read_bytes()[:-40])


def of_another_type(folder):
    np.save(folder / 'query_features.npy', np.load(folder / 'query_features.npy').astype(np.float16))


def another_list(folder):
    np.save(folder / 'query_paths.npy', np.load(folder / 'query_paths.npy')[::-1])


def older(folder):  # its `precision` was of the files
    manifest = json.loads((folder / 'manifest.json').read_text())
    (folder / 'manifest.json').write_text(json.dumps({**manifest, 'format': 'mgn features 1'}))


def lost_pages(folder):
    path = folder / 'gallery_features.npy'
    path.write_bytes(path.read_bytes()[:300] + bytes(path.stat().st_size - 300))


@pytest.mark.parametrize('damage', [cut, of_another_type, another_list, older, lost_pages,
                                    lambda folder: (folder / 'gallery_features.npy').write_bytes(b''),
                                    lambda folder: (folder / 'query_pids.npy').write_bytes(b''), lambda folder: (folder / 'gallery_pids.npy').unlink(),
                                    lambda folder: (folder / 'manifest.json').write_text('[]'),
                                    lambda folder: (folder / 'manifest.json').write_text('{')])
def test_damaged_files_are_refused(written, model, root, damage):
    damage(written)
    with pytest.raises(ValueError, match='want whole features in .*features, got files that do not fit: .*; extract them again'):
        read_features(str(written), model, market_layout(str(root)), SIZE, False)


def test_ids_of_another_shape_are_told(written, model, root):
    np.save(written / 'query_pids.npy', np.zeros((3, 2), np.int64))
    with pytest.raises(ValueError, match=r'query pids: want one of each image, got an array \(3, 2\)'):
        read_features(str(written), model, market_layout(str(root)), SIZE, False)


def test_features_that_are_not_finite_are_not_written(model, root, tmp_path):
    torch.nn.init.constant_(model.heads[0].norm.running_mean, torch.nan)
    with pytest.raises(ValueError, match='want finite features, got NaN or infinity; look at the weights'):
        write_features(model, market_layout(str(root)), CPU, str(tmp_path / 'features'), SIZE, 4, 0)
    assert not (tmp_path / 'features' / 'manifest.json').exists()


def test_an_extraction_that_was_stopped_is_no_features_and_may_be_repeated(written, model, root):
    (written / 'manifest.json').unlink()
    with pytest.raises(FileNotFoundError, match='want features written by mgn.extract to the end, found no .*manifest.json'):
        read_features(str(written), model, market_layout(str(root)), SIZE, False)
    write_features(model, market_layout(str(root)), CPU, str(written), SIZE, 4, 0)
    assert len(read_features(str(written), model, market_layout(str(root)), SIZE, False)[0]) == 3


def test_features_are_not_overwritten_and_options_are_checked(written, model, root, tmp_path):
    dataset = market_layout(str(root))
    with pytest.raises(ValueError, match='want a features_dir without features, got .*manifest.json; remove'):
        write_features(model, dataset, CPU, str(written), SIZE, 4, 0)
    with pytest.raises(ValueError, match="write_features.storage to be one of float32, float16, got 'int8'"):
        write_features(model, dataset, CPU, str(tmp_path / 'other'), SIZE, 4, 0, storage='int8')
    with pytest.raises(ValueError, match="want write_features.precision to be one of 'auto', 'float32', .*got 'int8'"):
        write_features(model, dataset, CPU, str(tmp_path / 'other'), SIZE, 4, 0, precision='int8')
    with pytest.raises(ValueError, match='want batch_size >= 1'):
        write_features(model, dataset, CPU, str(tmp_path / 'other'), SIZE, 0, 0)
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='want to write features to .*file/x, got: .*; free disk space or bind another'):
        write_features(model, dataset, CPU, str(tmp_path / 'file' / 'x'), SIZE, 4, 0)
