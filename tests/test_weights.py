"""Weights of other projects: what is recognised, converted, chosen and refused; mgn.load, evaluation, training."""

import logging
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastreid_layouts import state_of
from test_model import shake
from thin import narrow_networks

import mgn
from mgn import config, evaluation, weights
from mgn.data.augmentation import normalise
from mgn.data.datasets import market_layout
from mgn.features import Extractor
from mgn.model import MGN
from mgn.ops.errors import UserError
from mgn.runs import checkpoint

pytestmark = pytest.mark.usefixtures('clean_gin')
CPU = torch.device('cpu')
LAYOUTS = {'A': dict(pooling='gem', last_strides=(1, 1, 1)),
           'A without GeM': dict(pooling='max', last_strides=(2, 1, 1)),
           'B': dict(pooling='gem', last_strides=(1, 1, 1), first_pooling='ceil', reduction_bn=False,
                     reduction_relu=False),
           'B without GeM': dict(pooling='max', last_strides=(1, 1, 1), first_pooling='ceil', reduction_bn=False,
                                 reduction_relu=False)}


@pytest.fixture(scope='module', autouse=True)
def narrow():
    with narrow_networks():
        yield


def model_of(layout, classes=5, backbone='resnet50_ibn', seed=0):
    torch.manual_seed(seed)
    model = shake(MGN(classes, backbone, pretrained=False, embedding_dim=8, **LAYOUTS[layout]))
    if layout.startswith('A') and model.architecture['pooling'] == 'gem':  # one exponent for all heads
        for pool in model.pools:
            pool.p.data.fill_(2.5)
    return model.eval()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """{layout: (path, model)}, with NumPy's numbers: B plain, the others with IBN and as torch up to 1.5 wrote them."""
    folder, result = tmp_path_factory.mktemp('weights'), {}
    for layout in LAYOUTS:
        model = model_of(layout, 751, 'resnet50' if layout == 'B' else 'resnet50_ibn')
        path = str(folder / f'{layout}.pth')
        content = {'model': state_of(model, layout[0]), 'iteration': 7, 'best': np.float64(0.5), 'n': np.int64(3)}
        torch.save(content, path, _use_new_zipfile_serialization=layout == 'B')
        result[layout] = path, model
    return result


@pytest.mark.parametrize('dtype', [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
def test_a_file_of_halves_is_taken_with_its_rounded_means(files, tmp_path, dtype):
    state = {name: value.to(dtype) if value.is_floating_point() else value
             for name, value in torch.load(files['B'][0], weights_only=False)['model'].items()}
    torch.save(state, tmp_path / 'halves.pth')
    batch = torch.randint(0, 256, (2, 3, 384, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got, want = (mgn.load(path, device='cpu').embed(batch) for path in (tmp_path / 'halves.pth', files['B'][0]))
    assert (got * want).sum(1).min() > 0.99


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_file_of_fast_reid_becomes_a_checkpoint_with_the_options_that_it_needs(files, layout, caplog):
    path, model = files[layout]
    with caplog.at_level(logging.INFO):
        content = weights.load_checkpoint(path)
    assert content['num_classes'] == 751 and content['step'] == 0
    state = model.state_dict()
    assert content['model'].keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in content['model'].items())
    for name, value in model.architecture.items():
        assert f'MGN.{name} = {tuple(value) if isinstance(value, list) else value!r}\n' in content['config']
    assert content['config'].endswith('dataset = @market1501()')
    lines = [record.message for record in caplog.records]
    assert lines[0].endswith(f'MGN of fast-reid, layout {layout[0]}, {model.architecture["backbone"]} of 751 classes')
    assert lines[1] == f'{len(content["model"])} tensors; left out: pixel_mean, pixel_std'
    chosen = {line.split(' = ')[0] for line in lines[2:]}
    expected = {'MGN.first_pooling', 'MGN.reduction_relu', 'MGN.last_strides', 'dataset'}
    assert chosen == expected | ({'MGN.pooling'} if 'without' in layout else set())
    assert len(lines) == 2 + len(chosen)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_load_embeds_as_the_model_whose_weights_were_saved(files, layout):
    path, model = files[layout]
    embedder = mgn.load(path, device='cpu')
    batch = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 384, 128), dtype=np.uint8))
    with torch.no_grad():
        want = F.normalize(model(normalise(batch)).features)
    got = embedder.embed(batch)
    assert got.shape == (3, embedder.dim) and got.dtype == torch.float32 and embedder.input_size == (384, 128)
    assert (got - want).abs().max() < 1e-5 and want.std() > 0.01


