"""Files of features that are damaged, exchanged or edited: each is a sentence, and none a wrong figure."""

import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import write_market
from forks import another_process, lock
from thin import ThinResNet

from mgn import feature_files
from mgn.data.datasets import market_layout
from mgn.feature_files import NAMES, PARTS, read_features, write_features
from mgn.features import Extractor
from mgn.model import MGN
from mgn.ops.errors import UserError

FILES = [f'{part}_{name}.npy' for part in PARTS for name in NAMES]
FEATURES = 'gallery_features.npy'


@pytest.fixture(scope='module')
def extraction(tmp_path_factory):
    """What read_features takes, of features that were written; nothing in the folder may be changed."""
    root = write_market(tmp_path_factory.mktemp('data') / 'own', identities=2, images=2)
    folder, dataset = tmp_path_factory.mktemp('extraction') / 'features', market_layout(str(root))
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mgn.model.make_resnet', lambda backbone, imagenet: ThinResNet())
        model, extractor = MGN(0, embedding_dim=8), Extractor(torch.device('cpu'), (48, 24), 4, 0)
    write_features(model, dataset, extractor, str(folder))
    return str(folder), model, dataset, extractor


@pytest.fixture
def written(extraction, tmp_path):
    """A copy of the folder, and a function that reads it."""
    folder = tmp_path / 'features'
    shutil.copytree(extraction[0], folder)
    return folder, lambda: read_features(str(folder), *extraction[1:])


def rows_changed(change):
    def damage(folder):
        np.save(folder / FEATURES, change(np.load(folder / FEATURES)))
    return damage


def a_byte_changed(folder):
    data = bytearray((folder / FEATURES).read_bytes())
    data[-5] ^= 1
    (folder / FEATURES).write_bytes(data)


def exchanged(folder):
    (folder / 'query_camids.npy').rename(folder / 'x')
    (folder / 'query_pids.npy').rename(folder / 'query_camids.npy')
    (folder / 'x').rename(folder / 'query_pids.npy')


def test_files_that_may_not_be_read_are_no_damaged_ones(written, monkeypatch):
    read = open
    for name in ('manifest.json', FEATURES):
        def refuse(path, *rest, name=name):
            if str(path).endswith(name):
                raise PermissionError(13, 'Permission denied', path)
            return read(path, *rest)
        monkeypatch.setattr(feature_files, 'open', refuse, raising=False)
        with pytest.raises(PermissionError, match=f'Permission denied.*{name}'):
            written[1]()


def test_a_second_extraction_into_a_folder_is_refused_while_the_first_writes(extraction, tmp_path):
    """Both would write into the same files, whose mixture the manifest of the later one then calls whole."""
    _, model, dataset, extractor = extraction
    with another_process(lambda: lock(tmp_path)) as first:
        with pytest.raises(UserError, match=f'Another command is writing to features_dir {tmp_path}: process {first} '
                                            f'.*Wait for it, end it, or bind another features_dir'):
            write_features(model, dataset, extractor, str(tmp_path))
        assert os.listdir(tmp_path) == ['run.lock']
    (tmp_path / FEATURES).write_bytes(b'of one that was killed')
    (tmp_path / 'manifest.json.7.tmp').write_text('{')
    write_features(model, dataset, extractor, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, 'manifest.json', 'run.lock'}
    assert [len(rows) for rows in read_features(str(tmp_path), model, dataset, extractor)] == [
        len(dataset.query), len(dataset.gallery)]


def length_changed(folder):
    os.truncate(folder / FEATURES, (folder / FEATURES).stat().st_size - 40)


def lost_pages(folder):
    path = folder / FEATURES
    path.write_bytes(path.read_bytes()[:300] + bytes(path.stat().st_size - 300))


@pytest.mark.parametrize('damage, file', [
    (rows_changed(lambda rows: rows[::-1]), FEATURES), (rows_changed(lambda rows: rows.astype(np.float16)), FEATURES),
    (rows_changed(lambda rows: rows[:, ::-1]), FEATURES), (rows_changed(lambda rows: rows.astype(object)), FEATURES),
    (a_byte_changed, FEATURES), (length_changed, FEATURES), (lost_pages, FEATURES),
    (lambda folder: (folder / FEATURES).write_bytes(b''), FEATURES), (exchanged, 'query_pids.npy'),
    (lambda folder: shutil.copy(folder / 'query_features.npy', folder / FEATURES), FEATURES),
    (lambda folder: (folder / 'query_pids.npy').write_bytes(b''), 'query_pids.npy'),
    (lambda folder: (folder / 'gallery_pids.npy').unlink(), 'gallery_pids.npy'),
    (lambda folder: ((folder / FEATURES).unlink(), (folder / FEATURES).mkdir()), FEATURES)])
def test_a_file_that_is_not_as_it_was_written_is_named(written, damage, file):
    folder, read = written
    read()
    damage(folder)
    with pytest.raises(UserError, match=f'The features in .*features are damaged: .*{file}.*; extract them again$'):
        read()


def edited(**changes):
    return lambda text: json.dumps({**json.loads(text), **changes})


