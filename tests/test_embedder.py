"""mgn.load of this project's checkpoints: the images it takes, and the options, files and images that it refuses."""

import io
from pathlib import Path

import gin
import numpy as np
import pytest
import torch
from conftest import smooth_pixels
from PIL import Image
from test_model import images, shake
from thin import thin_networks
from torch._subclasses.fake_tensor import FakeTensorMode

import mgn
from mgn import config, evaluation, weights
from mgn.data.datasets import market_layout
from mgn.features import Extractor
from mgn.model import MGN
from mgn.ops.errors import UserError
from mgn.runs import checkpoint

pytestmark = pytest.mark.usefixtures('clean_gin')
CPU = torch.device('cpu')


@pytest.fixture(scope='module', autouse=True)
def thin():
    with thin_networks():
        yield


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """The path of a checkpoint of a small network of small images, and the network."""
    torch.manual_seed(0)
    model, path = shake(MGN(0, 'resnet18', pretrained=False)), str(tmp_path_factory.mktemp('small') / 'best.pth')
    checkpoint.save(path, {'config': "MGN.backbone = 'resnet18'\ninput_size = (64, 32)", 'num_classes': 0, 'step': 0,
                           'model': model.state_dict()})
    return path, model


def test_images_of_every_kind_give_the_features_of_extraction(small, market):
    embedder = mgn.load(small[0], device=CPU, batch_size=2)
    dataset = market_layout(str(market))
    paths = [sample.path for sample in dataset.query]
    want = Extractor(CPU, (64, 32), workers=0).features(small[1], dataset.query)
    arrays = [np.array(Image.open(path)) for path in paths]
    tensor = torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays])
    for given in (paths, [Image.open(path) for path in paths], arrays, tensor, [tensor[0], paths[1], arrays[2]]):
        assert (embedder.embed(given) - want).abs().max() <= 1e-6
    assert (embedder.embed([array[..., ::-1] for array in arrays], bgr=True) - want).abs().max() <= 1e-6
    assert (embedder.embed(tensor.flip(1), bgr=True) - want).abs().max() <= 1e-6
    mixed = [paths[0], Image.open(paths[1]), arrays[2][..., ::-1]]  # of these the array alone is told to be BGR
    assert (embedder.embed(mixed, bgr=True) - want).abs().max() <= 1e-6
    assert embedder.embed([]).shape == (0, embedder.dim)


@pytest.mark.parametrize('options', [dict(flip_test=True), dict(precision='bfloat16')])
def test_options_of_load_reach_the_features(small, market, options):
    samples = market_layout(str(market)).query
    want, plain = (Extractor(CPU, (64, 32), workers=0, **kind).features(small[1], samples) for kind in (options, {}))
    got = mgn.load(small[0], device='cpu', **options).embed([sample.path for sample in samples])
    assert (got - want).abs().max() <= 1e-6 and (got - plain).abs().max() > 1e-4


def test_load_leaves_random_state_and_takes_no_binding_of_the_callers_gin(small):
    path = small[0]
    batch = torch.randint(0, 256, (2, 3, 64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    want, before = mgn.load(path, device='cpu').embed(batch), torch.get_rng_state()
    gin.bind_parameter('MGN.paper_heads', True)
    assert torch.equal(mgn.load(path, device='cpu').embed(batch), want)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('change, default', [(torch.set_default_dtype, torch.float64),
                                             (torch.set_default_dtype, torch.bfloat16),
                                             (torch.set_default_device, 'meta')])
def test_features_are_float32_on_the_cpu_whatever_the_callers_defaults(small, change, default):
    images = [np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)]
    want, before = mgn.load(small[0], device='cpu').embed(images), {torch.set_default_dtype: torch.float32}
    change(default)
    try:
        embedder = mgn.load(small[0], device='cpu')
        got, none = embedder.embed(images), embedder.embed([])
    finally:
        change(before.get(change))
    assert torch.equal(got, want) and got.dtype == none.dtype == torch.float32 and none.device.type == 'cpu'


@pytest.mark.parametrize('image', [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), torch.zeros(3, 4, 4), 5, None,
                                   b'JPEG', np.zeros((0, 4, 3), np.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8)])
