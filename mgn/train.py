"""Trains MGN: python -m mgn.train --gin_file=gin/market.gin --gin_bindings="data_root='datasets'" """

from mgn import command_line


def main(gin_files, bindings):
    from mgn import config, training  # and torch, which --help need not wait for

    config.load(gin_files, bindings)
    training.Training(config.default_output_dir(gin_files)).run()


if __name__ == '__main__':
    command_line.run(main, several=True)
