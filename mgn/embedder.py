"""Images → features by somebody's weights, for programs that want no configuration: `mgn.load`."""

import functools
import inspect

import numpy as np
import torch
from PIL import Image

from mgn import annotations, portable, weights
from mgn.data.images import Decoder, rgb_array, to_batch
from mgn.devices import find_device
from mgn.features import Extractor
from mgn.model import MGN
from mgn.ops.arguments import shown
from mgn.ops.errors import UserError
from mgn.runs import checkpoint


class Embedder:
    """A network in evaluation mode. `embed` may be called from any thread.

    dim: D, the width of a feature. input_size: (H, W) in pixels, to which images are resized. device: torch.device.
    """

    def __init__(self, path, device='auto', precision='float32', flip_test=False, batch_size=64):
        annotations.check_all({'precision': precision, 'flip_test': flip_test, 'batch_size': batch_size}, Extractor)
        device = str(device) if isinstance(device, torch.device) else device
        annotations.check(device, str, 'device')
        self.decode, self.batch_size = Decoder(), batch_size
        if str(path).endswith('.onnx'):
            if flip_test or precision not in ('auto', 'float32') or device not in ('auto', 'cpu'):
                raise UserError(f'{path} runs on the CPU, as it was exported: leave out device, precision '
                                f'and flip_test')
            self.forward, metadata = portable.read_onnx(path)
            self.device, self.dim, self.input_size = torch.device('cpu'), metadata['D'], tuple(metadata['input_size'])
        else:
            self.open_weights(path, device, precision, flip_test)

    def open_weights(self, path, device, precision, flip_test):
        content = weights.load_checkpoint(path)
        values = weights.saved_values(content['config'], path)
        options = weights.options_in(values)
        self.input_size = values.get('input_size', (384, 128))
        annotations.check_all(options, MGN, f'{path}: MGN.')
        annotations.check_all({'input_size': self.input_size}, Extractor, f'{path}: ')
        self.device = find_device(device)
        extractor = Extractor(self.device, self.input_size, self.batch_size, 0, flip_test, precision)
        defaults = {name: parameter.default for name, parameter in inspect.signature(MGN).parameters.items()}
        # The caller's random numbers stay, and neither their default device nor their gin has a say.
        with torch.random.fork_rng(devices=()), torch.device('cpu'):
            model = MGN(**{**defaults, **options, 'num_classes': 0, 'fresh': False})
        model.to(self.device, torch.float32, memory_format=torch.channels_last).eval()
        checkpoint.load_model(model, content['model'], path, without='.classifier.')
        self.dim, self.forward = model.feature_dim, functools.partial(extractor.forward, model)

    @torch.no_grad()
    def embed(self, images, bgr=False):
        """The features of n images: (n, D) float32 on the CPU, L2-normalised, so their products are cosines.

        Images are resized and normalised as in evaluation: features are those of mgn.extract under mgn.load's
        flip_test and precision. What the checkpoint binds for these does not count.

        Args:
            images: an (n, 3, H, W) uint8 tensor, or a list of images of any sizes, each a path, a PIL image or an
                (h, w, 3) uint8 array.
            bgr: the channels of tensor and arrays are in the order of OpenCV, not RGB.
        Raises:
            UserError: another kind of image, or one that cannot be read.
        """
        if not isinstance(images, (list, tuple, torch.Tensor, np.ndarray)) or getattr(images, 'ndim', 4) == 0:
            raise UserError(f'embed takes a list of images or a tensor of them, not {shown(images)}; make it a list')
        parts = [torch.empty(0, self.dim, dtype=torch.float32, device='cpu')]
        for first in range(0, len(images), self.batch_size):
            batch = [self.as_tensor(image, bgr) for image in images[first:first + self.batch_size]]
            parts.append(self.forward(to_batch(batch, self.input_size)))
        return torch.cat(parts)

    def as_tensor(self, image, bgr):
        """(3, h, w) uint8, RGB."""
        if isinstance(image, str) or hasattr(image, '__fspath__'):
            return self.decode(image)
        if isinstance(image, Image.Image) and image.mode not in ('I', 'F'):  # these do not say which number is white
            try:
                image, bgr = rgb_array(image), False
            except Exception as error:  # Pillow reads the file now, or has closed it; see Decoder
                raise UserError(f'A PIL image cannot be read: {error}; give another') from error
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or (
                0 in image.shape):
            found = f'{image.dtype} {tuple(image.shape)}' if hasattr(image, 'dtype') else shown(image)
            raise UserError(f'Images must be a (n, 3, H, W) uint8 tensor, or a list of paths, PIL images or (h, w, 3) '
                            f'uint8 arrays, but one is {found}; convert it')
        return (image.flip(0) if bgr else image).cpu()
