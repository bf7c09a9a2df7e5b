"""Gin files and bindings, read strictly: a binding that reaches nothing or does not fit is an error. For binaries only.

Order: defaults.gin, the configuration saved in a checkpoint (not for mgn.train), every --gin_file, every
--gin_bindings; later ones win. Gin files are code of their author, as they may import modules. The configuration in a
checkpoint is data: bindings alone, of what this process knows already.
"""

import contextlib
import difflib
import functools
import inspect
import os
import re
import sys
import tokenize
from pathlib import Path

import gin

# All that can be configured: a recipe may bind what the binary at hand does not use.
from mgn import annotations, crop_search, evaluation, features, losses, model, optim, portable, training  # noqa: F401
from mgn import weights
from mgn.data import augmentation, datasets  # noqa: F401
from mgn.ops.errors import MissingFile, UserError
from mgn.runs.log import logger

PACKAGE = os.path.dirname(os.path.abspath(__file__))
DEFAULTS = os.path.join(PACKAGE, 'defaults.gin')
# A checkout has the recipes beside the package.
RECIPES = PACKAGE if os.path.isdir(os.path.join(PACKAGE, 'gin')) else os.path.dirname(PACKAGE)
gin.add_config_file_search_path(RECIPES)
SHARED = ('dataset', 'input_size')  # training and evaluation have to agree on them
MACRO = 'gin.macro'
# A checkpoint binds none of these.
OF_A_COMMAND = {'output_dir', 'features_dir', 'weights', 'query', 'gallery', 'compare', 'runs', 'report'}
TRAINING = ('train', 'mgn_losses', 'circle_softmax', 'make_optimizer', 'Adam', 'AdamW', 'SGD',
            'multi_step', 'cosine', 'Augmentation')
_saved_scopes = set()  # of the checkpoint at hand: flags may have rebound what uses them


def load(gin_files, bindings, saved=''):
    """Parses everything into gin's global configuration, checks all of it, and locks it.

    Args:
        gin_files: paths, looked for in the working folder, then in the package, as is what they include.
        bindings: strings. saved: the gin text of a checkpoint to evaluate (`bind_saved`).
    Raises:
        UserError: unknown names, with the nearest valid one; values that do not fit their parameter; a `saved` that is
            not plain bindings. MissingFile: a gin file, with the paths tried.
    """
    parse(gin_files, bindings, saved)
    with gin_errors_explained():
        gin.finalize()


def load_checkpoint(gin_files, bindings):
    """The content of the checkpoint that the flags bind to `weights`. Its configuration is loaded, below theirs."""
    content = weights.load_checkpoint(bound_weights(gin_files, bindings))
    load(gin_files, bindings, saved=content['config'])
    return content


def bound_weights(gin_files, bindings):
    """The path that the flags bind to `weights`; UserError where they bind none."""
    parse(gin_files, bindings)
    path = gin.query_parameter('%weights')
    if not path or not isinstance(path, str):
        raise UserError(f'The path of a checkpoint is needed, found weights = {path!r}; '
                        f"give --gin_bindings=\"weights='runs/market/best.pth'\"")
    return os.path.abspath(os.path.expanduser(path))


def default_output_dir(gin_files):
    """Where training writes unless output_dir is bound: runs/<name of the last gin file>."""
    return os.path.join('runs', Path(gin_files[-1]).stem if gin_files else 'mgn')


def parse(gin_files, bindings, saved=''):
    gin.clear_config()
    _saved_scopes.clear()
    with gin_errors_explained():
        gin.parse_config_file(DEFAULTS)
        if saved:
            bind_saved(saved)
        for gin_file in gin_files:
            gin.parse_config_file(os.path.expanduser(gin_file))
        # A path that is not UTF-8 holds surrogates, which gin reads as escapes only.
        gin.parse_config('\n'.join(bindings).encode(errors='backslashreplace').decode())


def bind_saved(text):
    """Binds what the configuration in a checkpoint says of evaluation.

    The names that it uses have to be known: those of this package, and those that the user's own gin files, parsed
    before, have imported; its own imports do nothing. Bindings that only training needs are set aside, as are folders
    and device of the training machine. Raises UserError with the line for an include, and for the import of what this
    process has not imported.
    """
    values, aside = {}, set()
    for statement in gin.config_parser.ConfigParser(text, gin.config.ParserDelegate(skip_unknown=True)):
        line = statement.location
        if isinstance(statement, gin.config_parser.BindingStatement):
            scope, selector, name, value, _ = statement
            if not name:
                scope, selector, name = '/'.join(filter(None, (scope, selector))), MACRO, 'value'
            if selector in TRAINING or selector != MACRO and selector.split('.')[-1] not in configurables():
                aside.add(selector)
            elif scope != 'device' and not {name, scope} & OF_A_COMMAND:
                values[scope, selector, name] = value, line
        elif not isinstance(statement, gin.config_parser.BlockDeclaration) and (
                getattr(statement, 'module', None) not in sys.modules):
            raise UserError(f'The configuration in a checkpoint should consist of bindings, but its line '
                            f'{line.line_num} is {line.line_content.strip()!r:.200}. Give another checkpoint; if it is '
                            f'yours, import the module in a --gin_file of your own')
    while unused := [key for key in values if key[1] == MACRO and key[0] not in default_macros() and key[0] not in {
            reference.config_key[0] for reference in gin.config.iterate_references(list(values.values()))}]:
        for key in unused:  # such as those of bindings that were set aside
            del values[key]
    for key, (value, line) in values.items():
        with gin.utils.try_with_location(line):
            gin.bind_parameter(key, value)
        _saved_scopes.add(key[0])
    gin.bind_parameter('pedestrians.draw', False)  # a checkpoint writes nothing
    if aside:
        logger.info('set aside, as evaluation does not need them: bindings of %s', ', '.join(sorted(aside)))


