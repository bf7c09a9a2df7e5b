"""Damaged image files, made by a seeded mutator: each is an image or a FileError, and never ends the process.

What is decoded is compared with Pillow's own chain, which alone says what a damaged file still shows.
"""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mgn.data.images import Decoder
from mgn.ops.errors import FileError

pytestmark = pytest.mark.filterwarnings('ignore:::PIL.Image', 'ignore:::PIL.TiffImagePlugin')
LIMIT = 20_000  # pixels, so that a damaged header makes no test slow
TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS = {  # of file: the mode of the image and how it is saved
    'jpeg': ('RGB', {'format': 'JPEG'}), 'jpeg 4:4:4': ('RGB', {'format': 'JPEG', 'subsampling': 0}),
    'jpeg progressive': ('RGB', {'format': 'JPEG', 'progressive': True}), 'jpeg grey': ('L', {'format': 'JPEG'}),
    'jpeg cmyk': ('CMYK', {'format': 'JPEG'}), 'jpeg exif': ('RGB', {'format': 'JPEG', 'exif': TURNED}),
    'jpeg restarts': ('RGB', {'format': 'JPEG', 'restart_marker_rows': 1}),
    'png': ('RGB', {'format': 'PNG'}), 'png rgba': ('RGBA', {'format': 'PNG'}), 'png grey': ('L', {'format': 'PNG'}),
    'png palette': ('P', {'format': 'PNG', 'transparency': bytes(range(256))}), 'png 1 bit': ('1', {'format': 'PNG'}),
    'png 16 bits': ('I;16', {'format': 'PNG'}), 'png exif': ('RGB', {'format': 'PNG', 'exif': TURNED}),
    'gif': ('P', {'format': 'GIF'}), 'webp': ('RGB', {'format': 'WEBP', 'exif': TURNED}),
    'webp lossless': ('RGBA', {'format': 'WEBP', 'lossless': True})}


def valid(kind):
    """The bytes of a small image file of a kind."""
    mode, options = KINDS[kind]
    y, x = np.mgrid[:45, :30]
    pixels = np.stack([127 + 120 * np.sin(y / 3 + x / (5 + i)) for i in range(3)], -1).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == 'I;16' else (
        Image.fromarray(pixels).convert(mode))
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def mutated(content, rng):
    """1 to 8 damages: a bit flipped, a byte replaced, a range cut out, repeated or inserted, a number, the end cut off.

    Half of the PNG files get their checksums right again: otherwise the decoder would hardly look at them.
    """
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        place = rng.randrange(len(content) if rng.random() < 0.6 else min(len(content), 200))
        end = place + rng.choice((1, 1, 2, 4, 30))
        behind, put = rng.choice((
            (place + 1, bytes([content[place] ^ 1 << rng.randrange(8)])),
            (place + 1, rng.choice((b'\x00', b'\x01', b'\x7f', b'\x80', b'\xff'))),
            (end, b''), (place, content[place:end]), (place, rng.randbytes(end - place)),
            (place + 4, struct.pack('>I', rng.choice((0, 1, 2 ** 16 - 1, 2 ** 31 - 1, 2 ** 32 - 1))))))
        content[place:behind] = put
        if rng.random() < 0.05:
            del content[place:]
        content = content or bytearray(1)
    return with_checksums(content) if content[:4] == b'\x89PNG' and rng.random() < 0.5 else bytes(content)


def with_checksums(content):
    """A PNG file whose chunks have the checksums of their present content."""
    content, place = bytearray(content), 8
    while place + 12 <= len(content):
        end = place + 8 + int.from_bytes(content[place:place + 4], 'big')
        content[end:end + 4] = zlib.crc32(content[place + 4:end]).to_bytes(4, 'big')
        place = end + 4
    return bytes(content)


def pillows(content):
    """(h, w, 3) uint8 pixels by Pillow's own chain, None where it refuses the file."""
    try:
        with Image.open(io.BytesIO(content), formats=('JPEG', 'PNG', 'GIF', 'WEBP')) as image:
            image.load()
            return np.asarray(ImageOps.exif_transpose(image).convert('RGB')) if 'I' not in image.mode else None
    except Exception:
        return None


def check(path, content, decode=Decoder(LIMIT)):
    """Decodes damaged content; returns whether it still is an image."""
    path.write_bytes(content)
    try:
        image = decode(path)
    except FileError as error:
        assert str(error).startswith(f'{path}: ') and len(str(error)) > len(f'{path}: ') and '\n' not in str(error)
        assert '0x' not in str(error)
        return False
    assert image.shape[0] == 3 and 0 < image.shape[1] * image.shape[2] <= LIMIT
    expected = pillows(content)
    if expected is not None:
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    return True


@pytest.mark.parametrize('cases', [30, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize('kind', KINDS)
def test_a_damaged_file_is_an_image_or_an_error_that_names_it(tmp_path, kind, cases):
    content, rng = valid(kind), random.Random(f'{kind} {cases}')
    assert check(tmp_path / 'valid', content)
    outcomes = [check(tmp_path / 'damaged', mutated(content, rng)) for _ in range(cases)]
    assert not all(outcomes)


@pytest.mark.parametrize('stride', [11, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize('kind', KINDS)
def test_a_file_that_is_cut_off_is_refused_or_has_lost_no_pixel(tmp_path, kind, stride):
    content, path = valid(kind), tmp_path / 'cut'
    path.write_bytes(content)
    whole = Decoder()(path)
    for length in range(0, len(content), stride):
        if check(path, content[:length]):
            assert torch.equal(Decoder()(path), whole)
