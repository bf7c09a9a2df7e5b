"""Folders and list files → samples: the published layouts and a user's own."""

import logging
import random
import re

import pytest
from conftest import write_market

from mgn.data import datasets
from mgn.data.datasets import Sample
from mgn.ops.errors import UserError

PARTS = ('bounding_box_train', 'query', 'bounding_box_test')


def touch(*paths):
    """Empty files: reading a layout opens no image."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_names(root, train, query, test):
    for part, names in zip(PARTS, (train, query, test)):
        touch(*(root / part / name for name in names))
    return root


def write_msmt(root, folders=('train', 'test'), **lists):
    """MSMT17 with one image in each list, or the lines given by `lists` (train, val, query, gallery)."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
    lines = {'train': '0000/0000_000_01_0303morning_0008_0.jpg 0\n', 'val': '0000/0000_001_15_0303noon_0009_1.jpg 0\n',
             'query': '0001/0001_000_07_0302evening_1_0.jpg 1\n', 'gallery': '0001/0001_001_11_0302evening_2_0.jpg 1\n'}
    for name, text in {**lines, **lists}.items():
        (root / f'list_{name}.txt').write_text(text)
    return root


def names(samples):
    return [sample.path.rsplit('/', 1)[-1] for sample in samples]


def test_market_reads_identity_and_camera_from_file_names_in_sorted_order(tmp_path):
    train = ['0002_c1s1_000451_03.jpg', '1501_c6s4_000001_01.jpg', '0002_c3s2_000002_01.jpg', '0007_c2s1_000001_01.jpg']
    write_names(tmp_path / 'market1501', train, ['0001_c5s1_000001_00.jpg'], ['0001_c4s6_000001_00.jpg'])
    dataset = datasets.market1501(str(tmp_path))
    folder = str(tmp_path / 'market1501')
    assert dataset.root == folder
    assert dataset.train == [Sample(f'{folder}/bounding_box_train/{name}', pid, camid) for name, pid, camid in (
        ('0002_c1s1_000451_03.jpg', 2, 1), ('0002_c3s2_000002_01.jpg', 2, 3), ('0007_c2s1_000001_01.jpg', 7, 2),
        ('1501_c6s4_000001_01.jpg', 1501, 6))]
    assert dataset.query == [Sample(f'{folder}/query/0001_c5s1_000001_00.jpg', 1, 5)]
    assert dataset.gallery == [Sample(f'{folder}/bounding_box_test/0001_c4s6_000001_00.jpg', 1, 4)]


def test_market_drops_junk_and_keeps_distractors(tmp_path):
    test = ['-1_c1s1_000401_03.jpg', '0000_c2s1_000401_03.jpg', '0001_c1s1_000401_03.jpg', '-1_c6s1_000401_03.jpg']
    write_names(tmp_path, ['0002_c1s1_1.jpg', '-1_c1s1_2.jpg'], ['0001_c2s1_1.jpg'], test)
    dataset = datasets.market1501(str(tmp_path))
    assert [(s.pid, s.camid) for s in dataset.gallery] == [(0, 2), (1, 1)]
    assert [s.pid for s in dataset.train] == [2]


def test_files_that_are_no_images_are_passed_over(tmp_path):
    train = ['0002_c1s1_1.jpg', 'Thumbs.db', '._0002_c1s1_1.jpg']  # the last is what macOS keeps beside the first
    write_names(tmp_path, train, ['0001_c2s1_1.jpg'], ['0001_c1s1_1.jpg'])
    assert names(datasets.market1501(str(tmp_path)).train) == ['0002_c1s1_1.jpg']


@pytest.mark.parametrize('read, alias', [
    (datasets.market1501, 'Market-1501-v15.09.15'), (datasets.market1501, 'market1501'),
    (datasets.market1501, 'Market-1501'), (datasets.market1501, ''), (datasets.dukemtmcreid, 'DukeMTMC-reID'),
    (datasets.dukemtmcreid, 'dukemtmcreid'), (datasets.dukemtmcreid, 'dukemtmc-reid'), (datasets.market_layout, '')])
def test_folder_aliases_are_found(tmp_path, read, alias):
    folder = tmp_path / alias
    write_names(folder, ['0002_c1_f1.jpg'], ['0001_c2_f1.jpg'], ['0001_c1_f1.jpg'])
    assert read(str(tmp_path)).root == str(folder)


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write_names(tmp_path / 'data' / 'market1501', ['0002_c1_f1.jpg'], ['0001_c2_f1.jpg'], ['0001_c1_f1.jpg'])
    assert datasets.market1501('~/data').root == str(tmp_path / 'data' / 'market1501')


def test_an_alias_without_all_three_folders_is_passed_over(tmp_path):
    touch(tmp_path / 'market1501' / 'query' / '0001_c1s1_1.jpg')
    write_names(tmp_path / 'Market-1501', ['0002_c1s1_1.jpg'], ['0001_c2s1_1.jpg'], ['0001_c1s1_1.jpg'])
    assert datasets.market1501(str(tmp_path)).root == str(tmp_path / 'Market-1501')


