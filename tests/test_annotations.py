"""Values that gin binds, against the annotation of their parameter: what does not fit is told with what does."""

import inspect
import re

import gin
import pytest

from mgn import annotations, config
from mgn.ops.errors import UserError

pytestmark = pytest.mark.usefixtures('clean_gin')

WRONG = ["'x'", "'False'", '2.5', '()', '(1,)', '(1, 2, 3)', '[]', '{}', "{'a': 1}", '@market1501', '@market1501()',
         '@mgn_losses', '@evaluate()', 'None', 'True', '1', '1e999', '-1e999', '@cosine', '@Adam()', '10 ** 3']


def parameters():
    """Every (configurable, parameter, annotation) that gin may bind here."""
    for selector, configurable in gin.config._REGISTRY.items():
        if selector.startswith('mgn.'):
            expected = annotations.of_parameters(configurable.wrapped)
            for name in inspect.signature(configurable.wrapped).parameters:
                if name not in (configurable.denylist or ()) and name != 'self':
                    yield selector.rsplit('.', 1)[-1], name, expected.get(name)


def test_every_parameter_that_can_be_bound_is_annotated():
    assert len(list(parameters())) > 60
    assert [place for place in parameters() if place[2] is None] == []


@pytest.mark.parametrize('name, parameter', sorted({place[:2] for place in parameters()}))
def test_a_value_of_another_type_is_an_error_that_names_the_binding_and_what_fits(name, parameter):
    refused = 0
    for text in WRONG:
        try:
            config.load([], [f'{name}.{parameter} = {text}'])
        except UserError as error:
            refused += 1
            assert re.search(rf"{parameter}|A gin binding looks like", str(error)), error
            assert not re.search("'(NoneType|int|str|tuple|float)' object|argument", str(error)), error
    assert refused >= 12


