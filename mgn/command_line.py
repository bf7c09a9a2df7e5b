"""What the binaries share: flags, log lines, and how they end. Light to import: --help does not wait for torch."""

import logging
import os
import re
import signal
import sys


def run(main, several=False):
    """Runs a binary's main(gin_files, bindings). A UserError ends it with its message alone, printed by one process.

    several: whether torchrun may start it as several processes.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored e.g. in the background of a script
            signal.signal(number, end)
    from absl import app, flags

    flags.DEFINE_multi_string('gin_file', [], 'Gin file, e.g. --gin_file=gin/market.gin; repeatable, later ones '
                              'win. Looked for in the working folder, then among the recipes of this package.',
                              module_name=sys.argv[0])  # so that --help shows it
    flags.DEFINE_multi_string('gin_bindings', [], 'Gin binding, e.g. --gin_bindings="data_root=\'datasets\'"; '
                              'repeatable, later ones win, and all of them win over gin files. Common names are in '
                              'mgn/defaults.gin, all in config.gin of a run.', module_name=sys.argv[0])
    for stream in filter(None, (sys.stdout, sys.stderr)):  # names of files need not be UTF-8
        stream.reconfigure(errors='backslashreplace')
    try:
        app.run(lambda arguments: carry_out(main, several, flags.FLAGS, arguments[1:]))
    except BrokenPipeError:  # who reads our output, such as head, wants no more
        os._exit(141)  # as after SIGPIPE


def end(number, frame):
    """Ends the process after a signal, by SystemExit, so that temporary files are removed."""
    while frame:
        if frame.f_code.co_filename.startswith('<frozen importlib'):  # some modules swallow what is raised meanwhile
            os._exit(128 + number)
        frame = frame.f_back
    sys.exit(128 + number)


def carry_out(main, several, flags, arguments):
    """The binary's work; what it raises becomes the way that it ends."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from mgn.ops.errors import UserError
    from mgn.runs import processes

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter('%(asctime)s %(levelname).1s %(message)s', '%H:%M:%S'))
    package = logging.getLogger('mgn')
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False  # absl prints the root logger's messages too
    logging.raiseExceptions = False  # a line that cannot be written, as its reader has gone, is left out
    logging.root.setLevel(logging.WARNING)  # of other libraries: the ONNX exporter tells its steps by the dozen
    try:
        processes.join()
        if processes.number() > 0:
            package.setLevel(logging.CRITICAL)  # process 0 logs for all
        if processes.count() > 1 and not several:
            raise UserError(f'This command is one process, found {processes.count()}; start it without torchrun')
        if arguments:
            raise UserError(f'Only flags are understood, found {arguments}; '
                            f'give --gin_file=FILE or --gin_bindings="name=value"')
        with logging_redirect_tqdm([package]):
            main(flags.gin_file, flags.gin_bindings)
        processes.leave()
    except SystemExit:  # a run that was interrupted, in all processes
        processes.leave()
        raise
    except Exception as error:
        if not processes.first_to_fail():
            sys.exit(1)
        message = error.message if isinstance(error, UserError) else processes.lost(error) or of_the_system(error)
        if message is None:
            raise
        sys.exit(f'error: {message}')


def of_the_system(error):
    """The message for lack of memory or space, or for a file that may not be read or written; None for other errors."""
    if isinstance(error, MemoryError) or re.search("out of memory|an('|no)t allocate memory|ALLOC_FAILED", str(error)):
        return (f'Memory ran out ({(str(error) or "none is free").splitlines()[0]}). Free some, or bind a smaller P '
                f'for training, a smaller Extractor.batch_size for evaluation.')
    # By its words: an error that has passed gin has kept nothing else.
    if isinstance(error, PermissionError) and ": '" in str(error) or 'No space left' in str(error):
        return f'A file cannot be used: {str(error).splitlines()[0]}. Allow it, free space, or give another path.'
