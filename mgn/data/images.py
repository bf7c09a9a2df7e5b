"""Files → batches of uint8 images, decoded and resized.

A training batch is one item of a data set whose index is the step, so workers and prefetching cannot change its content
and a run starts at any step. Nothing here reads gin: workers that are spawned hold no bindings.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from mgn.data import random_streams
from mgn.data.augmentation import Draws
from mgn.ops.errors import FileError, UserError

RESIZE_GROUP = 8  # images that are resized at a time


class TrainBatch(NamedTuple):
    images: torch.Tensor          # (B, 3, H, W) uint8, channels-last
    labels: torch.Tensor          # (B,) int64
    draws: Draws
    unreadable: list[str]         # what could not be read, each with its reason; another image stands in its place


class TestBatch(NamedTuple):
    images: torch.Tensor          # (B, 3, H, W) uint8, channels-last; fewer where unreadable
    unreadable: list[str]


def decode(path):
    """One image as (3, h, w) uint8 RGB; FileError naming the path where it is missing, truncated or no image."""
    # torchvision.io takes longer to import than torch, which --help need not wait for.
    from torchvision.io import ImageReadMode, decode_image, read_file

    try:
        image = decode_image(read_file(path), mode=ImageReadMode.RGB)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileError(f'{path}: {reason.rsplit(".cpp:", 1)[-1].lstrip("0123456789, ")}') from None
    if image.ndim != 3:
        raise FileError(f'{path}: an animation of {len(image)} images; replace it by one image')
    if image.dtype == torch.uint16:  # a PNG of 16 bits
        image = image.float().div_(257).round_().to(torch.uint8)
    return image


def to_batch(images, size):
    """(3, h, w) uint8 images → (B, 3, H, W) uint8, channels-last, resized to size=(H, W).

    The interpolation is bicubic and antialiased. Images of one size are resized RESIZE_GROUP at a time: one by one they
    take longer, and the memory for all of them would come from the system anew with every batch.
    """
    batch = torch.empty(len(images), *size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for shape in {image.shape for image in images}:
        same_shape = [i for i, image in enumerate(images) if image.shape == shape]
        for places in (same_shape[i:i + RESIZE_GROUP] for i in range(0, len(same_shape), RESIZE_GROUP)):
            group = torch.stack([images[i].permute(1, 2, 0) for i in places]).permute(0, 3, 1, 2)
            if shape[1:] != size:
                group = F.interpolate(group, size, mode='bicubic', antialias=True)
            for place, image in zip(places, group):
                batch[place] = image
    return batch


class TrainBatches(Dataset):
    """Item `step` is the batch of that step: sampler, images and the draws of their augmentation.

    positions: the range of places in the batch that are loaded; None: all of them.
    Another image of the same identity, drawn by (seed, step, position), replaces an unreadable image.
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
        draws = self.augmentation.draw(self.sampler.seed, step, len(indices), self.size, self.positions.start)
        labels = torch.tensor([self.labels[index] for index in indices])
        return TrainBatch(to_batch(images, self.size), labels, draws, list(unreadable.values()))

    def image(self, index, step, position, unreadable):
        for candidate in self.candidates(index, step, position):
            path = self.samples[candidate].path
            try:
                return decode(path)
            except FileError as error:
                unreadable[path] = str(error)
        raise UserError(f'No image of identity {self.samples[index].pid} can be read:\n  '
                        + '\n  '.join(unreadable.values()) + '\nRestore the files or remove this identity.')

    def candidates(self, index, step, position):
        """The image itself, then the others of its identity in random order."""
        yield index
        others = [i for i in self.sampler.images_of[self.labels[index]] if i != index]
        rng = random_streams.generator(self.sampler.seed, random_streams.REPLACEMENT, step, position)
        yield from rng.permutation(others).tolist()


class TestBatches(Dataset):
    """Item i holds `batch_size` images from samples[i·batch_size] on, in order; the last item may hold fewer."""

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
            except FileError as error:  # the caller raises it: an error from a worker process loses its form
                unreadable.append(str(error))
        return TestBatch(to_batch(images, self.size), unreadable)
