"""A table of images as a data set, what is wrong with one, and several data sets joined."""

import pytest
from conftest import write_market

from mgn.data import datasets
from mgn.data.datasets import Sample
from mgn.ops.errors import FileError, UserError


def write_table(root, *lines):
    (root / 'dataset.csv').write_text('\n'.join(('split,pid,camid,path,note', *lines)))
    return str(root)


def test_a_table_names_images_in_any_order_and_anywhere(tmp_path):
    root = write_table(tmp_path, 'query,7,1,a.jpg,x', 'gallery,7,2,"b, c.jpg",', 'gallery,-1,2,junk.jpg,', '',
                       'train, 5 ,3,/else/d.png')
    dataset = datasets.csv_table(root)
    assert dataset.query == [Sample(f'{root}/a.jpg', 7, 1)]
    assert dataset.gallery == [Sample(f'{root}/b, c.jpg', 7, 2)]
    assert dataset.train == [Sample('/else/d.png', 5, 3)] and not dataset.not_to_train


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path):
    """Excel begins UTF-8 with a mark and ends lines as Windows does."""
    rows = 'path,pid,camid,split\r\né.jpg,7,1,query\r\nb.jpg,7,2,gallery\r\n'
    (tmp_path / 'dataset.csv').write_bytes(rows.encode('utf-8-sig'))
    dataset = datasets.csv_table(str(tmp_path))
    assert dataset.query + dataset.gallery == [Sample(f'{tmp_path}/é.jpg', 7, 1), Sample(f'{tmp_path}/b.jpg', 7, 2)]


@pytest.mark.parametrize('lines, message', [
    (['query,x,1,a.jpg,', 'gallery,7,2,b.jpg,'], "line 2 of .*dataset.csv is .*'x'"),
    (['query,7,1,a.jpg,', 'gallery,7,2,b.jpg,', 'test,7,2,b.jpg,'], "line 4 of .*'test'"),
    (['query,7,1,a.jpg,', 'gallery,7'], 'line 3 of'),
    (['train,-2,1,a.jpg,'], 'line 2 of'), (['train,7,-1,a.jpg,'], 'line 2 of'),
    (['"' + 'x' * 200_000], 'dataset.csv cannot be read: field larger than'),
    (['query,7,1,a.jpg,', 'train,7,1,b.jpg,'], 'lists no image of gallery; add rows'),
    ([], 'lists no image of query and gallery')])
def test_a_table_with_other_rows_is_refused_with_the_line(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        datasets.csv_table(write_table(tmp_path, *lines))


def test_a_table_without_its_first_line_or_at_all_is_refused_and_one_without_training_may_be_tested(tmp_path):
    with pytest.raises(FileError, match='dataset.csv cannot be read'):
        datasets.csv_table(str(tmp_path))
    (tmp_path / 'dataset.csv').write_text('a.jpg,7,1,query\n')
    with pytest.raises(UserError, match=r"should begin with the line path,pid,camid,split, but .*\['a.jpg', '7'"):
        datasets.csv_table(str(tmp_path))
    (tmp_path / 'dataset.csv').write_text('path,pid,camid,split,pid\na.jpg,7,1,query,8\n')
    with pytest.raises(UserError, match="with the columns .*'split', 'pid'"):  # which of the two is meant?
        datasets.csv_table(str(tmp_path))
    dataset = datasets.csv_table(write_table(tmp_path, 'query,7,1,a.jpg,', 'gallery,7,2,b.jpg,'))
    with pytest.raises(FileError, match='lists no image to train on'):
        datasets.check_trainable(dataset)


def test_joined_sets_keep_identities_and_cameras_apart_and_test_on_the_first(tmp_path):
    one = datasets.market_layout(str(write_market(tmp_path / 'one', identities=3, images=2)))
    two = datasets.market_layout(str(write_market(tmp_path / 'two', identities=4, images=3, cameras=3)))
    three = datasets.market_layout(str(write_market(tmp_path / 'three', identities=3, images=2)))
    both = datasets.joined((one, two, three))
    assert (both.query, both.gallery, both.name) == (one.query, one.gallery, 'one+two+three')
    assert [s.path for s in both.train] == [s.path for s in (*one.train, *two.train, *three.train)]
    assert both.train[:6] == one.train
    assert [(s.pid, s.camid) for s in both.train[6:9]] == [(5, 4), (5, 5), (5, 6)]  # behind 3 and 2, from 1 on
    assert len({s.pid for s in both.train}) == 10 and len({s.camid for s in both.train}) == 7
    with pytest.raises(ValueError, match='joined.datasets is empty'):
        datasets.joined()


@pytest.mark.parametrize('part', ['train', 'query', 'gallery'])
def test_an_image_listed_twice_is_refused_but_a_query_may_stand_in_the_gallery(tmp_path, part):
    lines = ['train,5,1,c.jpg,', 'query,7,1,a.jpg,', 'gallery,7,1,a.jpg,', 'gallery,7,2,b.jpg,']
    assert len(datasets.csv_table(write_table(tmp_path, *lines)).gallery) == 2
    image = {'train': 'c.jpg', 'query': 'a.jpg', 'gallery': 'b.jpg'}[part]
    with pytest.raises(UserError, match=rf'lists images twice \(1\), first .*/{image}; list each once'):
        datasets.csv_table(write_table(tmp_path, *lines, f'{part},8,3,{image},'))


def test_a_data_set_joined_with_itself_is_refused(tmp_path):
    """Every person would be two."""
    one = datasets.market_layout(str(write_market(tmp_path / 'one', identities=3, images=2)))
    with pytest.raises(UserError, match=r'one\+one lists images twice \(6\)'):
        datasets.joined((one, one))
