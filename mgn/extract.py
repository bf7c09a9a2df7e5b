"""Features of query and gallery as files: python -m mgn.extract --gin_bindings="weights='runs/market/best.pth'" --gin_bindings="features_dir='features'" """

from mgn import config


def main(gin_files, bindings):
    from mgn import evaluation
    from mgn.runs import checkpoint  # and torch, which --help need not wait for

    content = checkpoint.load(config.bound_weights(gin_files, bindings))
    config.load(gin_files, bindings, saved=content['config'])
    evaluation.extract_checkpoint(content)


if __name__ == '__main__':
    config.run(main)
