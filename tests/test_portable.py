"""Exported files: the features of `embed` by onnxruntime and by PyTorch, metadata, and what is refused."""

import json
import logging
import math
import os
from importlib.util import find_spec
from pathlib import Path

import gin
import pytest
import torch
import torch.nn.functional as F
from test_model import shake
from thin import thin  # noqa: F401

import mgn
from mgn import portable
from mgn.features import hash_of_weights
from mgn.model import MGN
from mgn.ops.errors import UserError

pytestmark = [pytest.mark.usefixtures('thin'),
              pytest.mark.skipif(not all(map(find_spec, ('onnx', 'onnxscript', 'onnxruntime'))),
                                 reason="the extra `export` is not installed; pip install -e '.[export]' does")]
SIZE = (112, 48)  # maps of 7 rows: three stripes share some of them


def export(folder, *bindings, mAP=0.25):
    """Exports a thin MGN with weights as after some training; returns it."""
    gin.parse_config([f'Extractor.input_size = {SIZE}', 'MGN.embedding_dim = 8', *bindings])
    torch.manual_seed(0)
    model = shake(MGN(0, pretrained=False)).eval()
    portable.export_checkpoint({'model': model.state_dict(), 'mAP': mAP, 'config': 'dataset = @msmt17()'}, 'best.pth',
                               str(folder))
    return model


def images(count, size=SIZE):
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('bindings', [
    ['Extractor.flip_test = True'],
    pytest.param(["MGN.pooling = 'gem'", "MGN.first_pooling = 'ceil'", 'MGN.reduction_bn = False'],
                     marks=pytest.mark.long),
    pytest.param(["MGN.pooling = 'avg'", 'MGN.bnneck = False'], marks=pytest.mark.long)])
def test_both_files_give_the_features_of_the_model_for_any_batch(tmp_path, bindings, caplog):
    with caplog.at_level(logging.INFO):
        model = export(tmp_path, *bindings)
    assert sorted(os.listdir(tmp_path)) == ['model.onnx', 'model.pt2']
    embedder = mgn.load(str(tmp_path / 'model.onnx'))
    module, metadata = portable.read_pt2(str(tmp_path / 'model.pt2'))
    for count in (1, 2, 5, 33):
        want = portable.Portable(model, torch.float32)(images(count))
        assert (embedder.embed(images(count)) - want).abs().max() < 1e-5 and want.std() > 0.01
        assert (module(images(count)) - want).abs().max() < 1e-5
    assert embedder.input_size == SIZE and embedder.dim == model.feature_dim
    assert embedder.embed([images(1, (30, 20))[0], images(1, (200, 90))[0]]).shape == (2, model.feature_dim)
    assert embedder.embed([]).shape == (0, model.feature_dim)
    assert metadata['mAP'] == 0.25 and metadata['D'] == model.feature_dim and metadata['precision'] == 'float32'
    assert {name: metadata[name] for name in model.architecture} == model.architecture
    assert metadata['weights'] == hash_of_weights(model) and metadata['input_size'] == [*SIZE]
    assert caplog.text.count(' MB') == 2 and metadata['dataset'] == '@msmt17()'


def test_float16_files_hold_weights_of_two_bytes_and_are_near(tmp_path):
    import onnx

    model = export(tmp_path, "export_checkpoint.precision = 'float16'", mAP=None)
    held = {onnx.TensorProto.FLOAT: 0, onnx.TensorProto.FLOAT16: 0}  # numbers of either type
    for tensor in onnx.load(tmp_path / 'model.onnx').graph.initializer:
        held[tensor.data_type] = held.get(tensor.data_type, 0) + math.prod(tensor.dims)
    assert held[onnx.TensorProto.FLOAT] < 1000 < 0.9 * sum(x.numel() for x in model.parameters()) < held[
        onnx.TensorProto.FLOAT16]
    want = portable.Portable(model, torch.float32)(images(3))
    module, metadata = portable.read_pt2(str(tmp_path / 'model.pt2'))
    assert metadata['mAP'] is None and metadata['precision'] == 'float16'
    for got in mgn.load(str(tmp_path / 'model.onnx')).embed(images(3)), module(images(3)):
        assert (1 - (got * want).sum(1)).max() < 1e-3 and got.dtype == torch.float32
        assert (got.norm(dim=1) - 1).abs().max() < 1e-6 and not got.requires_grad
    made = onnx.load(tmp_path / 'model.onnx')  # as the page on weights promises
    assert made.ir_version <= 9 and all(each.version <= 18 for each in made.opset_import if not each.domain)


def without_onnx(folder, monkeypatch, change):
    """In the place of an ONNX file, whose export takes seconds: the network, whose features go through `change`."""
    written, there = {}, os.listdir(folder)

    def onnx_content(program, *_):
        assert os.listdir(folder) == there  # what a signal ends here leaves nothing behind
        written['after'] = program.module()
        return b'after'
    monkeypatch.setattr(portable, 'onnx_content', onnx_content)
    monkeypatch.setattr(portable, 'read_onnx', lambda path: (lambda x: change(written[Path(path).read_text()](x)), {}))


@pytest.mark.parametrize('change', [
    lambda features: features.flip(1), lambda features: features * math.nan, lambda features: 2 * features,
    lambda features: torch.cat((features[:-1], features[-1:].flip(1))),
    lambda features: torch.cat((features[:2], features[2:].flip(1))),
    lambda features: features if len(features) > 1 else features.flip(1)])
