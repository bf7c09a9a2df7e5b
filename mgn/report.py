"""Makes a page of what a checkpoint finds: python -m mgn.report --gin_bindings="weights='runs/market/best.pth'" """

from mgn import command_line


def main(gin_files, bindings):
    from mgn import config, evaluation  # and torch, which --help need not wait for

    evaluation.report_checkpoint(config.load_checkpoint(gin_files, bindings))


if __name__ == '__main__':
    command_line.run(main)
