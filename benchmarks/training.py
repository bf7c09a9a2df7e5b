"""A training step and feature extraction against fast-reid's MGN, alternating; where their time goes.

    make peers && python -m benchmarks.training [--batch=64] [--rounds=5] [--precision=bfloat16]
                                                [--cpu-time | --device=cuda]

Both sides: ResNet-50 with random weights, 384×128, 751 identities, the same images in memory. fast-reid runs in its
default float32 as its trainer runs it, with its Adam over one contiguous tensor; its losses weigh two triplet terms
more. On a GPU float32 is no TF32, for both. Before anything is timed, its MGN with our weights has to give our
features, and our cross-entropy with its gradient. --precision runs both our parts in that precision as well. --cpu-time
counts seconds of the processor instead of the wall clock's: use it with OMP_NUM_THREADS=1 on a machine that is shared
with others.
"""

import argparse
import functools
import importlib
import itertools
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import nn
from PIL import Image

from benchmarks.machine import cpu_model
from benchmarks.peers import fastreid_mgn
from mgn.data.augmentation import Augmentation, Draws, normalise
from mgn.data.datasets import Sample
from mgn.data.images import TrainBatch, TrainBatches
from mgn.data.loader import load_batches
from mgn.data.sampler import IdentitySampler
from mgn.devices import find_device
from mgn.losses import mgn_losses
from mgn.model import MGN, MGNOutput
from mgn.optim import make_optimizer

IDENTITIES, SIZE, K = 751, (384, 128), 4
HEADS = ('b1', 'b2', 'b3', 'b21', 'b22', 'b31', 'b32', 'b33')
ADAM = functools.partial(torch.optim.Adam, lr=3.5e-4, weight_decay=5e-4, fused=True)


def our_step(model, optimizer, augmentation, precision, loader, device):
    """As mgn.training.train_step; yields the name of each phase behind it. `loader` gives TrainBatches."""
    batch = next(loader)
    yield 'waiting for data'
    images, labels, *draws = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels, *batch.draws))
    images = augmentation(images, Draws(*draws)).contiguous(memory_format=torch.channels_last)
    yield 'augmentation'
    with torch.autocast(device.type, getattr(torch, precision), enabled=precision != 'float32'):
        output = model(images)
    yield 'forward'
    output = MGNOutput(tuple(x.float() for x in output.logits), output.embeddings.float(), output.features)
    losses = mgn_losses(output, labels)
    yield 'losses'
    optimizer.zero_grad()
    sum(losses.values()).backward()
    yield 'backward'
    optimizer.step()
    yield 'optimizer'


def peer_step(model, optimizer, contiguous, images, labels):
    """As fastreid.engine.train_loop.SimpleTrainer's; images: (B, 3, H, W) float32 in 0…255, as its transforms do."""
    with importlib.import_module('fastreid.utils.events').EventStorage():
        losses = model({'images': images.clone(), 'targets': labels})  # it normalises in place
    yield 'forward and losses'
    optimizer.zero_grad(set_to_none=False)  # the default of its days; its gradients live in one tensor
    sum(losses.values()).backward()
    yield 'backward'
    optimizer.step()
    contiguous.assert_buffer_is_valid()
    yield 'optimizer'


def extraction(features, *args):
    features(*args)
    yield 'features'


@torch.no_grad()
def our_features(model, precision, images):
    with torch.autocast(images.device.type, getattr(torch, precision), enabled=precision != 'float32'):
        return F.normalize(model(normalise(images)).features.float())


@torch.no_grad()
def peer_features(model, images):
    return F.normalize(model(images.clone()))


def become(peer, model):
    """Makes fast-reid's MGN the function that `model` is: its weights, its first pooling (padded), and batch
    normalisation and ReLU after each reduction, which fast-reid's project had, but its later releases do not."""
    for theirs, ours in zip((peer.backbone, peer.b1, peer.b2, peer.b3), (model.trunk, *model.branches)):
        theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    peer.backbone[3] = model.trunk[3]
    for name, ours in zip(HEADS, model.heads):
        head = getattr(peer, f'{name}_head')
        reduction, neck = head.bottleneck
        norm = nn.BatchNorm2d(len(ours.norm.weight))
        norm.load_state_dict(ours.norm.state_dict())
        neck.load_state_dict(ours.neck.state_dict())
        with torch.no_grad():
            reduction.weight.copy_(ours.reduction.weight[..., None, None])
            head.weight.copy_(ours.classifier.weight)
        head.bottleneck = nn.Sequential(reduction, norm, nn.ReLU(), neck)


def check(images, labels):
    """Raises AssertionError where the sides differ: features, cross-entropy, its gradient at the first convolution."""
    model, (peer, *_) = new_model(), fastreid_mgn(IDENTITIES)
    with torch.no_grad():
        model.train()(normalise(images))  # statistics to evaluate with
    become(peer, model)
    ours, theirs = our_features(model.eval(), 'float32', images), peer_features(peer.eval(), images.float())
    assert (theirs - ours).norm() < 1e-4 * ours.norm(), 'fast-reid computes other features'
    ours = mgn_losses(model.train()(normalise(images)), labels)['cross_entropy']
    with importlib.import_module('fastreid.utils.events').EventStorage():
        losses = peer.train()({'images': images.float(), 'targets': labels})
    theirs = sum(loss for name, loss in losses.items() if '_cls_' in name)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=0, msg='fast-reid computes another cross-entropy')
    ours, theirs = (torch.autograd.grad(loss, first.weight)[0]
                    for loss, first in ((ours, model.trunk[0]), (theirs, peer.backbone[0])))
    assert (theirs - ours).norm() < 1e-2 * ours.norm(), 'fast-reid computes another gradient'