def test_a_file_that_gives_other_features_is_not_written(tmp_path, monkeypatch, change):
    (tmp_path / 'model.onnx').write_text('before')
    without_onnx(tmp_path, monkeypatch, change)
    with pytest.raises(UserError, match='model.onnx gives features at a cosine distance of .* nothing was written'):
        export(tmp_path)
    assert os.listdir(tmp_path) == ['model.onnx'] and (tmp_path / 'model.onnx').read_text() == 'before'


def test_without_an_output_dir_the_files_lie_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(portable, 'onnx_content', lambda *_: b'')  # an export by ONNX takes seconds
    monkeypatch.setattr(portable, 'read_onnx', lambda path: portable.read_pt2(path.replace('.onnx', '.pt2')))
    export('')
    assert sorted(os.listdir(tmp_path)) == ['model.onnx', 'model.pt2']


def test_what_is_no_exported_file_is_refused(tmp_path):
    (tmp_path / 'a.onnx').write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match='a.onnx is no ONNX file of mgn.export'):
        mgn.load(str(tmp_path / 'a.onnx'))
    with pytest.raises(UserError, match='nowhere.onnx is no ONNX file of mgn.export .*No such file'):
        mgn.load(str(tmp_path / 'nowhere.onnx'))


def write_means(path, **metadata):
    """An ONNX file of the form that mgn.export writes, whose three features are the means of the colours."""
    import onnx
    from onnx import helper

    nodes = [helper.make_node('Cast', ['images'], ['x'], to=onnx.TensorProto.FLOAT),
             helper.make_node('GlobalAveragePool', ['x'], ['means']),
             helper.make_node('Flatten', ['means'], ['features'])]
    graph = helper.make_graph(
        nodes, 'means', [helper.make_tensor_value_info('images', onnx.TensorProto.UINT8, ['batch', 3, 6, 4])],
        [helper.make_tensor_value_info('features', onnx.TensorProto.FLOAT, ['batch', 3])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', portable.OPSET)])
    model.ir_version = portable.IR_VERSION
    helper.set_model_props(model, {'mgn': json.dumps({'D': 3, 'input_size': [6, 4], **metadata}), 'sha256': '0' * 64})
    path.write_bytes(portable.sealed(model.SerializeToString()))
    return str(path)


def test_a_file_without_a_checksum_is_refused(tmp_path):
    path = write_means(tmp_path / 'a.onnx')
    (tmp_path / 'a.onnx').write_bytes((tmp_path / 'a.onnx').read_bytes().replace(b'sha256', b'sha257'))
    with pytest.raises(UserError, match='a.onnx is no ONNX file of mgn.export .*checksum'):
        mgn.load(path)


@pytest.mark.parametrize('place', [0.1, 0.5, 0.8])
def test_a_file_with_a_changed_bit_is_refused(tmp_path, place):
    path = write_means(tmp_path / 'a.onnx')
    content = bytearray((tmp_path / 'a.onnx').read_bytes())
    content[int(place * len(content))] ^= 1
    (tmp_path / 'a.onnx').write_bytes(content)
    with pytest.raises(UserError, match='a.onnx is no ONNX file of mgn.export'):
        mgn.load(path)


@pytest.mark.parametrize('change', [{'D': 'x'}, {'D': 4}, {'D': None}, {'input_size': 5}, {'input_size': [4, 6]}])
def test_metadata_that_do_not_fit_the_network_are_refused(tmp_path, change):
    with pytest.raises(UserError, match='a.onnx is no ONNX file of mgn.export'):
        mgn.load(write_means(tmp_path / 'a.onnx', **change))


def test_load_of_an_onnx_file_needs_onnxruntime_alone_and_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    path = write_means(tmp_path / 'a.onnx')
    for name in ('onnx', 'onnxscript'):
        monkeypatch.setitem(__import__('sys').modules, name, None)
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in (path, '~/a.onnx'):
        assert mgn.load(name, 'cpu', 'auto').embed([images(1)[0]]).shape == (1, 3)
    for options in (dict(device='cuda'), dict(flip_test=True), dict(precision='float16')):
        with pytest.raises(UserError, match='runs on the CPU, as it was exported'):
            mgn.load(path, **options)


def test_without_the_extra_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'onnxruntime', None)
    with pytest.raises(UserError, match="onnxruntime, which is missing; pip install onnx onnxscript onnxr"):
        export(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('precision, distance', [('float32', 5e-5), ('float16', 5e-3)])
def test_one_feature_of_a_batch_that_is_a_little_off_is_enough(tmp_path, monkeypatch, precision, distance):
    def change(features):
        if len(features) < 17:
            return features
        last = features[-1]
        aside = F.normalize(last.flip(0) - (last.flip(0) @ last) * last, dim=0)
        return torch.cat((features[:-1], F.normalize(last + (2 * distance) ** 0.5 * aside, dim=0)[None]))
    without_onnx(tmp_path, monkeypatch, change)
    with pytest.raises(UserError, match='model.onnx gives features at a cosine distance of'):
        export(tmp_path, f"export_checkpoint.precision = '{precision}'")


def test_a_wrong_second_file_leaves_the_first_as_it_was(tmp_path, monkeypatch):
    (tmp_path / 'model.onnx').write_text('before')
    without_onnx(tmp_path, monkeypatch, lambda features: features)
    monkeypatch.setattr(portable, 'read_pt2', lambda path: (lambda images: torch.zeros(len(images), 1), {}))
    with pytest.raises(UserError, match='model.pt2 gives features at a cosine distance of .* nothing was written'):
        export(tmp_path)
    assert os.listdir(tmp_path) == ['model.onnx'] and (tmp_path / 'model.onnx').read_text() == 'before'
