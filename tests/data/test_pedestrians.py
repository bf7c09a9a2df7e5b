"""The drawn pedestrians of the demo: written once, the same bytes every time, and only the people tell the identity."""

import hashlib
import json
import os
import re

import numpy as np
import pytest

from mgn.data import datasets, pedestrians


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('pedestrians') / 'set')
    pedestrians.write_pedestrians(path)
    return path


def digest(folder, parts=pedestrians.FOLDERS):
    return {name: hashlib.sha256(open(os.path.join(folder, part, name), 'rb').read()).hexdigest()
            for part in parts for name in os.listdir(os.path.join(folder, part))}


def test_identities_of_train_and_test_are_disjoint_and_every_query_has_a_match(folder):
    dataset = datasets.pedestrians(folder)
    train, query, gallery = ({s.pid for s in part} for part in dataset[2:5])
    assert not train & (query | gallery)
    assert query == gallery - {0}
    cameras = {(s.pid, s.camid) for s in dataset.gallery}
    assert all(any(pid == s.pid and camid != s.camid for pid, camid in cameras) for s in dataset.query)
    assert any(s.pid == 0 for s in dataset.gallery)
    assert any(name.startswith('-1_') for name in os.listdir(os.path.join(folder, 'bounding_box_test')))


def test_a_complete_set_is_left_as_it_is(folder):
    before = {name: os.stat(os.path.join(folder, 'query', name)).st_mtime_ns
              for name in os.listdir(os.path.join(folder, 'query'))}
    pedestrians.write_pedestrians(folder)
    assert before == {name: os.stat(os.path.join(folder, 'query', name)).st_mtime_ns
                      for name in os.listdir(os.path.join(folder, 'query'))}


def test_an_image_is_a_function_of_seed_pid_camera_and_index():
    shots = pedestrians.plan(0)
    assert shots == pedestrians.plan(0)
    for shot in shots[::300]:
        assert np.array_equal(pedestrians.take(shot, 0), pedestrians.take(shot, 0))
        assert not np.array_equal(pedestrians.take(shot, 0)[:100, :50], pedestrians.take(shot, 1)[:100, :50])


def test_frame_numbers_and_sizes_tell_nothing_of_the_identity():
    shots = [shot for shot in pedestrians.plan(0) if shot.pid > 0]
    frames = np.array([int(re.fullmatch(r'\w+/\d{4}_c\ds\d_(\d{6})_\d\d\.jpg', shot.file)[1]) for shot in shots])
    assert len(set(frames)) == len(frames)
    pids = np.array([shot.pid for shot in shots])
    assert abs(np.corrcoef(pids, frames)[0, 1]) < 0.1
    sizes = np.array([pedestrians.take(shot, 0).shape[:2] for shot in shots[:240]])
    variance_within = np.mean([sizes[pids[:240] == pid].var(0) for pid in set(pids[:240])], axis=0)
    assert (variance_within > 0.75 * sizes.var(0)).all()  # 8 images an identity: 7/8 of it if size tells nothing


def test_backgrounds_of_one_identity_and_camera_differ():
    first, second = [shot for shot in pedestrians.plan(0) if shot.pid == 1][:2]
    assert first.camera == second.camera
    corners = [pedestrians.take(shot, 0)[:20, :10].astype(float) for shot in (first, second)]
    assert np.abs(corners[0] - corners[1]).mean() > 3


def test_a_foreign_folder_is_refused_and_stays(tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(ValueError, match='thesis.txt'):
        pedestrians.write_pedestrians(str(tmp_path))
    assert (tmp_path / 'thesis.txt').read_text() == 'mine'


@pytest.mark.parametrize('name, stamped', [
    ('bounding_box_train/0002_c1s1_000451_03.jpg', False), ('query/.notes', True),
    ('folder/0002_c1s1_000451_03.jpg', True)])
def test_files_of_others_are_refused_also_where_they_look_like_ours(tmp_path, name, stamped):
    path = tmp_path / 'set' / name
    path.parent.mkdir(parents=True)
    path.write_text('mine')
    if stamped:
        (tmp_path / 'set' / 'complete.json').write_text(json.dumps({'generator': 'mgn.pedestrians', 'version': 1}))
    with pytest.raises(ValueError, match=re.escape(name)):
        pedestrians.write_pedestrians(str(tmp_path / 'set'))
    assert path.read_text() == 'mine'


def test_a_file_in_place_of_the_folder_is_refused_and_stays(tmp_path):
    (tmp_path / 'set').write_text('mine')
    with pytest.raises(ValueError, match='set holds other files'):
        pedestrians.write_pedestrians(str(tmp_path / 'set'))
    assert (tmp_path / 'set').read_text() == 'mine'


def test_a_damaged_set_is_written_anew_with_the_same_bytes(folder, tmp_path, monkeypatch):
    whole = digest(folder, ('query',))
    shots = sorted(shot for shot in pedestrians.plan(0) if shot.file.startswith('query/'))[:20]
    monkeypatch.setattr(pedestrians, 'plan', lambda seed: shots)
    small = str(tmp_path / 'small')
    pedestrians.write_pedestrians(small)
    written = digest(small, ('query',))
    assert written == {name: whole[name] for name in sorted(whole)[:20]}
    os.remove(os.path.join(small, 'query', sorted(whole)[0]))
    pedestrians.write_pedestrians(small)
    assert digest(small, ('query',)) == written


def test_a_set_of_an_older_version_is_replaced_as_a_whole(folder, tmp_path, monkeypatch):
    old = tmp_path / 'set'
    (old / 'query').mkdir(parents=True)
    (old / 'query' / '0002_c3s5_012345_06.jpg').write_bytes(b'as version 1 named its files')
    stamp = {'generator': 'mgn.pedestrians', 'version': 1, 'seed': 0, 'images': 1}
    (old / 'complete.json').write_text(json.dumps(stamp))
    shots = pedestrians.plan(0)[::200]
    monkeypatch.setattr(pedestrians, 'plan', lambda seed: shots)
    pedestrians.write_pedestrians(str(old))
    files = [path.relative_to(old).as_posix() for path in old.rglob('*.*')]
    assert sorted(files) == sorted(['complete.json', *(shot.file for shot in shots)])
    assert os.listdir(tmp_path) == ['set']  # nothing is left beside it
