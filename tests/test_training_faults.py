"""What goes wrong in training: losses or weights that are not finite, images that cannot be read."""

import json
import os
from contextlib import contextmanager

import pytest
import torch
from conftest import read_image, write_market
from outcomes import assert_same, outcome
from thin import thin, train  # noqa: F401 (a fixture)

from mgn import training
from mgn.data import datasets
from mgn.runs import checkpoint
from mgn.data.augmentation import Augmentation
from mgn.data.images import TrainBatches
from mgn.runs.meter import Meter
from mgn.data.sampler import IdentitySampler
from mgn.data.loader import count_unreadable
from mgn.losses import make_losses, mgn_losses
from mgn.ops.errors import UserError

pytestmark = pytest.mark.usefixtures('thin')


def spoil(monkeypatch, name, at_step, value):
    """Multiplies the loss `name` of one step, counted from 0, by `value`."""
    calls, real = [], mgn_losses

    def spoilt(*args):
        losses = real(*args)
        calls.append(0)
        return {**losses, name: losses[name] * value} if len(calls) == at_step + 1 else losses

    monkeypatch.setattr(training, 'make_losses', lambda *_: make_losses(spoilt, 0, 0, 0))


@pytest.mark.parametrize('name, at_step, value, last_good, log_every', [
    ('triplet', 0, torch.nan, 0, 99), ('triplet', 3, torch.nan, 2, 1), ('cross_entropy', 4, torch.inf, 4, 99),
    ('cross_entropy', 5, -torch.inf, 4, 99), ('triplet', 6, torch.nan, 6, 1)])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(market, tmp_path, monkeypatch, name, at_step, value,
                                                                    last_good, log_every):
    with monkeypatch.context() as patch:
        spoil(patch, name, at_step, value)
        with pytest.raises(ValueError) as raised:
            train(market, tmp_path, f'train.log_every = {log_every}')
    last = tmp_path / 'last.pth'
    assert f'NaN or infinity in {name} at step {at_step}; ' in str(raised.value)
    assert f'the last good checkpoint is {last}, of step {last_good}' in str(raised.value)
    for path, step in ((last, last_good), (tmp_path / 'best.pth', None)):
        content = checkpoint.load(str(path))
        assert all(tensor.isfinite().all() for tensor in content['model'].values())
        assert step is None or content['step'] == step
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert max(line['step'] for line in lines) <= at_step
    train(market, tmp_path)  # what was wrong is mended
    assert checkpoint.load(str(last))['step'] == 7


def test_features_that_are_not_finite_stop_the_run_at_once_and_name_the_step(market, tmp_path, monkeypatch):
    calls = []

    def spoilt(output, labels):
        calls.append(0)
        factor = torch.nan if len(calls) == 4 else 1
        return mgn_losses(output._replace(embeddings=output.embeddings * factor), labels)

    monkeypatch.setattr(training, 'make_losses', lambda *_: make_losses(spoilt, 0, 0, 0))
    message = r'anchors must be finite, but head 0, row 0, .* is nan.*\(step 3; the last good checkpoint is .*last.pth'
    with pytest.raises(UserError, match=message):
        train(market, tmp_path, 'train.log_every = 99')
    assert len(calls) == 4


def test_the_first_bad_step_is_remembered_until_the_losses_are_read():
    meter, last_good = Meter(), 'the last good checkpoint is last.pth, of step 2'
    for step, (a, b) in enumerate([(1, 1), (1, 1), (1, torch.nan), (torch.inf, 1), (torch.nan, torch.nan), (1, 1)]):
        meter.add({'loss': torch.tensor(float(a + b)), 'a': torch.tensor(float(a)), 'b': torch.tensor(float(b))}, step)
    for read in (meter.check, meter.read):
        with pytest.raises(UserError, match='infinity in b at step 2; .*last.pth, of step 2. Lower lr'):
            read(last_good)


def test_all_losses_that_went_bad_at_the_first_bad_step_are_named():
    meter = Meter()
    meter.add({name: torch.tensor(torch.nan) for name in ('loss', 'a', 'b')}, 0)
    with pytest.raises(ValueError, match='infinity in a, b at step 0'):
        meter.check('there is no checkpoint yet')


def test_a_loss_may_have_other_terms_from_some_step_on():
    meter, one, two = Meter(), {'loss': torch.tensor(1.0)}, {'loss': torch.tensor(3.0), 'late': torch.tensor(2.0)}
    for step, losses in enumerate((one, two, two)):
        meter.add(losses, step)
    assert meter.read('') == {'loss': 3, 'late': 2}
    meter.add({'loss': torch.tensor(torch.nan)}, 3)
    meter.add(two, 4)
    with pytest.raises(UserError, match='NaN or infinity in loss at step 3; '):
        meter.check('')


