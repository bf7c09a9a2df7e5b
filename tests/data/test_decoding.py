"""Files → images, against Pillow: kinds of files, EXIF orientation, a limit of pixels, and what cannot be read."""

import io
import os
import resource
import zlib

import numpy as np
import pytest
import torch
from conftest import difference, read_image, smooth_pixels, write_image
from forks import run_program
from PIL import Image, ImageOps

from mgn.data.images import Decoder
from mgn.ops.errors import FileError

SIZE = (16, 8)
pytestmark = pytest.mark.filterwarnings('ignore:::PIL.Image', 'ignore:::PIL.TiffImagePlugin')


def pil_rgb(path):
    return np.asarray(Image.open(path).convert('RGB')).astype(int)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'RGBA', 'LA', '1'])
@pytest.mark.parametrize('size', [(1, 1), (31, 33), (64, 32)])
def test_png_files_of_every_mode_are_read_as_pil_converts_them_to_rgb(tmp_path, mode, size):
    path = tmp_path / 'image.png'
    Image.fromarray(smooth_pixels(*size)).convert(mode).save(path)
    image = read_image(str(path), size)
    assert (image.dtype, image.shape) == (torch.uint8, (3, *size))
    assert difference(image, pil_rgb(path)) == 0


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('options', [{}, {'quality': 60}, {'progressive': True}, {'subsampling': 0}])
@pytest.mark.parametrize('size', [(1, 1), (31, 33), (128, 64)])
def test_jpeg_files_are_read_as_pil_reads_them(tmp_path, mode, options, size):
    path = tmp_path / 'image.jpg'
    Image.fromarray(smooth_pixels(*size)).convert(mode).save(path, **options)
    image = read_image(str(path), size)
    assert (image.dtype, image.shape) == (torch.uint8, (3, *size))
    assert difference(image, pil_rgb(path)) <= 1  # two builds of libjpeg may round differently


@pytest.mark.parametrize('value', [0, 1, 40000, 65535])
def test_a_16_bit_png_is_read_as_8_bits(tmp_path, value):
    path = tmp_path / 'deep.png'
    Image.fromarray(np.full(SIZE, value, np.uint16)).save(path)
    image = read_image(str(path), SIZE)
    assert image.dtype == torch.uint8
    assert (image.int() - value // 257).abs().max() <= 1


@pytest.mark.parametrize('orientation', range(9))
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
def test_an_image_is_turned_as_its_exif_data_say(tmp_path, suffix, orientation):
    path, exif = tmp_path / f'image.{suffix}', Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(smooth_pixels(31, 20)).save(path, exif=exif)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert('RGB')).astype(int)
    image = Decoder()(path)
    assert tuple(image.shape[1:]) == expected.shape[:2] == ((20, 31) if orientation > 4 else (31, 20))
    assert difference(image, expected) <= 1


@pytest.mark.parametrize('orientation, turn', [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90),
                                               (8, Image.Transpose.ROTATE_270)])
def test_an_image_stored_sideways_gives_the_pixels_of_the_upright_one(tmp_path, orientation, turn):
    upright, exif = Image.fromarray(smooth_pixels(32, 16)), Image.Exif()
    exif[0x0112] = orientation
    upright.save(tmp_path / 'upright.png')
    upright.transpose(turn).save(tmp_path / 'sideways.png', exif=exif)
    assert torch.equal(*(read_image(tmp_path / f'{name}.png', SIZE) for name in ('upright', 'sideways')))


def test_exif_data_behind_other_segments_are_found_and_damaged_ones_turn_nothing(tmp_path):
    exif, file, path = Image.Exif(), io.BytesIO(), tmp_path / 'image.jpg'
    exif[0x0112] = 6
    Image.fromarray(smooth_pixels(31, 20)).save(file, 'JPEG', exif=exif, comment=b'c' * 9000, icc_profile=b'i' * 90000)
    content = file.getvalue()
    start = content.index(b'\xff\xe1')
    end = start + 2 + int.from_bytes(content[start + 2:start + 4], 'big')
    last = content.index(b'\xff\xda')
    path.write_bytes(content[:start] + content[end:last] + content[start:end] + content[last:])
    assert Decoder()(path).shape == (3, 20, 31)
    path.write_bytes(content.replace(content[start + 10:end], b'\xff' * (end - start - 10)))
    assert Decoder()(path).shape == (3, 31, 20)


def claim(path, height, width):
    """Writes a small image file whose header says that it is large."""
    file = io.BytesIO()
    Image.new('RGB', (8, 8)).save(file, 'PNG' if path.suffix == '.png' else 'JPEG')
    content = bytearray(file.getvalue())
    if path.suffix == '.png':
        content[16:24] = width.to_bytes(4, 'big') + height.to_bytes(4, 'big')
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, 'big')
    else:
        place = content.index(b'\xff\xc0') + 5
        content[place:place + 4] = height.to_bytes(2, 'big') + width.to_bytes(2, 'big')
    path.write_bytes(content)


