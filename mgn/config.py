"""Flags and gin files → bindings, read strictly: a binding that reaches nothing is an error.

Order: defaults.gin, the configuration saved in a checkpoint (mgn.eval), every --gin_file, every --gin_bindings; later
ones win. Import this from binaries only.
"""

import contextlib
import difflib
import inspect
import logging
import os
import re
import sys
import tokenize

import gin
from absl import app, flags
from tqdm.contrib.logging import logging_redirect_tqdm

flags.DEFINE_multi_string('gin_file', [], 'Gin file, e.g. gin/market.gin; repeatable, later ones win.')
flags.DEFINE_multi_string('gin_bindings', [], 'Gin binding, e.g. "data_root=\'datasets\'"; repeatable, later ones win.')

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = ('dataset', 'input_size')  # training and evaluation have to agree on them
PATH_MACROS = ('data_root', 'output_dir', 'weights', 'features_dir')
MACRO = 'gin.macro'


def run(main):
    """Runs a binary's main(gin_files, bindings) under absl; a user's mistake ends it with its message alone, said by one process."""
    def absl_main(argv):
        from mgn.runs import processes  # and torch, which --help need not wait for

        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter('%(asctime)s %(levelname).1s %(message)s', '%H:%M:%S'))
        package = logging.getLogger('mgn')
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False  # absl prints the root logger's messages too
        try:
            processes.join()
            if processes.number() > 0:
                package.setLevel(logging.CRITICAL)  # process 0 says it
            if len(argv) > 1:
                raise ValueError(f'want flags only, got {argv[1:]}; give --gin_file=FILE or --gin_bindings="name=value"')
            with logging_redirect_tqdm([package]):
                main(flags.FLAGS.gin_file, flags.FLAGS.gin_bindings)
            processes.leave()
        except SystemExit:  # a run that was interrupted, in all processes
            processes.leave()
            raise
        except Exception as error:
            if not processes.first_to_fail():
                sys.exit(1)
            if flags.FLAGS.verbosity > 0 or not (isinstance(error, (ValueError, TypeError, OSError)) or processes.lost(error)):
                raise
            sys.exit(f'error: {processes.lost(error) or error}\n(--verbosity=1 shows where)')
    app.run(absl_main)


def load(gin_files, bindings, saved=''):
    """Parses everything into gin's global configuration and locks it.

    Args:
        gin_files: paths, looked for in the working folder, then in the project's folder; what they include, beside
            the including file first.
        bindings: strings. saved: the gin text of a checkpoint; its output_dir and features_dir are not taken over.
    Raises:
        ValueError: unknown names, with the nearest valid one. FileNotFoundError: the paths tried.
    """
    parse(gin_files, bindings, saved)
    try:
        gin.finalize()
    except ValueError as error:
        undefined = re.match(r"No bindings specified for '(.*?)/gin.macro'", str(error))
        if undefined is None:
            raise
        raise ValueError(f'want the macro %{undefined[1]} defined, found no value{nearest(undefined[1], default_macros())}') from None


def bound_weights(gin_files, bindings):
    """The path that the flags bind to `weights`; ValueError where they bind none."""
    parse(gin_files, bindings)
    weights = gin.query_parameter('%weights')
    if weights is None:
        raise ValueError("want a checkpoint in `weights`, got none; give --gin_bindings=\"weights='runs/market/best.pth'\"")
    return os.path.abspath(os.path.expanduser(weights))


def default_output_dir(gin_files):
    """Where training writes unless output_dir is bound: runs/<name of the last gin file>."""
    name = os.path.splitext(os.path.basename(gin_files[-1]))[0] if gin_files else 'mgn'
    return os.path.join('runs', name)


