"""Writes model.onnx and model.pt2 of a checkpoint: python -m mgn.export --gin_bindings="weights='best.pth'" """

from mgn import command_line


def main(gin_files, bindings):
    from mgn import config, portable  # and torch, which --help need not wait for

    portable.export_checkpoint(config.load_checkpoint(gin_files, bindings))


if __name__ == '__main__':
    command_line.run(main)
