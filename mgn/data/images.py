"""Files → batches of uint8 images, decoded and resized.

A training batch is one item of a data set whose index is the step, so workers and prefetching cannot change its content
and a run starts at any step. Only constructors read gin: workers that are spawned hold no bindings.
"""

import contextlib
import io
import os
import re
import warnings
from typing import Annotated, NamedTuple

import gin
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from mgn.data import random_streams
from mgn.data.augmentation import Draws
from mgn.ops.errors import FileError, UserError

FORMATS = 'JPEG', 'PNG', 'GIF', 'WEBP'
APP1 = re.compile(b'\xff\xe1')  # marks the segment of a JPEG file that EXIF data are in; a search by `in` takes longer
PILLOWS_LIMIT = 178_956_970  # pixels
LONGEST_SIDE = 65_535  # pixels, JPEG's own limit; a resized side needs memory along the other one
LARGEST_FILE = 2 ** 30  # bytes; those of an image within Pillow's limit are fewer

# Pillow warns of large images, odd palettes and damaged EXIF data: once in every worker process.
warnings.filterwarnings('ignore', module=r'PIL\.')


class TrainBatch(NamedTuple):
    images: torch.Tensor          # (B, 3, H, W) uint8, channels-last
    labels: torch.Tensor          # (B,) int64
    draws: Draws
    unreadable: list[str]         # what could not be read, each with its reason; another image stands in its place


class TestBatch(NamedTuple):
    images: torch.Tensor          # (B, 3, H, W) uint8, channels-last; fewer where unreadable
    unreadable: dict[str, str]    # {path: what could not be read, with its reason}


@gin.configurable
class Decoder:
    """Files → images, one at a time: (3, h, w) uint8 RGB, upright as the EXIF data say, without transparency.

    The pixels are Pillow's. A JPEG file without an APP1 segment, where EXIF data are, is decoded by simplejpeg: at
    twice the speed, with the same result. What simplejpeg refuses is left to Pillow.

    Args:
        max_pixels: of an image, h · w; a larger one is refused before it is decoded. A batch of images is held in
            memory while it is resized, 6 bytes a pixel.
    """

    def __init__(self, max_pixels: Annotated[int, 1, PILLOWS_LIMIT] = 16_000_000):
        self.max_pixels = max_pixels

    def __call__(self, path):
        """FileError naming the path and a reason: missing, damaged, too large, an animation, or no image."""
        try:
            # A named pipe is opened at once, too, and read as an empty file.
            with open(path, 'rb', opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
                if (size := os.fstat(file.fileno()).st_size) > LARGEST_FILE:  # 0 of a device, which may have no end
                    raise ValueError(f'a file of more than {LARGEST_FILE} bytes; replace it by a smaller image')
                content = file.read(size)
            return torch.from_numpy(self.pixels(content)).permute(2, 0, 1)
        except Image.DecompressionBombError:
            reason = self.too_large()
        except UnidentifiedImageError:
            reason = 'this is no image in one of the formats ' + ', '.join(FORMATS)
        except Exception as error:  # Pillow raises errors of a dozen classes for damaged files
            reason = getattr(error, 'strerror', None) or (str(error) or type(error).__name__).splitlines()[0]
        raise FileError(f'{path}: {reason}')

    def pixels(self, content):
        """The bytes of a file → (h, w, 3) uint8."""
        if content.startswith(b'\xff\xd8') and not APP1.search(content):
            with contextlib.suppress(ValueError):
                height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
                if self.fits(width, height) and colours in ('YCbCr', 'Gray'):
                    return simplejpeg.decode_jpeg(content)  # strict: it refuses what libjpeg only warns of
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if not self.fits(*image.size):
                raise ValueError(self.too_large())
            frames = getattr(image, 'n_frames', 1)
            if frames > 1 and image.format != 'MPO':  # the further images of a photograph are not wanted
                raise ValueError(f'an animation of {frames} images; replace it by one image')
            return rgb_array(image)

    def fits(self, width, height):
        return width * height <= self.max_pixels and max(width, height) <= LONGEST_SIDE

    def too_large(self):
        return (f'an image of more than {self.max_pixels} pixels, or {LONGEST_SIDE} on one side, which is refused '
                f'before it is decoded; replace it by a smaller one or bind Decoder.max_pixels')


def rgb_array(image):
    """A PIL image → (h, w, 3) uint8, upright as its EXIF data say, without transparency."""
    image.load()  # raises, where the file is damaged, what the next line would suppress
    with contextlib.suppress(Exception):  # damaged EXIF data turn nothing, as in fast-reid
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):  # 16 bits of grey, which Pillow's conversion would clip at 255
        return np.repeat((np.asarray(image)[..., None] >> 8).astype(np.uint8), 3, axis=2)
    return np.array(image.convert('RGB'))


def to_batch(images, size):
    """(3, h, w) uint8 images → (B, 3, H, W) uint8, channels-last, resized to size=(H, W).

    The interpolation is bicubic and antialiased. Images of one size are resized together: one by one they take longer.
    """
    batch = torch.empty(len(images), *size, 3, dtype=torch.uint8, device='cpu').permute(0, 3, 1, 2)
    for shape in {image.shape for image in images}:
        places = [i for i, image in enumerate(images) if image.shape == shape]
        group = torch.stack([images[i].permute(1, 2, 0) for i in places]).permute(0, 3, 1, 2)
        if shape[1:] != size:
            group = F.interpolate(group, size, mode='bicubic', antialias=True)
        if len(places) == len(images):
            return group.contiguous(memory_format=torch.channels_last)
        for place, image in zip(places, group):
            batch[place] = image
    return batch


class TrainBatches:
    """Item `step` is the batch of that step: sampler, images and the draws of their augmentation.

    positions: the range of places in the batch that are loaded.
    Another image of the same identity, drawn by (seed, step, position), replaces an unreadable image.
    """

    def __init__(self, samples, labels, sampler, augmentation, size, positions):
        self.samples, self.labels, self.sampler = samples, labels, sampler
        self.augmentation, self.size, self.decode, self.positions = augmentation, tuple(size), Decoder(), positions

    def __getitem__(self, step):
        batch, images, unreadable = self.sampler.batch(step), [], {}
        indices = [batch[position] for position in self.positions]
        for position, index in zip(self.positions, indices):
            image = self.image(index, step, position, unreadable)
            images.append(self.augmentation.auto_augment(image, self.sampler.seed, step, position))
        draws = self.augmentation.draw(self.sampler.seed, step, len(indices), self.size, self.positions.start)
        labels = torch.tensor([self.labels[index] for index in indices])
        return TrainBatch(to_batch(images, self.size), labels, draws, list(unreadable.values()))

    def image(self, index, step, position, unreadable):
        for candidate in self.candidates(index, step, position):
            path = self.samples[candidate].path
            try:
                return self.decode(path)
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


class TestBatches:
    """Item i holds `batch_size` images from samples[i] on, in order; fewer where the samples end."""

    def __init__(self, samples, size, batch_size):
        self.samples, self.size, self.batch_size, self.decode = samples, tuple(size), batch_size, Decoder()

    def __getitem__(self, start):
        images, unreadable = [], {}
        for sample in self.samples[start:start + self.batch_size]:
            try:
                images.append(self.decode(sample.path))
            except FileError as error:  # the caller raises it: an error from a worker process loses its form
                unreadable[sample.path] = str(error)
        return TestBatch(to_batch(images, self.size), unreadable)
