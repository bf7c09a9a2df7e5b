"""A run interrupted and resumed ends with the very bits of an uninterrupted one; what must not go on is refused."""

import errno
import json
import logging
import os
import shutil
import zipfile
from contextlib import nullcontext

import gin
import pytest
import torch
from conftest import write_market
from outcomes import assert_same, outcome
from thin import ThinResNet, thin, train  # noqa: F401

from mgn import training
from mgn.runs import checkpoint

pytestmark = pytest.mark.usefixtures('thin')


class Crash(Exception):
    pass


def crash(monkeypatch, name, call):
    """Makes call number `call` (from 0) of training.<name> end the run."""
    calls, real = [], getattr(training, name)

    def crashing(*args, **kwargs):
        if len(calls) == call:
            raise Crash
        calls.append(0)
        return real(*args, **kwargs)

    monkeypatch.setattr(training, name, crashing)


@pytest.fixture(scope='module')
def uninterrupted(market, tmp_path_factory):
    folder = tmp_path_factory.mktemp('uninterrupted')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mgn.model.make_resnet', lambda backbone, imagenet: ThinResNet())
        train(market, folder)
    return folder


def test_the_comparison_sees_the_last_bit(uninterrupted):
    one, other = outcome(uninterrupted), outcome(uninterrupted)
    assert_same(one, other)
    weight = next(iter(other['last']['optimizer']['state'].values()))['exp_avg']
    weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
    with pytest.raises(AssertionError, match='exp_avg'):
        assert_same(one, other)


@pytest.mark.parametrize('name, call', [
    ('evaluate', 0), ('train_step', 1), ('train_step', 3), ('evaluate', 1), ('train_step', 5), ('train_step', 6),
    ('evaluate', 2), ('log_step', 0), ('log_step', 2), ('write_results', 0), ('write_results', 1)])
def test_resumed_equals_uninterrupted_bit_for_bit(market, tmp_path, monkeypatch, uninterrupted, name, call):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash(patch, name, call)
        train(market, tmp_path)
    if (name, call) == ('evaluate', 0):
        assert not (tmp_path / 'last.pth').exists()  # a run whose first evaluation fails leaves no checkpoint
    else:
        assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] < 7 or name == 'evaluate'
    train(market, tmp_path)
    assert_same(outcome(tmp_path), outcome(uninterrupted))


@pytest.mark.parametrize('call', [0, 5, 7])
def test_the_configuration_beside_a_resumed_run_stays_whole(market, tmp_path, monkeypatch, uninterrupted, call):
    with monkeypatch.context() as patch:
        crash(patch, 'train_step', call)
        with pytest.raises(Crash) if call < 7 else nullcontext():
            train(market, tmp_path)
    train(market, tmp_path)
    assert (tmp_path / 'config.gin').read_text() == (uninterrupted / 'config.gin').read_text()


@pytest.mark.parametrize('before, after', [(2, 2), (0, 2), (2, 0)])
def test_workers_change_no_bit_of_a_resumed_run(market, tmp_path, monkeypatch, uninterrupted, before, after):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash(patch, 'train_step', 5)
        train(market, tmp_path, f'workers = {before}')
    train(market, tmp_path, f'workers = {after}')
    got, want = outcome(tmp_path), outcome(uninterrupted)
    for part in (got, want):
        del part['last']['config'], part['best']['config']  # they differ in `workers`
    assert_same(got, want)


def test_interrupted_again_and_again_it_still_equals_uninterrupted(market, tmp_path, monkeypatch, uninterrupted):
    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash(patch, 'train_step', 2)
            train(market, tmp_path)
    train(market, tmp_path)
    assert_same(outcome(tmp_path), outcome(uninterrupted))