def test_duke_file_names_are_read(tmp_path):
    write_names(tmp_path / 'dukemtmcreid', ['0001_c2_f0046182.jpg'], ['0005_c8_f0000001.jpg'], ['7139_c3_f0090911.jpg'])
    dataset = datasets.dukemtmcreid(str(tmp_path))
    assert [(s.pid, s.camid) for part in dataset[2:5] for s in part] == [(1, 2), (5, 8), (7139, 3)]


@pytest.mark.parametrize('alias', ['MSMT17_V1', 'MSMT17_V2', 'msmt17', ''])
@pytest.mark.parametrize('folders', [('train', 'test'), ('mask_train_v2', 'mask_test_v2')])
def test_msmt17_reads_ids_from_the_second_column_and_cameras_from_the_third_field(tmp_path, alias, folders):
    folder = tmp_path / alias
    write_msmt(folder, folders)
    dataset = datasets.msmt17(str(tmp_path))
    assert dataset.train == [Sample(f'{folder}/{folders[0]}/0000/0000_000_01_0303morning_0008_0.jpg', 0, 1)]
    assert dataset.query == [Sample(f'{folder}/{folders[1]}/0001/0001_000_07_0302evening_1_0.jpg', 1, 7)]
    assert dataset.gallery == [Sample(f'{folder}/{folders[1]}/0001/0001_001_11_0302evening_2_0.jpg', 1, 11)]


def test_a_folder_of_another_set_called_test_hides_no_msmt17(tmp_path):
    (tmp_path / 'test').mkdir()
    write_msmt(tmp_path / 'MSMT17_V2', ('mask_train_v2', 'mask_test_v2'))
    assert datasets.msmt17(str(tmp_path)).root == str(tmp_path / 'MSMT17_V2')


def test_msmt17_keeps_the_order_of_its_lists_and_passes_over_blank_lines(tmp_path):
    lines = ['0003/0003_000_15_a_0_0.jpg 3', '', '0001/0001_000_02_a_0_0.jpg 7', '  ',
             '0002/0002_000_01_a_0_0.jpg\t12  ']
    write_msmt(tmp_path, train='\r\n'.join(lines))
    train = datasets.msmt17(str(tmp_path)).train
    assert [(s.pid, s.camid) for s in train] == [(3, 15), (7, 2), (12, 1)]
    assert names(train) == ['0003_000_15_a_0_0.jpg', '0001_000_02_a_0_0.jpg', '0002_000_01_a_0_0.jpg']


@pytest.mark.parametrize('combine_val, images, said', [
    (False, ['0000_000_01_0303morning_0008_0.jpg'], 'list_train.txt'),
    (True, ['0000_000_01_0303morning_0008_0.jpg', '0000_001_15_0303noon_0009_1.jpg'],
     'list_train.txt and list_val.txt')])
def test_msmt17_takes_the_validation_list_only_when_asked_and_says_which(tmp_path, caplog, combine_val, images, said):
    write_msmt(tmp_path)
    with caplog.at_level(logging.INFO, 'mgn'):
        assert names(datasets.msmt17(str(tmp_path), combine_val=combine_val).train) == images
    assert f'trains on {said}\n' in caplog.text


@pytest.mark.parametrize('suffix', ['.jpg', '.jpeg', '.png', '.PNG', '.JPG'])
def test_market_layout_takes_jpeg_and_png(tmp_path, suffix):
    write_names(tmp_path, [f'0002_c1s1_1{suffix}'], [f'0001_c2s1_1{suffix}'], [f'0001_c1s1_1{suffix}'])
    dataset = datasets.market_layout(str(tmp_path))
    assert [(s.pid, s.camid) for part in dataset[2:5] for s in part] == [(2, 1), (1, 2), (1, 1)]


def test_market_layout_without_cameras_gives_camera_0(tmp_path, caplog):
    write_names(tmp_path, ['2_1.png', '13_a.jpg', '-1_2.png'], ['1_1.png'], ['1_2.png', '0_1.png'])
    with caplog.at_level(logging.WARNING, 'mgn'):
        dataset = datasets.market_layout(str(tmp_path))
    ids = [[(sample.pid, sample.camid) for sample in part] for part in dataset[2:5]]
    assert ids == [[(13, 0), (2, 0)], [(1, 0)], [(0, 0), (1, 0)]]
    assert not caplog.records  # there are no published counts to miss


def test_market_layout_refuses_cameras_in_some_file_names_only(tmp_path):
    write_names(tmp_path, ['0002_1.jpg', '0003_c2_1.jpg'], ['0001_c1_1.jpg'], ['0001_c2_1.jpg'])
    with pytest.raises(ValueError, match=r'all file names of .* contain a camera or none, but .*0002_1\.jpg has none'):
        datasets.market_layout(str(tmp_path))


