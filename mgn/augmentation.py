"""Batch of uint8 images → augmented, normalised float32 batch, by a few tensor operations on the training device."""

import math
from typing import NamedTuple

import gin
import torch
import torch.nn.functional as F

from mgn import draws

# ImageNet's mean and standard deviation per RGB channel, for pixels in 0…255.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class Draws(NamedTuple):
    """What happens to each of B images; `erase` holds top, left, bottom, right in pixels (an empty box: nothing)."""
    flip: torch.Tensor    # (B,) bool
    top: torch.Tensor     # (B,) int64, of the crop in the padded image
    left: torch.Tensor    # (B,) int64
    erase: torch.Tensor   # (B, 4) int64


@gin.configurable
class Augmentation:
    """Horizontal flip → pad with black and crop back → normalise → random erasing, each image with its own draw.

    Erasing (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020) fills a box with the mean, 0 once normalised;
    its aspect ratio is uniform in `erasing_aspect`, as in fast-reid.
    """

    def __init__(self, flip_probability=0.5, padding=10, erasing_probability=0.5, erasing_area=(0.02, 0.4),
                 erasing_aspect=(0.3, 1 / 0.3)):
        self.flip_probability, self.padding = flip_probability, padding
        self.erasing_probability, self.erasing_area, self.erasing_aspect = (
            erasing_probability, erasing_area, erasing_aspect)

    def draw(self, seed, step, batch_size, size):
        """The draws of the images at positions 0…batch_size−1 of a step's global batch; size=(H, W) in pixels."""
        flip, top, left, erase = [], [], [], []
        for position in range(batch_size):
            rng = draws.generator(seed, draws.AUGMENTATION, step, position)
            flip.append(rng.random() < self.flip_probability)
            top.append(rng.integers(2 * self.padding + 1))
            left.append(rng.integers(2 * self.padding + 1))
            erase.append(self.erasing_box(rng, *size) if rng.random() < self.erasing_probability else (0, 0, 0, 0))
        return Draws(torch.tensor(flip), torch.tensor(top), torch.tensor(left), torch.tensor(erase))

    def erasing_box(self, rng, height, width):
        for _ in range(100):  # a box that does not fit is drawn again, as in the published code
            area = height * width * rng.uniform(*self.erasing_area)
            aspect = rng.uniform(*self.erasing_aspect)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                return top, left, top + h, left + w
        return 0, 0, 0, 0

    def __call__(self, images, draws):
        """images: (B, 3, H, W) uint8, draws on the same device → (B, 3, H, W) float32, normalised."""
        height, width = images.shape[2:]
        pad = self.padding
        # A crop of the mirrored image is the mirrored crop, from the other side.
        left = torch.where(draws.flip, 2 * pad - draws.left, draws.left)
        windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
        crops = windows[torch.arange(len(images), device=images.device), :, draws.top, left]  # (B, 3, H, W)
        crops = torch.where(draws.flip[:, None, None, None], crops.flip(-1), crops)
        top, left, bottom, right = draws.erase.T[:, :, None]
        rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
        erased = ((rows >= top) & (rows < bottom))[:, None, :, None] & ((columns >= left) & (columns < right))[:, None, None, :]
        return normalise(crops).masked_fill_(erased, 0)


def normalise(images):
    """images: (B, 3, H, W) uint8 → float32, ImageNet's mean 0 and standard deviation 1 per channel."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return images.float().sub_(mean).div_(std)
