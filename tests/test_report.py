"""The report: its numbers beside naive ones, what is missing or damaged, names of files, privacy, memory."""

import base64
import io
import os
import re

import numpy as np
import pytest
import torch
from memory import only_linux, printed
from PIL import Image
from reports import bind, data_of, made, people, root, weights, write_table, write_weights  # noqa: F401 (fixtures)
from thin import thin  # noqa: F401

from mgn import evaluation, ranked_lists, report_page
from mgn.data.augmentation import normalise
from mgn.data.datasets import Sample, csv_table
from mgn.data.images import Decoder, to_batch
from mgn.features import Extractor
from mgn.model import MGN
from mgn.ops import match_ranks
from mgn.ops.errors import UserError
from mgn.ops.metrics import METRICS
from mgn.runs import checkpoint

pytestmark = pytest.mark.usefixtures('thin', 'clean_gin')


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image['jpeg']))), float)


def model_of(weights):
    model = MGN(0)
    checkpoint.load_model(model, checkpoint.load(weights)['model'], weights, without='.classifier.')
    return model.eval()


def naive(dataset, cosines, camera=None):
    """Of each query: items by similarity with their kinds, ranks of its matches, AP; also in one camera's gallery."""
    rows = []
    for query, row in zip(dataset.query, cosines):
        kinds, ranks, rank = [], [], 0
        for item in sorted(range(len(row)), key=lambda i: (-row[i], i)):
            found = dataset.gallery[item]
            if camera is None or found.camid == camera:
                same = found.pid == query.pid
                kind = 'other' if not same else 'junk' if found.camid == query.camid else 'match'
                rank += kind != 'junk'
                ranks += [rank] if kind == 'match' else []
                kinds.append((item, kind, None if kind == 'junk' else rank))
        rows.append((kinds, ranks, np.mean([i / r for i, r in enumerate(ranks, 1)]) if ranks else None))
    return rows


@pytest.fixture
def expected(root, weights):
    """The data set and the cosines of query and gallery, (Q, G) float64."""
    bind(weights, root, root)
    dataset = csv_table()
    features = Extractor(torch.device('cpu')).features(model_of(weights), dataset.query + dataset.gallery).double()
    query, gallery = features.split([len(dataset.query), len(dataset.gallery)])
    return dataset, (query @ gallery.T).numpy()


def test_lists_and_measures_are_those_of_a_naive_ranking(root, weights, expected):
    dataset, cosines = expected
    page = made(weights, root, root / 'out')
    rows = naive(dataset, cosines)
    known = [ap for _, _, ap in rows if ap is not None]
    assert page['queries']['ap'] == [None if ap is None else pytest.approx(ap, abs=5e-5) for _, _, ap in rows]
    assert page['queries']['first'] == [ranks[0] if ranks else 0 for _, ranks, _ in rows]
    assert page['queries']['file'][0] == 'q/1_1.png' and page['queries']['pid'] == [s.pid for s in dataset.query]
    assert page['measures'][0][1]['mAP'] == pytest.approx(np.mean(known)) and page['metrics'] == list(METRICS)
    assert sorted(row['query'] for row in page['lists']) == [i for i, row in enumerate(rows) if row[1]]
    for row in page['lists']:
        kinds, ranks, _ = rows[row['query']]
        end = next((i + 1 for i, (_, _, rank) in enumerate(kinds) if rank == 10), len(kinds))
        found = [[os.path.join(root, page['images'][image]['path']), *rest] for image, *rest, _ in row['nearest']]
        assert found == [[dataset.gallery[item].path, kind, rank] for item, kind, rank in kinds[:end]]
        assert [similarity for *_, similarity in row['nearest']] == pytest.approx(
            [cosines[row['query'], item] for item, *_ in kinds[:end]], abs=1e-4)
        assert row['ranks'] == ranks and page['images'][row['image']]['pid'] == dataset.query[row['query']].pid
    paths = [image['path'] for image in page['images']]
    assert len(paths) == len(set(paths))


