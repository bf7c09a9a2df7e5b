"""Search in a folder of crops: the nearest are those of a sort; what is kept, made again, refused or left out."""

import io
import json
import logging
import os

import gin
import numpy as np
import pytest
import torch
from conftest import write_image
from thin import thin  # noqa: F401

from mgn import crop_search, evaluation, feature_files
from mgn.crop_search import search
from mgn.data.datasets import Sample, market_layout
from mgn.features import Extractor
from mgn.model import MGN
from mgn.ops.errors import UserError

pytestmark = pytest.mark.usefixtures('thin')
SIZE = (48, 24)


@pytest.fixture
def content():
    gin.bind_parameter('Extractor.input_size', SIZE)
    gin.bind_parameter('Extractor.workers', 0)
    gin.bind_parameter('Extractor.batch_size', 3)
    gin.bind_parameter('MGN.embedding_dim', 8)
    torch.manual_seed(0)
    return {'model': MGN(0).state_dict()}


@pytest.fixture
def crops(tmp_path):
    for i in range(11):
        write_image(tmp_path / 'crops' / ('deep/er' if i % 2 else '') / f'{i}.png', i, (30 + i, 20))
    return tmp_path / 'crops'


def found(content, capsys, **options):
    search(content, 'best.pth', device='cpu', format='json', **options)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def features_of(content, paths):
    model = MGN(0)
    model.load_state_dict(content['model'])
    return Extractor(torch.device('cpu')).features(model, [Sample(path, 0, 0) for path in paths]).double()


def test_the_nearest_are_those_of_a_sort_and_a_second_search_makes_no_gallery_feature(content, crops, capsys, caplog):
    for i in range(4):
        write_image(crops.parent / 'people' / f'{i}.jpg', 90 + i)
    queries = [str(crops.parent / 'people' / f'{i}.jpg') for i in range(4)]
    paths = sorted(str(path) for path in crops.rglob('*.png'))
    with caplog.at_level(logging.INFO):
        first = found(content, capsys, query=str(crops.parent / 'people'), gallery=str(crops), k=4)
        again = found(content, capsys, query=str(crops.parent / 'people'), gallery=str(crops), k=4)
    assert first == again and [row['query'] for row in first] == queries
    cosines = features_of(content, queries) @ features_of(content, paths).T
    for row, cosine in zip(first, cosines):
        order = cosine.argsort(descending=True)[:4]
        assert [crop['path'] for crop in row['nearest']] == [paths[i] for i in order]
        assert [crop['similarity'] for crop in row['nearest']] == pytest.approx(cosine[order].tolist(), abs=2e-6)
    assert 'features of 0 images are kept, 11 are to be made' in caplog.text
    assert 'features of 11 images are kept, 0 are to be made' in caplog.text
    assert os.listdir(f'{crops}.features') == ['00000001.npz']


def test_only_new_and_changed_images_are_made_vanished_ones_not_found(content, crops, capsys, caplog, monkeypatch):
    monkeypatch.setattr(crop_search, 'IMAGES_OF_A_PART', 4)
    query = str(crops / '0.png')
    assert len(found(content, capsys, query=query, gallery=str(crops))[0]['nearest']) == 10
    os.remove(crops / '2.png')
    write_image(crops / '4.png', 77, (50, 20))
    write_image(crops / 'new.jpg', 78)
    with caplog.at_level(logging.INFO):
        rows = found(content, capsys, query=query, gallery=str(crops), k=20)[0]['nearest']
    assert 'features of 9 images are kept, 2 are to be made' in caplog.text
    paths = sorted(str(path) for path in crops.rglob('*.*g'))
    assert sorted(row['path'] for row in rows) == paths and rows[0]['path'] == query
    cosines = dict(zip(paths, (features_of(content, [query]) @ features_of(content, paths).T)[0].tolist()))
    assert {row['path']: row['similarity'] for row in rows} == pytest.approx(cosines, abs=2e-6)


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def grow(path):
    """By a byte behind the end of the image, and with the time that it had."""
    before = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b' ')
    os.utime(path, ns=(0, before))


@pytest.mark.parametrize('change', [touch, grow])
def test_a_new_time_or_size_alone_makes_an_image_a_changed_one(content, crops, capsys, caplog, change):
    found(content, capsys, query=str(crops / '0.png'), gallery=str(crops))
    change(crops / '4.png')
    with caplog.at_level(logging.INFO):
        found(content, capsys, query=str(crops / '0.png'), gallery=str(crops))
    assert 'features of 10 images are kept, 1 are to be made' in caplog.text