@pytest.mark.parametrize('at_step, last_good', [(0, 0), (3, 2), (6, 6)])
def test_weights_that_are_not_finite_are_never_saved(market, tmp_path, monkeypatch, at_step, last_good):
    calls, real = [], training.train_step

    def spoilt(model, *args):
        losses = real(model, *args)
        calls.append(0)
        if len(calls) == at_step + 1:
            model.trunk[0].weight.data[0, 0, 0, 0] = torch.inf
        return losses

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f'last.pth, of step {last_good}'):
        patch.setattr(training, 'train_step', spoilt)
        train(market, tmp_path, 'train.log_every = 99')
    last = checkpoint.load(str(tmp_path / 'last.pth'))
    assert last['step'] == last_good and last['model']['trunk.0.weight'].isfinite().all()


def test_initial_weights_that_are_not_finite_are_a_clear_error(market, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.init, 'kaiming_normal_', lambda tensor, **kwargs: tensor.data.fill_(torch.nan))
    with pytest.raises(ValueError, match='NaN or infinity in the weights heads.0.reduction.weight'):
        train(market, tmp_path)
    assert not (tmp_path / 'last.pth').exists()


def test_images_that_are_too_small_end_a_run_at_its_start_which_may_be_corrected(market, tmp_path, monkeypatch):
    message = r'images of at least \(1585, 1\) pixels, found \(64, 32\); bind a larger'
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
        for name in ('load_batches', 'evaluate'):
            patch.setattr(training, name, lambda *_: pytest.fail('work that is lost'))
        train(market, tmp_path, 'MGN.parts = (1, 100)')
    assert not list(tmp_path.glob('*.pth'))
    train(market, tmp_path, 'total_steps = 1')
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 1


def test_a_run_that_fails_later_keeps_what_it_has(market, tmp_path, monkeypatch):
    def failing(*args):
        if len(steps) == 3:
            raise UserError('An error of the fourth step.')
        steps.append(0)
        return real(*args)
    steps, real = [], training.train_step
    with monkeypatch.context() as patch, pytest.raises(UserError, match='of the fourth step'):
        patch.setattr(training, 'train_step', failing)
        train(market, tmp_path)
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 2
    assert 'train.total_steps' in (tmp_path / 'config.gin').read_text()


def test_a_run_that_fails_before_its_first_checkpoint_may_be_corrected(market, tmp_path, monkeypatch):
    options = 'train.evaluate_first = False', 'train.log_every = 1'
    train(market, tmp_path / 'untouched', *options)
    calls, real = [], training.train_step

    def failing(*args):
        if calls:
            raise UserError('An error of the second step.')
        calls.append(0)
        return real(*args)
    with monkeypatch.context() as patch, pytest.raises(UserError, match='of the second step'):
        patch.setattr(training, 'train_step', failing)
        train(market, tmp_path / 'run', *options)
    assert checkpoint.load(str(tmp_path / 'run' / 'last.pth'))['step'] == 0
    train(market, tmp_path / 'run', *options)
    assert_same(outcome(tmp_path / 'run'), outcome(tmp_path / 'untouched'))


def test_the_last_good_checkpoint_is_named_where_an_older_one_was_resumed(market, tmp_path, monkeypatch):
    train(market, tmp_path, 'train.keep_last = 2')
    os.truncate(tmp_path / 'last.pth', 100)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match='last.pth, of step 6'):
        patch.setattr(training, 'train_step', lambda model, *_: {'loss': model.trunk[0].weight.data.fill_(torch.inf)})
        train(market, tmp_path, 'train.keep_last = 2')
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 6


def test_options_of_extraction_out_of_range_are_refused_although_no_evaluation_is_near(market, tmp_path):
    with pytest.raises(UserError, match='Extractor.batch_size must be an integer from 1'):
        train(market, tmp_path, 'train.evaluate_first = False', 'Extractor.batch_size = 0')


def test_the_first_evaluation_can_be_left_out(market, tmp_path):
    train(market, tmp_path, 'total_steps = 2', 'train.evaluate_first = False')
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'mAP' in line] == [2]


@pytest.mark.parametrize('binding, message', [
    ('train.clip_gradient_norm = 0', 'train.clip_gradient_norm must be a finite number from'),
    ('train.clip_gradient_norm = -1', 'train.clip_gradient_norm must be a finite number from'),
    ('train.clip_gradient_norm = False', 'train.clip_gradient_norm must be a finite number from 1e-30 or None'),
    ('mgn_losses.triplet_weight = -1', 'mgn_losses.triplet_weight must be a finite number from 0'),
    ('mgn_losses.margin = -0.3', 'mgn_losses.margin must be a finite number from 0'),
    ('mgn_losses.smoothing = 1.5', 'mgn_losses.smoothing must be a finite number from 0 to 1'),
    ('cosine.start = -1', 'cosine.start must be steps from 0 on'), ('cosine.warmup_factor = 2', 'from 0 to 1'),
    ('make_optimizer.bias_lr_factor = -1', 'make_optimizer.bias_lr_factor must be'),
    ('lr = -1.0', 'The optimizer refuses its bindings: Invalid learning rate: -1.0'),
    ('MGN.embedding_dim = 0', 'MGN.embedding_dim must be an integer from 1'),
    ('seed = 10000000000000000000', 'seed must be an integer from 0'),
    ('workers = 100000', 'workers must be an integer from 0 to 1024')])