def test_curves_are_those_of_all_pairs(root, weights, expected):
    dataset, cosines = expected
    page = made(weights, root, root / 'out')
    same = np.array([[query.pid == item.pid for item in dataset.gallery] for query in dataset.query])
    camera = np.array([[query.camid == item.camid for item in dataset.gallery] for query in dataset.query])
    for name, pairs in (('matches', same & ~camera), ('others', ~same)):
        assert sum(page['similarities'][name]) == pairs.sum()
        for bins in (5, 20, 100):  # of the counts, each the sum of several; float32 may put a pair next to its bin
            counts = np.reshape(page['similarities'][name], (bins, -1)).sum(1)
            assert np.abs(counts - np.histogram(cosines[pairs], bins, (-1, 1))[0]).sum() <= 2
    assert page['cameras']['rows'] == page['cameras']['columns'] == [0, 1, 2]
    for column in range(3):
        rows = naive(dataset, cosines, column)
        for row in range(3):
            aps = [ap for query, (_, _, ap) in zip(dataset.query, rows) if query.camid == row and ap is not None]
            cell = page['cameras']['mAP'][row][column]
            assert cell == (pytest.approx(np.mean(aps), abs=1e-4) if aps else None)
    assert page['cameras']['mAP'][1][1] is None


def test_pairs_of_many_queries_with_a_gallery_in_parts_are_counted_once_each(monkeypatch):
    """An item for each of 1,200 queries, in the same direction: the cosine may be rounded to more than 1."""
    monkeypatch.setattr(ranked_lists, 'ITEMS', 500)
    query = torch.randn(1200, 8, generator=torch.Generator().manual_seed(0))
    ids = np.arange(1200), np.arange(1200), np.zeros(1200, int), np.ones(1200, int)
    found = ranked_lists.similarities((query, 3 * query), ids)
    assert found['queries'] == found['matches'].sum() == found['matches'][-1] == 1000
    assert found['others'].sum() == 1000 * 1199


def test_a_camera_without_any_match_is_an_empty_column():
    features, ids = (torch.eye(2), torch.eye(2).repeat(2, 1)), ([1, 2], [1, 2, 8, 9], [0, 0], [1, 1, 2, 2])
    dataset = type('Dataset', (), {'query': [Sample('', pid, 0) for pid in (1, 2)], 'gallery': [
        Sample('', pid, camid) for pid, camid in zip(ids[1], ids[3])]})
    found = ranked_lists.by_cameras(features, ids, dataset)
    assert found['rows'].tolist() == [0] and found['columns'].tolist() == [1, 2] and found['mAP'] == [(1.0, None)]


def test_junk_has_no_rank_and_leaves_room_for_the_nearest_ten():
    """Nearest are boxes of nobody, in another camera, and images of the query's camera; then a match and others."""
    angles = torch.linspace(0, 1, 25)
    features = torch.tensor([[1.0, 0.0]]), torch.stack((angles.cos(), angles.sin()), 1)
    pids, camids = np.array([-1] * 6 + [7] * 7 + [*range(100, 112)]), np.array([2] * 6 + [1] * 6 + [2] * 13)
    ids, dataset = ([7], pids, [1], camids), type('Dataset', (), {
        'query': [Sample('q', 7, 1)], 'gallery': [Sample(str(i), *who) for i, who in enumerate(zip(pids, camids))]})
    row, = ranked_lists.ranked_lists(features, ids, match_ranks(*features, *map(np.asarray, ids)), [0], dataset, {})
    kinds, ranks = zip(*(entry[1:3] for entry in row['nearest']))
    assert kinds == ('junk',) * 12 + ('match',) + ('other',) * 9 and ranks == (None,) * 12 + (*range(1, 11),)


def test_maps_are_the_energy_of_the_last_map_of_each_branch(root, weights):
    page = made(weights, root, root / 'out')
    model = model_of(weights)
    for image in page['images'][::5]:
        batch = normalise(to_batch([Decoder()(os.path.join(root, image['path']))], (48, 24)))
        for branch, found in zip(model.branches, image['maps']):
            with torch.no_grad():
                energy = (branch(model.trunk(batch))[0] ** 2).sum(0)
            values = np.frombuffer(base64.b64decode(found['values']), np.uint8).reshape(found['size'])
            wanted = 255 * (energy - energy.min()) / (energy.max() - energy.min())
            assert np.abs(values - wanted.numpy()).max() <= 1.01 and values.max() >= 254 and values.min() == 0
    assert page['branches'] == [1, 2] and [map['size'] for map in page['images'][0]['maps']] == [[2, 1], [3, 2]]


