"""Evaluation against a naive pipeline that looks at one image and one pair at a time, and what stops it."""

import itertools
import logging
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_image, write_market
from rankings import naive_expansion, naive_key, published_distances
from thin import thin  # noqa: F401
from PIL import Image, ImageOps

from mgn import evaluation
from mgn.data.datasets import market_layout
from mgn.evaluation import evaluate
from mgn.feature_files import write_features
from mgn.features import Extractor
from mgn.ops.errors import UserError
from mgn.ops.metrics import METRICS, retrieval_metrics
from mgn.model import MGN
from mgn.ops import match_ranks, match_ranks_from_distance
from mgn.results import table

pytestmark = pytest.mark.usefixtures('thin')

CPU = torch.device('cpu')
SIZE = (48, 24)  # smaller than the images


def extractor(batch_size=64, workers=0, flip_test=False):
    return Extractor(CPU, SIZE, batch_size, workers, flip_test)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MGN(5)
    for name, buffer in model.named_buffers():  # as after training: statistics of its own
        if name.endswith('running_var'):
            buffer.uniform_(0.5, 1.5)
    return model.train()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """More test images than `market` has: 5 queries of 4 identities, 22 gallery images, 3 cameras."""
    root = write_market(tmp_path_factory.mktemp('data') / 'own', identities=2, images=2)
    names = ['query/0101_c2s1_000050_00.png', 'query/0104_c3s1_000051_00.png']
    names += [f'bounding_box_test/{pid:04d}_c{camera}s1_{60 + pid + camera:06d}_0{i}.png'
              for pid in (101, 102, 104) for camera in (1, 3) for i in (1, 2)]
    for seed, name in enumerate(names, 1000):
        write_image(root / name, seed, (40, 56))
    return root


def naive_features(model, paths, flip_test):
    model.eval()
    features = []
    with torch.no_grad():
        for path in paths:
            image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
            image = F.interpolate(image, SIZE, mode='bicubic', antialias=True) / 255
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            image = (image - mean[:, None, None]) / std[:, None, None]
            feature = model(image).features[0]
            if flip_test:
                feature = (feature + model(image.flip(3)).features[0]) / 2
            features.append(feature / feature.norm())
    return features


def naive_results(model, root, flip_test=False, cross_camera=True):
    query, gallery = (sorted((root / part).iterdir()) for part in ('query', 'bounding_box_test'))
    features = dict(zip(query + gallery, naive_features(model, query + gallery, flip_test)))

    def ids(path):
        return tuple(map(int, re.match(r'(-?\d+)_c(\d)', path.name).groups()))

    collected, unmatched = [], 0
    for q in query:
        pid, camera = ids(q)
        ranked = []
        for g in gallery:
            own = (ids(g) == (pid, camera)) if cross_camera else g.name == q.name
            if ids(g)[0] != -1 and not own:
                similarity = float(features[q].double() @ features[g].double())
                ranked.append((-similarity, len(ranked), ids(g)[0] == pid))
        hits = [match for _, _, match in sorted(ranked)]
        ranks = [rank for rank, hit in enumerate(hits, 1) if hit]
        if not ranks:
            unmatched += 1
            continue
        precision = [i / rank for i, rank in enumerate(ranks, 1)]
        before = [(i - 1) / (rank - 1) if rank > 1 else 1 for i, rank in enumerate(ranks, 1)]
        collected.append([ranks[0] <= 1, ranks[0] <= 5, ranks[0] <= 10, sum(precision) / len(ranks),
                          sum((p + b) / 2 for p, b in zip(precision, before)) / len(ranks), len(ranks) / ranks[-1]])
    means = [sum(values) / len(collected) for values in zip(*collected)]
    return dict(zip(METRICS, means)), unmatched


@pytest.mark.parametrize('batch_size, workers', [pytest.param(1, 0, marks=pytest.mark.long), (3, 2), (64, 0)])
@pytest.mark.parametrize('flip_test', [False, True])
def test_the_results_are_those_of_the_naive_pipeline(model, folder, batch_size, workers, flip_test):
    got = evaluate(model, market_layout(str(folder)), extractor(batch_size, workers, flip_test))
    want, unmatched = naive_results(model, folder, flip_test)
    assert 0 < want['mAP'] < 1
    assert {name: got[name] for name in METRICS} == pytest.approx(want, abs=1e-12)
    assert (got['queries'], got['queries_without_match'], got['gallery']) == (5, unmatched, 22)


def test_redecided_is_a_share_of_all_pairs(model, folder, monkeypatch):
    real = evaluation.match_ranks
    monkeypatch.setattr(evaluation, 'match_ranks', lambda *args: real(*args)._replace(redecided=11))
    assert evaluate(model, market_layout(str(folder)), extractor())['redecided'] == 11 / (5 * 22)