def test_a_torn_last_line_of_the_metrics_is_written_anew(market, tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash(patch, 'train_step', 5)
        train(market, tmp_path)
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 6, "epo')
    train(market, tmp_path)
    assert_same(outcome(tmp_path), outcome(uninterrupted))


def test_a_full_disk_stops_a_run_that_can_go_on_later(market, tmp_path, monkeypatch, uninterrupted):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(0)
        # Two each for metrics.jsonl; last.pth, config.gin, best.pth, eval.json of 0; last.pth, config.gin of 2
        if len(calls) > 2 * 7:
            raise OSError(errno.ENOSPC, 'No space left on device')
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space left on device. What was there'):
        patch.setattr(os, 'fsync', full)
        train(market, tmp_path)
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 2
    assert not list(tmp_path.glob('*.tmp'))
    train(market, tmp_path)
    assert_same(outcome(tmp_path), outcome(uninterrupted))


@pytest.fixture
def copy(uninterrupted, tmp_path):
    return shutil.copytree(uninterrupted, tmp_path / 'run')


def test_a_finished_run_started_again_changes_nothing(market, copy, uninterrupted, caplog):
    with caplog.at_level(logging.WARNING):
        train(market, copy)
    assert_same(outcome(copy), outcome(uninterrupted))
    assert 'configuration differs' not in caplog.text


def test_resuming_under_another_configuration_says_what_changed_and_obeys_it(market, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash(patch, 'train_step', 5)
        train(market, tmp_path)
    train(market, tmp_path, 'lr = 0.5', 'weight_decay = 0.25')
    assert '-lr = 0.01' in caplog.text and '+lr = 0.5' in caplog.text
    weights, biases = checkpoint.load(str(tmp_path / 'last.pth'))['optimizer']['param_groups']
    assert (weights['initial_lr'], weights['weight_decay']) == (0.5, 0.25)
    assert (biases['initial_lr'], biases['weight_decay']) == (1.0, 0)


def test_other_images_of_as_many_identities_are_named(market, copy, tmp_path, caplog):
    shutil.copytree(market, tmp_path / 'market')
    train(tmp_path / 'market', copy)
    assert 'differ from those of the checkpoint' not in caplog.text  # the same, elsewhere
    folder = next(tmp_path.glob('market/**/bounding_box_train'))
    image = min(path.name for path in folder.iterdir())
    (folder / image).rename(folder / f'{image[:4]}_c9_{image[8:]}')
    train(tmp_path / 'market', copy)
    assert 'the images to train on, or their pids or camids, differ from those of the checkpoint' in caplog.text


def test_a_longer_run_goes_on_from_a_finished_one_without_the_weights_that_it_began_with(market, copy):
    train(market, copy, 'total_steps = 9', "MGN.pretrained = 'gone.pth'")
    assert checkpoint.load(str(copy / 'last.pth'))['step'] == 9
    assert [json.loads(line)['step'] for line in (copy / 'metrics.jsonl').read_text().splitlines()] == [
        0, 3, 4, 6, 7, 7, 8, 9, 9]


def test_fewer_steps_than_were_done_are_refused(market, copy):
    refuses(market, copy, 'last.pth is of step 7, beyond total_steps = 5. Bind more', 'total_steps = 5')


def test_a_checkpoint_of_an_older_version_without_losses_resumes(market, tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash(patch, 'train_step', 5)
        train(market, tmp_path)
    content = checkpoint.load(str(tmp_path / 'last.pth'))
    del content['losses']
    torch.save(content, tmp_path / 'last.pth')
    train(market, tmp_path)
    assert_same(outcome(tmp_path), outcome(uninterrupted))


def test_the_best_checkpoint_is_read_once_and_the_last_one_not_at_all_after_the_start(market, copy, monkeypatch):
    read, real = [], checkpoint.load
    monkeypatch.setattr(checkpoint, 'load', lambda path, **options: (
        read.append(os.path.basename(path)), real(path, **options))[1])
    train(market, copy, 'total_steps = 16')
    assert read == ['last.pth', 'best.pth']


def refuses(market, folder, message, *bindings):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        train(market, folder, *bindings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_resume_false_refuses_a_folder_that_holds_a_run(market, copy):
    refuses(market, copy, 'train.resume = False needs an output_dir without a run.*last.pth', 'train.resume = False')


def test_resume_false_starts_in_an_empty_folder(market, tmp_path):
    train(market, tmp_path, 'train.resume = False', 'total_steps = 1')
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 1


@pytest.mark.parametrize('resume', [True, False])
def test_a_foreign_best_is_not_overwritten(market, copy, resume):
    for path in (copy / 'last.pth', *copy.glob('step_*.pth')):
        path.unlink()
    refuses(market, copy, 'best.pth without a last.pth', f'train.resume = {resume}')


def test_another_number_of_identities_is_refused(copy, tmp_path):
    other = write_market(tmp_path / 'other', identities=7)
    refuses(other, copy, 'trained on 6 identities, but the data set has 7')


def test_another_architecture_is_refused(market, copy):
    refuses(market, copy, '(?s)do not fit the configured architecture.*heads.4.*is missing.*holds another run',
            'MGN.parts = (1, 3)')


@pytest.mark.parametrize('before, after', [('Adam', 'SGD'), ('SGD', 'Adam')])
def test_another_optimizer_is_refused(market, tmp_path, before, after):
    train(market, tmp_path, 'total_steps = 2', f'make_optimizer.optimizer = @{before}')
    refuses(market, tmp_path, f'trained with the optimizer {before}, but {after} is configured',
            f'make_optimizer.optimizer = @{after}')


def test_a_run_with_another_optimizer_than_ours_resumes(market, tmp_path):
    gin.external_configurable(torch.optim.RMSprop, module='torch.optim')  # its state has other names
    optimizer = 'make_optimizer.optimizer = @RMSprop'
    train(market, tmp_path, 'total_steps = 2', optimizer)
    train(market, tmp_path, 'total_steps = 3', optimizer)
    assert checkpoint.load(str(tmp_path / 'last.pth'))['step'] == 3


def test_weights_alone_are_refused(market, copy):
    shutil.copy(copy / 'best.pth', copy / 'last.pth')
    refuses(market, copy, 'last.pth holds weights alone, .*the whole state of a run')


@pytest.mark.parametrize('change', [
    {'config': 5}, {'config': None}, {'num_classes': '6'}, {'step': None}, {'step': -1}, {'step': 2.0}, {'model': []},
    {'model': {'trunk.0.weight': 3}}, {'losses': 'x'}, {'mAP': 'x'}, {'optimizer': None},
    {'optimizer': {}}, {'optimizer': {'state': {0: {'exp_avg': torch.zeros(3)}}, 'param_groups': []}},
    {'optimizer_class': 7}, {'meter': None}, {'meter': {}}, {'meter': {'names': ['a'], 'sums': None, 'count': 1}},
    {'meter': {'names': ['a'], 'sums': torch.zeros(2), 'count': 1}},
    *({'optimizer': {'state': {0: state}, 'param_groups': []}} for state in (
        {'step': torch.tensor(1.), 'exp_avg': torch.tensor(0.), 'exp_avg_sq': torch.tensor(0.)},  # once a crash
        {'step': torch.tensor(1.), 'exp_avg': torch.zeros(8, 3, 7, 7)}, {'momentum_buffer': torch.zeros(8, 3, 7, 7)},
        {'exp_avg': torch.zeros(8, 3, 7, 7).to_sparse(), 'exp_avg_sq': torch.zeros(8, 3, 7, 7)}))
], ids=lambda change: f'{change!s:.60}')
def test_a_checkpoint_with_a_field_that_is_missing_or_of_another_type_is_refused(market, copy, change):
    content = torch.load(copy / 'last.pth')
    whole = {key: value for key, value in {**content, **change}.items() if value is not None or key not in change}
    torch.save(whole, copy / 'last.pth')
    refuses(market, copy, '(?s)last.pth')


@pytest.mark.parametrize('value', [
    torch.zeros(8, 3, 7, 7, dtype=torch.complex64), torch.zeros(8, 3, 7, 7).to_sparse(),
    torch.zeros(8, 3, 7, 7, dtype=torch.int32), torch.zeros(8, 3, 7, 7, device='meta')], ids=lambda v: str(v.dtype))
def test_weights_of_another_kind_are_refused(market, copy, value):
    content = torch.load(copy / 'last.pth')
    content['model']['trunk.0.weight'] = value
    torch.save(content, copy / 'last.pth')
    refuses(market, copy, 'trunk.0.weight has type')


def flip_a_bit(path, place):
    """In a tensor: between them are bytes that mean nothing."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        tensors = [info for info in file.infolist() if '/data/' in info.filename and info.file_size > 64]
    tensor = tensors[int(place * len(tensors))]
    data[tensor.header_offset + 300 + tensor.file_size // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize('damage', [
    lambda path: path.write_bytes(path.read_bytes()[:-33]), lambda path: path.write_bytes(b''),
    lambda path: path.unlink(), *(lambda path, place=place: flip_a_bit(path, place) for place in (0.1, 0.5, 0.9))])
def test_a_damaged_last_is_named_and_the_newest_intact_checkpoint_resumed(market, copy, uninterrupted, caplog, damage):
    (copy / 'step_3.pth').write_bytes((copy / 'step_6.pth').read_bytes())
    (copy / 'step_5.pth').mkdir()
    damage(copy / 'last.pth')
    missing = not (copy / 'last.pth').exists()
    with caplog.at_level(logging.INFO):
        train(market, copy)
    assert missing or any('is ignored' in message and 'last.pth' in message for message in caplog.messages)
    assert (copy / 'last.pth.damaged').exists() != missing
    assert any(f'resuming from {copy}/step_6.pth, step 6' in message for message in caplog.messages)
    assert_same(outcome(copy), outcome(uninterrupted))


def test_damaged_checkpoints_alone_are_all_named_and_nothing_begins_anew(market, copy):
    flip_a_bit(copy / 'last.pth', 0.5)
    (copy / 'step_6.pth').write_bytes(b'')
    refuses(market, copy, '(?s)All checkpoints.*damaged.*last.pth.*step_6.pth.*Bring one back')


def test_a_damaged_best_is_put_aside_and_named(market, tmp_path, monkeypatch, uninterrupted, caplog):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash(patch, 'train_step', 3)
        train(market, tmp_path)
    flip_a_bit(tmp_path / 'best.pth', 0.5)
    train(market, tmp_path)
    assert 'was renamed to' in caplog.text and (tmp_path / 'best.pth.damaged').exists()
    assert_same(outcome(tmp_path), outcome(uninterrupted))


@pytest.mark.parametrize('content', [{'format': 'mgn checkpoint 2', 'step': 9}, {'weights': torch.zeros(3)}])
def test_what_is_whole_but_of_another_program_is_not_overwritten(market, copy, content):
    torch.save(content, copy / 'last.pth')
    refuses(market, copy, 'last.pth is no checkpoint of mgn.train: it holds something else')


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(market, copy, monkeypatch):
    def unreadable(*_, **__):
        raise OSError(errno.EIO, 'Input/output error')
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match='Input/output error'):
        patch.setattr(torch, 'load', unreadable)
        train(market, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_measures_without_a_checkpoint_are_not_taken_over(market, copy):
    for path in copy.glob('*.pth'):
        path.unlink()
    refuses(market, copy, 'metrics.jsonl without a last.pth to resume from')


@pytest.mark.parametrize('keep_last, kept', [(0, []), (1, [6]), (2, [4, 6]), (9, [0, 2, 4, 6])])
def test_the_newest_older_checkpoints_are_kept(market, tmp_path, keep_last, kept):
    train(market, tmp_path, f'train.keep_last = {keep_last}')
    assert sorted(path.name for path in tmp_path.glob('step_*')) == [f'step_{step}.pth' for step in kept]
    assert all(checkpoint.load(str(tmp_path / f'step_{step}.pth'))['step'] == step for step in kept)


def test_what_a_killed_run_had_no_time_to_remove_is_removed_by_the_next(market, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'remove', lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        train(market, tmp_path)
    steps = [path.name for path in tmp_path.glob('step_*.pth')]
    assert len(steps) == 2
    train(market, tmp_path, 'total_steps = 4')
    assert [path.name for path in tmp_path.glob('step_*.pth')] == [max(steps)]


def test_fewer_may_be_kept_than_before(market, copy):
    for step in (1, 2):
        shutil.copy(copy / 'step_6.pth', copy / f'step_{step}.pth')
    train(market, copy, 'total_steps = 9', 'train.keep_last = 2')
    assert sorted(path.name for path in copy.glob('step_*')) == ['step_7.pth', 'step_8.pth']