def test_what_is_no_image_is_refused(small, image):
    with pytest.raises(UserError, match='Images must be a .* uint8 tensor, or a list of paths'):
        mgn.load(small[0], device='cpu').embed([image])


@pytest.mark.parametrize('bgr', [False, True])
def test_a_tensor_of_a_gpu_is_an_image_like_others(bgr):
    """The CPU resizes all: CUDA has no such operation for uint8."""
    with FakeTensorMode():
        image = torch.empty(3, 8, 4, dtype=torch.uint8, device='cuda')
        assert mgn.embedder.Embedder.as_tensor(None, image, bgr).device.type == 'cpu'


@pytest.mark.parametrize('device', [5, None, True, 2.5, [], {}, 10 ** 5000], ids=type)
def test_a_device_that_is_no_name_is_a_sentence(small, device):
    with pytest.raises(UserError, match='^device must be a string that is not empty, found '):
        mgn.load(small[0], device)


@pytest.mark.parametrize('precision', ['int8', None, 16, ['float32']])
def test_other_precisions_are_refused(small, precision):
    choices = "'auto' or 'float32' or 'bfloat16' or 'float16'"
    with pytest.raises(UserError, match=f'^precision must be {choices}, found '):
        mgn.load(small[0], 'cpu', precision)


@pytest.mark.parametrize('batch_size', [0, 4097, 2.0, None])
def test_other_batch_sizes_are_refused(small, batch_size):
    with pytest.raises(UserError, match='^batch_size must be an integer from 1 to 4096, found '):
        mgn.load(small[0], 'cpu', batch_size=batch_size)


def test_what_is_no_list_is_refused(small):
    embedder = mgn.load(small[0], device='cpu')
    for images in (iter([]), 'a.jpg', Image.new('RGB', (4, 4)), None, {}, torch.tensor(3), np.array('a.jpg')):
        with pytest.raises(UserError, match='takes a list of images or a tensor of them, not .*; make it a list'):
            embedder.embed(images)


def test_a_pil_image_of_a_damaged_file_or_of_no_pixel_is_refused(small, tmp_path):
    Image.fromarray(smooth_pixels(90, 90)).save(tmp_path / 'a.png')
    whole, embedder = (tmp_path / 'a.png').read_bytes(), mgn.load(small[0], device='cpu')
    flipped = bytearray(whole)
    flipped[whole.index(b'IDAT') + 60] ^= 0x55
    for damaged in whole[:200], bytes(flipped):  # Pillow forgets the second one's error once it has raised it
        with pytest.raises(UserError, match='A PIL image cannot be read: .*(truncated|broken)'):
            embedder.embed([Image.open(io.BytesIO(damaged))])
    with pytest.raises(UserError, match='Images must be'):
        embedder.embed([Image.new('RGB', (0, 4))])


@pytest.mark.parametrize('mode', ['I', 'F'])
def test_a_pil_image_that_does_not_say_which_number_is_white_is_refused(small, mode):
    with pytest.raises(UserError, match=f'Images must be .*, but one is .*mode={mode}'):
        mgn.load(small[0], device='cpu').embed([Image.new('L', (4, 4), 200).convert(mode)])


def test_an_error_of_any_class_of_pillow_is_a_sentence(small, monkeypatch):
    def load(image):
        raise SyntaxError('Failed to decode frame 0')
    monkeypatch.setattr(Image.Image, 'load', load)
    with pytest.raises(UserError, match='A PIL image cannot be read: Failed to decode frame 0; give another'):
        mgn.load(small[0], device='cpu').embed([Image.new('RGB', (4, 4))])


