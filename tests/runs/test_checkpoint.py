"""Checkpoints: what is saved comes back, a failing write harms nothing, foreign files are refused without being run."""

import errno
import io
import os
import pickle
import resource
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mgn.ops.errors import UserError
from mgn.runs import checkpoint

CONTENT = {'config': "seed = 3\n# ü", 'num_classes': 4, 'step': 12, 'mAP': 0.25, 'resume': None, 'names': ['a', 'b'],
           'model': {'empty': torch.empty(0), 'half': torch.arange(33.).half(), 'count': torch.tensor(7),
                     'strided': torch.arange(129.)[::2], 'nan': torch.tensor([torch.nan, torch.inf])},
           'optimizer': {'state': {0: {'step': torch.tensor(2.0)}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]}}


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / 'last.pth'
    checkpoint.save(str(path), CONTENT)
    got = checkpoint.load(str(path))
    assert {name: got[name] for name in ('config', 'step', 'mAP', 'resume', 'names')} == {
        name: CONTENT[name] for name in ('config', 'step', 'mAP', 'resume', 'names')}
    for name, tensor in CONTENT['model'].items():
        torch.testing.assert_close(got['model'][name], tensor, rtol=0, atol=0, equal_nan=True)
        assert got['model'][name].dtype == tensor.dtype
    assert got['optimizer'] == CONTENT['optimizer']
    assert os.listdir(tmp_path) == ['last.pth']


def test_saving_again_replaces_the_file(tmp_path):
    path = str(tmp_path / 'last.pth')
    for step in (1, 2):
        checkpoint.save(path, {**CONTENT, 'step': step})
        assert checkpoint.load(path)['step'] == step
    assert os.listdir(tmp_path) == ['last.pth']


def test_the_data_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    path = tmp_path / 'last.pth'
    checkpoint.save(str(path), {**CONTENT, 'step': 1})
    seen, fsync = [], os.fsync

    def watched(descriptor):
        seen.append(checkpoint.load(str(path))['step'])
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', watched)
    checkpoint.save(str(path), {**CONTENT, 'step': 2})
    assert seen == [1, 2]  # the file under its temporary name, then the folder


BIG = {'model': {'weight': torch.zeros(100_000)}}


@contextmanager
def full_disk(monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', no_space)
        yield


@contextmanager
def size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FAILURES = pytest.mark.parametrize('failure', [full_disk, lambda _: size_limit(150_000), lambda _: size_limit(0)],
                                   ids=['no space to sync', 'room for a part', 'room for nothing'])


@FAILURES
def test_a_failing_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch, failure):
    path = tmp_path / 'last.pth'
    checkpoint.save(str(path), {**BIG, 'step': 1})
    before = path.read_bytes()
    with pytest.raises(OSError, match='last.pth could not be written: .*What was there before is unharmed.*Free disk'):
        with failure(monkeypatch):
            checkpoint.save(str(path), {**BIG, 'step': 2})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['last.pth']


def test_a_signal_while_it_writes_ends_the_process_as_it_asks(tmp_path, monkeypatch):
    """torch's writer makes another error of what is raised within a write."""
    @contextmanager
    def interrupted(path, mode, keep_as):
        class File(io.BytesIO):
            def write(self, content):
                raise SystemExit(75)
        yield File()
    monkeypatch.setattr(checkpoint, 'replacing', interrupted)
    with pytest.raises(SystemExit, match='75'):
        checkpoint.save(str(tmp_path / 'last.pth'), {**BIG, 'step': 1})


@FAILURES
def test_a_failing_first_write_leaves_nothing(tmp_path, monkeypatch, failure):
    with pytest.raises(OSError, match='last.pth could not be written: .*What was there before is unharmed'):
        with failure(monkeypatch):
            checkpoint.save(str(tmp_path / 'last.pth'), BIG)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_may_not_be_written_is_a_clear_error():
    folder = Path(tempfile.mkdtemp())  # not tmp_path, into which root alone can look
    path = folder / 'last.pth'
    user = os.geteuid()
    try:
        checkpoint.save(str(path), {**CONTENT, 'step': 1})
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        with pytest.raises(OSError, match='last.pth could not be written: .*denied'):
            checkpoint.save(str(path), {**CONTENT, 'step': 2})
        os.seteuid(user)
        assert os.listdir(folder) == ['last.pth']
        assert checkpoint.load(str(path))['step'] == 1
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_missing_folder_is_made_and_one_that_cannot_be_is_a_clear_error(tmp_path):
    checkpoint.save(str(tmp_path / 'new' / 'last.pth'), CONTENT)
    assert checkpoint.load(str(tmp_path / 'new' / 'last.pth'))['step'] == 12
    with pytest.raises(OSError, match='last.pth/last.pth could not be written'):
        checkpoint.save(str(tmp_path / 'new' / 'last.pth' / 'last.pth'), CONTENT)