@gin.config.register_finalize_hook
def check_names(config):
    """Rejects what gin accepts silently: macros that nothing uses and scopes that nothing enters."""
    used = {reference.config_key for reference in gin.config.iterate_references(config)}
    used_scopes = {scope for scope, _ in used if scope} | _saved_scopes  # a macro's value is made in its own scope
    for (scope, selector), parameters in config.items():
        if selector == MACRO and (scope, MACRO) not in used and scope not in {*default_macros(), *_saved_scopes}:
            raise UserError(f'Nothing uses the macro {scope!r}{nearest(scope, default_macros())}')
        for name in SHARED:
            if str(parameters.get(name, f'%{name}')) != f'%{name}':
                raise UserError(f'Training and evaluation share {name}, so it must be bound as a macro, found '
                                f'{selector}.{name} = {parameters[name]}; bind {name} = …')
        if selector != MACRO and scope and scope not in used_scopes:
            raise UserError(f'No reference enters the scope {scope!r} of {selector}{nearest(scope, used_scopes)}')


@gin.config.register_finalize_hook
def absolute_paths(config):
    """Makes the paths of a command (OF_A_COMMAND) absolute. data_root stays as given, as a checkpoint keeps it."""
    paths = {(name, MACRO, 'value'): config[name, MACRO]['value'] for name in OF_A_COMMAND}
    return {key: os.path.abspath(os.path.expanduser(path)) for key, path in paths.items() if path and type(path) is str}


@gin.config.register_finalize_hook
def check_values(config):
    """Rejects values that do not fit the annotation of their parameter."""
    macros = {name: parameters['value'] for (name, selector), parameters in config.items() if selector == MACRO}
    for (_, selector), parameters in config.items():
        if not selector.startswith(('mgn.', 'torch.optim.')):
            continue  # a user's own: its annotations may mean anything
        expected = annotations.of_parameters(gin.get_configurable(selector))
        for name, value in parameters.items():
            bound = repr(value)[1:] if repr(value)[0] == '%' else f'{selector.split(".")[-1]}.{name}'
            if name in expected:
                annotations.check(weights.without_macros(value, macros), expected[name], bound)


@gin.config.register_finalize_hook
def check_softmax(config):
    """Rejects circle_softmax of logits that are no cosines: its margins would mean nothing."""
    softmax = config.get(('', 'mgn.losses.mgn_losses'), {}).get('softmax')
    if 'circle_softmax' in str(softmax) and config.get(('', 'mgn.model.MGN'), {}).get('classifier') != 'cosine':
        raise UserError(f'mgn_losses.softmax = {softmax} needs the cosines of a classifier; bind '
                        f"MGN.classifier = 'cosine'")


@functools.cache
def default_macros():
    with open(DEFAULTS) as lines:
        return [line.split(' ')[0] for line in lines if re.match(r'\w+ = ', line)]


def configurables():
    """What can be configured, by its short name. gin has no public list of it."""
    return {name.rsplit('.', 1)[-1]: configurable.wrapped for name, configurable in gin.config._REGISTRY.items()}


@contextlib.contextmanager
def gin_errors_explained():
    """What gin refuses is a user's mistake, said with the nearest valid name."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise MissingFile(f'{error} Correct the path, or start in another folder.') from error
    except ModuleNotFoundError as error:
        raise UserError(f'{error}\nStart in the folder of that module, or add that to PYTHONPATH.') from error
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, TypeError, KeyError) as error:
        raise UserError(explained(error)) from None


def explained(error):
    """gin's message with the nearest valid name."""
    message = str(error)
    if isinstance(error, UnicodeDecodeError):
        return f'A gin file is UTF-8 text, and one is not ({message}); give --gin_bindings="weights=\'…\'" for weights'
    if isinstance(error, RecursionError):
        return 'A gin file includes itself, a macro is bound to itself, or a value is nested too deeply; correct it'
    if not isinstance(error, ValueError):
        return f'A gin binding looks like P = 16, and this is none: {re.sub(" on line .*: <ast.*?>", "", message)}'
    if macro := re.match(r"No bindings specified for '(.*?)/gin.macro'", message):
        return f'The macro %{macro[1]} is used, but has no value; bind it{nearest(macro[1], default_macros())}'
    if configurable := re.search(r"No configurable matching (?:reference )?'@?([^'()]*)", message):
        return (f'{message}{nearest(configurable[1], configurables())}; for a name of your own give the --gin_file '
                f'that imports its module')
    if parameter := re.search(r"Configurable '(?:.*\.)?(.*?)' doesn't have a parameter named '(.*?)'", message):
        name, parameter = parameter.groups()
        return message + nearest(parameter, inspect.signature(configurables()[name]).parameters)
    return message


def nearest(name, names):
    close = difflib.get_close_matches(name, names, n=1, cutoff=0)
    return f'; the nearest valid name is {close[0]!r}' if close else '; there are none'
