"""Files → batches of uint8 images, decoded and resized in DataLoader workers.

A training batch is one item of a data set whose index is the step, so workers and prefetching cannot change its content
and a run starts at any step. Nothing here reads gin: workers that are spawned hold no bindings.
"""

import signal
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from mgn.data import draws
from mgn.data.augmentation import Draws

TOGETHER = 8  # images that are resized at a time


class TrainBatch(NamedTuple):
    images: torch.Tensor          # (B, 3, H, W) uint8, channels-last
    labels: torch.Tensor          # (B,) int64
    draws: Draws
    unreadable: list[str]         # what could not be read, each with its reason; another image stands in its place


class TestBatch(NamedTuple):
    images: torch.Tensor          # (B, 3, H, W) uint8, channels-last; fewer where unreadable
    unreadable: list[str]


def decode(path):
    """One image as (3, h, w) uint8 RGB; ValueError naming the path where it is missing, truncated or no image."""
    from torchvision.io import ImageReadMode, decode_image, read_file  # takes longer to import than torch, which --help need not wait for

    try:
        image = decode_image(read_file(path), mode=ImageReadMode.RGB)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'{path}: {reason.rsplit(".cpp:", 1)[-1].lstrip("0123456789, ")}') from None
    if image.ndim != 3:
        raise ValueError(f'{path}: want one image, got an animation of {len(image)}')
    if image.dtype == torch.uint16:  # a PNG of 16 bits
        image = image.float().div_(257).round_().to(torch.uint8)
    return image


def to_batch(images, size):
    """(3, h, w) uint8 images → (B, 3, H, W) uint8, channels-last, resized to size=(H, W) by antialiased bicubic interpolation.

    Images of one size go through it some at a time: one by one they take longer, and memory for all of them would come from the system
    anew with every batch.
    """
    batch = torch.empty(len(images), *size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for shape in {image.shape for image in images}:
        places = [i for i, image in enumerate(images) if image.shape == shape]
        for some in (places[first:first + TOGETHER] for first in range(0, len(places), TOGETHER)):
            group = torch.stack([images[i].permute(1, 2, 0) for i in some]).permute(0, 3, 1, 2)
            if shape[1:] != size:
                group = F.interpolate(group, size, mode='bicubic', antialias=True)
            for place, image in zip(some, group):
                batch[place] = image
    return batch


class TrainBatches(Dataset):
    """Item `step` is the batch of that step: sampler, images and the draws of their augmentation.

    `positions`: a range of the batch's places, whose images alone are taken; None: all.
    An unreadable image is answered by another image of the same identity, drawn by (seed, step, position).
    """

    def __init__(self, samples, labels, sampler, augmentation, size, positions=None):
        self.samples, self.labels, self.sampler = samples, labels, sampler
        self.augmentation, self.size = augmentation, tuple(size)
        self.positions = range(sampler.P * sampler.K) if positions is None else positions

    def indices(self, step):
        batch = self.sampler.batch(step)
        return [batch[position] for position in self.positions]

    def paths(self, step):
        return [self.samples[index].path for index in self.indices(step)]

    def __getitem__(self, step):
        images, unreadable, indices = [], {}, self.indices(step)
        for position, index in zip(self.positions, indices):
            images.append(self.image(index, step, position, unreadable))
        augmentation_draws = self.augmentation.draw(self.sampler.seed, step, len(indices), self.size, self.positions.start)
        labels = torch.tensor([self.labels[index] for index in indices])
        return TrainBatch(to_batch(images, self.size), labels, augmentation_draws, list(unreadable.values()))

    def image(self, index, step, position, unreadable):
        for candidate in self.candidates(index, step, position):
            path = self.samples[candidate].path
            try:
                return decode(path)
            except ValueError as error:
                unreadable[path] = str(error)
        raise ValueError(f'want a readable image of identity {self.samples[index].pid}, got none:\n  '
                         + '\n  '.join(unreadable.values()) + '\nrestore the files or remove this identity')

    def candidates(self, index, step, position):
        """The image itself, then the others of its identity in random order."""
        yield index
        others = [i for i in self.sampler.images_of[self.labels[index]] if i != index]
        yield from draws.generator(self.sampler.seed, draws.REPLACEMENT, step, position).permutation(others).tolist()


class TestBatches(Dataset):
    """Item i holds the images i·batch_size … of `samples`, in order."""

    def __init__(self, samples, size, batch_size):
        self.samples, self.size, self.batch_size = samples, tuple(size), batch_size

    def __len__(self):
        return -(-len(self.samples) // self.batch_size)

    def paths(self, item):
        return [sample.path for sample in self.samples[item * self.batch_size:(item + 1) * self.batch_size]]

    def __getitem__(self, item):
        images, unreadable = [], []
        for path in self.paths(item):
            try:
                images.append(decode(path))
            except ValueError as error:  # raised by the caller: across processes an error would lose its shape
                unreadable.append(str(error))
        return TestBatch(to_batch(images, self.size), unreadable)


def batches(dataset, items, workers, device):
    """The items of TrainBatches or TestBatches in the order of `items`, made ahead by `workers` processes (0: none).

    Raises RuntimeError in place of an item where a worker process has died.
    """
    import torchvision.io  # noqa: F401 (once, not in every worker)

    loader = DataLoader(dataset, sampler=items, batch_size=None, num_workers=workers, pin_memory=device.type == 'cuda', worker_init_fn=leave_signals)
    main = hasattr(signal, 'SIGCHLD') and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if main else None
    result = iter(loader)
    if before is not None:  # torch's handler would raise that error wherever the main process is, in the middle of a step
        signal.signal(signal.SIGCHLD, before)
    return result


def leave_signals(_):
    """A terminal sends its SIGINT to every process; the main one ends the others, and counts its own signals alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