def test_a_file_of_fast_reid_is_evaluated_with_the_users_bindings_over_its_own(files, market, tmp_path):
    bindings = [f"data_root = '{market}'", 'dataset = @market_layout()', 'input_size = (96, 32)', 'workers = 0',
                "device = 'cpu'", f"output_dir = '{tmp_path}'"]
    path, model = files['A without GeM']
    found = []
    for pooling in ('max', 'avg'):
        content = config.load_checkpoint([], [*bindings, f"weights = '{path}'", f"MGN.pooling = '{pooling}'"])
        results = evaluation.evaluate_checkpoint(content)
        assert results['step'] == 0 and results['queries'] == 3
        found.append(results['mAP'])
    dataset, extractor = market_layout(str(market)), Extractor(CPU, (96, 32), workers=0)
    assert evaluation.evaluate(model, dataset, extractor)['mAP'] == pytest.approx(found[0], abs=1e-9)


def test_convert_writes_a_checkpoint_that_gives_the_same_features(files, tmp_path):
    path, _ = files['A']
    bindings = [f"weights = '{path}'", f"output_dir = '{tmp_path / 'new'}'"]
    evaluation.convert_checkpoint(config.load_checkpoint([], bindings))
    converted = mgn.load(str(tmp_path / 'new' / 'A_mgn.pth'), device='cpu')
    batch = torch.randint(0, 256, (2, 3, 90, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(converted.embed(batch), mgn.load(path, device='cpu').embed(batch))
    bound = checkpoint.load(str(tmp_path / 'new' / 'A_mgn.pth'))['config']
    assert '@market1501()' in bound and str(tmp_path) not in bound  # paths belong to this machine


@pytest.mark.parametrize('source', ['A', 'ours'])
def test_training_starts_from_a_whole_mgn_with_new_classifiers(files, tmp_path, source, caplog):
    path, model = files['A']
    if source == 'ours':
        path = str(tmp_path / 'best.pth')
        bound = '\n'.join(f'MGN.{name} = {value!r}' for name, value in model.architecture.items())
        checkpoint.save(path, {'config': bound, 'num_classes': 751, 'step': 1, 'model': model.state_dict()})
    new, state = MGN(9, 'resnet50_ibn', pretrained=path, embedding_dim=8, **LAYOUTS['A']), model.state_dict()
    for name, value in new.state_dict().items():
        if 'classifier' in name:
            assert value.shape == (9, 8) and value.std() < 0.002
        else:
            assert torch.equal(value, state[name])
    with pytest.raises(UserError, match=r"(?s)bn1.BN.weight is unexpected.*MGN.backbone = 'resnet50_ibn': bind that"):
        MGN(9, 'resnet50', pretrained=path, embedding_dim=8, **LAYOUTS['A'])
    with caplog.at_level(logging.WARNING):
        MGN(9, 'resnet50_ibn', pretrained=path, embedding_dim=8, **{**LAYOUTS['A'], 'last_strides': (2, 1, 1)})
    assert 'was trained with MGN.last_strides = ' in caplog.text


def test_a_model_that_a_checkpoint_will_replace_does_not_read_the_file(tmp_path):
    MGN(9, 'resnet50', pretrained=str(tmp_path / 'nowhere.pth'), fresh=False)


def saved(tmp_path, change, layout='A', backbone='resnet50'):
    """The path of a file of a state dict in fast-reid's names, changed by `change`, which takes and edits it.

    All weights lie in the memory of the largest, so the file is small.
    """
    with torch.device('meta'):
        state = state_of(MGN(3, backbone, pretrained=False, embedding_dim=2, **LAYOUTS[layout]), layout[0])
    memory = torch.ones(max(value.numel() for value in state.values()))
    state = {key: memory[:value.numel()].view(value.shape) if value.is_meta and value.is_floating_point()
             else torch.zeros_like(value, device='cpu') if value.is_meta else value for key, value in state.items()}
    content = change(state)
    torch.save({'model': state} if content is None else content, tmp_path / 'w.pth')
    return str(tmp_path / 'w.pth')


def drop(state, beginning):
    for key in [key for key in state if key.startswith(beginning)]:
        del state[key]


@pytest.mark.filterwarnings('ignore:The PyTorch API of nested tensors')
@pytest.mark.parametrize('change, message', [
    (lambda state: state.update({'b1.se.weight': torch.zeros(1)}), '1 keys do not, the first of them b1.se.weight'),
    (lambda state: state.update({'backbone.NL_1.0.g': torch.zeros(1)}), 'NL_1.0.g is unexpected'),
    (lambda state: state.update(pixel_mean=torch.tensor([0.5, 0.5, 0.5])), r'pixel_mean = \[0.5, 0.5, 0.5\]'),
    (lambda state: state.update(pixel_std=torch.tensor([0.5, 0.5, 0.5])), r'pixel_std = \[0.5, 0.5, 0.5\]'),
    (lambda state: state.update({'b1_head.bnneck.weight': 'x'}), "1 keys do not.*is no tensor, but 'x'"),
    (lambda state: state.update({'b2_pool.1.weight': torch.zeros(2, 2)}), r'heads.1.reduction.* has shape \(2, 2\)'),
    (lambda state: drop(state, 'b33_pool.1'), 'heads.7.reduction.weight is missing'),
    (lambda state: drop(state, 'b21_pool.0.p'), 'pools.1.p is missing'),
    (lambda state: drop(state, 'b1.0.4.'), '4 blocks of b1.0'),
    (lambda state: state.update({3: torch.zeros(1)}), r'1 keys do not, the first of them 3 \(no name\)'),
    (lambda state: state.update({'b1.foo': torch.zeros(1)}), '1 keys do not, the first of them b1.foo'),
    (lambda state: state.update({'b1_head.weight': torch.ones(3, 2)}), r'\(the same as b1_head.weight\)'),
    (lambda state: state.update({'b2_pool.1.weight': torch.zeros(2)}), r'heads.1.reduction.* has shape \(2,\)'),
    (lambda state: state.update({'b1_head.classifier.weight': torch.zeros(())}), r'classifier.weight \(one number\)'),
    (lambda state: state.update({'b1_pool.0.p': torch.zeros(1).expand(10 ** 12)}), r'\(1000000000000,\) is larger'),
    (lambda state: state.update({'b1_pool.0.p': torch.nested.nested_tensor([torch.zeros(1)])}), 'is no tensor'),
    (lambda state: {'model': {}}, 'holds no weights by name'),
    (lambda state: {'a.weight': torch.zeros(1), 'b': torch.zeros(2)},
     '2 keys do not, the first of them a.weight, b. Known are checkpoints of mgn.train;'),
    (lambda state: [1, 2], 'holds no weights by name, but list'),
    (lambda state: dict.fromkeys(['conv1.weight', 'layer1.0.conv1.weight'], torch.zeros(1)), 'backbone without heads'),
], ids=range(20))
def test_what_fits_no_layout_is_refused_with_the_keys_that_do_not(tmp_path, change, message):
    with pytest.raises(UserError, match=f'(?s)w.pth.*({message})'):
        mgn.load(saved(tmp_path, change), device='cpu')


@pytest.mark.parametrize('use', ['load', 'pretrained', 'convert'])
@pytest.mark.parametrize('ours', [True, False])
def test_a_tensor_that_is_larger_than_its_file_is_refused_before_memory_is_taken(tmp_path, ours, use):
    path, content = str(tmp_path / 'w.pth'), {'model': {'x.classifier.weight': torch.zeros(1, 2).expand(10 ** 9, 2)}}
    own = {'format': checkpoint.FORMAT, 'config': '', 'num_classes': 10 ** 9, 'step': 0}
    torch.save({**content, **own} if ours else content, path)
    assert len(torch.load(path)['model']['x.classifier.weight']) == 10 ** 9
    with pytest.raises(UserError, match=r'w.pth cannot be .* \(a tensor of the shape \(1000000000, 2\) is larger '
                                        r'than the file\)\. Give another file'):
        if use == 'load':
            mgn.load(path, device='cpu')
        elif use == 'pretrained':
            MGN(2, 'resnet50', pretrained=path, embedding_dim=2)
        else:
            evaluation.convert_checkpoint(config.load_checkpoint([], [f"weights = '{path}'"]))


def test_convert_takes_no_memory_for_classes_that_a_file_does_not_hold(tmp_path):
    content = {'config': "MGN.backbone = 'resnet50'", 'num_classes': 10 ** 12, 'step': 0, 'mAP': 0.25,
               'model': MGN(0, 'resnet50', pretrained=False).state_dict(), 'optimizer': {'of': 'last.pth'}}
    checkpoint.save(str(tmp_path / 'many.pth'), content)
    bindings = [f"weights = '{tmp_path / 'many.pth'}'", f"output_dir = '{tmp_path}'"]
    evaluation.convert_checkpoint(config.load_checkpoint([], bindings))
    assert mgn.load(str(tmp_path / 'many_mgn.pth'), device='cpu').dim == 8 * 256
    written = checkpoint.load(str(tmp_path / 'many_mgn.pth'))
    assert written['mAP'] == 0.25 and 'optimizer' not in written


def test_a_checkpoint_that_binds_nothing_was_trained_with_the_defaults(tmp_path, caplog):
    path, model = str(tmp_path / 'best.pth'), MGN(0, 'resnet50', pretrained=False)
    checkpoint.save(path, {'config': "MGN.backbone = 'resnet50'", 'num_classes': 0, 'step': 1,
                           'model': model.state_dict()})
    with caplog.at_level(logging.WARNING):
        MGN(2, 'resnet50', pretrained=path)
        assert not caplog.records
        MGN(2, 'resnet50', pretrained=path, last_strides=(1, 1, 1))
    assert 'was trained with MGN.last_strides = (2, 1, 1), which is bound otherwise' in caplog.text


def test_attributes_in_place_of_methods_are_not_used(tmp_path):
    def change(state):
        content = OrderedDict(model=state)
        content.get = content.pop = 5
        return content
    assert mgn.load(saved(tmp_path, change), device='cpu').dim == 16


class Code:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.mark.parametrize('legacy', [True, False])
def test_a_file_from_elsewhere_executes_nothing(tmp_path, legacy):
    content = {'model': {'conv1.weight': torch.zeros(1)}, 'optimizer': Code(tmp_path / 'executed')}
    torch.save(content, tmp_path / 'w.pth', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r'w.pth cannot be loaded as weights \(it asks for the code .*open\)'):
        weights.load_checkpoint(str(tmp_path / 'w.pth'))
    assert not (tmp_path / 'executed').exists()


def test_a_file_without_batch_normalisation_behind_the_reductions_needs_none(tmp_path):
    path = saved(tmp_path, lambda state: [drop(state, f'{head}_head.bnneck') for head in weights.HEADS] and None)
    assert 'MGN.bnneck = False' in weights.load_checkpoint(path)['config']
    assert mgn.load(path, device='cpu').dim == 16


def test_a_newer_file_without_pixel_means_is_taken(tmp_path):
    content = weights.load_checkpoint(saved(tmp_path, lambda state: drop(state, 'pixel_'), 'B'))
    assert 'MGN.first_pooling = ' in content['config'] and content['num_classes'] == 3


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    saved(tmp_path, lambda state: None)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert weights.load_checkpoint('~/w.pth')['num_classes'] == weights.read('~/w.pth').num_classes == 3


def test_macros_of_macros_in_a_checkpoint_are_followed():
    text = 'width = 8\nnarrow = %width\nMGN.embedding_dim = %narrow\nMGN.parts = (1, %stripes)\nstripes = 2\n'
    values = weights.options_in(weights.saved_values(text, 'best.pth'))
    assert values == {'embedding_dim': 8, 'parts': (1, 2)}


@pytest.mark.parametrize('classes, dataset', [(751, 'market1501'), (702, 'dukemtmcreid'), (1041, 'msmt17'), (3, None)])
def test_the_number_of_classes_chooses_a_published_data_set(tmp_path, classes, dataset):
    def change(state):
        for key in state:
            if key.endswith('classifier.weight'):
                state[key] = torch.zeros(classes, 2)
    found = weights.load_checkpoint(saved(tmp_path, change))['config']
    assert re.findall(r'dataset = @(\w+)\(\)', found) == ([dataset] if dataset else [])


@pytest.mark.parametrize('backbone', ['resnet50', 'resnet101'])
def test_the_number_of_blocks_tells_the_backbone(tmp_path, backbone):
    path = saved(tmp_path, lambda state: None, backbone=backbone)
    assert weights.load_checkpoint(path)['config'].startswith(f"MGN.backbone = '{backbone}'\n")


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_torchs_advice_to_run_the_code_in_a_file_is_left_out(tmp_path):
    torch.jit.script(torch.nn.ReLU()).save(tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'cannot be loaded .* \(.*TorchScript.*\)\. Give another file\.$') as raised:
        mgn.load(str(tmp_path / 'w.pth'), device='cpu')
    assert 'Re-running' not in raised.value.message and 'False' not in raised.value.message
