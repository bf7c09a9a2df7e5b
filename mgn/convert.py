"""Writes weights of another project as a checkpoint: python -m mgn.convert --gin_bindings="weights='market.pth'" """

from mgn import command_line


def main(gin_files, bindings):
    from mgn import config, evaluation  # and torch, which --help need not wait for

    evaluation.convert_checkpoint(config.load_checkpoint(gin_files, bindings))


if __name__ == '__main__':
    command_line.run(main)