@pytest.mark.parametrize('binding, message', [
    ("P = 'x'", "P must be an integer from 2 to 65536, found 'x'"),
    ('train.P = True', 'train.P must be an integer from 2 to 65536, found True'),
    ('input_size = 5', r'input_size must be values in parentheses as in \(1, 2\), each an integer from 1 to 4096, '
                       'found 5'),
    ("flip_test = 'False'", "flip_test must be True or False, found 'False'"),
    ("train.resume = 'no'", 'train.resume must be True or False'),
    ("MGN.bnneck = 'no'", 'MGN.bnneck must be True or False'),
    ('weights = 5', 'weights must be a string that is not empty'),
    ("train.schedule = 'cosine'", 'train.schedule must be a reference without parentheses such as @name, found'),
    ('train.schedule = @market1501', 'train.schedule must be a reference'),
    ('train.schedule = @cosine()', 'train.schedule must be a reference'),
    ('make_optimizer.optimizer = @cosine', 'make_optimizer.optimizer must be a reference'),
    ("Adam.lr = 'x'", 'Adam.lr must be a finite number or a reference'),
    ('Adam.betas = (0.9,)', r'Adam.betas must be values in parentheses as in \(1, 2\)'),
    ('train.keep_last = 1.5', 'train.keep_last must be an integer'),
    ('mgn_losses.margin = (1,)', r'mgn_losses.margin must be a finite number from 0 or None, found \(1,\)'),
    ('SGD.weight_decay = 100000000000000000000', 'SGD.weight_decay must be a finite number'),  # torch takes 64 bits
    ("train.freeze = 'trunk'", r"train.freeze must be values in parentheses as in \('name',\), each a string"),
    ('MGN.parts = (1, 2.5)', r'MGN.parts must be values in parentheses as in \(1, 2, 3\), each an integer'),
    ('device = 5', 'device must be a string that is not empty, found 5'),
    ("feature_precision = 'int8'", "feature_precision must be 'auto' or 'float32' or .*, found 'int8'"),
    ('train.precision = 16', "train.precision must be 'auto' or 'float32' or .*, found 16"),
    ("write_features.storage = 'int8'", "write_features.storage must be 'float32' or 'float16', found 'int8'"),
    ("train.mining = 'none'", "train.mining must be 'all' or 'process', found 'none'"),
    ("MGN.backbone = 'vit'", "MGN.backbone must be 'resnet18' or .* or 'resnet101_ibn', found 'vit'"),
    ("MGN.pooling = 'mean'", "MGN.pooling must be 'max' or 'avg' or 'gem', found 'mean'"),
    ('dataset = @market1501', r'dataset must be a reference with parentheses such as @name\(\), found @market1501'),
    ('joined.datasets = (@market1501,)', r'joined.datasets must be .* each a reference with parentheses such as @name'),
    ('rerank = 20', 'rerank must be True or False, found 20'),
    ('query_expansion = 2.0', 'query_expansion must be an integer from 0 to 4096, found 2.0'),
    ("evaluate.cross_camera = 'False'", "evaluate.cross_camera must be True or False, found 'False'"),
    ('Extractor.batch_size = 0', 'Extractor.batch_size must be an integer from 1 to 4096, found 0'),
    ('Extractor.batch_size = 100000', 'Extractor.batch_size must be an integer from 1 to 4096, found 100000'),
    ('workers = -1', 'workers must be an integer from 0 to 1024, found -1'),
    ('workers = 2.0', 'workers must be an integer from 0 to 1024, found 2.0'),
    ('input_size = (0, 24)', r'input_size must be .* each an integer from 1 to 4096, found \(0, 24\)'),
    ('input_size = (48, 100000)', r'input_size must be .* found \(48, 100000\)'),
    ("input_size = (48, '24')", 'input_size must be values in parentheses'),
    ('input_size = (48,)', 'input_size must be values in parentheses'),
    ('input_size = None', 'input_size must be values in parentheses'),
    ('query_expansion = -1', 'query_expansion must be an integer from 0 to 4096, found -1'),
    ('query_expansion = 4097', 'query_expansion must be an integer from 0 to 4096, found 4097'),
    ('query_expansion = True', 'query_expansion must be an integer from 0 to 4096, found True'),
    ('evaluate.alpha = -1.0', 'evaluate.alpha must be a finite number from 0, found -1.0'),
    ('evaluate.k1 = 0', 'evaluate.k1 must be an integer from 1 to 2147483647, found 0'),
    ('evaluate.k2 = 6.0', 'evaluate.k2 must be an integer from 1 to 2147483647, found 6.0'),
    ('evaluate.lambda_value = 1.1', 'evaluate.lambda_value must be a finite number from 0 to 1, found 1.1'),
    ('Augmentation.flip_probability = 2', 'flip_probability must be a finite number from 0 to 1, found 2'),
    ('Augmentation.flip_probability = -0.1', 'flip_probability must be a finite number from 0 to 1, found -0.1'),
    ('Augmentation.erasing_probability = 1e999', 'erasing_probability must be a finite number from 0 to 1, found inf'),
    ('Augmentation.auto_augment_probability = 1.5', 'must be a finite number from 0 to 1, found 1.5'),
    ('Augmentation.erasing_area = (0.0, 0.4)', r'erasing_area must be .* each a finite number from 1e-09 to 1, found'),
    ('Augmentation.erasing_area = (0.02, 1.5)', 'erasing_area must be .* each a finite number from 1e-09 to 1, found'),
    ('Augmentation.erasing_aspect = (1.0, 1e999)', 'erasing_aspect must be .* each a finite number from 0.001 to 1000'),
    ('Augmentation.padding = -1', 'Augmentation.padding must be an integer from 0 to 1000, found -1'),
    ('Augmentation.padding = 100000', 'Augmentation.padding must be an integer from 0 to 1000, found 100000'),
    ('Decoder.max_pixels = 0', 'Decoder.max_pixels must be an integer from 1 to 178956970, found 0'),
    ('Decoder.max_pixels = 200000000', 'Decoder.max_pixels must be .* found 200000000'),
    ("Decoder.max_pixels = 'many'", "Decoder.max_pixels must be .* found 'many'"),
    ('mgn_losses.cross_entropy_weight = (1.0, -1.0)', 'cross_entropy_weight must be a finite number from 0 or values'),
    ('multi_step.gamma = 1.5', 'multi_step.gamma must be a finite number from 0 to 1'),
    ('cosine.final_factor = -1', 'cosine.final_factor must be a finite number from 0 to 1, found -1'),
    ('cosine.period = 0', 'cosine.period must be an integer from 1 to'),
    ('make_optimizer.bias_weight_decay = -1', 'bias_weight_decay must be a finite number from 0, found -1'),
    ('MGN.parts = (1, 0, 3)', 'MGN.parts must be .* each an integer from 1 to 128'),
    ('MGN.parts = (1, -2, 3)', 'MGN.parts must be .* each an integer from 1 to 128'),
    ('MGN.last_strides = (2, 1, 4)', 'MGN.last_strides must be .* each 1 or 2'),
    ('MGN.embedding_dim = 0', 'MGN.embedding_dim must be an integer from 1 to 65536'),
    ('search.k = 0', 'search.k must be an integer from 1 to 4096, found 0'),
    ('P = 1', 'P must be an integer from 2 to 65536, found 1'),
    ('K = 0', 'K must be an integer from 1 to 65536, found 0'),
    ('train.keep_last = -1', 'train.keep_last must be an integer from 0'),
    ('seed = -1', 'seed must be an integer from 0 to 9223372036854775807, found -1'),
    ('seed = 9223372036854775808', 'seed must be an integer from 0 to 9223372036854775807'),
    ('seed = 0.0', 'seed must be an integer'), ("seed = '0'", 'seed must be an integer'),
    ('seed = None', 'seed must be an integer'), ('seed = True', 'seed must be an integer'),
    ('pedestrians.seed = -1', 'pedestrians.seed must be an integer from 0 to'),
    ('cuhk01.seed = -1', 'cuhk01.seed must be an integer from 0 to'),
    ('a = %b\nb = %a\nP = %a', 'is bound to itself')])
