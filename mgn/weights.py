"""Weights that other projects have saved, in this project's names and options. Reading them runs no code of a file.

Besides checkpoints of this project, it reads:
- fast-reid's MGN in two layouts: A, of its versions 0.1 (the released market_mgn_R50-ibn.pth and its like), and B, of
  1.0 and later. Facts from its code at the tags v0.1, v0.1.1, v1.0.0, v1.3.0 and from PyPI `fastreid` 1.4.0.
- backbones in torchvision's names, plain or with IBN (IBN-Net's resnet50_ibn_a-….pth and its like).
"""

import inspect
import os
import re
import tokenize
from typing import NamedTuple

import gin
import torch

from mgn.data.augmentation import MEAN, STD
from mgn.ops.errors import UserError
from mgn.runs import checkpoint
from mgn.runs.log import logger

KNOWN = ('Known are checkpoints of mgn.train; MGN of fast-reid, with keys such as backbone.0.weight, '
         'b1.0.0.conv1.weight and b1_head.bnneck.weight or b1_head.bottleneck.0.weight; and backbones, with '
         'conv1.weight and layer1.0.conv1.weight')
DATASETS = {751: 'market1501', 702: 'dukemtmcreid', 1041: 'msmt17'}  # by their number of identities to train on
DEPTHS = {5: 'resnet50', 22: 'resnet101'}  # by the blocks of layer3 behind the first
HEADS = ('b1', 'b2', 'b3', 'b21', 'b22', 'b31', 'b32', 'b33')
POOLS = {0: (0,), 1: (1, 3, 4), 2: (2, 5, 6, 7)}  # heads that a branch pools for
IN_HEADS = {'pool.0.p': 'p', 'head.pool_layer.p': 'p',  # fast-reid's names behind <head>_ → ours behind heads.<h>.
            'pool.1.weight': 'reduction.weight', 'head.bottleneck.0.weight': 'reduction.weight',
            'pool.2.': 'norm.', 'head.bnneck.': 'neck.', 'head.bottleneck.1.': 'neck.',
            'head.classifier.weight': 'classifier.weight', 'head.weight': 'classifier.weight'}


class Weights(NamedTuple):
    """What a file holds, in this project's names; a backbone's in torchvision's."""
    path: str
    source: str               # what it is, for the log
    state: dict               # {name: tensor}
    options: dict | None      # of MGN; None: a backbone alone
    chosen: dict              # those of the options that the file does not tell → why they are so
    left_out: list[str]       # names in the file

    @property
    def num_classes(self):
        return len(self.state.get('heads.0.classifier.weight', ()))


def load_checkpoint(path):
    """A whole MGN as the content of a checkpoint (`mgn.runs.checkpoint`), whoever has saved it.

    The options of another project's file are bindings in its configuration, so that those of the user win.
    Raises MissingFile; UserError where the file is damaged or fits no known layout, with the first keys that do not.
    """
    path = os.path.expanduser(str(path))
    content = checkpoint.read(path)
    if checkpoint.is_own(content):
        return checkpoint.checked(content, path)
    weights = from_elsewhere(content, path)
    if weights.options is None:
        raise UserError(f'{path} holds {weights.source} without heads. Train with MGN.pretrained = {path!r}, or give '
                        f'the weights of a whole MGN.')
    tell(weights)
    lines = [f'MGN.{name} = {value!r}' for name, value in weights.options.items()] + ['input_size = (384, 128)']
    if dataset := DATASETS.get(weights.num_classes):
        lines.append(f'dataset = @{dataset}()')
        logger.info('dataset = @%s(), unless bound otherwise: by the %d classes', dataset, weights.num_classes)
    return {'config': '\n'.join(lines), 'num_classes': weights.num_classes, 'step': 0, 'model': weights.state,
            'losses': None, 'mAP': None}


def read(path):
    """The Weights in a file of any known kind. Raises as load_checkpoint does."""
    path = os.path.expanduser(path)
    content = checkpoint.read(path)
    if not checkpoint.is_own(content):
        return from_elsewhere(content, path)
    content = checkpoint.checked(content, path)
    options = options_in(saved_values(content['config'], path))
    return Weights(path, 'a checkpoint of mgn.train', content['model'], options, {}, [])


