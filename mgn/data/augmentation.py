"""What happens to each image of a training batch: drawn on the CPU, applied to the whole batch on the training device.

Another way of flipping, cropping or erasing has two places: `Augmentation.draw` and `erasing_box` choose, `__call__`
applies. What fills the erased boxes is ERASING_FILL.
"""

import functools
import math
from typing import Annotated, NamedTuple

import gin
import torch
import torch.nn.functional as F

from mgn.data import random_streams

# ImageNet's mean and standard deviation per RGB channel, for pixels in 0…255.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
Share = Annotated[float, 0, 1]  # of the images
Area, Aspect = Annotated[float, 1e-9, 1], Annotated[float, 1e-3, 1000]
ERASING_FILL = 0.0  # of normalised pixels, whose mean is 0


class Draws(NamedTuple):
    """What happens to each of B images; `erase` holds top, left, bottom, right in pixels (an empty box: nothing)."""
    flip: torch.Tensor    # (B,) bool
    top: torch.Tensor     # (B,) int64, of the crop in the padded image
    left: torch.Tensor    # (B,) int64
    erase: torch.Tensor   # (B, 4) int64


@gin.configurable
class Augmentation:
    """AutoAugment → resize → horizontal flip → pad with black and crop back → normalise → random erasing.

    Each image has its own draw. AutoAugment is torchvision's, with ImageNet's policy (Cubuk et al., CVPR 2019), of an
    image as it was decoded; it happens in the workers.

    Erasing (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020) fills a box with the mean, 0 once normalised;
    its share of the image is uniform between the two of `erasing_area`, its aspect ratio between those of
    `erasing_aspect`, as in fast-reid.
    """

    def __init__(self, flip_probability: Share = 0.5, padding: Annotated[int, 0, 1000] = 10,
                 erasing_probability: Share = 0.5, erasing_area: tuple[Area, Area] = (0.02, 0.4),
                 erasing_aspect: tuple[Aspect, Aspect] = (0.3, 1 / 0.3), auto_augment_probability: Share = 0.0):
        self.auto_augment_probability = auto_augment_probability
        self.flip_probability, self.padding = flip_probability, padding
        self.erasing_probability, self.erasing_area, self.erasing_aspect = (
            erasing_probability, erasing_area, erasing_aspect)

    def auto_augment(self, image, seed, step, position):
        """(3, h, w) uint8 → the same, changed by a policy that depends on seed, step and position alone, or not."""
        if not self.auto_augment_probability:  # a generator takes longer than the rest of this
            return image
        rng = random_streams.generator(seed, random_streams.AUTO_AUGMENT, step, position)
        if rng.random() >= self.auto_augment_probability:
            return image
        from torchvision.transforms import AutoAugment  # takes as long to import as torch

        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))
            return AutoAugment()(image)

    def draw(self, seed, step, batch_size, size, first=0):
        """The draws of `batch_size` images from position `first` of a step's batch on; size=(H, W) in pixels."""
        flip, top, left, erase = [], [], [], []
        for position in range(first, first + batch_size):
            rng = random_streams.generator(seed, random_streams.AUGMENTATION, step, position)
            flip.append(rng.random() < self.flip_probability)
            top.append(rng.integers(2 * self.padding + 1))
            left.append(rng.integers(2 * self.padding + 1))
            erase.append(self.erasing_box(rng, *size) if rng.random() < self.erasing_probability else (0, 0, 0, 0))
        return Draws(torch.tensor(flip), torch.tensor(top), torch.tensor(left), torch.tensor(erase))

    def erasing_box(self, rng, height, width):
        for _ in range(100):  # a box that does not fit is drawn again, as in the published code
            area = height * width * rng.uniform(*sorted(self.erasing_area))
            aspect = rng.uniform(*sorted(self.erasing_aspect))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                return top, left, top + h, left + w
        return 0, 0, 0, 0

    def __call__(self, images, draws):
        """(B, 3, H, W) uint8 of any strides, Draws on the same device → (B, 3, H, W) float32, channels-last.

        Batched tensor operations, which never wait for a GPU. Channels-last images are faster. Of a box to erase, what
        lies outside of the image is ignored.
        """
        count, _, height, width = images.shape
        pad, numbers = self.padding, functools.partial(torch.arange, device=images.device)
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))            # (B, H + 2p, W + 2p, 3)
        rows, columns = draws.top[:, None] + numbers(height), draws.left[:, None] + numbers(width)
        columns = torch.where(draws.flip[:, None], width + 2 * pad - 1 - columns, columns)  # mirrored, then cropped
        crops = padded[numbers(count)[:, None, None], rows[:, :, None], columns[:, None]]  # (B, H, W, 3)
        return erase_boxes(normalise(crops.permute(0, 3, 1, 2)), draws.erase)


def erase_boxes(images, boxes):
    """Fills one box of each of (B, 3, H, W) normalised, channels-last images, in place; boxes: as `Draws.erase`."""
    top, left, bottom, right = boxes.T[:, :, None]
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[2:])
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
    return images.masked_fill_(inside[:, None], ERASING_FILL)


def normalise(images):
    """images: (B, 3, H, W) uint8, any strides → float32, channels-last, with ImageNet's mean 0 and deviation 1.

    Raises ValueError for another shape or type.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f'Images must be (B, 3, H, W) and torch.uint8, but these are {tuple(images.shape)} and '
                         f'{images.dtype}; mgn.data.images.to_batch makes them')
    count, _, height, width = images.shape
    mean, std = mean_and_std(width, images.device)
    # Rows of 3W numbers make long vector loops; (…, 3) would make short ones.
    rows = images.permute(0, 2, 3, 1).reshape(count, height, 3 * width).float().sub_(mean).div_(std)
    return rows.view(count, height, width, 3).permute(0, 3, 1, 2)


@functools.cache
def mean_and_std(width, device):
    """MEAN and STD repeated along a row, (3·width,) float32 each; cached, as a copy to a GPU makes it wait."""
    return tuple(torch.tensor(values).repeat(width).to(device) for values in (MEAN, STD))
