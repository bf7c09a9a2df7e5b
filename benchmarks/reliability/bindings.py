"""Every parameter that gin can bind × a table of wrong values: refused by a sentence before anything starts, or used.

What is accepted runs: an evaluation, a training step, a checkpoint, mgn.eval and mgn.extract, all over a thin network.
"""

import ast
import contextlib
import functools
import inspect
import itertools
import math
import random
import re
import tempfile
from pathlib import Path

import gin
import torch
import torchvision
from conftest import write_image, write_market
from thin import BINDINGS, ThinResNet, fitting_schedule

from benchmarks.reliability.driver import Row, told
from benchmarks.reliability.files import is_sentence, write_lists
from mgn import config, evaluation, step, training
from mgn.data import loader
from mgn.ops.errors import UserError

VALUES = ("'x'", "'False'", "''", '-1', '0', '2.5', '-0.5', '1e999', f'{10 ** 20}', '100000', 'None', 'True', 'False',
          '()', '(1,)', '(1, 2, 3)', '[]', '{}', '@market1501', '@market1501()', '@nothing', '%nothing')
USED_BY = {'AdamW': ('make_optimizer.optimizer = @AdamW',), 'SGD': ('make_optimizer.optimizer = @SGD',),
           'multi_step': ('train.schedule = @multi_step', 'multi_step.warmup_steps = 0', 'multi_step.milestones = ()'),
           'msmt17': ('dataset = @msmt17()',),
           'dukemtmcreid': ('dataset = @dukemtmcreid()',), 'market_layout': ('dataset = @market_layout()',)}
THIN = (*BINDINGS, *fitting_schedule('total_steps = 1'), 'total_steps = 1', 'train.evaluate_every = 1')
OF_GIN = 'macro', 'constant', 'singleton'


@functools.cache
def parameters():
    """(name to bind, its default) of all macros and of all parameters of configurables."""
    config.parse([], [])
    found = [(name, gin.query_parameter(f'%{name}')) for name in config.default_macros()]
    for name, configurable in sorted(config.configurables().items()):
        if name not in OF_GIN and configurable.__module__.split('.')[0] in ('mgn', 'torch'):
            found += [(f'{name}.{parameter.name}', parameter.default)
                      for parameter in inspect.signature(configurable).parameters.values()]
    return found


@functools.cache
def shuffled():
    """All cases in random order, so that some of them show what all are like."""
    cases = list(itertools.product(parameters(), VALUES))
    random.Random(0).shuffle(cases)
    return cases


def prepare(folder):
    thin_and_short([])
    write_market(folder / 'data')
    (folder / 'msmt').mkdir()
    write_lists(folder / 'msmt')
    for part, images in (('train', 'train'), ('train', 'val'), ('test', 'query')):  # the gallery has those of the query
        for line in (folder / 'msmt' / f'list_{images}.txt').read_text().splitlines():
            write_image(folder / 'msmt' / part / line.split()[0], 0)
    config.load([], [*THIN, f"data_root = '{folder}/data'"])
    training.Training(str(folder / 'run')).run()


class Enough(BaseException):
    """A step has been trained, which is enough of a run that goes on."""


class OfNoNetwork:
    """ImageNet weights that cannot be downloaded."""
    class IMAGENET1K_V1:
        url = 'of torchvision'

        @staticmethod
        def get_state_dict(check_hash):
            raise OSError('no network')


def thin_and_short(steps):
    """The thin network, and an end before the second step. No crowd of workers: it would end the machine."""
    torchvision.models.get_model = lambda backbone, weights: ThinResNet()
    torchvision.models.get_model_weights = lambda backbone: OfNoNetwork
    real = step.train_step

    def one_step(*args):
        if steps:
            raise Enough
        losses = real(*args)
        steps.append(0)
        return losses
    training.train_step = one_step
    start = loader.DataLoader

    def start_workers(*args, num_workers, **options):
        assert num_workers <= 16, f'{num_workers} worker processes were about to start'
        return start(*args, num_workers=num_workers, **options)
    loader.DataLoader = start_workers


def used(given, run, steps):
    """Trains, evaluates and extracts with the bindings, in a folder of its own."""
    with contextlib.suppress(Enough):
        config.load([], [*THIN, *given])
        training.Training(str(run)).run()
    steps.clear()
    weights = f"weights = '{run.parent}/run/best.pth'"
    evaluation.evaluate_checkpoint(config.load_checkpoint([], [weights, f"output_dir = '{run}'", *given]))
    evaluation.extract_checkpoint(config.load_checkpoint([], [weights, f"features_dir = '{run}/features'", *given]))


def binding(rng, folder, number):
    (name, default), value = shuffled()[number]
    torch.set_num_threads(1)
    configurable, given, steps = name.split('.')[0], f'{name} = {value}', []
    thin_and_short(steps)
    with tempfile.TemporaryDirectory(dir=folder) as run, contextlib.chdir(run):
        try:
            used([f"data_root = '{folder}/{'msmt' if configurable == 'msmt17' else 'data'}'",
                  *USED_BY.get(configurable, ()), given], Path(run), steps)
        except UserError as error:
            said = error.message
            diverged = re.search('NaN|finite', said)  # by a value that is possible, such as a large weight decay
            assert not steps or diverged, f'{given}: refused after the first step: {said}'
            own = said.replace(run, '')  # without the path of this folder, which a message may have in thirty lines
            assert is_sentence(said) and len(own) < 2000, f'{given}: this is no sentence: {said}'
            unnamed = re.search('architecture|No query', said)  # the value is possible, but not with this data or file
            named = any(word in said for word in (name, name.split('.')[-1], value.strip("@%()'")))
            assert named or unnamed or diverged, f'{given}: {said}'
        except Exception as error:
            raise AssertionError(f'{given}: {told(error)}') from error
        else:
            assert possible(name, value, default), f'{given} was accepted, although the default is {default!r}'


def possible(name, value, default):
    """Whether a value is like the default: of its type, and for numbers finite, and of its sign."""
    if not isinstance(default, (bool, int, float, str, tuple)) or name.startswith('pedestrians.'):  # it is not used
        return True
    if value == 'None':
        return name == 'mgn_losses.margin'  # the soft margin
    try:
        value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return False
    of_torch = name.split('.')[0] in ('Adam', 'AdamW', 'SGD')  # which writes 0 for 0.0, and checks signs itself
    kind = float if of_torch and type(default) is int else type(default)
    like = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
    if not isinstance(value, like) or isinstance(value, bool) != isinstance(default, bool):
        return False
    if isinstance(value, (int, float)):
        fraction = re.search('probability|smoothing|lambda', name)
        return math.isfinite(value) and (of_torch or value >= 0) and (not fraction or value <= 1)
    return True


ROWS = {'bindings': Row('each parameter × a table of wrong values', len(shuffled()), binding, prepare,
                        seconds=60, memory=4 * 2 ** 30, limit=3 * 3600,
                        fixed='texts that counted as true; about 40 of Python\'s own messages')}
