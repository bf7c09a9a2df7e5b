"""Gin files and bindings, read strictly: a binding that reaches nothing is an error. For binaries only.

Order: defaults.gin, the configuration saved in a checkpoint (mgn.eval, mgn.extract), every --gin_file, every
--gin_bindings; later ones win.
"""

import contextlib
import difflib
import inspect
import io
import os
import re
import tokenize
from pathlib import Path

import gin

# All that can be configured: a recipe may bind what the binary at hand does not use.
from mgn import evaluation, features, losses, model, optim, training  # noqa: F401
from mgn.data import augmentation, datasets  # noqa: F401
from mgn.ops.errors import MissingFile, UserError
from mgn.runs import checkpoint

PACKAGE = os.path.dirname(os.path.abspath(__file__))
DEFAULTS = os.path.join(PACKAGE, 'defaults.gin')
# A checkout has the recipes beside the package.
RECIPES = PACKAGE if os.path.isdir(os.path.join(PACKAGE, 'gin')) else os.path.dirname(PACKAGE)
SHARED = ('dataset', 'input_size')  # training and evaluation have to agree on them
PATH_MACROS = ('data_root', 'output_dir', 'weights', 'features_dir')
MACRO = 'gin.macro'
# Parameters in configurations that earlier versions saved → their names of today; None: another binding has the value.
EXTRACTION = ('input_size', 'batch_size', 'workers', 'flip_test', 'precision')
MOVED = {**{f'evaluate.{name}': f'Extractor.{name}' for name in EXTRACTION},
         **{f'write_features.{name}': None for name in EXTRACTION}}


def load(gin_files, bindings, saved=''):
    """Parses everything into gin's global configuration and locks it.

    Args:
        gin_files: paths, looked for in the working folder, then in the package; what they include, beside the
            including file first.
        bindings: strings. saved: the gin text of a checkpoint; its output_dir and features_dir are not taken over.
    Raises:
        UserError: unknown names, with the nearest valid one. MissingFile: a gin file, with the paths tried.
    """
    parse(gin_files, bindings, saved)
    with gin_errors_explained():
        gin.finalize()


def load_checkpoint(gin_files, bindings):
    """The content of the checkpoint that the flags bind to `weights`. Its configuration is loaded, below theirs."""
    content = checkpoint.load(bound_weights(gin_files, bindings))
    load(gin_files, bindings, saved=content['config'])
    return content


def bound_weights(gin_files, bindings):
    """The path that the flags bind to `weights`; UserError where they bind none."""
    parse(gin_files, bindings)
    weights = gin.query_parameter('%weights')
    if weights is None:
        raise UserError("No checkpoint is named; give --gin_bindings=\"weights='runs/market/best.pth'\"")
    return os.path.abspath(os.path.expanduser(weights))


def default_output_dir(gin_files):
    """Where training writes unless output_dir is bound: runs/<name of the last gin file>."""
    return os.path.join('runs', Path(gin_files[-1]).stem if gin_files else 'mgn')


def parse(gin_files, bindings, saved=''):
    gin.clear_config()
    with gin_errors_explained():
        parse_file(DEFAULTS)
        gin.parse_config(translated(saved))
        for name in ('output_dir', 'features_dir') if saved else ():
            gin.bind_parameter(f'{name}/macro.value', None)
        for gin_file in gin_files:
            parse_file(gin_file)
        parse_text('\n'.join(bindings))


def parse_file(path, including_folder=''):
    """Parses a gin file, which is looked for beside the including file, in the working folder and among the recipes."""
    folders = [including_folder or os.getcwd(), os.getcwd(), RECIPES]
    tried = list(dict.fromkeys(os.path.join(folder, os.path.expanduser(path)) for folder in folders))
    found = next(filter(os.path.isfile, tried), None)
    if found is None:
        raise MissingFile(f'There is no gin file {path}; tried {", ".join(tried)}')
    with open(found) as file:
        parse_text(file.read(), found)