def test_cameras_in_one_folder_and_none_in_another_are_an_error(tmp_path):
    write_market(tmp_path)
    for path in (tmp_path / 'query').iterdir():
        path.rename(path.with_name(path.name.replace('_c1s1_', '_')))
    message = r'all file names of .* contain a camera or none, but .*query.0101_000000_00\.jpg has none'
    with pytest.raises(ValueError, match=message):
        datasets.market_layout(str(tmp_path))


def test_counts_are_logged_and_differences_from_the_published_ones_warned_of(market, caplog):
    with caplog.at_level(logging.INFO, 'mgn'):
        datasets.market1501(str(market.parent))
    assert 'Market-1501 in' in caplog.records[0].message
    assert '6 identities and 24 images to train, 3 query, 10 gallery, 2 cameras' in caplog.records[0].message
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    pairs = (('751 train_pids', 6), ('12936 train', 24), ('3368 query', 3), ('15913 gallery', 10), ('6 cameras', 2))
    assert [re.search(r'should have (\d+ \w+) as published, but has (\d+)', w).groups() for w in warnings] == [
        (want, str(found)) for want, found in pairs]


@pytest.mark.parametrize('name, counts', [
    ('market1501', (751, 12936, 3368, 15913, 6)), ('dukemtmcreid', (702, 16522, 2228, 17661, 8)),
    ('msmt17', (1041, 30248, 11659, 82161, 15)), ('msmt17 with val', (1041, 32621, 11659, 82161, 15))])
def test_each_data_set_is_compared_with_its_published_counts(tmp_path, caplog, name, counts):
    if name.startswith('msmt17'):
        write_msmt(tmp_path)
        datasets.msmt17(str(tmp_path), combine_val='val' in name)
    else:
        getattr(datasets, name)(str(write_market(tmp_path, identities=1, images=1, size=(8, 4))))
    wanted = [int(re.search(r'should have (\d+) \w+ as published', r.message)[1]) for r in caplog.records]
    assert wanted == list(counts)


def test_published_counts_raise_no_warning(caplog):
    train = [Sample(str(i), i % 2, i % 3) for i in range(4)]
    dataset = datasets.Dataset('small', 'root', train, train[:1], train[:3])
    assert datasets.logged(dataset, (2, 4, 1, 3, 3)) is dataset
    assert not caplog.records


@pytest.mark.parametrize('pids', [[], [5], [7, 0, 7, 1501, 3, 0], list(range(33, 0, -1)) * 2])
def test_labels_are_0_to_C_by_ascending_id_whatever_the_order(pids):
    samples = [Sample(f'{i}.jpg', pid, 1) for i, pid in enumerate(pids)]
    ascending = sorted(set(pids))
    expected = [ascending.index(pid) for pid in pids]
    assert datasets.train_labels(samples) == (expected, len(ascending))
    order = random.Random(0).sample(range(len(pids)), len(pids))
    labels, _ = datasets.train_labels([samples[i] for i in order])
    assert labels == [expected[i] for i in order]


def test_reading_twice_gives_the_same_data_set(market):
    assert datasets.market1501(str(market)) == datasets.market1501(str(market))


def test_cuhk03_is_read_in_markets_layout_by_the_boxes_asked_for(tmp_path):
    for boxes, pid in (('detected', 3), ('labeled', 4)):
        name = f'{pid:04d}_c1_1.png'
        write_names(tmp_path / 'cuhk03-np' / boxes, [name], [name], [name.replace('c1', 'c2')])
    assert [sample.pid for sample in datasets.cuhk03(str(tmp_path)).query] == [3]
    labeled = datasets.cuhk03(str(tmp_path), boxes='labeled')
    assert [sample.pid for sample in labeled.query] == [4] and labeled.name == 'CUHK03 (labeled)'


def test_cuhk01_splits_identities_by_a_seed_and_cameras_by_the_number_of_the_image(tmp_path, caplog):
    touch(*(tmp_path / 'CUHK01' / 'campus' / f'{pid:04d}{i:03d}.png' for pid in range(1, 972) for i in range(1, 5)))
    touch(tmp_path / 'CUHK01' / 'campus' / 'Thumbs.db')
    with caplog.at_level(logging.WARNING):
        first, again, other = (datasets.cuhk01(str(tmp_path), seed=seed) for seed in (0, 0, 1))
    assert not caplog.records  # the published sizes
    assert first == again and {s.pid for s in first.train} != {s.pid for s in other.train}
    trained, tested = {s.pid for s in first.train}, {s.pid for s in first.query}
    assert len(trained) == 485 and len(tested) == 486 and not trained & tested
    assert names(first.query[:2]) == [f'{first.query[0].pid:04d}00{i}.png' for i in (1, 2)]
    assert {s.camid for s in first.query} == {1} and {s.camid for s in first.gallery} == {2}
    assert tested == {s.pid for s in first.gallery}


def test_cuhk01_without_images_is_refused(tmp_path):
    (tmp_path / 'campus').mkdir()
    with pytest.raises(UserError, match='campus holds no images with names such as'):
        datasets.cuhk01(str(tmp_path))
