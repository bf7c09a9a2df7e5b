"""What is wrong with the folders and list files of a data set is named."""

import re

import pytest
import torch
from test_datasets import PARTS, write_msmt, write_names

from mgn import evaluation
from mgn.data import datasets
from mgn.ops import match_ranks
from mgn.ops.errors import FileError


@pytest.mark.parametrize('read, aliases', [
    (datasets.market1501, ('Market-1501-v15.09.15', 'market1501', 'Market-1501', '')),
    (datasets.dukemtmcreid, ('DukeMTMC-reID', 'dukemtmcreid', 'dukemtmc-reid')), (datasets.market_layout, ('',))])
def test_a_missing_folder_lists_every_folder_tried(tmp_path, read, aliases):
    with pytest.raises(FileNotFoundError, match='data_root') as error:
        read(str(tmp_path / 'nowhere'))
    assert {f'{tmp_path / "nowhere" / alias} (no such folder)' for alias in aliases} <= {
        line.strip() for line in str(error.value).splitlines()}


def test_a_missing_part_is_told_from_those_that_are_there(tmp_path):
    write_names(tmp_path, ['0002_c1s1_1.jpg'], ['0001_c2s1_1.jpg'], [])
    with pytest.raises(FileNotFoundError) as error:
        datasets.market_layout(str(tmp_path))
    assert f'\n  {tmp_path} (lacks bounding_box_test)\n' in str(error.value)


def test_missing_msmt17_lists_every_folder_tried(tmp_path):
    write_msmt(tmp_path / 'MSMT17_V1')
    (tmp_path / 'MSMT17_V1' / 'list_query.txt').unlink()
    with pytest.raises(FileNotFoundError) as error:
        datasets.msmt17(str(tmp_path))
    assert f'\n  {tmp_path}/MSMT17_V1 (lacks list_query.txt)\n' in str(error.value)
    for alias in ('MSMT17_V2', 'msmt17'):
        assert f'\n  {tmp_path / alias} (no such folder)\n' in str(error.value)


@pytest.mark.parametrize('folders', [(), ('train',), ('train', 'mask_train_v2')])
def test_msmt17_without_images_to_evaluate_lists_the_folders_looked_for(tmp_path, folders):
    tmp_path.joinpath('MSMT17_V1').mkdir()
    write_msmt(tmp_path, folders=folders)
    with pytest.raises(FileNotFoundError) as error:
        datasets.msmt17(str(tmp_path))
    lacking = [folder for folder in ('train', 'test') if folder not in folders]
    assert f'\n  {tmp_path} (lacks {", ".join(lacking)})\n' in str(error.value)


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('junk', [[], ['-1_c1s1_000001_01.jpg', 'Thumbs.db']])
def test_a_folder_without_images_is_named(tmp_path, part, junk):
    parts = {name: ['0001_c1s1_1.jpg'] for name in PARTS} | {part: junk}
    write_names(tmp_path, *parts.values())
    (tmp_path / part).mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=re.escape(f'{tmp_path}/{part} holds no images')):
        datasets.market1501(str(tmp_path))


@pytest.mark.parametrize('read, name', [
    (datasets.market1501, 'person_c1s1_1.jpg'), (datasets.market1501, '0002_000451.jpg'),
    (datasets.market1501, '2-c1.jpg'), (datasets.dukemtmcreid, '0002.jpg'),
    (datasets.dukemtmcreid, '0002_f0046182.jpg'), (datasets.market_layout, 'photo.png')])
def test_a_misnamed_file_is_named(tmp_path, read, name):
    write_names(tmp_path, ['0002_c1s1_1.jpg', name], ['0001_c2s1_1.jpg'], ['0001_c1s1_1.jpg'])
    with pytest.raises(ValueError, match=re.escape(f'but {tmp_path}/bounding_box_train/{name} does not;')):
        read(str(tmp_path))


@pytest.mark.parametrize('line', [
    '0000/0000_001_02_a_0_0.jpg', '0000/0000_001_02_a_0_0.jpg x', '0000/0000_001.jpg 3', '3',
    '0000/0000_001_xx_a_0_0.jpg 3', '0000/0000_001_cam_07_a_0.jpg 3', '0000/0000_001_02_a_0_0.jpg 3 4',
    '0000/0000_001_02_a_0_0.jpg -1', '/0000/0000_001_02_a_0_0.jpg 3', '../0000_001_02_a_0_0.jpg 3',
    '0000/0000_001_02_\0_0_0.jpg 3', f'0000/0000_001_02_a_0_0.jpg {10 ** 18}', f'0000/0000_001_{10 ** 18}_a_0_0.jpg 3',
    'x' * 300])