def test_new_parts_overwrite_none_where_an_earlier_one_was_removed(content, crops, capsys, caplog, monkeypatch):
    listdir, folder = os.listdir, crops.parent / 'crops.features'
    monkeypatch.setattr(crop_search, 'IMAGES_OF_A_PART', 4)
    monkeypatch.setattr(os, 'listdir', lambda path: sorted(listdir(path), reverse=True))  # in whatever order
    found(content, capsys, query=str(crops / '0.png'), gallery=str(crops))
    os.remove(folder / '00000001.npz')
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            found(content, capsys, query=str(crops / '0.png'), gallery=str(crops))
    assert sorted(os.listdir(folder)) == [f'0000000{number}.npz' for number in (2, 3, 4)]
    assert 'features of 11 images are kept, 0 are to be made' in caplog.text


def test_unreadable_crops_are_named_and_left_out_each_time(content, crops, capsys, caplog):
    (crops / '00.jpg').write_text('no image')
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(found(content, capsys, query=str(crops / '0.png'), gallery=str(crops), k=99)[0]['nearest']) == 11
        assert 'images cannot be read and are left out' in caplog.text and '00.jpg: ' in caplog.text
    with pytest.raises(UserError, match='No image in .* can be read'):
        (crops.parent / 'bad').mkdir()
        os.rename(crops / '00.jpg', crops.parent / 'bad' / '00.jpg')
        search(content, 'best.pth', query=str(crops / '0.png'), gallery=str(crops.parent / 'bad'), device='cpu')
    with pytest.raises(UserError, match='No image in .*00.jpg can be read'):
        search(content, 'best.pth', query=str(crops.parent / 'bad/00.jpg'), gallery=str(crops), device='cpu')


def test_an_unreadable_image_whose_name_begins_like_a_readable_one_shifts_no_feature(content, crops, capsys):
    (crops / '2.png: 2.png').write_text('no image')
    rows = found(content, capsys, query=str(crops / '4.png'), gallery=str(crops), k=11)[0]['nearest']
    assert rows[0] == {'path': str(crops / '4.png'), 'similarity': 1.0} and len(rows) == 11


def test_a_crop_whose_name_is_no_text_is_found_and_kept(content, crops, capsys, caplog):
    os.rename(crops / '2.png', crops / '\udcff.png')
    with caplog.at_level(logging.INFO):
        rows = [found(content, capsys, query=str(crops / '4.png'), gallery=str(crops), k=11) for _ in range(2)]
    assert rows[0] == rows[1] and str(crops / '\udcff.png') in [crop['path'] for crop in rows[0][0]['nearest']]
    assert 'features of 11 images are kept, 0 are to be made' in caplog.text


@pytest.mark.parametrize('error', [MemoryError, PermissionError])
def test_kept_features_that_cannot_be_read_for_another_reason_are_not_called_damaged(content, crops, capsys,
                                                                                     monkeypatch, error):
    def load(path):
        raise error

    places = dict(query=str(crops / '0.png'), gallery=str(crops))
    found(content, capsys, **places)
    monkeypatch.setattr(np, 'load', load)
    with pytest.raises(error):
        found(content, capsys, **places)


def test_hidden_files_and_folders_are_left_out_but_both_folders_may_lie_in_one(content, crops, capsys, caplog):
    write_image(crops / '.thumbnails/9.png', 0, (30, 20))
    write_image(crops / '.9.png', 0, (30, 20))
    (crops / '._0.png').write_text('what macOS keeps beside an image')
    os.rename(crops / '2.png', crops / '2.PNG')
    os.rename(crops, crops.parent / '.crops')
    with caplog.at_level(logging.WARNING):
        for folder in (str(crops.parent / '.crops'), f'{crops.parent}/.crops/'):
            rows = found(content, capsys, query=folder, gallery=folder, k=99)
            assert [len(row['nearest']) for row in rows] == [11] * 11
    assert not caplog.text and sorted(os.listdir(crops.parent)) == ['.crops', '.crops.features']
    assert '.features' not in os.listdir(crops.parent / '.crops')


