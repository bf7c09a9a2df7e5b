"""What is on the page: crops, the blurred part, queries of the curves, names; and the lists of a second network."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from reports import made, root, weights, write_weights  # noqa: F401 (fixtures)
from thin import thin  # noqa: F401

from mgn import ranked_lists, report_page

pytestmark = pytest.mark.usefixtures('thin', 'clean_gin')


def test_queries_of_the_curves_are_spread_over_the_list_and_boxes_of_nobody_are_in_none(monkeypatch):
    monkeypatch.setattr(ranked_lists, 'SAMPLED', 2)
    ids = [1, 2, 3, 4], [4, -1, 9], [0] * 4, [1] * 3
    found = ranked_lists.similarities((torch.eye(4), torch.eye(4)[1:]), ids)  # of the first query and the last
    assert (found['queries'], found['matches'].sum(), found['others'].sum()) == (2, 1, 3)


@pytest.mark.parametrize('size, shown', [((40, 20), (40, 20)), ((2000, 2), (128, 1)), ((100, 2000), (13, 256))])
def test_crops_are_never_enlarged_and_have_a_pixel_at_least(size, shown):
    jpeg = base64.b64decode(report_page.crop(torch.zeros(3, *size, dtype=torch.uint8), False))
    assert Image.open(io.BytesIO(jpeg)).size == shown[::-1]


@pytest.mark.parametrize('height', [7, 60])
def test_the_blurred_part_is_an_eighth_at_least(monkeypatch, height):
    image = torch.arange(3 * height * 20).reshape(3, height, 20).mul(37).to(torch.uint8)
    monkeypatch.setattr(report_page.simplejpeg, 'encode_jpeg', lambda pixels, *_: pixels.tobytes())
    sharp, blurred = (np.frombuffer(base64.b64decode(report_page.crop(image, blur)), np.uint8)
                      for blur in (False, True))
    changed = (sharp != blurred).reshape(height, -1).any(1)
    assert changed.sum() == -(-height // 8) and changed[:changed.sum()].all()


def test_the_page_does_not_name_the_home_folder(root, weights, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    page = made(weights, root, root / 'out')
    assert page['weights'] == '~/run/best.pth' and str(tmp_path) not in page['notices'][0]


def test_ranks_beside_the_lists_of_the_other_network_are_its_own(root, weights, tmp_path):
    other = write_weights(tmp_path / 'other.pth', 1)
    ranks = {row['query']: row['ranks'] for row in made(other, root, root / 'out')['lists']}
    compare = made(weights, root, root / 'out', f"compare = '{other}'")['compare']
    assert compare['others'] and all(row['ranks'] == ranks[row['query']] for row in compare['others'])