def test_a_value_that_does_not_fit_is_told_with_what_does(binding, message):
    with pytest.raises(UserError, match=message):
        config.load([], binding.split('\n'))


@pytest.mark.parametrize('binding', [
    'lr = 1', 'mgn_losses.margin = None', 'MGN.parts = [1, 2]', 'height = 64\ninput_size = (%height, 32)',
    'MGN.pretrained = False', "MGN.pretrained = '~/x.pth'", 'train.schedule = @cosine', 'train.losses = @mgn_losses',
    'make_optimizer.optimizer = @SGD', 'dataset = @msmt17()', 'train.clip_gradient_norm = 3', 'seed = 0'])
def test_values_that_fit_are_taken(binding):
    config.load([], binding.split('\n'))


@pytest.mark.parametrize('name', [
    'data_root', 'output_dir', 'weights', 'features_dir', 'market1501.root', 'msmt17.root', 'dukemtmcreid.root',
    'market_layout.root', 'pedestrians.root'])
def test_an_empty_path_is_refused(name):
    with pytest.raises(UserError, match=f"{name} must be a string that is not empty.*, found ''"):
        config.load([], [f"{name} = ''"])


def test_annotations_of_a_users_own_are_not_looked_into():
    @gin.configurable
    def own_of_many_kinds(a: 'list[int]' = (), b: 'Any' = 1, c: str = 'x') -> 'int | float':
        pass

    config.load([], ['own_of_many_kinds.a = [1]', 'own_of_many_kinds.b = {}', "own_of_many_kinds.c = ''",
                     'train.schedule = @own_of_many_kinds'])


@pytest.mark.parametrize('binding, message', [
    ('train.schedule = @gin.singleton', 'train.schedule must be a reference without parentheses .*, found @gin.singl'),
    ('dataset = @gin.singleton()', r'dataset must be a reference with parentheses .*, found @gin.singleton\(\)'),
    ('dataset = @gin.constant()', 'A gin binding looks like P = 16, and this is none: .*constant'),
    ('evaluate.alpha = {[1]: 1}', 'A gin binding looks like P = 16, and this is none: .*unhashable')])
def test_gins_own_configurables_and_odd_literals_are_sentences(binding, message):
    with pytest.raises(UserError, match=f'(?s)^{message}'):
        config.load([], [binding])