@pytest.mark.parametrize('flip_test', [False, True])
def test_features_are_those_of_one_image_at_a_time_in_order(model, folder, flip_test):
    dataset = market_layout(str(folder))
    paths = [sample.path for sample in dataset.gallery]
    want = torch.stack(naive_features(model, paths, flip_test))
    model.train()
    got = extractor(5, 0, flip_test).features(model, dataset.gallery)
    assert got.shape == (22, 8 * 256)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(22))


def test_the_flip_test_is_the_mean_of_image_and_mirrored_image(model, tmp_path):
    for name, mirror in (('a', False), ('b', True)):
        write_market(tmp_path / name, suffix='.png', size=SIZE)
    for path in (tmp_path / 'b').glob('query/*.png'):
        ImageOps.mirror(Image.open(path)).save(path)
    plain, mirrored = (market_layout(str(tmp_path / name)).query for name in 'ab')
    both = [extractor(2, 0, True).features(model, samples) for samples in (plain, mirrored)]
    torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=1e-6)
    alone = [extractor(2, 0, False).features(model, samples) for samples in (plain, mirrored)]
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    assert (alone[0] - both[0]).abs().max() > 1e-3


def test_a_model_of_mixed_modes_runs_in_evaluation_mode_and_gets_them_back_after_errors_too(model, folder):
    model.trunk.eval()  # frozen statistics, say
    modes = [module.training for module in model.modules()]
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.extend(part.training for part in model.modules()))
    samples = market_layout(str(folder)).query
    extractor().features(model, samples)
    assert seen and not any(seen) and [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match='nowhere.png'):
        extractor().features(model, [*samples, samples[0]._replace(path='nowhere.png')])
    assert [module.training for module in model.modules()] == modes


def test_evaluation_leaves_the_model_as_it_was(model, folder):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        evaluate(model, market_layout(str(folder)), extractor())
        assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize('where', ['query', 'bounding_box_test'])
@pytest.mark.parametrize('damage', [lambda data: data[:len(data) // 2], lambda data: b'', lambda data: b'no image'])
@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.long)])
def test_an_unreadable_image_stops_it_and_is_named(model, folder, tmp_path, where, damage, workers):
    root = shutil.copytree(folder, tmp_path / 'data')
    path = sorted((root / where).glob('0101*'))[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match='Evaluation needs every image, and these cannot be read') as raised:
        evaluate(model, market_layout(str(root)), extractor(4, workers))
    assert str(path) in str(raised.value) and 'Traceback' not in str(raised.value)


def test_queries_without_a_match_are_left_out_counted_and_reported(model, folder, tmp_path, caplog):
    root = shutil.copytree(folder, tmp_path / 'data')
    write_image(root / 'query' / '0555_c1s1_000000_00.jpg', 1)  # nobody in the gallery
    write_image(root / 'query' / '0556_c1s1_000000_00.jpg', 2)  # there, but of the same camera alone
    write_image(root / 'bounding_box_test' / '0556_c1s1_000001_00.jpg', 3)
    got = evaluate(model, market_layout(str(root)), extractor())
    want, unmatched = naive_results(model, root)
    assert {name: got[name] for name in METRICS} == pytest.approx(want, abs=1e-12)
    assert (got['queries'], got['queries_without_match']) == (7, unmatched) == (7, 2)
    assert '2 of 7 queries have no true match and are left out' in caplog.text


def test_no_query_with_a_match_is_an_error(model, tmp_path):
    root = write_market(tmp_path / 'data')
    for path in (root / 'query').iterdir():
        path.rename(path.with_name(path.name.replace('0', '9', 1)))
    with pytest.raises(ValueError, match='No query of .*data has .* its identity from another camera in the gallery'):
        evaluate(model, market_layout(str(root)), extractor())
    with pytest.raises(ValueError, match='At least one query must have a true match'):
        evaluate(model, market_layout(str(root)), extractor(), cross_camera=False)


def test_an_identity_in_the_cameras_of_its_queries_alone_has_no_match(model, tmp_path):
    root = write_market(tmp_path / 'data')
    for path in (root / 'bounding_box_test').glob('*_c2*'):
        path.rename(path.with_name(path.name.replace('1', '9', 1)))
    with pytest.raises(ValueError, match='No query of .*data has .* its identity from another camera in the gallery'):
        evaluate(model, market_layout(str(root)), extractor())


