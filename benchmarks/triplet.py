"""Batch-hard triplet loss, forward and backward, against fast-reid's and pytorch-metric-learning's, alternating.

    make peers && python -m benchmarks.triplet [--device=cuda]

Prints medians, ratios, and each side's peak memory beyond its inputs (of one call in a process of its own).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.machine import cpu_model
from benchmarks.peers import fastreid_triplet_loss, metric_learning_triplet_loss
from mgn.ops import batch_hard_triplet_loss, implementation

SHAPES = {(3, 64, 256): 300, (1, 256, 256): 100, (1, 1024, 256): 40, (1, 4096, 512): 7}  # heads, N, D: rounds
MARGIN, K = 1.2, 4  # K images of each identity


def sides():
    fastreid, metric_learning = fastreid_triplet_loss(), metric_learning_triplet_loss(MARGIN)
    return {
        'mgn': lambda features, labels: batch_hard_triplet_loss(features, labels, MARGIN).sum(),
        'fast-reid': lambda features, labels: sum(fastreid(head, labels, MARGIN, False, True) for head in features),
        'pytorch-metric-learning': lambda features, labels: sum(metric_learning(head, labels) for head in features),
    }


def inputs(heads, n, d, device):
    features = torch.randn(heads, n, d, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    return features, (torch.arange(n) // K).to(device)


def step(loss_of, features, labels):
    """Loss and gradient; waits for the device."""
    loss = loss_of(features, labels)
    gradient, = torch.autograd.grad(loss, features)
    if features.is_cuda:
        torch.cuda.synchronize()
    return loss.detach(), gradient


def measure(shape, rounds, device):
    """{side: median seconds}, after checking that all sides agree."""
    features, labels = inputs(*shape, device)
    losses, times = sides(), {}
    expected = step(losses['mgn'], features, labels)
    for name, loss_of in losses.items():
        loss, gradient = step(loss_of, features, labels)
        torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-4, msg=f'{name} finds another loss')
        torch.testing.assert_close(gradient, expected[1], rtol=1e-2, atol=1e-4, msg=f'{name} finds another gradient')
        times[name] = []
    for _ in range(3 + rounds):  # the first three are warm-up
        for name, loss_of in losses.items():
            start = time.perf_counter()
            step(loss_of, features, labels)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent[3:]) for name, spent in times.items()}


def peak_memory(side, shape, device):
    """Bytes beyond inputs at the peak of one step, told by a process of its own."""
    program = f'from benchmarks.triplet import print_peak; print_peak({side!r}, {shape!r}, {device!r})'
    return json.loads(subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                                     check=True).stdout)


def print_peak(side, shape, device):
    loss_of = sides()[side]
    step(loss_of, *inputs(shape[0], 64, shape[2], device))  # whatever is loaded once
    features, labels = inputs(*shape, device)
    if device == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss_of, features, labels)
        print(torch.cuda.max_memory_allocated() - before)
        return
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # the peak starts anew
    before = resident('VmRSS')
    step(loss_of, features, labels)
    print(resident('VmHWM') - before)


def resident(what):
    with open('/proc/self/status') as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    device = parser.parse_args().device
    machine = torch.cuda.get_device_name() if device == 'cuda' else f'{cpu_model()}, {torch.get_num_threads()} threads'
    print(f'{machine}, torch {torch.__version__}, mgn {implementation(device)}; medians of forward and backward, '
          f'alternating\n')
    print('| heads × N × D | mgn, ms | fast-reid, ms | ratio | pytorch-metric-learning, ms | ratio | peak memory: mgn, '
          'fast-reid, p-m-l, MiB |')
    print('|---|---|---|---|---|---|---|')
    for shape, rounds in SHAPES.items():
        times = measure(shape, rounds, device)
        own, fastreid, metric_learning = (1000 * seconds for seconds in times.values())
        memory = ', '.join(f'{peak_memory(side, shape, device) / 2**20:.1f}' for side in times)
        print(f'| {" × ".join(map(str, shape))} | {own:.2f} | {fastreid:.2f} | {fastreid / own:.1f}× | '
              f'{metric_learning:.2f} | '
              f'{metric_learning / own:.1f}× | {memory} |', flush=True)


if __name__ == '__main__':
    main()
