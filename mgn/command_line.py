"""What the binaries share: flags, log lines, and how they end. Light to import: --help does not wait for torch."""

import logging
import signal
import sys


def run(main):
    """Runs a binary's main(gin_files, bindings). A UserError ends it with its message alone, printed by one process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without removing temporary files
    try:
        from absl import app, flags

        flags.DEFINE_multi_string('gin_file', [], 'Gin file, e.g. --gin_file=gin/market.gin; repeatable, later ones '
                                  'win. Looked for in the working folder, then among the recipes of this package.',
                                  module_name=sys.argv[0])  # so that --help shows it
        flags.DEFINE_multi_string('gin_bindings', [], 'Gin binding, e.g. --gin_bindings="data_root=\'datasets\'"; '
                                  'repeatable, later ones win, and all of them win over gin files.',
                                  module_name=sys.argv[0])
        for stream in filter(None, (sys.stdout, sys.stderr)):  # names of files need not be UTF-8
            stream.reconfigure(errors='backslashreplace')
        app.run(lambda arguments: carry_out(main, flags.FLAGS, arguments[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def carry_out(main, flags, arguments):
    """The binary's work; what it raises becomes the way that it ends."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from mgn.ops.errors import UserError
    from mgn.runs import processes

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter('%(asctime)s %(levelname).1s %(message)s', '%H:%M:%S'))
    package = logging.getLogger('mgn')
    package.addHandler(handler)
    package.setLevel(logging.DEBUG if flags.verbosity > 0 else logging.INFO)  # absl's -v
    package.propagate = False  # absl prints the root logger's messages too
    try:
        processes.join()
        if processes.number() > 0:
            package.setLevel(logging.CRITICAL)  # process 0 logs for all
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
        message = error.message if isinstance(error, UserError) else processes.lost(error)
        if message is None:
            raise
        sys.exit(f'error: {message}')