def new_model(device='cpu'):
    return MGN(IDENTITIES, pretrained=False).to(device, memory_format=torch.channels_last)


def alternating(sides, rounds, clock):
    """{name: function that makes a step} → {name: {phase: median seconds}}, with 'in all' as the last phase."""
    times = {name: [] for name in sides}
    for _ in range(1 + rounds):  # the first is warm-up
        for name, make in sides.items():
            before = start = clock()
            times[name].append({})
            for phase in make():
                now = clock()
                times[name][-1][phase], before = now - before, now
            times[name][-1]['in all'] = before - start
    return {name: {phase: statistics.median(lap[phase] for lap in laps[1:]) for phase in laps[0]}
            for name, laps in times.items()}


def show(title, seconds, count):
    print(title)
    peer = next(iter(seconds.values()))['in all']
    for name, phases in seconds.items():
        spent = phases['in all']
        print(f'  {name:30} {spent:7.3f} s, {count / spent:6.2f} images/s, {peer / spent:5.2f} × fast-reid', flush=True)
        if len(phases) > 2:
            print('    ' + ', '.join(f'{phase} {part:.3f} s' for phase, part in phases.items() if phase != 'in all'))


def steps(images, labels, rounds, precisions, clock):
    """fast-reid's training step and ours in each precision, all on the same batch in memory."""
    device = images.device
    peer, model, augmentation = fastreid_mgn(IDENTITIES, device.type), new_model(device).train(), Augmentation()
    optimizer, pixels = make_optimizer(model, ADAM), images.float(memory_format=torch.contiguous_format)
    loader = itertools.repeat(TrainBatch(images, labels, augmentation.draw(0, 0, len(images), SIZE), []))
    return alternating({
        'fast-reid': functools.partial(peer_step, *peer, pixels, labels),
        **{f'mgn, {precision}': functools.partial(our_step, model, optimizer, augmentation, precision, loader, device)
           for precision in precisions},
    }, rounds, clock)


def extractions(images, rounds, precisions, clock):
    peer, model = fastreid_mgn(IDENTITIES, images.device.type)[0].eval(), new_model(images.device).eval()
    pixels = images.float(memory_format=torch.contiguous_format)
    return alternating({
        'fast-reid': functools.partial(extraction, peer_features, peer, pixels),
        **{f'mgn, {precision}': functools.partial(extraction, our_features, model, precision, images)
           for precision in precisions},
    }, rounds, clock)


def steps_from_files(batch_size, rounds, precision, device, clock):
    """Our step alone by the wall's clock, its batches loaded from 64×128 JPEGs by one worker beside it."""
    model, augmentation = new_model(device).train(), Augmentation()
    optimizer = make_optimizer(model, ADAM)
    with tempfile.TemporaryDirectory() as folder:
        samples = [Sample(f'{folder}/{i}.jpg', i // K, i % 2) for i in range(2 * batch_size)]
        for sample in samples:
            image = F.interpolate(torch.rand(1, 3, 16, 8), (128, 64), mode='bilinear')[0].mul(255).byte()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(sample.path)
        labels = [sample.pid for sample in samples]
        sampler = IdentitySampler(labels, [sample.camid for sample in samples], batch_size // K, K, 0)
        batches = TrainBatches(samples, labels, sampler, augmentation, SIZE, range(batch_size))
        loader = load_batches(batches, range(1 + rounds), 1, device)
        step = functools.partial(our_step, model, optimizer, augmentation, precision, loader, device)
        return alternating({precision: step}, rounds, clock)[precision]


def synchronised():
    """The wall clock, once the GPU has finished."""
    torch.cuda.synchronize()
    return time.perf_counter()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=8, help='images: a multiple of 4, at least 8; recipes take 64')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--precision', default='float32', choices=('float32', 'bfloat16', 'float16'))
    parser.add_argument('--cpu-time', action='store_true')
    parser.add_argument('--device', default='cpu', type=torch.device)
    options = parser.parse_args()
    if options.batch < 2 * K or options.batch % K:
        parser.error(f'--batch must be a multiple of {K}, at least {2 * K}, not {options.batch}')
    torch.manual_seed(0)
    images = torch.randint(0, 256, (options.batch, 3, *SIZE), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(options.batch) // K
    options.device = find_device(str(options.device))
    if options.device.type == 'cuda':
        torch.cuda.set_device(options.device)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
    wall = synchronised if options.device.type == 'cuda' else time.perf_counter
    clock = time.process_time if options.cpu_time else wall
    precisions = dict.fromkeys(('float32', options.precision))
    processor = torch.cuda.get_device_name() if options.device.type == 'cuda' else cpu_model()
    print(f'{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}; batches of {options.batch}, '
          f'medians of {options.rounds} alternating rounds{", seconds of the processor" if options.cpu_time else ""}',
          flush=True)
    check(images, labels)
    images, labels = images.to(options.device), labels.to(options.device)
    show('training step', steps(images, labels, options.rounds, precisions, clock), options.batch)
    show('images → features', extractions(images, options.rounds, precisions, clock), options.batch)
    for precision in precisions:
        seconds = steps_from_files(options.batch, options.rounds, precision, options.device, wall)
        print(f'training step of mgn, batches from files by one worker, {precision}')
        for name, spent in seconds.items():
            print(f'  {name:30} {spent:7.3f} s, {spent / seconds["in all"]:6.1%}', flush=True)


if __name__ == '__main__':
    main()
