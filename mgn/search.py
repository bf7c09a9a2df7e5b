"""Prints the nearest crops of a folder to each query image.

python -m mgn.search --gin_bindings="weights='best.pth'" --gin_bindings="query='person.jpg'" \\
    --gin_bindings="gallery='crops'"
"""

import logging
import sys

from mgn import command_line


def main(gin_files, bindings):
    from mgn import config, crop_search  # and torch, which --help need not wait for

    for handler in logging.getLogger('mgn').handlers:  # standard output is for the results
        handler.setStream(sys.stderr)
    crop_search.search(config.load_checkpoint(gin_files, bindings))


if __name__ == '__main__':
    command_line.run(main)