def options_in(values):
    """The options of MGN among saved_values."""
    return {name.removeprefix('MGN.'): value for name, value in values.items() if name.startswith('MGN.')}


def saved_values(config, path):
    """What the configuration of a checkpoint binds, {'MGN.backbone': 'resnet50', 'input_size': (384, 128), …}."""
    values = {}
    try:
        for statement in gin.config_parser.ConfigParser(config, gin.config.ParserDelegate(skip_unknown=True)):
            if isinstance(statement, gin.config_parser.BindingStatement):
                values['.'.join(filter(None, (statement.selector, statement.arg_name)))] = statement.value
        return {name: without_macros(value, values) for name, value in values.items()}
    except (ValueError, SyntaxError, TypeError, RecursionError, tokenize.TokenError) as error:
        raise UserError(f'The configuration in {path} cannot be read: {error}. Give another checkpoint.') from None


def without_macros(value, macros):
    """The value with those of macros, {name: value}, in their place; RecursionError where one is bound to itself."""
    if isinstance(value, (tuple, list)):
        return tuple(without_macros(item, macros) for item in value)
    name = repr(value)[1:] if repr(value)[0] == '%' else None  # %name: of a macro, or one of gin's constants
    return without_macros(macros[name], macros) if name in macros else value


def load_backbone(resnet, weights, name):
    """Loads a backbone's weights into the ResNet of this name, but for its classifier, which MGN does not use."""
    tell(weights)
    checkpoint.load_model(resnet, weights.state, weights.path, without='fc.', remedy=(
        f'They should be those of {name}: bind another MGN.backbone, or give another file to MGN.pretrained.'))


def load_all_but_classifiers(model, weights):
    """Loads the weights of a whole MGN; the model keeps its own classifiers."""
    tell(weights)
    made_with = {name: weights.options.get(name, parameter.default)  # a configuration does not bind all
                 for name, parameter in inspect.signature(type(model)).parameters.items() if name in model.architecture}
    differing = [f'MGN.{name} = {value!r}' for name, value in made_with.items()
                 if model.architecture[name] != (list(value) if isinstance(value, tuple) else value)]
    checkpoint.load_model(model, weights.state, weights.path, without='.classifier.', remedy=(
        f'They are of {", ".join(differing) or "another MGN"}: bind that, or give another file to MGN.pretrained.'))
    if differing:
        logger.warning('%s was trained with %s, which is bound otherwise', weights.path, ', '.join(differing))


def tell(weights):
    """Says in the log what was read, and each option that was chosen."""
    logger.info('%s: %s%s', weights.path, weights.source,
                f' of {weights.num_classes} classes' if weights.num_classes else '')
    logger.info('%d tensors; left out: %s', len(weights.state), ', '.join(weights.left_out) or 'nothing')
    for name, why in weights.chosen.items():
        logger.info('MGN.%s = %r, unless bound otherwise: %s', name, weights.options[name], why)


def from_elsewhere(content, path):
    """The Weights in what torch.load has made of another project's file."""
    state = content
    for field in ('model', 'state_dict'):
        if isinstance(state, dict) and isinstance(state.get(field), dict):
            state = state[field]
    if not isinstance(state, dict) or not state:
        raise UserError(f'{path} holds no weights by name, but {type(state).__name__}. {KNOWN}.')
    bad = [f'{key} ({fault})' for key, value in state.items() if (fault := checkpoint.misfit(value, value))]
    bad += [f'{key!r} (no name)' for key in state if not isinstance(key, str)]
    if bad:
        refuse(path, bad)
    if all(key.startswith('module.') for key in state):
        state = {key.removeprefix('module.'): value for key, value in state.items()}
    for key in [key for key in state if key.endswith('.running_var')]:  # PyTorch before 0.4.1 had no such counter
        state.setdefault(key.replace('running_var', 'num_batches_tracked'), torch.zeros((), dtype=torch.int64))
    if 'b1.0.0.conv1.weight' in state and 'backbone.0.weight' in state:
        return from_fastreid(state, path)
    if 'conv1.weight' in state and 'layer1.0.conv1.weight' in state:
        left_out = [key for key in state if key.startswith('fc.')]
        kind = 'a backbone with IBN' if 'layer1.0.bn1.IN.weight' in state else 'a backbone'
        return Weights(path, kind, {k: v for k, v in state.items() if k not in left_out}, None, {}, left_out)
    refuse(path, list(state))