def test_eval_makes_the_same_page_without_a_second_extraction(root, weights, monkeypatch):
    page, forward, images = made(weights, root, root / 'out'), Extractor.forward, []
    monkeypatch.setattr(Extractor, 'forward', lambda *given: images.append(len(given[2])) or forward(*given))
    evaluation.evaluate_checkpoint(bind(weights, root, root / 'eval', 'report = True'))
    assert sum(images) == len(people())
    own = {'made': None, 'command': None}
    assert {**data_of(root / 'eval/report.html'), **own} == {**page, **own}
    assert sorted(os.listdir(root / 'eval')) == ['eval.json', 'report.html']
    assert os.listdir(root / 'out') == ['report.html']


def test_the_chosen_are_the_worst_the_best_and_others():
    ap = np.random.default_rng(0).permutation(1000) / 1000
    ap[::10] = np.nan
    order = np.argsort(ap)[:900]
    chosen = ranked_lists.choose(ap, 100).tolist()
    assert len({*chosen}) == 100 and chosen[:33] == order[:33].tolist() and chosen[-33:] == order[-33:].tolist()
    assert np.ptp(ap[chosen[33:-33]]) > 0.7
    assert sorted(ranked_lists.choose(ap, 2000)) == sorted(order)
    changed = ranked_lists.most_changed(ap, np.where(np.arange(1000) < 50, ap / 2, ap), 20).tolist()
    assert changed == [i for i in np.argsort(-np.nan_to_num(ap[:50]), kind='stable')][:20]


def test_queries_bounds_the_pictures_and_all_are_listed(root, weights):
    page = made(weights, root, root / 'out', 'report.queries = 3')
    assert len(page['lists']) == 3 and len(page['queries']['file']) == 8
    assert len(page['images']) < len(people())
    for wrong in ('report.queries = 0', 'report.blur = 1', "runs = 'runs/a'", 'compare = 3'):
        with pytest.raises(UserError, match=r'(queries|blur|runs|compare) must be'):
            made(weights, root, root / 'out', wrong)


def test_crops_are_small_and_their_top_is_blurred_where_asked(tmp_path, weights):
    root = write_table(tmp_path / 'data', people(3), (300, 120))
    sharp, blurred = (made(weights, root, root / 'out', f'report.blur = {blur}') for blur in (False, True))
    assert blurred['blur'] and not sharp['blur']
    for before, after in zip(sharp['images'], blurred['images']):
        before, after = pixels(before), pixels(after)
        assert before.shape == after.shape == (128, 51, 3)
        assert after[:12].std((0, 1)).max() < 4 < before[:12].std((0, 1)).min()
        assert np.abs(before[24:] - after[24:]).max() < 3