def test_values_out_of_range_are_refused_at_the_start_by_name(market, tmp_path, binding, message):
    with pytest.raises(UserError, match=message):
        train(market, tmp_path / 'run', binding)
    assert not list(tmp_path.rglob('*.pth'))


@contextmanager
def damaged(path, damage):
    with open(path, 'rb') as file:
        whole = file.read()
    try:
        with open(path, 'wb') as file:
            file.write(damage(whole))
        yield
    finally:
        with open(path, 'wb') as file:
            file.write(whole)


@pytest.fixture(scope='module')
def hundred(tmp_path_factory):
    """120 training images, of which one may be unreadable; the first images of the first batch."""
    root = write_market(tmp_path_factory.mktemp('hundred'), identities=30, size=(16, 8))
    train_samples = datasets.market_layout(str(root)).train
    labels, _ = datasets.train_labels(train_samples)
    batch = IdentitySampler(labels, [sample.camid for sample in train_samples], 2, 2, 0).batch(0)
    return root, [train_samples[batch[0]].path, train_samples[batch[2]].path]


@pytest.mark.parametrize('damage', [lambda data: data[:len(data) // 2], lambda data: b'', lambda data: b'no image'])
@pytest.mark.parametrize('workers', [0, 1])
def test_an_unreadable_training_image_is_replaced_and_counted(hundred, tmp_path, caplog, damage, workers):
    root, (path, _) = hundred
    with damaged(path, damage):
        train(root, tmp_path, f'workers = {workers}', 'total_steps = 2')
    warnings = [record.message for record in caplog.records if 'unreadable' in record.message]
    assert len(warnings) == 1
    assert 'number 1' in warnings[0] and path in warnings[0]
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 2


def test_more_than_one_per_cent_of_unreadable_images_are_an_error(hundred, tmp_path):
    root, (one, other) = hundred
    with damaged(one, lambda data: data[:99]), damaged(other, lambda data: b''):
        with pytest.raises(ValueError, match='At most 1% of the 120 .*images may be unreadable, but 2 are:') as raised:
            train(root, tmp_path, 'total_steps = 2')
    assert one in str(raised.value) and other in str(raised.value)


def test_the_only_other_image_of_an_identity_takes_the_place_of_an_unreadable_one(tmp_path):
    root = write_market(tmp_path, identities=2, images=2, size=(16, 8))
    samples = datasets.market_layout(str(root)).train
    labels, _ = datasets.train_labels(samples)
    sampler = IdentitySampler(labels, [sample.camid for sample in samples], 2, 2, 0)
    batches = TrainBatches(samples, labels, sampler, Augmentation(), (16, 8), range(4))
    with damaged(samples[0].path, lambda data: data[:50]):
        got = batches[0]
    for position, index in enumerate(sampler.batch(0)):
        assert torch.equal(got.images[position], read_image(samples[index or 1].path, (16, 8)))
    assert len(got.unreadable) == 1 and samples[0].path in got.unreadable[0]


@pytest.mark.parametrize('images, limit', [(99, 0), (100, 1), (199, 1), (12936, 129)])
def test_the_same_image_counts_once_and_one_per_cent_is_allowed(images, limit, caplog):
    unreadable = {}
    for _ in range(3):
        count_unreadable(unreadable, [f'{i}.jpg: truncated' for i in range(limit)], images)
    assert len(unreadable) == len(caplog.records) == limit  # each is said once
    with pytest.raises(ValueError, match=f'but {limit + 1} are:'):
        count_unreadable(unreadable, ['one more.jpg: truncated'], images)


@pytest.mark.parametrize('workers', [0, 1])
def test_an_identity_without_a_readable_image_is_an_error_that_names_them_all(tmp_path, workers):
    root = write_market(tmp_path / 'data', identities=2, images=3, size=(16, 8))
    images = list((root / 'bounding_box_train').glob('0001_*'))
    for image in images:
        image.write_bytes(b'')
    with pytest.raises(ValueError, match='No image of identity 1 can be read') as raised:
        train(root, tmp_path / 'run', f'workers = {workers}')
    assert len(images) == 3 and all(str(image) in str(raised.value) for image in images)
    assert 'Traceback' not in str(raised.value)