@pytest.mark.parametrize('height, width', [(65500, 65500), (16000, 8000), (4001, 4000)])
@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_an_image_of_too_many_pixels_is_refused_before_it_takes_memory(tmp_path, suffix, height, width):
    path = tmp_path / f'image{suffix}'
    claim(path, height, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = 'an image of more than 16000000 pixels, or 65535 on one side, which .* bind Decoder.max_pixels'
    with pytest.raises(FileError, match=message) as e:
        Decoder()(path)
    assert str(e.value).startswith(f'{path}: ')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB; one byte a pixel is 15,625


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_the_limit_of_pixels_is_the_largest_image(tmp_path, suffix):
    path = tmp_path / f'image{suffix}'
    write_image(path, 0, size=(20, 10))
    assert Decoder(200)(path).shape == (3, 20, 10)
    with pytest.raises(FileError, match='more than 199 pixels'):
        Decoder(199)(path)


def test_no_side_is_longer_than_that_of_a_jpeg_file(tmp_path):
    path = tmp_path / 'image.png'
    Image.new('L', (1, 65535)).save(path)
    assert Decoder()(path).shape == (3, 65535, 1)
    Image.new('L', (65536, 1)).save(path)
    with pytest.raises(FileError, match='or 65535 on one side'):
        Decoder()(path)


def test_pillow_gives_no_warnings(tmp_path):
    exif, path = Image.Exif(), tmp_path / 'image.png'
    exif[0x0112] = 6
    image = Image.fromarray(smooth_pixels(31, 20)).convert('P')
    image.save(path, transparency=bytes(range(256)), exif=b'Exif\0\0' + exif.tobytes()[6:20])
    claim(tmp_path / 'large.png', 12000, 10000)
    script = (f'from mgn.data.images import Decoder\nprint(tuple(Decoder()({str(path)!r}).shape))\n'
              f'try: Decoder()({str(tmp_path / "large.png")!r})\nexcept ValueError: pass')
    result = run_program(script)
    assert (result.stdout, result.stderr) == ('(3, 31, 20)\n', '')


@pytest.mark.parametrize('format', ['GIF', 'WEBP', 'MPO'])
def test_images_of_other_formats_with_a_suffix_of_jpeg_are_read(tmp_path, format):
    """MPO is how phones save a photograph with further images, such as one of its depth, and with EXIF data."""
    path, image, exif = tmp_path / 'image.jpg', Image.fromarray(smooth_pixels(31, 20)), Image.Exif()
    exif[0x010f] = 'a maker'
    image.save(path, format, exif=exif, **({'save_all': True, 'append_images': [image]} if format == 'MPO' else {}))
    assert Image.open(path).format == format and difference(Decoder()(path), pil_rgb(path)) <= 1


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / 'image.png'
    write_image(path, 0)
    monkeypatch.setattr('mgn.data.images.LARGEST_FILE', path.stat().st_size)
    assert Decoder()(path).shape[0] == 3
    monkeypatch.setattr('mgn.data.images.LARGEST_FILE', path.stat().st_size - 1)
    with pytest.raises(FileError, match=r'image.png: a file of more than \d+ bytes; replace it'):
        Decoder()(path)


def missing(path):
    pass


def empty(path):
    path.touch()


def text(path):
    path.write_text('no image' * 100)


def folder(path):
    path.mkdir()


def truncated(path):
    write_image(path, 0)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


def header_only(path):
    write_image(path, 0)
    path.write_bytes(path.read_bytes()[:24])


def animated(path):
    frames = [Image.fromarray(smooth_pixels(*SIZE, seed)) for seed in (0, 1)]
    frames[0].save(path, 'GIF' if path.suffix == '.jpg' else 'PNG', save_all=True, append_images=frames[1:])


def bitmap(path):
    Image.fromarray(smooth_pixels(*SIZE)).save(path, 'BMP')


def damaged_pixels(path):
    """Which ended the process of another decoder."""
    Image.fromarray(smooth_pixels(64, 32)).save(path, 'PNG')
    content = bytearray(path.read_bytes())
    place = content.index(b'IDAT') + 40
    content[place:place + 400] = bytes(400)
    path.write_bytes(content)


@pytest.mark.parametrize('name', ['person.jpg', 'pérson 1.png'])
@pytest.mark.parametrize('damage', [missing, empty, text, folder, truncated, header_only, animated, bitmap,
                                    damaged_pixels])
def test_what_is_no_readable_image_is_named(tmp_path, damage, name):
    damage(tmp_path / name)
    with pytest.raises(FileError) as error:
        read_image(str(tmp_path / name), SIZE)
    assert str(error.value).startswith(f'{tmp_path / name}: ')
    assert '\n' not in str(error.value) and '0x' not in str(error.value)


def test_a_named_pipe_and_a_device_are_no_images_and_nobody_waits_for_their_end(tmp_path):
    os.mkfifo(tmp_path / 'pipe.jpg')
    os.symlink('/dev/zero', tmp_path / 'device.jpg')
    for name in ('pipe.jpg', 'device.jpg'):
        with pytest.raises(FileError, match=f'{name}: this is no image'):
            Decoder()(str(tmp_path / name))
