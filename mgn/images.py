"""Files → batches of uint8 images, decoded and resized in DataLoader workers.

A training batch is one item of a data set whose index is the step, so workers and prefetching cannot change its content
and a run starts at any step. Nothing here reads gin: workers that are spawned hold no bindings.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, read_file

from mgn import draws
from mgn.augmentation import Draws


class TrainBatch(NamedTuple):
    images: torch.Tensor          # (B, 3, H, W) uint8, channels-last
    labels: torch.Tensor          # (B,) int64
    draws: Draws
    unreadable: list[str]         # what could not be read, each with its reason; another image stands in its place


class TestBatch(NamedTuple):
    images: torch.Tensor          # (B, 3, H, W) uint8, channels-last; fewer where unreadable
    unreadable: list[str]


def read_image(path, size):
    """One image as (3, H, W) uint8 RGB, resized to size=(H, W) by antialiased bicubic interpolation where it differs.

    Raises ValueError naming the path where it is missing, truncated or no image.
    """
    try:
        image = decode_image(read_file(path), mode=ImageReadMode.RGB)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'{path}: {reason.rsplit(".cpp:", 1)[-1].lstrip("0123456789, ")}') from None
    if image.ndim != 3:
        raise ValueError(f'{path}: want one image, got an animation of {len(image)}')
    if image.dtype == torch.uint16:  # a PNG of 16 bits
        image = image.float().div_(257).round_().to(torch.uint8)
    if image.shape[1:] == torch.Size(size):
        return image
    return F.interpolate(image[None], size, mode='bicubic', antialias=True)[0]


def stack(images):
    """(3, H, W) images, pixel by pixel in memory as decoders leave them → (B, 3, H, W), channels-last, without transposing."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


class TrainBatches(Dataset):
    """Item `step` is the whole batch of that step: sampler, images and the draws of their augmentation.

    An unreadable image is answered by another image of the same identity, drawn by (seed, step, position).
    """

    def __init__(self, samples, labels, sampler, augmentation, size):
        self.samples, self.labels, self.sampler = samples, labels, sampler
        self.augmentation, self.size = augmentation, tuple(size)

    def __getitem__(self, step):
        images, unreadable = [], {}
        indices = self.sampler.batch(step)
        for position, index in enumerate(indices):
            images.append(self.image(index, step, position, unreadable))
        augmentation_draws = self.augmentation.draw(self.sampler.seed, step, len(indices), self.size)
        labels = torch.tensor([self.labels[index] for index in indices])
        return TrainBatch(stack(images), labels, augmentation_draws, list(unreadable.values()))

    def image(self, index, step, position, unreadable):
        for candidate in self.candidates(index, step, position):
            path = self.samples[candidate].path
            try:
                return read_image(path, self.size)
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

    def __getitem__(self, item):
        images, unreadable = [], []
        for sample in self.samples[item * self.batch_size:(item + 1) * self.batch_size]:
            try:
                images.append(read_image(sample.path, self.size))
            except ValueError as error:  # raised by the caller: across processes an error would lose its shape
                unreadable.append(str(error))
        return TestBatch(stack(images) if images else torch.empty(0, 3, *self.size, dtype=torch.uint8), unreadable)


def batches(dataset, items, workers, device):
    """The items of TrainBatches or TestBatches in the order of `items`, made ahead by `workers` processes (0: none)."""
    return DataLoader(dataset, sampler=items, batch_size=None, num_workers=workers, pin_memory=device.type == 'cuda')
