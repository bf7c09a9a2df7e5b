"""What happens to each image of a training batch: drawn here, done to the whole batch on the training device by mgn.ops.augmentation."""

import math
from typing import NamedTuple

import gin
import torch

from mgn.data import draws
from mgn.ops.augmentation import augment


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

    def draw(self, seed, step, batch_size, size, first=0):
        """The draws of `batch_size` images from position `first` of a step's batch on; size=(H, W) in pixels."""
        flip, top, left, erase = [], [], [], []
        for position in range(first, first + batch_size):
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
        """images: (B, 3, H, W) uint8, draws on the same device → (B, 3, H, W) float32, normalised, channels-last."""
        return augment(images, *draws, self.padding)
