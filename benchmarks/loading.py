"""Loader throughput per core against fast-reid's chain of transforms, and torchvision's, in turn in one run.

    make peers && python -m benchmarks.loading

Sources are drawn in the run: 64×128 JPEGs as in Market-1501, and 150×350 ones as MSMT17 has.
"loader_and_augmentation" and the chains do the same work: file → decoded, resized, mirrored, padded and cropped,
erased, normalised, a float32 batch of 384×128 images. "loader" is what one worker does here (file → decoded, resized
uint8 image). fast-reid normalises in its model; that is counted here too. One thread each, whose time on the core is
counted.
"""

import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import simplejpeg
import torch
import torchvision.transforms as T

from benchmarks.machine import cpu_model
from benchmarks.peers import fastreid_loader
from mgn.data.augmentation import MEAN, STD, Augmentation, normalise
from mgn.data.images import Decoder, to_batch

SIZE, BATCH, IMAGES, BATCHES = (384, 128), 64, 256, 29

decode, fastreid_chain = Decoder(), fastreid_loader(SIZE)
transforms = T.Compose([
    T.Resize(SIZE, T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(), T.Pad(10), T.RandomCrop(SIZE), T.ToTensor(),
    T.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]), T.RandomErasing(0.5, (0.02, 0.4))])


def torchvision_chain(paths):
    return torch.stack([transforms(PIL.Image.open(path).convert('RGB')) for path in paths])


def loader(paths):
    return to_batch([decode(path) for path in paths], SIZE)


def loader_and_augmentation(paths):
    augmentation = Augmentation()
    return augmentation(loader(paths), augmentation.draw(0, 0, len(paths), SIZE))


def decode_only(paths):
    return [decode(path) for path in paths]


def pillow_only(paths):
    return [np.array(PIL.Image.open(path).convert('RGB')) for path in paths]


def write_sources(folder, size):
    """Smooth random images, which compress like photographs rather than like noise."""
    paths = []
    for seed in range(IMAGES):
        coarse = np.random.default_rng(seed).integers(0, 256, (1, 3, size[0] // 8, size[1] // 8))
        image = torch.nn.functional.interpolate(torch.from_numpy(coarse).float(), size, mode='bicubic')[0]
        paths.append(str(folder / f'{seed}.jpg'))
        PIL.Image.fromarray(image.clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(paths[-1], quality=90)
    return paths


def check(paths):
    """Without random draws both sides have one result, to the roundings of decoders and resizers: a level is 0.017."""
    ours, theirs = normalise(loader(paths)), fastreid_loader(SIZE, is_train=False)(paths)
    difference = (ours - theirs).abs()
    assert difference.mean() < 0.02 and difference.max() < 0.2, (
        f'Both loaders must give the same images, but they differ by {difference.mean()}, at most {difference.max()}')


def main():
    warnings.simplefilter('ignore')  # fast-reid uses types that torch will remove
    torch.set_num_threads(1)
    print(f'{cpu_model()}, 1 thread, torch {torch.__version__}, Pillow {PIL.__version__}, simplejpeg '
          f'{simplejpeg.__version__}; images per second of a core, medians of {BATCHES} batches in turn')
    works = {'fast-reid': fastreid_chain, 'torchvision': torchvision_chain,
             'loader_and_augmentation': loader_and_augmentation, 'loader': loader, 'decode_only': decode_only,
             'pillow_only': pillow_only}
    for size in ((128, 64), (350, 150)):
        with tempfile.TemporaryDirectory() as folder:
            paths = write_sources(Path(folder), size)
            check(paths[:BATCH])
            times = {name: [] for name in works}
            for number in range(1 + BATCHES):  # the first is warm-up
                first = number * BATCH % IMAGES
                for name, work in works.items():
                    start = time.process_time()
                    work(paths[first:first + BATCH])
                    times[name].append(time.process_time() - start)
        seconds = {name: statistics.median(of_work[1:]) for name, of_work in times.items()}
        print(f'sources {size[1]}×{size[0]}')
        for name in works:
            print(f'  {name:24} {BATCH / seconds[name]:8.0f} images/s  '
                  f'{seconds["fast-reid"] / seconds[name]:5.2f} × fast-reid')


if __name__ == '__main__':
    main()
