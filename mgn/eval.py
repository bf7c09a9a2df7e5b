"""Evaluates a checkpoint as it was trained: python -m mgn.eval --gin_bindings="weights='runs/market/best.pth'" """

from mgn import command_line


def main(gin_files, bindings):
    from mgn import config, evaluation  # and torch, which --help need not wait for

    evaluation.evaluate_checkpoint(config.load_checkpoint(gin_files, bindings))


if __name__ == '__main__':
    command_line.run(main, several=True)
