"""Images → L2-normalised test features, by one configured extractor; and what these features depend on."""

import contextlib
import hashlib
import os
from typing import Annotated

import gin
import numpy as np
import torch
import torch.nn.functional as F

from mgn.data.images import TestBatches
from mgn.data.augmentation import normalise
from mgn.data.loader import load_batches
from mgn.devices import Precision, find_device, resolve_precision
from mgn.model import MGN
from mgn.ops.errors import UserError
from mgn.runs import checkpoint as checkpoints, processes
from mgn.runs.log import progress

Size = tuple[Annotated[int, 1, 4096], Annotated[int, 1, 4096]]  # (H, W) in pixels


@gin.configurable(denylist=['device'])
class Extractor:
    """How images become features, alike in the evaluations of training, in mgn.eval and in mgn.extract.

    Args:
        device: torch.device that the model is on.
        input_size: (H, W) in pixels. batch_size: images at a time. workers: decoding processes.
        flip_test: average the features of image and mirrored image.
        precision: of the model's forward pass, by autocast: 'float32', 'bfloat16', 'float16', or 'auto' for bfloat16
            where the device has units for it, else float32. Features are averaged and normalised in float32 always.
    """

    def __init__(self, device, input_size: Size = gin.REQUIRED, batch_size: Annotated[int, 1, 4096] = 64,
                 workers: Annotated[int, 0, 1024] = 4, flip_test: bool = False, precision: Precision = 'float32'):
        self.device, self.batch_size, self.workers = device, batch_size, workers
        self.place = device if device.type == 'cuda' else 'cpu'  # of features to rank
        self.input_size, self.flip_test = input_size, flip_test
        self.precision = resolve_precision(precision, device, 'Extractor.precision')

    def settings(self):
        """What features depend on beside the model and the images."""
        return {'input_size': list(self.input_size), 'flip_test': self.flip_test, 'precision': self.precision}

    def features(self, model, samples, unreadable=None):
        """The features of `samples` in order: (n, D) float32 on the CPU.

        unreadable: a dict that takes what cannot be read, {path: reason}, which is left out; None: that is a UserError.
        Features that are not finite are a UserError that names their images.
        """
        return torch.cat([torch.empty(0, model.feature_dim, device='cpu'), *self.batches(model, samples, unreadable)])

    def gathered(self, model, samples):
        """The same in process 0, of which each process makes a part; None in the others."""
        processes.check_same('precision of features', self.precision, "Bind feature_precision = 'float32'.")
        return processes.to_first(self.features(model, processes.part(samples)))

    @torch.no_grad()
    def batches(self, model, samples, unreadable=None):
        """Yields the same features batch by batch. The model runs in evaluation mode and is put back into its own."""
        test_batches = TestBatches(samples, self.input_size, self.batch_size)
        starts = range(0, len(samples), self.batch_size)
        loader = load_batches(test_batches, starts, self.workers, self.device)
        with evaluation_mode(model), progress(len(samples), unit='image', what='features') as bar:
            for batch, start in zip(loader, starts):
                if unreadable is not None:
                    unreadable.update(batch.unreadable)
                elif batch.unreadable:
                    raise UserError('Evaluation needs every image, and these cannot be read:\n  ' + '\n  '.join(
                        batch.unreadable.values()) + '\nrestore the files or remove them from the data set')
                features = self.forward(model, batch.images)
                if not features.isfinite().all():
                    read = [s.path for s in samples[start:start + self.batch_size] if s.path not in batch.unreadable]
                    bad = [path for path, row in zip(read, features) if not row.isfinite().all()]
                    raise UserError(f'Features must be finite, but {len(bad)} of a batch of {len(read)} have NaN or '
                                    f'infinity, first that of {bad[0]}; look at the weights and at this image'
                                    + ", or bind feature_precision = 'float32'" * (self.precision != 'float32'))
                yield features
                bar.update(len(features))

    def forward(self, model, images):
        """images: (B, 3, H, W) uint8 → (B, D) float32 on the CPU; NaN where the network diverged."""
        images = normalise(images.to(self.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, getattr(torch, self.precision), enabled=self.precision != 'float32'):
            features = model(images).features.float()
            if self.flip_test:
                features = (features + model(images.flip(3)).features.float()) / 2
        # Where a norm is beyond float32, division by it leaves zeros, and ranks without a meaning: 0 · ∞ is NaN.
        return (F.normalize(features) + 0 * features.norm(dim=1, keepdim=True)).cpu()


def load_for_features(checkpoint, weights, device, **settings):
    """The checkpoint's MGN without classifiers, in evaluation mode on the device of this name, and its Extractor."""
    extractor = Extractor(find_device(device), **settings)
    model = MGN(num_classes=0, fresh=False).to(extractor.device, memory_format=torch.channels_last).eval()
    checkpoints.load_model(model, checkpoint['model'], weights, without='.classifier.')
    return model, extractor


@contextlib.contextmanager
def evaluation_mode(model):
    """The model in evaluation mode; afterwards each of its modules is back in the mode that it had."""
    learning = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in learning:
            module.training = True


def check_same_data(dataset, parts, model=None):
    """UserError in all processes where their images or weights differ, as copies on several machines may."""
    if processes.count() > 1:
        images = [hash_of(image_lists(dataset, part).values()) for part in parts]
        processes.check_same(f'images of {dataset.name}', images, 'Give all machines the same files in data_root.')
        if model:
            processes.check_same('weights', hash_of_weights(model), 'Give all machines the same checkpoint.')


def image_lists(dataset, part):
    """The pids, camids and paths (bytes, relative to the data set's folder) of a part's n images: (n,) arrays."""
    samples = getattr(dataset, part)
    ids = {f'{name}s': np.array([getattr(sample, name) for sample in samples]) for name in ('pid', 'camid')}
    return {**ids, 'paths': np.array([os.fsencode(os.path.relpath(sample.path, dataset.root)) for sample in samples])}


def hash_of_weights(model):
    """SHA-256 of the names, shapes and values of all weights that features depend on."""
    state = {name: tensor for name, tensor in model.state_dict().items() if '.classifier.' not in name}
    return hash_of(part for name in sorted(state) for part in (
        f'{name} {tuple(state[name].shape)}'.encode(), np.ascontiguousarray(state[name].detach().cpu().numpy())))


def hash_of(parts):
    """SHA-256 of bytes and contiguous arrays, one after the other."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()
