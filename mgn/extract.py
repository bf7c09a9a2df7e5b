"""Writes the features of query and gallery as files.

python -m mgn.extract --gin_bindings="weights='runs/market/best.pth'" --gin_bindings="features_dir='features'"
"""

from mgn import command_line


def main(gin_files, bindings):
    from mgn import config, evaluation  # and torch, which --help need not wait for

    evaluation.extract_checkpoint(config.load_checkpoint(gin_files, bindings))


if __name__ == '__main__':
    command_line.run(main, several=True)
