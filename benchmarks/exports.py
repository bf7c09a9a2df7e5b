"""The same network four ways: mgn.eval, mgn.load, ONNX and model.pt2; mAP of each on a data set, and time per image.

    python -m benchmarks.exports WEIGHTS DATA_ROOT [--dataset=market_layout] [--batch=16] [--rounds=5]

Exports the weights into a temporary folder. The time is the forward pass of one batch, the sides alternating, medians,
on 1 and 2 threads. Needs the extra `export`.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch

import mgn
from benchmarks.machine import cpu_model
from benchmarks.ranking import alternate
from mgn import config, portable
from mgn.data import datasets
from mgn.embedder import Embedder
from mgn.ops import match_ranks, retrieval_metrics


def mgn_binary(name, *bindings):
    subprocess.run([sys.executable, '-m', f'mgn.{name}', *(f'--gin_bindings={binding}' for binding in bindings)],
                   check=True, stdout=subprocess.DEVNULL)


def mean_precision(embed, dataset):
    features = [embed([sample.path for sample in part]) for part in (dataset.query, dataset.gallery)]
    ids = ([getattr(sample, name) for sample in part] for name in ('pid', 'camid')
           for part in (dataset.query, dataset.gallery))
    return retrieval_metrics(*match_ranks(*features, *ids)[:2])['mAP']


def with_forward(weights, forward):
    """An Embedder of the same images whose network is another."""
    embedder = Embedder(weights, 'cpu')
    embedder.forward = forward
    return embedder.embed


def on_threads(count, model, onnx, pt2, batch, rounds):
    """{side: seconds an image} on so many threads."""
    torch.set_num_threads(count)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count
    session = onnxruntime.InferenceSession(onnx, options, providers=['CPUExecutionProvider'])
    runs = {'mgn.load': model.forward, 'model.onnx': lambda x: session.run(None, {'images': x.numpy()}),
            'model.pt2': portable.read_pt2(pt2)[0]}
    seconds = alternate({name: functools.partial(run, batch) for name, run in runs.items()}, rounds)
    return {name: value / len(batch) for name, value in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('weights', metavar='WEIGHTS')
    parser.add_argument('data_root', metavar='DATA_ROOT')
    parser.add_argument('--dataset', default='market_layout', help='a function of mgn.data.datasets')
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    config.load([], [f"data_root='{args.data_root}'"])
    dataset, model = getattr(datasets, args.dataset)(), mgn.load(args.weights, device='cpu')
    with tempfile.TemporaryDirectory() as folder:
        bindings = f"weights='{args.weights}'", f"output_dir='{folder}'"
        mgn_binary('export', *bindings)
        mgn_binary('eval', *bindings, "device='cpu'", f"data_root='{args.data_root}'", f'dataset=@{args.dataset}()')
        onnx, pt2 = (str(Path(folder, file)) for file in ('model.onnx', 'model.pt2'))
        found = {'mgn.eval': json.loads(Path(folder, 'eval.json').read_text())['mAP'],
                 'mgn.load': mean_precision(model.embed, dataset),
                 'model.onnx': mean_precision(mgn.load(onnx).embed, dataset),
                 'model.pt2': mean_precision(with_forward(args.weights, portable.read_pt2(pt2)[0]), dataset)}
        images = torch.randint(0, 256, (args.batch, 3, *model.input_size), dtype=torch.uint8)
        times = [on_threads(count, model, onnx, pt2, images, args.rounds) for count in (1, 2)]
    print(f'{cpu_model()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {dataset.name}, '
          f'{len(dataset.query)} × {len(dataset.gallery)}, {args.batch} images of {model.input_size}')
    print('| | mAP, % | ms an image, 1 thread | 2 threads |\n|---|---|---|---|')
    for side, mAP in found.items():
        print(f'| {side} | {100 * mAP:.3f} |', ' | '.join(f'{1000 * t[side]:.2f}' if side in t else '' for t in times),
              '|')


if __name__ == '__main__':
    main()
