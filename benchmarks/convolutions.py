"""The convolutions of MGN's ResNets (mgn.convolution) against torch's own, forward and backward, alternating.

    python -m benchmarks.convolutions

Channels-last, float32; of each setting every shape that ProductConv takes another way than torch,
and the sum of all convolutions of these shapes that a step has.
"""

import collections
import statistics
import time

import torch
from torch import nn

from benchmarks.machine import cpu_model
from mgn.convolution import SMALL_MAP, WIDE, ProductConv
from mgn.model import MGN

SETTINGS = {'gin/cpu.gin': (24, (128, 64), {'backbone': 'resnet18', 'last_strides': (2, 2, 2)}),
            'ResNet-50, 384×128': (16, (384, 128), {})}
ROUNDS = 7


def shapes_of(size, options):
    """{(channels, out, k, stride, H, W): how many a model has} of its convolutions."""
    counts, model = collections.Counter(), MGN(0, pretrained=False, **options).eval()
    for layer in model.modules():
        if isinstance(layer, ProductConv):
            layer.register_forward_hook(lambda conv, inputs, _: counts.update(
                [(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], *inputs[0].shape[2:])]))
    with torch.no_grad():
        model(torch.zeros(1, 3, *size))
    return counts


def main():
    print(f'{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}; '
          f'medians of {ROUNDS} rounds, forward + backward, ms')
    for name, (images, size, options) in SETTINGS.items():
        totals = [0, 0]
        print(f'{name}, {images} images')
        for (channels, out, k, stride, height, width), count in sorted(shapes_of(size, options).items()):
            small = k == 3 and -(-height // stride) * -(-width // stride) <= SMALL_MAP
            if min(channels, out) < WIDE and not small:
                continue
            convs = [kind(channels, out, k, stride, k // 2, bias=False).to(memory_format=torch.channels_last)
                     for kind in (nn.Conv2d, ProductConv)]
            convs[1].load_state_dict(convs[0].state_dict())
            x = torch.randn(images, channels, height, width).to(memory_format=torch.channels_last).requires_grad_()
            results = [conv(x) for conv in convs]
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
            gradient = torch.randn_like(results[0])
            times = [[], []]
            for _ in range(1 + ROUNDS):  # the first is warm-up
                for conv, spent in zip(convs, times):
                    start = time.perf_counter()
                    result = conv(x)
                    forward = time.perf_counter()
                    torch.autograd.grad(result, (x, conv.weight), gradient)
                    spent.append((forward - start, time.perf_counter() - forward))
            peer, own = ([1000 * statistics.median(part) for part in zip(*spent[1:])] for spent in times)
            totals = [total + count * sum(spent) for total, spent in zip(totals, (peer, own))]
            print(f'  {channels:4} → {out:4}, {k}×{k}, {height:2}×{width:2}, stride {stride}: '
                  f'conv2d {peer[0]:6.1f} + {peer[1]:6.1f}, ours {own[0]:6.1f} + {own[1]:6.1f}, '
                  f'{sum(peer) / sum(own):.2f}× faster{", one product" if small else ""}', flush=True)
        print(f'  these in a step: conv2d {totals[0]:.0f}, ours {totals[1]:.0f}, {totals[0] / totals[1]:.2f}× faster')


if __name__ == '__main__':
    main()