def test_a_broken_list_line_is_named(tmp_path, line):
    write_msmt(tmp_path, query=f'0001/0001_000_07_0302evening_1_0.jpg 1\n{line}\n')
    with pytest.raises(ValueError, match=re.escape(f'line 2 of {tmp_path}/list_query.txt is {repr(line)[:200]};')):
        datasets.msmt17(str(tmp_path))


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-32'])
def test_a_list_in_another_encoding_is_named(tmp_path, encoding):
    write_msmt(tmp_path)
    (tmp_path / 'list_query.txt').write_text('0001/0001_000_07_0302evening_1_0.jpg 1\n', encoding=encoding)
    with pytest.raises(ValueError, match='line 1 of .*list_query.txt is .*; restore the list'):
        datasets.msmt17(str(tmp_path))


def test_the_mark_that_windows_puts_in_front_of_utf_8_is_no_part_of_a_path(tmp_path):
    write_msmt(tmp_path, train='\ufeff0000/0000_000_01_0303morning_0008_0.jpg 0\n')
    assert datasets.msmt17(str(tmp_path)).train[0].path.endswith('/train/0000/0000_000_01_0303morning_0008_0.jpg')


@pytest.mark.parametrize('part', PARTS[:2])
@pytest.mark.parametrize('name, pid', [('0000_c1s1_1.jpg', 0), ('-2_c1s1_1.jpg', -2)])
def test_identities_of_people_begin_at_1_in_markets_layout(tmp_path, part, name, pid):
    names = {name: ['0001_c1s1_1.jpg'] for name in PARTS}
    names[part].append(name)
    write_names(tmp_path, *names.values())
    with pytest.raises(ValueError, match=f'from 1 on, as 0 means nobody .*, but {tmp_path}/{part}/{name} has {pid};'):
        datasets.market_layout(str(tmp_path))


def test_identity_0_of_msmt17_is_a_person(tmp_path):
    """As in mgn.ops, which tests/ops/test_match_ranks.py shows: there 0 is an identity like any other."""
    write_msmt(tmp_path, query='0000/0000_000_07_a_1_0.jpg 0\n',
               gallery='0001/0001_001_11_a_2_0.jpg 1\n0000/0000_001_11_a_2_0.jpg 0\n')
    dataset = datasets.msmt17(str(tmp_path))
    ids = evaluation.identities(dataset, cross_camera=True)
    assert match_ranks(torch.ones(1, 2), torch.ones(2, 2), *ids).ranks.tolist() == [2]


@pytest.mark.parametrize('name', [f'{10 ** 18}_c1s1_1.jpg', f'0001_c{10 ** 18}s1_1.jpg'])
def test_numbers_that_64_bits_do_not_hold_are_refused(tmp_path, name):
    write_names(tmp_path, ['0002_c1s1_1.jpg', name], ['0001_c2s1_1.jpg'], ['0001_c1s1_1.jpg'])
    with pytest.raises(ValueError, match=re.escape(f'but {tmp_path}/bounding_box_train/{name} does not;')):
        datasets.market1501(str(tmp_path))


def test_a_file_in_place_of_a_folder_and_a_folder_in_place_of_a_list_are_named(tmp_path):
    write_names(tmp_path, ['0002_c1s1_1.jpg'], [], ['0001_c1s1_1.jpg'])
    (tmp_path / 'query').touch()
    with pytest.raises(FileError, match=f'{tmp_path}/query cannot be read: Not a directory; restore it or correct'):
        datasets.market1501(str(tmp_path))
    write_msmt(tmp_path / 'MSMT17_V1')
    (tmp_path / 'MSMT17_V1' / 'list_query.txt').unlink()
    (tmp_path / 'MSMT17_V1' / 'list_query.txt').mkdir()
    with pytest.raises(FileError, match='list_query.txt cannot be read: Is a directory'):
        datasets.msmt17(str(tmp_path))


@pytest.mark.parametrize('name', ['train', 'query', 'gallery'])
def test_an_empty_list_is_named(tmp_path, name):
    write_msmt(tmp_path, **{name: '\n'})
    with pytest.raises(ValueError, match=re.escape(f'{tmp_path}/list_{name}.txt lists no images')):
        datasets.msmt17(str(tmp_path))
