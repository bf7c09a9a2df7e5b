"""Loader throughput per core against PIL and torchvision's classic per-image chain, both alternating in one run.

    python -m benchmarks.loading

Sources are drawn in the run: 64×128 JPEGs as in Market-1501, and 150×350 ones as MSMT17 has. "loader" is what one
worker does here (file → decoded, resized uint8 image), "loader + augmentation" adds the batched flip, crop, erasing and
normalisation on the CPU; the classic chain does all of it per image. Both sides give 384×128 images, on one thread.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torchvision.transforms as T
from torchvision.io import ImageReadMode, decode_image, read_file, write_jpeg

from benchmarks.machine import cpu_model
from mgn.augmentation import MEAN, STD, Augmentation
from mgn.images import decode, to_batch

SIZE, BATCH, IMAGES, ROUNDS = (384, 128), 64, 256, 7

classic_chain = T.Compose([
    T.Resize(SIZE, T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(), T.Pad(10), T.RandomCrop(SIZE), T.ToTensor(),
    T.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]), T.RandomErasing(0.5, (0.02, 0.4))])


def classic(paths):
    return torch.stack([classic_chain(PIL.Image.open(path).convert('RGB')) for path in paths])


def loader(paths):
    return to_batch([decode(path) for path in paths], SIZE)


def loader_and_augmentation(paths):
    augmentation = Augmentation()
    return augmentation(loader(paths), augmentation.draw(0, 0, len(paths), SIZE))


def decode_only(paths):
    return [decode_image(read_file(path), mode=ImageReadMode.RGB) for path in paths]


def write_sources(folder, size):
    """Smooth random images, which compress like photographs rather than like noise."""
    paths = []
    for seed in range(IMAGES):
        coarse = np.random.default_rng(seed).integers(0, 256, (1, 3, size[0] // 8, size[1] // 8))
        image = torch.nn.functional.interpolate(torch.from_numpy(coarse).float(), size, mode='bicubic')[0]
        paths.append(str(folder / f'{seed}.jpg'))
        write_jpeg(image.clamp(0, 255).to(torch.uint8), paths[-1], quality=90)
    return paths


def main():
    torch.set_num_threads(1)
    print(f'{cpu_model()}, 1 thread, torch {torch.__version__}; images per second, medians of {ROUNDS} alternating rounds')
    works = (classic, loader, loader_and_augmentation, decode_only)
    for size in ((128, 64), (350, 150)):
        with tempfile.TemporaryDirectory() as folder:
            paths = write_sources(Path(folder), size)
            times = {work: [] for work in works}
            for _ in range(1 + ROUNDS):  # the first is warm-up
                for work in works:
                    start = time.perf_counter()
                    for first in range(0, IMAGES, BATCH):
                        work(paths[first:first + BATCH])
                    times[work].append(time.perf_counter() - start)
        peer = statistics.median(times[classic][1:])
        print(f'sources {size[1]}×{size[0]}')
        for work in works:
            median = statistics.median(times[work][1:])
            print(f'  {work.__name__:24} {IMAGES / median:8.0f} images/s  {peer / median:5.2f} × classic')


if __name__ == '__main__':
    main()
