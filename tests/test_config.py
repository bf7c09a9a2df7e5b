"""Gin files and bindings: found from anywhere, later ones win, names that reach nothing are errors."""

import os
import subprocess
import sys
from pathlib import Path

import gin
import pytest
from setuptools.config.pyprojecttoml import read_configuration

import mgn
from mgn import config
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


def test_circle_softmax_without_cosines_is_refused():
    with pytest.raises(UserError, match="softmax = @circle_softmax needs the cosines .* MGN.classifier = 'cosine'"):
        config.load([], ['mgn_losses.softmax = @circle_softmax'])
    config.load([], ['mgn_losses.softmax = @circle_softmax', "MGN.classifier = 'cosine'"])
