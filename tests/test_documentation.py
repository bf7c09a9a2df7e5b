"""README, docs and recipes: every code block says whether it is run, and what they name exists; `make long` runs them.

A comment just before a block says what is done with it:

    <!-- run -->                    as it is printed
    <!-- run short -->              the same, its trainings with the bindings SHORT after their own
    <!-- run after README.md -->    as it is printed, after the blocks of that page in the same folder
    <!-- file my_data.py -->        saved under this name for the blocks after it
    <!-- ci:demo -->                by .ci/run, which finds it by this name
    <!-- not run: REASON -->

Blocks that are no commands begin with ```text. The blocks of a page run in their order and in one folder.
"""

import csv
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import write_market

from mgn import config

ROOT = Path(__file__).parent.parent
PAGES = ['README.md', *sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'docs').glob('*.md'))]
RECIPES = sorted(path.name for path in (ROOT / 'gin').glob('*.gin'))
Block = namedtuple('Block', 'mark language text')
BLOCK = re.compile(r'(?:<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$', re.M | re.S)
MARK = re.compile(r'run|run short|run after (?P<page>\S+\.md)|file (?P<file>[\w.]+)|ci:(?P<ci>\w+)|not run: \S.*')
# Two steps on small images by a small network without downloaded weights; evaluation finds all this in the checkpoint.
SHORT = ('total_steps=2', 'input_size=(64, 32)', 'P=4', 'K=2', 'workers=1', "device='cpu'", "MGN.backbone='resnet18'",
         'MGN.pretrained=False', 'MGN.parts=(1, 2)', 'MGN.last_strides=(2, 2)', 'multi_step.warmup_steps=0',
         'multi_step.milestones=()', 'cosine.warmup_steps=0', 'cosine.start=0')
TRAINING = re.compile(r'-m mgn\.train(?:\\\n|.)*')  # to the end of the command, which may take several lines


def read(page):
    return (ROOT / page).read_text()


def blocks(page):
    return [Block(*match.group('mark', 'language', 'text')) for match in BLOCK.finditer(read(page))]


def code(page):
    """The code of a page: blocks, and what stands in backticks, which may go over the end of a line."""
    inline = re.findall('`([^`]+)`', BLOCK.sub('', read(page)))
    return [block.text for block in blocks(page)] + [' '.join(piece.split()) for piece in inline]


@pytest.mark.parametrize('page', PAGES)
def test_every_block_has_a_mark_and_every_mark_a_block(page):
    assert read(page).count('```') == 2 * len(blocks(page)), 'a block is left open, or indented'
    assert read(page).count('<!--') == sum(block.mark is not None for block in blocks(page)), 'a mark lacks its block'
    for block in blocks(page):
        assert (block.mark is None) == (block.language == 'text'), block
        mark = MARK.fullmatch(block.mark or 'run')
        assert mark, f'of unknown kind: {block.mark}'
        assert not mark['page'] or mark['page'] in PAGES
        assert not mark['ci'] or re.search(rf'\bfor name in .*\b{mark["ci"]}\b', read('.ci/run')), block.mark


@pytest.mark.parametrize('page', PAGES)
def test_what_code_names_exists(page):
    targets = re.findall(r'(?m)^(\w+):', read('Makefile'))
    for piece in code(page):
        assert set(re.findall(r'(?m)^make (\w+)', piece)) <= set(targets), piece
        for module in re.findall(r'-m ([\w.]+)', piece):
            assert importlib.util.find_spec(module), piece
        for path in re.findall(r'(?<![\w/.])(?:mgn|gin|tests|csrc|docs|benchmarks|\.ci)/[\w./*]*', piece):
            assert list(ROOT.glob(path)), piece
        for name, parameter in re.findall(r'(?:^|")(\w+)\.(\w+) ?=', piece):
            assert parameter in inspect.signature(config.configurables()[name]).parameters, piece


@pytest.fixture
def home(tmp_path):
    """A newcomer's folder: what stands for the published data sets, and for PATH, their own images."""
    people = write_market(tmp_path / 'PATH')
    for name in ('Market-1501-v15.09.15', 'DukeMTMC-reID'):
        shutil.copytree(people, tmp_path / 'datasets' / name)
    msmt = tmp_path / 'datasets' / 'MSMT17_V1'
    msmt.mkdir()
    (msmt / 'list_val.txt').touch()
    for part, folder, old in (('train', 'train', 'bounding_box_train'), ('query', 'test', 'query'),
                              ('gallery', 'test', 'bounding_box_test')):
        images = sorted(path for path in (people / old).iterdir() if path.name[0] != '-')
        names = [f'{path.name[:4]}/{path.name[:4]}_000_{path.name[6]:0>2}_{part}{number}.jpg'
                 for number, path in enumerate(images)]
        for path, name in zip(images, names):
            (msmt / folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, msmt / folder / name)
        (msmt / f'list_{part}.txt').write_text(''.join(f'{name} {int(name[:4])}\n' for name in names))
        with open(people / f'{part}.csv', 'w') as file:
            rows = csv.writer(file)
            rows.writerow(('path', 'identity', 'camera'))
            rows.writerows((path.relative_to(people), int(path.name[:4]), path.name[6]) for path in images)
    yield tmp_path
    shutil.rmtree(tmp_path)  # gigabytes


def run(home, *command, text=''):
    """What a command prints; it ends without error. Its standard input is the text."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']])
    environment = {**os.environ, 'PATH': path, 'HOME': str(home), 'PYTHONPATH': str(ROOT), 'PET_STANDALONE': '1'}
    done = subprocess.run(command, cwd=home, input=text, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0 and 'Traceback' not in done.stdout, f'{command} {text}\n{done.stdout}'
    return done.stdout


def run_commands(home, commands, short=True):
    """Runs lines of a shell. Each training among them is new: a folder of another run would continue that one."""
    bindings = shlex.join(f'--gin_bindings={binding}' for binding in SHORT)
    trainings = len(TRAINING.findall(commands))
    if short:
        commands = TRAINING.sub(lambda match: f'{match[0]} {bindings}', commands)
    printed = run(home, 'bash', '-euo', 'pipefail', text=commands)
    assert len(re.findall('training on .* from step 0 to ', printed)) == trainings, f'{commands}\n{printed}'


def run_page(home, page):
    for block in blocks(page):
        mark = MARK.fullmatch(block.mark or 'not run: text')
        if mark['page']:
            run_page(home, mark['page'])
        if mark['file']:
            (home / mark['file']).write_text(block.text)
        elif mark[0].startswith('run') and block.language == 'python':
            run(home, sys.executable, '-', text=block.text)
        elif mark[0].startswith('run'):
            run_commands(home, block.text, mark[0] == 'run short')


@pytest.mark.long
@pytest.mark.parametrize('page', PAGES)
def test_blocks_run(home, page):
    run_page(home, page)


@pytest.mark.long
@pytest.mark.parametrize('recipe', RECIPES)
def test_the_command_of_a_recipe_runs(home, recipe):
    command = read(f'gin/{recipe}').partition('\n')[0].removeprefix('# ')
    assert command.startswith(f'python -m mgn.train --gin_file=gin/{recipe}')
    run_commands(home, command)
