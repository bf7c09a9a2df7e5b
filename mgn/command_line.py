"""What the binaries share: flags, log lines, and how they end. Light to import: --help does not wait for torch."""

import logging
import sys

from absl import app, flags
from tqdm.contrib.logging import logging_redirect_tqdm

flags.DEFINE_multi_string('gin_file', [], 'Gin file, e.g. gin/market.gin; repeatable, later ones win.')
flags.DEFINE_multi_string('gin_bindings', [], 'Gin binding, e.g. "data_root=\'datasets\'"; repeatable, later ones win.')


def run(main):
    """Runs a binary's main(gin_files, bindings). A UserError ends it with its message alone, printed by one process."""
    def absl_main(argv):
        from mgn.ops.errors import UserError
        from mgn.runs import processes

        sys.stdout.reconfigure(errors='backslashreplace')  # names of files may hold any bytes
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter('%(asctime)s %(levelname).1s %(message)s', '%H:%M:%S'))
        package = logging.getLogger('mgn')
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False  # absl prints the root logger's messages too
        try:
            processes.join()
            if processes.number() > 0:
                package.setLevel(logging.CRITICAL)  # process 0 logs for all
            if len(argv) > 1:
                raise UserError(f'Only flags are understood, found {argv[1:]}; '
                                f'give --gin_file=FILE or --gin_bindings="name=value"')
            with logging_redirect_tqdm([package]):
                main(flags.FLAGS.gin_file, flags.FLAGS.gin_bindings)
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
    app.run(absl_main)