def test_a_folder_that_may_not_be_read_is_named_and_left_out(content, crops, capsys, caplog, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('deep'):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    assert len(found(content, capsys, query=str(crops / '0.png'), gallery=str(crops), k=99)[0]['nearest']) == 6
    assert 'a folder is left out: ' in caplog.text and f"{crops / 'deep'}" in caplog.text


def test_broken_links_and_pipes_are_named_and_left_out(content, crops, capsys, caplog):
    os.symlink('nowhere.png', crops / 'broken.png')
    os.symlink('loop.png', crops / 'loop.png')
    os.mkfifo(crops / 'pipe.png')
    with caplog.at_level(logging.WARNING):
        assert len(found(content, capsys, query=str(crops / '0.png'), gallery=str(crops), k=99)[0]['nearest']) == 11
    assert '3 of 14 images cannot be read' in caplog.text


def test_kept_features_of_other_weights_or_damaged_ones_are_refused(content, crops, capsys):
    places = dict(query=str(crops / '0.png'), gallery=str(crops))
    found(content, capsys, **places)
    other = {'model': {name: tensor * 0.5 if tensor.is_floating_point() else tensor
                       for name, tensor in content['model'].items()}}
    with pytest.raises(UserError, match='other weights or settings; bind another features_dir, or remove'):
        found(other, capsys, **places)
    part = f'{crops}.features/00000001.npz'
    whole = open(part, 'rb').read()
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(len(whole), size=60):
        with open(part, 'wb') as file:
            file.write(bytes([*whole[:place], whole[place] ^ 255, *whole[place + 1:]]))
        try:
            found(content, capsys, **places)
        except UserError as error:
            assert 'remove' in str(error)
            refused += 1
    assert refused > 40  # headers of a zip file have bytes without meaning
    central = whole.index(b'PK\x01\x02')
    for place in (central + 6, central + 8, central + 10):  # version, flags, method of compression
        with open(part, 'wb') as file:
            file.write(bytes([*whole[:place], whole[place] ^ 255, *whole[place + 1:]]))
        with pytest.raises(UserError, match='is damaged: .*; remove it'):
            found(content, capsys, **places)
    with np.load(io.BytesIO(whole)) as arrays:
        np.savez(part, **{**arrays, 'paths': arrays['paths'][:, None]})
    with pytest.raises(UserError, match='remove'):
        found(content, capsys, **places)
    np.savez(f'{crops}.features/mine.npz', x=1)  # not a part: somebody's own
    (crops.parent / 'crops.features/00000001.npz.7.tmp').write_bytes(b'')  # what a killed search was writing
    with open(part, 'wb') as file:
        file.write(whole)
    assert found(content, capsys, **places)
    with open(part, 'wb') as file:
        file.write(whole[:-30])
    with pytest.raises(UserError, match='is damaged: .*; remove it, and its features are made again'):
        found(content, capsys, **places)


@pytest.mark.parametrize('storage', ['float32', 'float16'])
def test_the_gallery_of_an_extraction_is_searched_without_its_images(content, market, tmp_path, capsys, storage):
    (model, extractor), dataset = evaluation.load_for_features(content, 'x', 'cpu'), market_layout(str(market))
    feature_files.write_features(model, dataset, extractor, str(tmp_path / 'kept'), storage)
    query = dataset.query[0].path
    rows = found(content, capsys, query=query, gallery=str(tmp_path / 'kept'), k=3)[0]['nearest']
    paths = [sample.path for sample in dataset.gallery]
    cosine = (features_of(content, [query]) @ features_of(content, paths).T)[0]
    assert [row['path'] for row in rows] == [  # not behind the folder of the features, where they are not
        os.path.relpath(paths[i], market) for i in cosine.argsort(descending=True)[:3]]
    gin.bind_parameter('Extractor.input_size', (32, 32))
    with pytest.raises(UserError, match='what differs is input_size'):
        found(content, capsys, query=query, gallery=str(tmp_path / 'kept'))


def test_a_folder_of_crops_may_hold_a_manifest_of_something_else(content, crops, capsys):
    (crops / 'manifest.json').write_text('{"name": "crops"}')
    assert len(found(content, capsys, query=str(crops / '0.png'), gallery=str(crops), k=99)[0]['nearest']) == 11


@pytest.mark.parametrize('options, message', [
    (dict(query=None), 'A query is needed; give'), (dict(gallery=None), 'A gallery is needed'),
    (dict(query='nowhere'), 'no image in nowhere'), (dict(gallery='nowhere'), 'no image in nowhere'),
    (dict(gallery=__file__), 'gallery must be a folder, but .* is a file')])
def test_what_is_missing_is_said(content, crops, options, message):
    with pytest.raises(UserError, match=message):
        search(content, 'best.pth', **{**dict(query=str(crops), gallery=str(crops), device='cpu'), **options})


def test_text_is_a_line_for_the_query_and_for_each_crop(content, crops, capsys):
    search(content, 'best.pth', query=str(crops / '0.png'), gallery=str(crops), device='cpu', k=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(crops / '0.png') and lines[1] == f'  1.0000  {crops}/0.png' and len(lines) == 3


@pytest.mark.parametrize('bad, batch', [(1, 2), (5, 3)])
def test_an_image_whose_feature_is_not_finite_is_named_and_not_kept(content, crops, bad, batch, monkeypatch):
    """Behind an unreadable image, in a batch that this image shortens."""
    paths = sorted(crops.rglob('*.png'))
    paths[0].write_text('no image')
    calls, real = [], Extractor.forward

    def forward(self, model, images):
        features = real(self, model, images)
        calls.append(len(images))
        if sum(calls) >= bad > sum(calls[:-1]):
            features[bad - 1 - sum(calls[:-1]), 2] = torch.nan
        return features
    monkeypatch.setattr(Extractor, 'forward', forward)
    with pytest.raises(UserError, match=f'but 1 of a batch of {batch} have NaN .* that of {paths[bad]}; look'):
        search(content, 'best.pth', query=str(crops / '2.png'), gallery=str(crops), device='cpu')
    assert os.listdir(f'{crops}.features') == []