def test_features_that_are_not_finite_are_an_error(model, folder):
    model.heads[3].norm.bias.data[0] = torch.nan
    first = sorted((folder / 'query').iterdir())[0]
    with pytest.raises(ValueError, match=f'27 of a batch of 27 have NaN or infinity, first that of {first}; look at'):
        evaluate(model, market_layout(str(folder)), extractor())


@pytest.mark.parametrize('scale, fits', [(1e25, False), (1e15, True), (1e-30, True)])
def test_features_whose_norm_no_float32_holds_are_an_error_and_no_ranking_of_zeros(model, folder, scale, fits):
    want = evaluate(model, market_layout(str(folder)), extractor())
    for head in model.heads:
        for parameter in (head.neck.weight, head.neck.bias):
            parameter.data *= scale
    if fits:
        got = evaluate(model, market_layout(str(folder)), extractor())
        assert {name: got[name] for name in METRICS} == {name: want[name] for name in METRICS}
    else:
        with pytest.raises(UserError, match='27 of a batch of 27 have NaN or infinity'):
            evaluate(model, market_layout(str(folder)), extractor())


def one_camera(path):
    return path.with_name(re.sub(r'_c\d', '_c1', path.name))


def no_camera(path):
    return path.with_name(re.sub(r'_c\ds1', '', path.name))


@pytest.mark.parametrize('rename', [one_camera, no_camera])
def test_without_cameras_only_the_querys_own_file_is_left_out(model, tmp_path, rename, caplog):
    root = write_market(tmp_path / 'data', suffix='.png')
    for path in list((root / 'query').iterdir()):
        shutil.copy(path, root / 'bounding_box_test' / path.name)
    for part in ('bounding_box_train', 'query', 'bounding_box_test'):
        for path in list((root / part).iterdir()):
            path.rename(rename(path))
    with pytest.raises(ValueError, match='several cameras, found camera . alone; bind evaluate.cross_camera = False'):
        evaluate(model, market_layout(str(root)), extractor())
    with caplog.at_level(logging.INFO):
        got = evaluate(model, market_layout(str(root)), extractor(), cross_camera=False)
    assert f'{got["queries"]} gallery images have the name and the pid of a query' in caplog.text
    for path in list(root.glob('*/*')):  # the naive pipeline wants a camera in every name
        if '_c' not in path.name:
            path.rename(path.with_name(path.name.replace('_', '_c1s1_', 1)))
    want, unmatched = naive_results(model, root, cross_camera=False)
    assert {name: got[name] for name in METRICS} == pytest.approx(want, abs=1e-12)
    assert got['queries_without_match'] == unmatched == 0 and not got['cross_camera']
    assert got['gallery'] == len(list((root / 'bounding_box_test').iterdir())) - 1  # without the junk box


def naive_stages(model, root, k=0, alpha=3.0, k1=20, k2=6, lambda_value=0.3):
    """Figures by the cosine of expanded queries, and by the published formula of re-ranking on dense matrices."""
    dataset = market_layout(str(root))
    features = extractor(64, 0, False).features(model, dataset.query + dataset.gallery).numpy()
    query, gallery = features[:len(dataset.query)], features[len(dataset.query):]
    if k:
        query = naive_expansion(query, gallery, k, alpha).astype(np.float32)
    rows = [[float(x) for x in row] for row in np.concatenate((query, gallery))]
    keys = np.array([[naive_key(a, b) for b in rows] for a in rows])
    final = published_distances(keys, np.maximum(1 + keys, 0) ** 2, len(query), k1, k2, lambda_value)

    def figures(dist):
        pids, camids = ([[getattr(sample, name) for sample in part] for part in (dataset.query, dataset.gallery)]
                        for name in ('pid', 'camid'))
        offsets, ranks, _ = match_ranks_from_distance(dist, *pids, *camids)
        return retrieval_metrics(offsets, ranks)
    return figures(keys[:len(query), len(query):]), figures(final)


STAGES = [dict(query_expansion=3), dict(rerank=True), dict(query_expansion=2, alpha=0.0, rerank=True),
          dict(query_expansion=50, alpha=1.5, rerank=True, k1=4, k2=2, lambda_value=0.1)]