@pytest.mark.parametrize('path', ['nowhere.pth', '.'])
def test_what_is_no_file_is_not_found(tmp_path, path):
    with pytest.raises(FileNotFoundError, match='no file .*, where weights were expected'):
        checkpoint.load(str(tmp_path / path))


@pytest.mark.parametrize('length', [0, 1, 31, 33, 129, 0.5, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, length):
    path = tmp_path / 'last.pth'
    checkpoint.save(str(path), CONTENT)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(length * len(whole)) if length == 0.5 else length])
    with pytest.raises(ValueError, match='last.pth (is damaged|cannot be loaded)'):
        checkpoint.load(str(path))


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path, rng = tmp_path / 'last.pth', np.random.default_rng(0)
    checkpoint.save(str(path), CONTENT)
    whole, want = path.read_bytes(), checkpoint.load(str(path))
    found = 0
    for place in rng.integers(len(whole), size=300):
        path.write_bytes(bytes([*whole[:place], whole[place] ^ 1 << rng.integers(8), *whole[place + 1:]]))
        try:
            got = checkpoint.load(str(path))
        except checkpoint.Damaged:
            found += 1
            continue
        assert str(got) == str(want)
    assert found > 100


class Code:
    """Pickled: an instruction to create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize('write', [
    lambda path, marker: path.write_text('want: weights\ngot: text'),
    lambda path, marker: path.write_bytes(bytes(range(256)) * 9),
    lambda path, marker: path.write_bytes(pickle.dumps({'format': checkpoint.FORMAT, 'x': Code(marker)}, protocol=2)),
    lambda path, marker: torch.save({'format': checkpoint.FORMAT, 'model': Code(marker)}, path),
    lambda path, marker: torch.save({'format': checkpoint.FORMAT, 'model': Code(marker)}, path,
                                    _use_new_zipfile_serialization=False),
    lambda path, marker: torch.save(nn.Linear(1, 1), path),
    lambda path, marker: torch.save(nn.Linear(1, 1).state_dict(), path),
    lambda path, marker: torch.save({'format': 'mgn checkpoint 0', 'model': {}}, path),
    lambda path, marker: torch.save(torch.zeros(3), path),
    lambda path, marker: torch.save([checkpoint.FORMAT], path),
], ids=['text', 'bytes', 'pickle with code', 'checkpoint with code', 'old checkpoint with code', 'module', 'state dict',
        'other format', 'tensor', 'list'])
def test_what_is_no_checkpoint_is_refused_and_not_run(tmp_path, write):
    path, marker = tmp_path / 'best.pth', tmp_path / 'executed'
    write(path, marker)
    with pytest.raises(ValueError, match='best.pth (is damaged|cannot be loaded|is no checkpoint of mgn.train)'):
        checkpoint.load(str(path))
    assert not marker.exists()


def test_the_code_of_these_tests_would_run_if_it_were_loaded(tmp_path):
    pickle.loads(pickle.dumps(Code(tmp_path / 'executed')))
    assert (tmp_path / 'executed').exists()


def model(classes=3, width=4):
    torch.manual_seed(classes)
    heads = nn.ModuleList([nn.ModuleDict({'reduction': nn.Linear(width, 2)})])
    if classes:
        heads[0]['classifier'] = nn.Linear(2, classes, bias=False)
    return nn.ModuleDict({'heads': heads})


def test_a_fitting_state_is_loaded():
    source, target = model().state_dict(), model()
    nn.init.zeros_(target['heads'][0]['reduction'].weight)
    checkpoint.load_model(target, source, 'best.pth')
    assert all(torch.equal(value, source[name]) for name, value in target.state_dict().items())


def test_missing_unexpected_and_ill_shaped_keys_are_all_listed_and_nothing_is_loaded():
    state = model(7, width=5).state_dict()
    state['trunk.0.weight'] = state.pop('heads.0.reduction.bias')
    target = model(3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match='my.pth do not fit the configured architecture') as raised:
        checkpoint.load_model(target, state, 'my.pth')
    for problem in ('heads.0.reduction.bias is missing\n', 'trunk.0.weight is unexpected\n',
                    'heads.0.reduction.weight has shape (2, 5) instead of (2, 4)\n',
                    'heads.0.classifier.weight has shape (7, 2) instead of (3, 2)\n'):
        assert problem in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_as_many_numbers_in_another_shape_do_not_fit():
    with pytest.raises(UserError, match=r'weight has shape \(2, 6\) instead of \(3, 4\)'):
        checkpoint.load_model(nn.Linear(4, 3, bias=False), {'weight': torch.zeros(2, 6)}, 'my.pth')


@pytest.mark.parametrize('make', [torch.optim.Adam, lambda p: torch.optim.AdamW(p, amsgrad=True),
                                  lambda p: torch.optim.Adam(p, amsgrad=True), torch.optim.SGD,
                                  lambda p: torch.optim.SGD(p, momentum=0.9)])
def test_moments_of_every_kind_fit_and_those_of_another_shape_do_not(make):
    layer = nn.Linear(4, 3)
    optimizer = make(layer.parameters())
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    checkpoint.check_moments(optimizer)
    for values in optimizer.state.values():
        for name in [name for name, value in values.items() if name != 'step' and value is not None]:
            whole, values[name] = values[name], values[name][:1]
            with pytest.raises(ValueError, match='another form'):
                checkpoint.check_moments(optimizer)
            values[name] = whole


def test_ten_keys_are_listed_and_the_others_counted():
    source = {f'layer{number}': torch.zeros(1) for number in range(13)}
    with pytest.raises(UserError) as raised:
        checkpoint.load_model(nn.Module(), source, 'my.pth', remedy='Bind another output_dir.')
    assert str(raised.value).count('is unexpected') == 10
    assert '\n  … 3 more …\n' in str(raised.value) and 'layer12 is' in str(raised.value)
    assert str(raised.value).endswith('\nBind another output_dir.')
    del source['layer10'], source['layer11'], source['layer12']
    with pytest.raises(UserError) as raised:
        checkpoint.load_model(nn.Module(), source, 'my.pth')
    assert str(raised.value).count('is unexpected') == 10 and '…' not in str(raised.value)


@pytest.mark.parametrize('classes', [0, 7])
def test_a_classifier_of_another_size_is_refused_where_the_whole_model_is_wanted(classes):
    with pytest.raises(ValueError, match='heads.0.classifier.weight'):
        checkpoint.load_model(model(3), model(classes).state_dict(), 'best.pth')


def test_types_that_are_no_weights_are_named_beside_one_that_is():
    value = torch.zeros(2, dtype=torch.float8_e4m3fn)
    assert checkpoint.misfit(value, value) == (
        'has type torch.float8_e4m3fn, torch.strided on cpu instead of torch.float32')


@pytest.mark.parametrize('classes', [0, 7])
def test_where_features_are_wanted_classifiers_are_dropped(classes):
    source, target = model(classes).state_dict(), model(0)
    checkpoint.load_model(target, source, 'best.pth', without='.classifier.')
    assert sorted(target.state_dict()) == ['heads.0.reduction.bias', 'heads.0.reduction.weight']
    assert all(torch.equal(value, source[name]) for name, value in target.state_dict().items())


def test_where_features_are_wanted_everything_else_is_still_checked():
    state = {**model(7, width=5).state_dict(), 'trunk.0.weight': torch.zeros(1)}
    with pytest.raises(ValueError, match=r'heads.0.reduction.weight has shape \(2, 5\) instead of \(2, 4\)') as raised:
        checkpoint.load_model(model(0), state, 'best.pth', without='.classifier.')
    assert 'trunk.0.weight is unexpected' in str(raised.value)
    assert 'classifier' not in str(raised.value)
