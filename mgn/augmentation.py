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
        """images: (B, 3, H, W) uint8, draws on the same device → (B, 3, H, W) float32, normalised; both channels-last."""
        _, _, height, width = images.shape
        pad, batch = self.padding, torch.arange(len(images), device=images.device)
        pixels = images.permute(0, 2, 3, 1)
        both = torch.stack((pixels, pixels.flip(2))).flatten(3)                # (2, B, H, 3W), as it is and mirrored
        padded = F.pad(both, (3 * pad, 3 * pad, pad, pad))
        mirror_stride, batch_stride, row_stride, _ = padded.stride()
        windows = padded.as_strided(                                           # every crop is a view: no pixel is copied
            (2, len(images), 2 * pad + 1, 2 * pad + 1, height, 3 * width),
            (mirror_stride, batch_stride, row_stride, 3, row_stride, 1))
        crops = windows[draws.flip.long(), batch, draws.top, draws.left]       # (B, H, 3W)
        top, left, bottom, right = draws.erase.T[:, :, None]
        rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
        erased_rows, erased_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        kept = ~(erased_rows[:, :, None] & erased_columns.repeat_interleave(3, dim=1)[:, None, :])
        crops = crops.view(len(images), height, width, 3).permute(0, 3, 1, 2)
        normalised = normalise(crops)
        normalised.permute(0, 2, 3, 1).flatten(2).mul_(kept)
        return normalised


def normalise(images):
    """images: (B, 3, H, W) uint8 → float32, channels-last, ImageNet's mean 0 and standard deviation 1 per channel."""
    count, _, height, width = images.shape
    # Rows of 3W numbers, mean and deviation repeated along them, make long vector loops; (…, 3) would make short ones.
    mean, std = (torch.tensor(v, device=images.device).repeat(width) for v in (MEAN, STD))
    rows = images.permute(0, 2, 3, 1).reshape(count, height, 3 * width).float().sub_(mean).div_(std)
    return rows.view(count, height, width, 3).permute(0, 3, 1, 2)