@pytest.mark.parametrize('options', STAGES, ids=str)
def test_each_stage_has_the_figures_of_the_naive_pipeline_and_the_plain_ones_stay(model, folder, options):
    plain = evaluate(model, market_layout(str(folder)), extractor())
    got = evaluate(model, market_layout(str(folder)), extractor(), **options)
    stages = {name: got.pop(name) for name in ('query_expansion', 'rerank') if name in got}
    measured = {'features_s', 'ranking_s'}
    same = plain.keys() - measured
    assert got.keys() == plain.keys() and {name: got[name] for name in same} == {name: plain[name] for name in same}

    k, alpha = options.get('query_expansion', 0), options.get('alpha', 3.0)
    parameters = {name: options.get(name, default) for name, default in (('k1', 20), ('k2', 6), ('lambda_value', 0.3))}
    expanded, reranked = naive_stages(model, folder, k, alpha, **parameters)
    want = {'query_expansion': {'k': k, 'alpha': alpha, **expanded},
            'rerank': {**parameters, 'expanded': k > 0, **reranked}}
    assert stages.keys() == {name for name in want if options.get(name)}
    for name, stage in stages.items():
        assert stage.pop('seconds') >= 0
        assert stage == pytest.approx(want[name], abs=1e-12)
        assert stage['mAP'] != got['mAP']


def test_without_cameras_the_stages_leave_out_what_plain_ranking_does(model, tmp_path):
    root = write_market(tmp_path / 'data', suffix='.png')
    for path in list((root / 'query').iterdir()):
        shutil.copy(path, root / 'bounding_box_test' / path.name)
    got = evaluate(model, market_layout(str(root)), extractor(), cross_camera=False, query_expansion=1,
                   rerank=True, k1=1, k2=1, lambda_value=1)
    # A query's nearest item is its own image, which only its ranks leave out; λ = 1 ranks by the original distance.
    for name in METRICS:
        assert got[name] == got['query_expansion'][name] == got['rerank'][name]


def test_on_a_gpu_the_later_stages_get_a_gallery_from_files_on_the_device_of_the_query(model, folder, tmp_path,
                                                                                         monkeypatch):
    """Unlike match_ranks they take none that is elsewhere. The device meta stands in for a GPU."""
    dataset, seen = market_layout(str(folder)), []
    on_gpu = extractor()
    write_features(model, dataset, on_gpu, str(tmp_path / 'features'))
    on_gpu.place = 'meta'
    ids = evaluation.identities(dataset, True)
    ranks = match_ranks(torch.ones(len(ids[0]), 1), torch.ones(len(ids[1]), 1), *ids)
    monkeypatch.setattr(evaluation, 'match_ranks', lambda *_: ranks)
    monkeypatch.setattr(evaluation, 'expand_queries', lambda query, gallery, *_: (seen.append(gallery), query)[1])
    monkeypatch.setattr(evaluation, 'k_reciprocal_ranks', lambda query, gallery, *_: (seen.append(gallery), ranks)[1])
    evaluate(model, dataset, on_gpu, str(tmp_path / 'features'), query_expansion=1, rerank=True)
    assert [(x.device.type, tuple(x.shape)) for x in seen] == 2 * [('meta', (len(ids[1]), model.feature_dim))]


def test_each_stage_says_its_time_and_has_a_row(model, folder, caplog):
    caplog.set_level(logging.INFO, 'mgn')
    got = evaluate(model, market_layout(str(folder)), extractor(), query_expansion=3, rerank=True)
    for stage in ('query expansion and ranking', 're-ranking'):
        assert len(re.findall(rf'{stage} \d+\.\d{{3}} s', caplog.text)) == 1
    rows = table(got).splitlines()
    labels = ['data set', 'own', '+ query expansion', '+ re-ranking']
    assert len(rows) == 5 and len({len(row) for row in rows[:4]}) == 1
    for row, label, figures in zip(rows[1:], labels[1:], (got, got['query_expansion'], got['rerank'])):
        assert row.startswith(label + ' ')
        assert row[len(label):].split() == [f'{100 * figures[name]:.2f}' for name in METRICS]
    without = {name: value for name, value in got.items() if name != 'query_expansion'}
    assert [row.split('  ')[0] for row in table(without).splitlines()[:3]] == ['data set', 'own', '+ re-ranking']
    assert len(table({name: value for name, value in without.items() if name != 'rerank'}).splitlines()) == 3


def test_the_last_line_of_a_table_counts_queries_and_gallery():
    results = {'dataset': 'own', **dict.fromkeys(METRICS, 0.5), 'queries': 5, 'queries_without_match': 1, 'gallery': 22}
    assert table(results).endswith('\nper cent; 5 queries, 1 of them without a match; 22 in the gallery')


def test_each_stage_is_timed_for_itself(model, folder, monkeypatch):
    seconds = itertools.count()  # one passes from each look at the clock to the next
    monkeypatch.setattr(evaluation.time, 'perf_counter', lambda: next(seconds))
    got = evaluate(model, market_layout(str(folder)), extractor(), query_expansion=3, rerank=True)
    assert [got['features_s'], got['ranking_s'], got['query_expansion']['seconds'], got['rerank']['seconds']] == [1] * 4
