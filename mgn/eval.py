"""Evaluates a checkpoint as it was trained: python -m mgn.eval --gin_bindings="weights='runs/market/best.pth'" """

from mgn import config


def main(gin_files, bindings):
    from mgn import evaluation
    from mgn.runs import checkpoint  # and torch, which --help need not wait for

    content = checkpoint.load(config.bound_weights(gin_files, bindings))
    config.load(gin_files, bindings, saved=content['config'])
    evaluation.evaluate_checkpoint(content)


if __name__ == '__main__':
    config.run(main)