def refuse(path, keys):
    shown = ', '.join(str(key) for key in keys[:checkpoint.SHOWN])
    raise UserError(f'{path} fits no known layout of weights: {len(keys)} keys do not, the first of them {shown:.500}. '
                    f'{KNOWN}.')


def from_fastreid(state, path):
    """Weights of fast-reid's MGN → Weights."""
    layout = 'A' if 'b1_pool.1.weight' in state else 'B'
    third = len({key.split('.')[2] for key in state if key.startswith('b1.0.')})
    left_out = [key for key in ('pixel_mean', 'pixel_std') if key in state]
    names = {key: our_name(key, third) for key in state if key not in left_out}
    unknown = [key for key, name in names.items() if name is None]
    if unknown or third not in DEPTHS:
        refuse(path, unknown or [f'{third} blocks of b1.0, where ResNet-50 has 5 and ResNet-101 has 22'])
    for key, expected in zip(('pixel_mean', 'pixel_std'), (MEAN, STD)):
        if key in left_out and not torch.equal(*(tensor.flatten().double().round(decimals=3) for tensor in (
                state[key], state[key].new_tensor(expected)))):  # as halves, too
            raise UserError(f'{path} normalises images by {key} = {state[key].flatten().tolist()!s:.99}, but this '
                            f'project by {expected}. Give other weights.')
    key_of = {name: key for key, name in names.items()}
    bad = [f'{key} (the same as {key_of[name]})' for key, name in names.items() if key_of[name] != key]
    bad += [f'{key} (one number)' for key in names if not state[key].ndim and not key.endswith('batches_tracked')]
    if bad:
        refuse(path, bad)
    ours = {name: state[key].flatten(1) if name.endswith('.reduction.weight') and state[key].ndim == 4 else state[key]
            for key, name in names.items()}
    exponents = {h: ours.pop(f'heads.{h}.p').flatten()[:2] for h in range(len(HEADS)) if f'heads.{h}.p' in ours}
    gem = len(exponents) > 0
    for branch, heads in POOLS.items():
        if exponents.keys() >= {*heads}:  # where one is missing, so is the whole to those who load it
            ours[f'pools.{branch}.p'] = torch.cat([exponents[h] for h in heads])
    ibn = '_ibn' if 'backbone.4.0.bn1.IN.weight' in state else ''
    options = {'backbone': DEPTHS[third] + ibn, 'parts': (1, 2, 3),
               'last_strides': (1, 1, 1) if gem or layout == 'B' else (2, 1, 1),
               'embedding_dim': len(ours.get('heads.0.reduction.weight', ())), 'pooling': 'gem' if gem else 'max',
               'first_pooling': 'padded' if layout == 'A' else 'ceil', 'reduction_bn': 'heads.0.norm.weight' in ours,
               'reduction_relu': layout == 'A', 'bnneck': 'heads.0.neck.weight' in ours}
    chosen = {name: f'in fast-reid with layout {layout}' for name in ('first_pooling', 'reduction_relu')}
    chosen['last_strides'] = f'as published for layout {layout} {"with" if gem else "without"} GeM'
    if not gem:
        chosen['pooling'] = "as published; 'avg' has the same weights"
    return Weights(path, f'MGN of fast-reid, layout {layout}, {options["backbone"]}', ours, options, chosen, left_out)


def our_name(key, third):
    """The name of a tensor of fast-reid's MGN in ours, None where it has none. third: blocks of layer3 in a branch."""
    first, _, rest = key.partition('.')
    if first == 'backbone':
        return f'trunk.{rest}'
    if first in HEADS[:3] and (place := re.fullmatch(r'([01])\.(\d{1,2})\.(.+)', rest)):
        return f'branches.{HEADS.index(first)}.{int(place[2]) + third * int(place[1])}.{place[3]}'
    head, _, rest = key.partition('_')
    for theirs, ours in IN_HEADS.items() if head in HEADS else ():
        if rest == theirs or theirs.endswith('.') and rest.startswith(theirs):
            return f'heads.{HEADS.index(head)}.{ours}{rest.removeprefix(theirs)}'