def parse(gin_files, bindings, saved=''):
    # For their configurables: a recipe may bind what the binary at hand does not use.
    from mgn import evaluation, features, losses, model, optim, training
    from mgn.data import augmentation, datasets  # noqa: F401

    gin.clear_config()
    gin.config._FILE_READERS[:] = [(open_gin_file, lambda path: True)]  # gin's own would look in the working folder first
    try:
        gin.parse_config_file(os.path.join(HERE, 'defaults.gin'))
        gin.parse_config(saved)
        for name in ('output_dir', 'features_dir') if saved else ():
            gin.bind_parameter(f'{name}/macro.value', None)
        for gin_file in gin_files:
            gin.parse_config_file(gin_file)
        gin.parse_config(bindings)
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f'want gin bindings such as P = 16, got what cannot be parsed: {error}') from None
    except ValueError as error:
        raise ValueError(str(error) + hint(str(error))) from None


@contextlib.contextmanager
def open_gin_file(path, including=[]):
    """Opens a gin file; `including` holds the folders of the files being read, the innermost last."""
    folders = [*including[-1:], os.getcwd(), os.path.dirname(HERE)]
    tried = [os.path.join(folder, os.path.expanduser(path)) for folder in folders]
    found = next((candidate for candidate in tried if os.path.isfile(candidate)), None)
    if found is None:
        raise FileNotFoundError(f'want the gin file {path}, found none; tried {", ".join(dict.fromkeys(tried))}')
    including.append(os.path.dirname(found))
    try:
        with open(found) as file:
            yield file
    finally:
        including.pop()


@gin.config.register_finalize_hook
def check_names(config):
    """Rejects what gin accepts silently: macros that nothing uses and scopes that nothing enters."""
    used = {ref.config_key for ref in gin.config.iterate_references(config)}
    used_scopes = {scope for scope, _ in used if scope}  # a macro's value is made in a scope of the macro's name
    for scope, selector in config:
        if selector == MACRO and (scope, MACRO) not in used and scope not in default_macros():
            raise ValueError(f'want a name that something uses, got the macro {scope!r}, which nothing does'
                             + nearest(scope, default_macros()))
        for name in SHARED:
            if name in config[scope, selector] and str(config[scope, selector][name]) != f'%{name}':
                raise ValueError(f'want {name} bound as a macro, which training and evaluation share, got {selector}.{name} = '
                                 f'{config[scope, selector][name]}; bind {name} = …')
        if selector != MACRO and scope and scope not in used_scopes:
            raise ValueError(f'want a scope that a reference enters, got {scope!r} in {scope}/{selector}, which none does'
                             + nearest(scope, used_scopes))


@gin.config.register_finalize_hook
def absolute_paths(config):
    """Paths become absolute, so that a checkpoint's configuration serves from any folder."""
    keys = [(name, MACRO, 'value') for name in PATH_MACROS] + [(*key, 'root') for key in config]
    paths = {key: config.get(key[:2], {}).get(key[2]) for key in keys}
    return {key: os.path.abspath(os.path.expanduser(path)) for key, path in paths.items() if isinstance(path, str)}


def default_macros():
    with open(os.path.join(HERE, 'defaults.gin')) as lines:
        return [line.split(' ')[0] for line in lines if re.match(r'\w+ = ', line)]


def hint(message):
    """The nearest valid name for gin's own complaints."""
    configurable = re.search(r"No configurable matching (?:reference )?'@?([^'()]*)", message)
    if configurable:
        names = [name.rsplit('.', 1)[-1] for name, _ in gin.config._REGISTRY.items()]  # gin has no public list
        return nearest(configurable[1], names)
    parameter = re.search(r"Configurable '(.*?)' doesn't have a parameter named '(.*?)'", message)
    if parameter:
        configurable = gin.config._REGISTRY.get_match(parameter[1])
        return nearest(parameter[2], inspect.signature(configurable.wrapped).parameters)
    return ''


def nearest(name, names):
    close = difflib.get_close_matches(name, names, n=1, cutoff=0)
    return f'; the nearest valid name is {close[0]!r}' if close else '; there are none'