def edited_hash(text):
    content = json.loads(text)
    content['sha256']['gallery']['features'] = '0' * 64
    return json.dumps(content)


@pytest.mark.parametrize('edit', [
    edited(flip_test=True), edited(D=10 ** 4000), edited(images=None), edited(sha256=[]), edited(sha256={}),
    edited(weights=float('nan')), edited(parts=[[[]]]), edited_hash, edited(another=1),
    edited(**{'sha256 of the above': None}), lambda text: text[:-20], lambda text: '', lambda text: '[]',
    lambda text: 'null', lambda text: '3', lambda text: '"text"', lambda text: '{', lambda text: '[' * 200_000,
    lambda text: '{"D":' * 100_000, lambda text: '9' * 10_000, lambda text: '\0' * 50,
    lambda text: json.dumps({name: value for name, value in json.loads(text).items() if name != 'sha256'})])
def test_an_edited_manifest_is_refused(written, edit):
    folder, read = written
    manifest = folder / 'manifest.json'
    manifest.write_text(edit(manifest.read_text()))
    with pytest.raises(UserError) as raised:
        read()
    assert str(raised.value) == (f'The features in {folder} are damaged: {manifest} is not as mgn.extract wrote it; '
                                 'extract them again')
    manifest.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(UserError, match='are damaged: .*manifest.json is not as mgn.extract wrote it; extract them'):
        read()


@pytest.mark.parametrize('written_format', ['mgn features 1', 'mgn features 2', None, ['x' * 1000], 10 ** 4000])
def test_other_formats_are_to_be_extracted_again(written, written_format):
    folder, read = written
    manifest = folder / 'manifest.json'
    manifest.write_text(edited(format=written_format)(manifest.read_text()))
    with pytest.raises(UserError, match="features have the format .*, and this version reads 'mgn features 3' only; "
                                        "extract them again") as raised:
        read()
    assert len(str(raised.value)) < 300


class Code:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), 'w')


@pytest.mark.parametrize('file', ['gallery_paths.npy', 'query_pids.npy'])
@pytest.mark.parametrize('kind', ['array of objects', 'pickle', 'archive', 'records', 'text'])
def test_with_hashes_that_fit_files_of_something_else_run_no_code(written, tmp_path, file, kind):
    folder, read = written
    if kind == 'pickle':
        (folder / file).write_bytes(pickle.dumps(Code(tmp_path / 'mark')))
    elif kind == 'archive':
        np.savez(folder / 'x.npz', np.ones(3))
        (folder / 'x.npz').rename(folder / file)
    else:
        content = {'array of objects': np.array([Code(tmp_path / 'mark')] * 3), 'records': np.zeros(3, 'i4,f4'),
                   'text': np.array(['a', 'b', 'c'])}[kind]
        np.save(folder / file, content)
    content = json.loads((folder / 'manifest.json').read_text())
    del content['sha256 of the above']
    part, name = file[:-4].split('_')
    content['sha256'][part][name] = feature_files.file_hash(folder / file)
    content['sha256 of the above'] = feature_files.text_hash(content)
    (folder / 'manifest.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match='The features in .* are (damaged: .*; extract|of other weights)'):
        read()
    assert not (tmp_path / 'mark').exists()


def mutated(rng, folder):
    """Changes a file of the folder; returns what was done."""
    name = rng.choice([*FILES, 'manifest.json'])
    path = folder / name
    data = bytearray(path.read_bytes())
    place = rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), 128))])  # where .npy has its header
    end = min(place + rng.choice([1, 1, 2, 8, 50]), len(data))
    kind = rng.choice(['bit', 'bytes', 'cut', 'delete', 'insert', 'repeat', 'other'])
    if kind == 'bit':
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 'bytes':
        data[place:end] = rng.randbytes(end - place)
    elif kind == 'cut':
        del data[place:]
    elif kind == 'delete':
        del data[place:end]
    elif kind == 'insert':
        data[place:place] = rng.choice([rng.randbytes(3), b'9' * 30, b'[' * 9000, b'\0', b'NaN', b'{}', b'"'])
    elif kind == 'repeat':
        data[end:end] = data[place:end]
    else:
        data = bytearray((folder / rng.choice([*FILES, 'manifest.json'])).read_bytes())
    path.write_bytes(data)
    return f'{name}: {kind} at {place}'


@pytest.mark.parametrize('cases', [150, pytest.param(2000, marks=pytest.mark.long)])
def test_mutated_files_are_refused_in_a_sentence_or_say_the_same(written, extraction, cases):
    (folder, read), rng = written, random.Random(0)
    original = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected, refused = read(), 0
    for case in range(cases):
        what = mutated(rng, folder)
        changed = [name for name, data in original.items() if (folder / name).read_bytes() != data]
        try:
            got = read()
            assert changed in ([], ['manifest.json']), what
            assert all(map(np.array_equal, got, expected)), what
        except UserError as error:
            refused += 1
            assert changed and f'The features in {folder} ' in str(error) and 'extract them again' in str(error), what
        for name in changed:
            (folder / name).write_bytes(original[name])
    assert refused > 0.8 * cases
