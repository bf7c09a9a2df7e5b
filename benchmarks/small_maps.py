"""Forward and backward of layer4's convolutions as one matrix product (SmallMapConv) against torch's own, alternating.

    python -m benchmarks.small_maps

Shapes are those of gin/cpu.gin and gin/demo.gin (ResNet-18, 24 images, channels-last, float32).
"""

import statistics
import time

import torch
from torch import nn

from benchmarks.machine import cpu_model
from mgn.model import SmallMapConv

SHAPES = ((256, 512, 8, 4, 2), (512, 512, 4, 2, 1), (256, 512, 6, 3, 2), (512, 512, 3, 2, 1))  # in, out, H, W, stride
IMAGES, ROUNDS = 24, 15


def main():
    print(f'{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {ROUNDS} rounds, ms')
    for channels, out, height, width, stride in SHAPES:
        convs = [kind(channels, out, 3, stride, 1, bias=False).to(memory_format=torch.channels_last)
                 for kind in (nn.Conv2d, SmallMapConv)]
        convs[1].load_state_dict(convs[0].state_dict())
        images = torch.randn(IMAGES, channels, height, width).to(memory_format=torch.channels_last).requires_grad_()
        results = [conv(images) for conv in convs]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        gradient = torch.randn_like(results[0])
        times = [[], []]
        for _ in range(2 + ROUNDS):  # the first two are warm-up
            for conv, spent in zip(convs, times):
                start = time.perf_counter()
                torch.autograd.grad(conv(images), (images, conv.weight), gradient)
                spent.append(time.perf_counter() - start)
        peer, own = (1000 * statistics.median(spent[2:]) for spent in times)
        print(f'  {channels}→{out}, {height}×{width}, stride {stride}: conv2d {peer:6.1f}, one product {own:6.1f}, '
              f'{peer / own:.2f} × conv2d')


if __name__ == '__main__':
    main()