def parse_text(text, path=''):
    """Parses gin text, of the file `path` if there is one. gin itself would look for includes in the working folder."""
    start = 0
    for include in [*re.finditer(r'''(?m)^include\s+["'](.+?)["'][ \t]*(?:#.*)?$''', text), None]:
        part = io.StringIO('\n' * text.count('\n', 0, start) + text[start:include and include.start()])
        part.name = path  # for gin's messages, as are the empty lines
        gin.parse_config(part)
        if include:
            parse_file(include[1], os.path.dirname(path))
            start = include.end()


def translated(saved):
    """A configuration that an earlier version saved, with today's names."""
    for old, new in MOVED.items():  # gin indents the lines of a value that takes several
        saved = re.sub(rf'(?m)^{re.escape(old)} =(.*\n?(?:    .*\n?)*)', rf'{new} =\1' if new else '', saved)
    return saved


@gin.config.register_finalize_hook
def check_names(config):
    """Rejects what gin accepts silently: macros that nothing uses and scopes that nothing enters."""
    used = {reference.config_key for reference in gin.config.iterate_references(config)}
    used_scopes = {scope for scope, _ in used if scope}  # a macro's value is made in a scope of the macro's name
    for (scope, selector), parameters in config.items():
        if selector == MACRO and (scope, MACRO) not in used and scope not in default_macros():
            raise UserError(f'Nothing uses the macro {scope!r}{nearest(scope, default_macros())}')
        for name in SHARED:
            if str(parameters.get(name, f'%{name}')) != f'%{name}':
                raise UserError(f'Training and evaluation share {name}, so it must be bound as a macro, found '
                                f'{selector}.{name} = {parameters[name]}; bind {name} = …')
        if selector != MACRO and scope and scope not in used_scopes:
            raise UserError(f'No reference enters the scope {scope!r} of {selector}{nearest(scope, used_scopes)}')


@gin.config.register_finalize_hook
def absolute_paths(config):
    """Paths become absolute, so that a checkpoint's configuration serves from any folder."""
    keys = [(name, MACRO, 'value') for name in PATH_MACROS] + [(*key, 'root') for key in config]
    paths = {key: config.get(key[:2], {}).get(key[2]) for key in keys}
    for scope, selector, name in (key for key, path in paths.items() if path == ''):
        raise UserError(f"{scope or f'{selector}.{name}'} must be a path, not ''; bind '.' for the working folder")
    return {key: os.path.abspath(os.path.expanduser(path)) for key, path in paths.items() if isinstance(path, str)}


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
    except ModuleNotFoundError as error:
        missing = re.search(r"No module named '(.*)'\n.*\n\s+(?:import|from) \1\b", str(error))
        if not missing:  # the module that gin imports was found, but imports one that was not
            raise
        raise UserError(f'The configuration imports {missing[1]}, which Python does not find; start in the folder of '
                        f'{missing[1]}.py, or add that to PYTHONPATH') from None
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise UserError(explained(error)) from None


def explained(error):
    """gin's message with the nearest valid name, or the one that a parameter has today."""
    message = str(error)
    if not isinstance(error, ValueError):
        return f'A gin binding looks like P = 16, and this is none: {message}'
    if macro := re.match(r"No bindings specified for '(.*?)/gin.macro'", message):
        return f'The macro %{macro[1]} is used, but has no value{nearest(macro[1], default_macros())}'
    if configurable := re.search(r"No configurable matching (?:reference )?'@?([^'()]*)", message):
        return message + nearest(configurable[1], configurables())
    if parameter := re.search(r"Configurable '(?:.*\.)?(.*?)' doesn't have a parameter named '(.*?)'", message):
        name, parameter = parameter.groups()
        if f'{name}.{parameter}' in MOVED:
            return f'{message}; it is called Extractor.{parameter}'
        return message + nearest(parameter, inspect.signature(configurables()[name]).parameters)
    return message


def nearest(name, names):
    close = difflib.get_close_matches(name, names, n=1, cutoff=0)
    return f'; the nearest valid name is {close[0]!r}' if close else '; there are none'
