"""Batch of uint8 images → mirrored, cropped, normalised, erased float32 batch, with what was drawn for each image given."""

import functools

import torch
import torch.nn.functional as F

from mgn.ops.native import kernels
from mgn.ops.private import uncompiled

# ImageNet's mean and standard deviation per RGB channel, for pixels in 0…255.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def augment(images, flip, top, left, erase, padding):
    """Horizontal flip → pad with black and crop back → normalise → fill a box with the mean, 0 once normalised; each image on its own.

    On the CPU one pass of a compiled kernel, elsewhere tensor operations, which do not wait for the device; the same bits on the CPU.

    Args:
        images: (B, 3, H, W) uint8, of any strides; channels-last ones are not copied.
        flip: (B,) bool.
        top, left: (B,) int64 from 0 to 2·padding, of the crop in the padded image.
        erase: (B, 4) int64, top, left, bottom, right of the box in the crop; what lies outside is ignored, an empty box erases nothing.
        padding: in pixels, on each side.
    Returns:
        (B, 3, H, W) float32, channels-last.
    Raises:
        ValueError: shapes, types or devices that do not go together; on the CPU a crop outside the padded image.
    """
    _check_images(images)
    if isinstance(padding, bool) or not isinstance(padding, int) or not 0 <= padding < 2 ** 31:
        raise ValueError(f'want padding as an integer from 0 to 2³¹ − 1, got {padding!r}; 0 pads nothing')
    count = len(images)
    for name, draw, shape, dtype in (('flip', flip, (count,), torch.bool), ('top', top, (count,), torch.int64),
                                     ('left', left, (count,), torch.int64), ('erase', erase, (count, 4), torch.int64)):
        if not isinstance(draw, torch.Tensor) or draw.shape != shape or draw.dtype != dtype or draw.device != images.device:
            got = f'{tuple(draw.shape)}, {draw.dtype} on {draw.device}' if isinstance(draw, torch.Tensor) else type(draw).__name__
            raise ValueError(f'want {name} of shape {shape}, {dtype}, on {images.device} with the images, got {got}; pass one draw per image')
    return torch.ops.mgn.augment.default(images, flip, top, left, erase, padding)


def normalise(images):
    """images: (B, 3, H, W) uint8, of any strides → float32, channels-last, ImageNet's mean 0 and standard deviation 1 per channel.

    Raises ValueError for another shape or type.
    """
    _check_images(images)
    return torch.ops.mgn.normalise.default(images)


def _check_images(images):
    if not isinstance(images, torch.Tensor) or images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        got = f'{tuple(images.shape)}, {images.dtype}' if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f'want images of shape (B, 3, H, W), torch.uint8, got {got}; mgn.data.images.to_batch makes them')


torch.library.define('mgn::augment', '(Tensor images, Tensor flip, Tensor top, Tensor left, Tensor erase, int padding) -> Tensor')
torch.library.define('mgn::normalise', '(Tensor images) -> Tensor')


def _augment(images, flip, top, left, erase, padding):
    if images.device.type != 'cpu':
        return augment_reference(images, flip, top, left, erase, padding)
    for name, draw in (('top', top), ('left', left)):
        outside = (draw < 0) | (draw > 2 * padding)
        if outside.any():
            place = outside.nonzero()[0].item()
            raise ValueError(f'want {name} from 0 to {2 * padding}, twice the padding, got {draw[place].item()} for image {place}; '
                             'draw and augment with one padding')
    compiled = kernels(images.device)
    if compiled is None:
        return augment_reference(images, flip, top, left, erase, padding)
    return _run(compiled, images, flip, top, left, erase, padding)


def _normalise(images):
    compiled = kernels(images.device) if images.device.type == 'cpu' else None
    if compiled is None:
        return normalise_reference(images)
    none = torch.zeros(len(images), 4, dtype=torch.int64)
    return _run(compiled, images, none[:, 0].bool(), none[:, 0], none[:, 0], none, 0)


def _run(compiled, images, flip, top, left, erase, padding):
    draws = [draw.contiguous() for draw in (flip, top, left, erase)]
    out = _empty_result(images)
    compiled.augment.default(images.permute(0, 2, 3, 1).contiguous(), *draws, padding, *mean_and_std(images.shape[3], images.device),
                             out.permute(0, 2, 3, 1))
    return out


def _empty_result(images):
    count, _, height, width = images.shape
    return images.new_empty((count, height, width, 3), dtype=torch.float32).permute(0, 3, 1, 2)


@functools.cache
def mean_and_std(width, device):
    """MEAN and STD repeated along a row, (3·width,) float32 each; kept, as a copy to a GPU would have each step wait for it."""
    return tuple(torch.tensor(values).repeat(width).to(device) for values in (MEAN, STD))


def augment_reference(images, flip, top, left, erase, padding):
    """augment by tensor operations on the whole batch."""
    count, _, height, width = images.shape
    batch = torch.arange(count, device=images.device)
    pixels = images.permute(0, 2, 3, 1)
    both = torch.stack((pixels, pixels.flip(2))).flatten(3)                # (2, B, H, 3W), as it is and mirrored
    padded = F.pad(both, (3 * padding, 3 * padding, padding, padding))
    mirror_stride, batch_stride, row_stride, _ = padded.stride()
    windows = padded.as_strided(                                           # every crop is a view: no pixel is copied
        (2, count, 2 * padding + 1, 2 * padding + 1, height, 3 * width),
        (mirror_stride, batch_stride, row_stride, 3, row_stride, 1))
    crops = windows[flip.long(), batch, top, left]                         # (B, H, 3W)
    top, left, bottom, right = erase.T[:, :, None]
    rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
    erased_rows, erased_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    erased = erased_rows[:, :, None] & erased_columns.repeat_interleave(3, dim=1)[:, None, :]
    normalised = normalise_reference(crops.view(count, height, width, 3).permute(0, 3, 1, 2))
    normalised.permute(0, 2, 3, 1).flatten(2).masked_fill_(erased, 0)
    return normalised


def normalise_reference(images):
    """normalise by tensor operations. Rows of 3W numbers make long vector loops; (…, 3) would make short ones."""
    count, _, height, width = images.shape
    mean, std = mean_and_std(width, images.device)
    rows = images.permute(0, 2, 3, 1).reshape(count, height, 3 * width).float().sub_(mean).div_(std)
    return rows.view(count, height, width, 3).permute(0, 3, 1, 2)


@torch.library.register_fake('mgn::augment')
def _(images, flip, top, left, erase, padding):
    return _empty_result(images)


@torch.library.register_fake('mgn::normalise')
def _(images):
    return _empty_result(images)


torch.library.impl('mgn::augment', 'CompositeExplicitAutograd', uncompiled(_augment))
torch.library.impl('mgn::normalise', 'CompositeExplicitAutograd', uncompiled(_normalise))
