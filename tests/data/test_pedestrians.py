"""The drawn pedestrians of the demo: written once, the same bytes every time, and only the people tell the identity."""

import hashlib
import os
import re
import shutil

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


def test_two_persons_wear_the_same_colours_and_are_trained_or_tested_together():
    people = [pedestrians.Person(0, number) for number in range(1, 41)]
    colours = [(person.upper.tolist(), person.second.tolist(), person.lower.tolist()) for person in people]
    assert colours[::2] == colours[1::2] and sum(a != b for a, b in zip(colours[1::2], colours[2::2])) > 15
    assert all(one.pattern is not other.pattern for one, other in zip(people[::2], people[1::2]))
    assert pedestrians.TRAIN_PIDS % 2 == pedestrians.TEST_PIDS % 2 == 0


def test_cameras_show_the_same_people_in_different_light():
    shots = [[shot for shot in pedestrians.plan(0) if shot.camera == camera][:40] for camera in (3, 5)]
    dark, hazy = ([pedestrians.take(shot, 0).astype(float) for shot in of_camera] for of_camera in shots)
    assert np.mean([image.mean() for image in dark]) < np.mean([image.mean() for image in hazy]) - 30
    darkest = [np.mean([np.percentile(image, 1) for image in images]) for images in (dark, hazy)]
    assert darkest[0] < 40 < darkest[1]


def test_a_set_of_another_seed_is_refused_and_stays(folder):
    before = digest(folder, ('query',))
    with pytest.raises(ValueError, match='or of another seed; bind data_root'):
        pedestrians.write_pedestrians(folder, seed=1)
    assert digest(folder, ('query',)) == before


def test_a_folder_of_something_else_is_refused_and_stays(tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    for path in (tmp_path, tmp_path / 'thesis.txt'):
        with pytest.raises(ValueError, match=f'{path} holds something else, or a set that is not whole'):
            pedestrians.write_pedestrians(str(path))
    assert (tmp_path / 'thesis.txt').read_text() == 'mine'


def test_a_damaged_set_is_refused_and_the_same_bytes_are_written_anew(folder, tmp_path, monkeypatch):
    whole = digest(folder, ('query',))
    shots = sorted(shot for shot in pedestrians.plan(0) if shot.file.startswith('query/'))[:20]
    monkeypatch.setattr(pedestrians, 'plan', lambda seed: shots)
    small = tmp_path / 'small'
    small.mkdir()
    pedestrians.write_pedestrians(str(small))
    written = digest(small, ('query',))
    assert written == {name: whole[name] for name in sorted(whole)[:20]}
    os.remove(small / 'query' / sorted(whole)[0])
    with pytest.raises(ValueError, match='a set that is not whole'):
        pedestrians.write_pedestrians(str(small))
    shutil.rmtree(small)
    pedestrians.write_pedestrians(str(small))
    assert digest(small, ('query',)) == written
    assert os.listdir(tmp_path) == ['small']  # nothing is left beside it