def test_runs_are_overlaid_and_a_folder_without_metrics_is_named(root, weights, tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/metrics.jsonl').write_text('{"step": 3, "loss": NaN}\n{"step": 4, "mAP": 0.5}\n')
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b/metrics.jsonl').write_text('damage\n{"step": 3}\n')
    page = made(weights, root, root / 'out', f"runs = ('{tmp_path}/a', '{tmp_path}/b')")
    assert page['runs'] == [{'name': f'{tmp_path}/a', 'records': [{'step': 3, 'loss': None}, {'step': 4, 'mAP': 0.5}]}]
    assert len(page['notices']) == 1 and 'Line 1 of' in page['notices'][0]
    page = made(weights, root, root / 'out')
    assert page['runs'] == [] and 'has no metrics.jsonl with records' in page['notices'][0] and page['lists']


def test_another_network_is_compared_and_one_that_cannot_be_read_is_named(root, weights, tmp_path, monkeypatch):
    def forbidden(path, *rest):
        if path == str(other):
            raise PermissionError(13, 'Permission denied', path)
        return open(path, *rest)
    other = write_weights(tmp_path / 'other.pth', 1, 'MGN.parts = (1, 2, 3)', 'MGN.last_strides = (2, 1, 1)',
                          'MGN.embedding_dim = 4', 'input_size = (64, 32)')
    alone = made(other, root, root / 'out')
    page = made(weights, root, root / 'out', f"compare = '{other}'")
    compare = page['compare']
    assert compare['ap'] == alone['queries']['ap'] and compare['measures'] == {
        name: pytest.approx(alone['measures'][0][1][name]) for name in METRICS}
    change = np.abs(np.array(compare['ap'], float) - np.array(page['queries']['ap'], float))
    chosen = [row['query'] for row in compare['lists']]
    assert chosen == [row['query'] for row in compare['others']] and change[chosen].min() > 0
    assert list(change[chosen]) == sorted(change[chosen], reverse=True)
    lists = {row['query']: [rest for _, *rest in row['nearest']] for row in alone['lists']}
    assert all([rest for _, *rest in row['nearest']] == lists[row['query']] for row in compare['others'])
    (tmp_path / 'model.onnx').write_bytes(b'something else')
    monkeypatch.setattr(checkpoint, 'open', forbidden, raising=False)
    for path, reason in (('nowhere.pth', 'There is no file'), (other, '.*Permission denied'),
                         (tmp_path / 'model.onnx', 'is no ONNX file')):
        page = made(weights, root, root / 'out', f"compare = '{path}'")
        assert 'compare' not in page and page['lists']
        assert any(re.match(f'There is no comparison with .*{path}: .*{reason}', text) for text in page['notices'])


@pytest.mark.parametrize('setting', ['flip_test = True', "feature_precision = 'bfloat16'"])
def test_a_network_compared_with_itself_by_other_settings_is_the_same(root, weights, setting):
    page = made(weights, root, root / 'out', f"compare = '{weights}'", setting)
    assert page['compare']['ap'] == page['queries']['ap'] and page['compare']['lists'] == []


def test_another_network_is_run_as_the_command_says_but_an_exported_one_as_it_was_exported(monkeypatch):
    seen = []

    def embedder(*args):
        seen.append(args)
        raise UserError('seen')
    monkeypatch.setattr(report_page, 'Embedder', embedder)
    extractor = Extractor(torch.device('cpu'), (8, 4), batch_size=3, workers=0, flip_test=True, precision='bfloat16')
    for path in 'a.pth', 'a.onnx':
        report_page.compared(path, extractor, None, None, [])
    assert seen == [('a.pth', 'cpu', 'bfloat16', True, 3), ('a.onnx', 'cpu', 'auto', True, 3)]


def test_images_that_vanished_are_named_and_the_rest_is_made(root, weights):
    os.remove(root / 'q/3_0.png')
    (root / 'g/2_1_0.png').write_text('no image')
    page = made(weights, root, root / 'out')
    notice = next(text for text in page['notices'] if 'cannot be read' in text)
    assert 'q/3_0.png: No such file' in notice and 'g/2_1_0.png: ' in notice
    shots = [shot for shot in people() if shot[0] not in ('q/3_0.png', 'g/2_1_0.png')]
    assert page['queries']['file'] == [name for name, _, _, split in shots if split == 'query']
    assert page['gallery'] == sum(split == 'gallery' for *_, split in shots)
    with pytest.raises(UserError, match='Evaluation needs every image'):
        evaluation.evaluate_checkpoint(bind(weights, root, root / 'eval', 'report = True'))


def test_where_no_query_can_be_read_the_images_are_named(root, weights):
    for path in (root / 'q').iterdir():
        path.write_bytes(b'')
    with pytest.raises(UserError, match='(?s)cannot be read:.*q/.*No query or no gallery image is left'):
        made(weights, root, root / 'out')


def test_a_picture_that_vanished_behind_its_features_is_marked(root, weights, tmp_path):
    features = f"features_dir = '{tmp_path}/features'"
    evaluation.extract_checkpoint(bind(weights, root, root / 'out', features))
    whole = made(weights, root, root / 'out', features)
    os.remove(root / 'q/3_0.png')
    page = made(weights, root, root / 'out', features)
    assert page['lists'] == whole['lists'] and page['notices'] == whole['notices']
    assert [image for image in page['images'] if 'error' in image] == [
        {'path': 'q/3_0.png', 'pid': 3, 'camid': 0, 'error': 'No such file or directory'}]


def test_features_of_other_weights_and_weights_of_another_data_set_are_named(root, weights, tmp_path):
    features = f"features_dir = '{tmp_path}/features'"
    other = write_weights(tmp_path / 'other.pth', 1, 'dataset = @pedestrians()')
    evaluation.extract_checkpoint(bind(weights, root, root / 'out', features))
    page = made(other, root, root / 'out', features, 'dataset = @csv_table()')
    assert any('are of other weights' in text and 'made from the images' in text for text in page['notices'])
    assert 'The weights were trained on @pedestrians(); this page is of @csv_table().' in page['notices']
    assert page['lists'] == made(other, root, root / 'out', 'dataset = @csv_table()')['lists']


def test_names_of_files_end_no_script_and_the_page_asks_for_nothing(tmp_path, weights):
    hostile = ['q/<!--<script>.png', 'q/<img src=x onerror=alert(1)>.png', 'g/\u2028"\'&amp;.png', 'g/\udcff\n.png']
    root = write_table(tmp_path / 'data', [(name, i % 2, i // 2, 'query' if name[0] == 'q' else 'gallery')
                                           for i, name in enumerate(hostile)])
    page = made(weights, root, root / 'out')
    assert page['queries']['file'] == hostile[:2] and {image['path'] for image in page['images']} == set(hostile)
    text = (root / 'out/report.html').read_text()
    data = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    assert '<' not in data and len(re.findall('<script', text)) == 2
    assert set(re.findall(r'https?:[^\s\'"]*', text.replace(data, ''))) == {'http://www.w3.org/'}
    code = text.replace(data, '')
    assert not re.findall(r'innerHTML|insertAdjacent|document\.write|eval\(|@import|url\(|\bfetch\(', code)
    assert "default-src 'none'" in text


def test_without_cameras_only_the_file_itself_is_junk(root, weights):
    (root / 'dataset.csv').write_text('path,pid,camid,split\nq/1_1.png,1,0,query\nq/1_1.png,1,0,gallery\n'
                                      'g/1_1_0.png,1,0,gallery\ng/2_1_0.png,2,0,gallery\n')
    page = made(weights, root, root / 'out', 'evaluate.cross_camera = False')
    kinds = {page['images'][image]['path']: kind for image, kind, *_ in page['lists'][0]['nearest']}
    assert kinds == {'q/1_1.png': 'junk', 'g/1_1_0.png': 'match', 'g/2_1_0.png': 'other'}
    assert page['cameras']['mAP'] == [page['queries']['ap']]


@only_linux
def test_memory_stays_far_below_a_matrix_of_all_pairs():
    """2,000 queries and 15,000 items: all pairs are 240 MB in float64."""
    taken, = printed('''
import numpy as np, torch
from mgn import ranked_lists
from mgn.data.datasets import Sample
from mgn.ops import match_ranks
torch.set_num_threads(1)
Q, G = 2000, 15000
torch.manual_seed(0)
features = torch.randn(Q, 8), torch.randn(G, 8)
ids = [np.arange(Q) % 500, np.arange(G) % 500, np.zeros(Q, int), 1 + np.arange(G) // 500 % 3]
dataset = type('Dataset', (), {'query': [Sample('', 0, 0)] * Q, 'gallery': [Sample('', 0, c) for c in ids[3].tolist()]})
ranks = match_ranks(*features, *ids)
before = high_water(True)
ap, _ = ranked_lists.by_query(ranks)
ranked_lists.ranked_lists(features, ids, ranks, ranked_lists.choose(ap, 200), dataset, {})
ranked_lists.similarities(features, ids)
ranked_lists.by_cameras(features, ids, dataset)
print(high_water() - before)
''')
    assert 0 < taken < 120e6, taken
