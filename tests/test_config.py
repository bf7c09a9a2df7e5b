"""Gin files and bindings: found from anywhere, later ones win, names that reach nothing are errors."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import gin
import pytest
from setuptools.config.pyprojecttoml import read_configuration

import mgn
from mgn import annotations, config
from mgn.ops.errors import FileError, UserError

PROJECT = Path(mgn.__file__).parent.parent
RECIPES = sorted(path.name for path in (PROJECT / 'gin').glob('*.gin'))
pytestmark = pytest.mark.usefixtures('clean_gin')


def value(name):
    return gin.query_parameter(name)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_every_recipe_of_the_project_loads_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {'market.gin', 'duke.gin', 'msmt17.gin', 'cpu.gin', 'demo.gin'} <= set(RECIPES)
    for name in RECIPES:
        config.load([f'gin/{name}'], [])
        assert gin.config_is_locked()


@pytest.mark.parametrize('recipe, dataset, total, warmup, milestones', [
    ('market', '@market1501()', 18000, 2000, (8000, 14000)),
    ('duke', '@dukemtmcreid()', 23000, 2500, (10000, 18000)),
    ('msmt17', '@msmt17()', 42000, 4700, (19000, 33000)),
])
def test_the_published_recipes_hold_the_published_values(recipe, dataset, total, warmup, milestones):
    config.load([f'gin/{recipe}.gin'], [])
    assert str(value('%dataset')) == dataset
    assert value('%total_steps') == total
    assert value('multi_step.warmup_steps') == warmup
    assert value('multi_step.milestones') == milestones
    assert (value('%P'), value('%K'), value('%input_size')) == (16, 4, (384, 128))
    assert (value('%lr'), value('%weight_decay')) == (3.5e-4, 5e-4)
    assert str(value('train.schedule')) == '@multi_step'


def test_later_files_and_bindings_win_and_bindings_beat_files(tmp_path):
    first = write(tmp_path / 'first.gin', 'P = 5\nK = 5\nseed = 5\n')
    second = write(tmp_path / 'second.gin', 'K = 6\nseed = 6\n')
    config.load([first, second], ['seed = 7', 'lr = 7.0', 'lr = 8.0'])
    assert [value(name) for name in ('%P', '%K', '%seed', '%lr', '%workers')] == [5, 6, 7, 8.0, 4]
    config.load([second, first], [])
    assert [value(name) for name in ('%P', '%K', '%seed')] == [5, 5, 5]


def test_loading_again_forgets_what_was_bound_before():
    config.load([], ['P = 5', 'MGN.pooling = "avg"'])
    config.load([], [])
    assert value('%P') == 16
    assert 'MGN.pooling' not in gin.config_str()


def test_a_file_is_looked_for_in_the_working_folder_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.load(['gin/market.gin'], [])
    assert value('%total_steps') == 18000
    write(tmp_path / 'gin' / 'market.gin', 'total_steps = 3')
    config.load(['gin/market.gin'], [])
    assert value('%total_steps') == 3
    monkeypatch.setenv('HOME', str(tmp_path))
    config.load(['~/gin/market.gin'], [])
    assert value('%total_steps') == 3


def test_a_missing_file_names_the_paths_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as raised:
        config.load(['gin/markt.gin'], [])
    assert 'Unable to open file: gin/markt.gin. Searched config paths: ' in str(raised.value)
    assert str(PROJECT) in str(raised.value)


def test_an_include_is_found_from_the_working_folder(tmp_path, monkeypatch):
    top = write(tmp_path / 'recipes' / 'top.gin', "include 'recipes/base.gin'\nK = 6\n")
    write(tmp_path / 'recipes' / 'base.gin', 'P = 5\nK = 5\n')
    monkeypatch.chdir(tmp_path)
    config.load([top], [])
    assert (value('%P'), value('%K')) == (5, 6)


def test_a_file_may_include_a_recipe_of_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.load([write(tmp_path / 'mine.gin', "include 'gin/duke.gin'\nP = 5\n")], [])
    assert (value('%total_steps'), value('%P')) == (23000, 5)


@pytest.mark.parametrize('binding, nearest', [
    ("data_rot = 'x'", 'data_root'),                         # macros
    ('datset = @market1501()', 'dataset'),
    ('lr = %lrr', 'lr'),                                      # macros that have no value
    ('train.total_steps = %total_step', 'total_steps'),
    ('trian.P = 3', 'train'),                                 # configurables
    ('Augmentatoin.padding = 3', 'Augmentation'),
    ('dataset = @markt1501()', 'market1501'),                 # references
    ('train.schedule = @cosin', 'cosine'),
    ('make_optimizer.optimizer = @Addam', 'Adam'),
    ('train.totl_steps = 3', 'total_steps'),                  # parameters
    ('MGN.part = (1,)', 'parts'),
    ('evaluate.cross_cameras = True', 'cross_camera'),
    ('Adam.weight_decy = 1.0', 'weight_decay'),
    ("dataset = @own/market_layout()\nonw/market_layout.root = 'x'", 'own'),  # scopes
])
def test_an_unknown_name_is_an_error_that_names_the_nearest(binding, nearest):
    with pytest.raises(UserError) as raised:
        config.load([], binding.split('\n'))
    assert f'the nearest valid name is {nearest!r}' in str(raised.value)


def test_an_unknown_name_in_a_file_is_an_error_that_names_the_file_and_the_line(tmp_path):
    path = write(tmp_path / 'mine.gin', 'P = 5\ntrain.PP = 6\n')
    with pytest.raises(ValueError, match="(?s)PP.*mine.gin.*line 2.*nearest valid name is 'P'"):
        config.load([path], [])


@pytest.mark.parametrize('binding', [
    'foo/train.P = 3', 'foo/lr = 3', "a/market1501.root = 'x'", 'gin.macro.value = 3'])
def test_a_binding_in_a_scope_that_nothing_enters_is_an_error(binding):
    with pytest.raises(ValueError, match='Nothing uses the macro|No reference enters the scope'):
        config.load([], [binding])


@pytest.mark.parametrize('binding', [
    'evaluate.dataset = 3', "train.default_output_dir = 'x'", 'MGN.num_classes = 3', 'multi_step.total_steps = 3',
    'cosine.step = 3', 'mgn_losses.labels = 3', 'make_optimizer.model = 3'])
def test_a_parameter_that_the_caller_always_gives_cannot_be_bound(binding):
    with pytest.raises(ValueError, match=binding.split(' ')[0].split('.')[1]):
        config.load([], [binding])


@pytest.mark.parametrize('binding', [
    "weights = 'x.pth'", 'SGD.momentum = 0.5', 'cosine.start = 3', 'msmt17.combine_val = True', 'SGD.nesterov = True',
    'Extractor.flip_test = True', 'mgn.model.MGN.pooling = "avg"'])
def test_a_binding_that_this_binary_does_not_use_is_fine(binding):
    config.load([], [binding])


def test_macros_and_scopes_of_ones_own_are_fine_where_something_uses_them():
    config.load([], ['rate = 0.5', 'lr = %rate', 'dataset = @own/market_layout()', "own/market_layout.root = 'x'"])
    assert gin.get_bindings('Adam')['lr'] == 0.5
    assert value('own/market_layout.root') == 'x'


@pytest.mark.parametrize('binding', ['train.input_size = (64, 32)', 'Extractor.input_size = (64, 32)',
                                     'train.dataset = @msmt17()', 'evaluate_checkpoint.dataset = @msmt17()'])
def test_what_training_and_evaluation_share_is_bound_as_a_macro(binding):
    with pytest.raises(ValueError, match='must be bound as a macro'):
        config.load([], [binding])


@pytest.mark.parametrize('binding', ['P', 'P =', 'P = (3', '= 3', 'dataset = @', 'include nowhere'])
def test_what_is_no_binding_is_an_error(binding):
    with pytest.raises(UserError, match='^A gin binding looks like P = 16, and this is none: '):
        config.load([], [binding])


def test_the_paths_of_a_call_become_absolute_and_that_of_the_data_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '/home/somebody')
    config.load([], ["data_root = '~/data'", "output_dir = 'runs/a'", "weights = '~/best.pth'"])
    assert value('%data_root') == '~/data'
    assert value('%output_dir') == str(tmp_path / 'runs' / 'a')
    assert value('%weights') == '/home/somebody/best.pth'
    config.load([], [])
    assert [value(f'%{name}') for name in ('data_root', 'output_dir', 'weights')] == ['datasets', None, None]


def test_the_weights_to_evaluate_come_from_the_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.bound_weights([], ["weights = 'best.pth'"]) == str(tmp_path / 'best.pth')
    assert config.bound_weights([write(tmp_path / 'mine.gin', "weights = '/w/best.pth'")], []) == '/w/best.pth'
    with pytest.raises(ValueError, match='--gin_bindings="weights='):
        config.bound_weights([], [])


@pytest.mark.parametrize('files, expected', [
    ([], 'runs/mgn'), (['gin/market.gin'], 'runs/market'), (['gin/market.gin', '/a/b.c.gin'], 'runs/b.c')])
def test_the_default_output_dir_is_named_after_the_last_file(files, expected):
    assert config.default_output_dir(files) == expected


def test_gins_registry_lists_what_can_be_configured():
    """A private name of gin, which has no public list; config.configurables is where it is used."""
    known = config.configurables()
    assert {'train', 'evaluate', 'Extractor', 'MGN', 'Adam', 'cosine', 'market1501'} <= known.keys()
    assert known['Adam'].__name__ == 'Adam' and callable(known['train'])


def test_an_include_is_read_where_it_stands_and_lines_keep_their_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'base.gin', 'P = 5\nK = 5\n')
    top = write(tmp_path / 'top.gin', "P = 4\nseed = 4\ninclude 'base.gin'  # its own\nK = 6\ntrain.PP = 6\n")
    with pytest.raises(UserError, match="(?s)PP.*top.gin.*line 5.*nearest valid name is 'P'"):
        config.load([top], [])
    assert [value(name) for name in ('%P', '%K', '%seed')] == [5, 6, 4]


def test_a_users_mistake_keeps_its_sentence_where_gin_adds_to_it():
    @gin.configurable
    def mistaken():
        raise FileError('There is no file x; give another')

    with pytest.raises(OSError) as raised:
        mistaken()
    assert isinstance(raised.value, UserError) and 'In call to configurable' in str(raised.value)
    assert raised.value.message == 'There is no file x; give another'


def test_the_folder_of_recipes_is_no_package_and_the_package_is_whole():
    assert not list((PROJECT / 'gin').glob('**/*.py'))
    assert PROJECT not in Path(gin.__file__).parents or 'site-packages' in gin.__file__
    settings = read_configuration(str(PROJECT / 'pyproject.toml'), expand=False)['tool']['setuptools']
    assert set(settings['packages']) == {'mgn.gin', *(
        '.'.join(path.parent.relative_to(PROJECT).parts) for path in (PROJECT / 'mgn').glob('**/__init__.py'))}
    assert settings['package-dir'] == {'mgn.gin': 'gin'}
    others = {path.name for path in (PROJECT / 'mgn').iterdir() if path.suffix not in ('', '.py', '.so', '.pyc')}
    assert {'defaults.gin'} < others and settings['package-data'] == {'mgn': sorted(others), 'mgn.gin': ['*.gin']}


def test_importing_the_package_and_its_ops_is_light():
    script = ("import sys, mgn; first = set(sys.modules); from mgn import ops\n"
              "print(sorted({'torch', 'gin', 'absl', 'torchvision', 'mgn.config'} & first))\n"
              "print(sorted({'torch', 'gin', 'absl', 'torchvision', 'mgn.config'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True,
                          env={**os.environ, 'PYTHONPATH': str(PROJECT)})
    assert done.stdout == "[]\n['torch']\n"


def test_help_does_not_wait_for_torch():
    program = """
import sys
from mgn import eval, extract, train
print(sorted({'torch', 'torchvision'} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == '[]\n'


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(UserError, match="(?s)No module named 'nowhere_to_be_found'.*\nStart in .*PYTHONPATH"):
        config.load([], ['import nowhere_to_be_found'])


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


def test_circle_softmax_without_cosines_is_refused():
    with pytest.raises(UserError, match="softmax = @circle_softmax needs the cosines .* MGN.classifier = 'cosine'"):
        config.load([], ['mgn_losses.softmax = @circle_softmax'])
    config.load([], ['mgn_losses.softmax = @circle_softmax', "MGN.classifier = 'cosine'"])