def test_a_pil_image_that_was_closed_is_refused(small, market):
    image = Image.open(market_layout(str(market)).query[0].path)
    image.close()
    with pytest.raises(UserError, match='A PIL image cannot be read: Operation on closed image; give another'):
        mgn.load(small[0], device='cpu').embed([image])


@pytest.mark.parametrize('options', [dict(batch_size=0), dict(flip_test='no')])
def test_options_of_load_are_checked(small, options):
    with pytest.raises(UserError, match=f'{[*options][0]} must be'):
        mgn.load(small[0], device='cpu', **options)


def test_a_crafted_configuration_of_a_checkpoint_is_refused_by_load(tmp_path):
    model = MGN(0, 'resnet18', pretrained=False)
    content = {'num_classes': 0, 'step': 0, 'model': model.state_dict(), 'config': "MGN.backbone = 'resnet18'"}
    checkpoint.save(str(tmp_path / 'fine.pth'), content)
    embedder = mgn.load(str(tmp_path / 'fine.pth'), 'cpu')
    assert embedder.embed(images(1).byte()).shape == (1, 2048) and embedder.input_size == (384, 128)
    for text, message in (('MGN.parts = "abc"', 'MGN.parts must be values in parentheses'),
                          ('MGN.bnneck = 3', 'True or False'), ('MGN.parts = (1', 'cannot be read'),
                          ('input_size = 3', 'input_size must be values in parentheses'),
                          ('MGN.parts = (1, %two)\ntwo = %two', 'cannot be read: maximum recursion'),
                          ('MGN.squares = 3', 'MGN.squares is unknown; another version of this project')):
        checkpoint.save(str(tmp_path / 'bad.pth'), {**content, 'config': text})
        with pytest.raises(UserError, match=message):
            mgn.load(str(tmp_path / 'bad.pth'), 'cpu')


def test_a_configuration_may_bind_macros_in_tuples_and_of_macros(tmp_path):
    text = ("MGN.backbone = %name\nname = %other\nother = 'resnet18'\n"
            "MGN.parts = (1, %two)\nMGN.last_strides = (2, 1)\ntwo = 2\ninput_size = (64, 32)")
    model, path = MGN(0, 'resnet18', False, (1, 2), (2, 1)), str(tmp_path / 'best.pth')
    checkpoint.save(path, {'config': text, 'num_classes': 0, 'step': 0, 'model': model.state_dict()})
    assert mgn.load(path, 'cpu').dim == 4 * 256 and weights.read(path).options['parts'] == (1, 2)
    assert weights.saved_values("file = '%name'", path) == {'file': '%name'}  # a string


@pytest.mark.parametrize('value', [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name_but_for_classifiers(small, tmp_path, value):
    content, path = checkpoint.load(small[0]), str(tmp_path / 'best.pth')
    classifier = {'heads.0.classifier.weight': torch.tensor([[value]])}
    checkpoint.save(path, {**content, 'model': {**content['model'], **classifier}})
    assert mgn.load(path, device='cpu').dim == 8 * 256
    content['model']['heads.3.norm.running_mean'][7] = value
    checkpoint.save(path, content)
    bindings = f"weights = '{path}'", f"output_dir = '{tmp_path}'"
    for use in (lambda: mgn.load(path, device='cpu'),
                lambda: evaluation.convert_checkpoint(config.load_checkpoint([], bindings))):
        with pytest.raises(UserError, match='best.pth must be finite, but 1 .* heads.3.norm.running_mean; give other'):
            use()


def test_load_takes_paths_of_either_kind_and_says_of_anything_else_that_it_is_no_file(small, monkeypatch):
    monkeypatch.setenv('HOME', str(Path(small[0]).parent))
    for path in (Path(small[0]), '~/best.pth'):
        assert mgn.load(path, device='cpu').dim == 8 * 256
    for path in (None, 5, small[0].encode(), ['best.pth'], object()):
        with pytest.raises(UserError, match='There is no file .*, where weights were expected. Correct the path'):
            mgn.load(path, device='cpu')
