"""Images → L2-normalised test features: in memory, or in files that evaluation reads in place of the images."""

import hashlib
import json
import logging
import os
import time
import uuid

import gin
import numpy as np
import torch
import torch.nn.functional as F

from mgn.runs import processes
from mgn.folding import folded
from mgn.data.images import TestBatches
from mgn.runs.interruption import leave_if_nothing_is_lost
from mgn.data.augmentation import normalise
from mgn.precision import DTYPES, resolve
from mgn.runs.log import progress, write_text
from mgn.data.loader import load_batches

logger = logging.getLogger(__name__)

FORMAT = 'mgn features 2'
MANIFEST = 'manifest.json'
SAMPLE = 1000  # rows of a file that are looked at before it is believed
STORAGES = {'float32': torch.float32, 'float16': torch.float16}


def extract_features(model, samples, device, input_size, batch_size, workers, flip_test, precision='float32'):
    """L2-normalised test features of `samples`, in their order: (len(samples), D) float32 on the CPU.

    precision: 'float32', 'bfloat16' or 'float16', of the forward pass, by autocast. The model stays as it is: a folded copy runs.
    """
    return torch.cat([torch.empty(0, model.feature_dim),
                      *feature_batches(model, samples, device, input_size, batch_size, workers, flip_test, precision)])


@torch.no_grad()
def feature_batches(model, samples, device, input_size, batch_size, workers, flip_test, precision='float32'):
    """The same, batch by batch."""
    if batch_size < 1:
        raise ValueError(f'want batch_size >= 1 to extract features, got {batch_size}')
    test_batches = TestBatches(samples, input_size, batch_size)
    network = folded(model)
    done, said = 0, time.perf_counter()
    with progress(len(samples), unit='image', what='features') as bar:
        for batch in load_batches(test_batches, range(len(test_batches)), workers, device):
            leave_if_nothing_is_lost()
            if batch.unreadable:
                raise ValueError('want readable images to evaluate, got\n  ' + '\n  '.join(batch.unreadable)
                                 + '\nrestore the files, or remove them from the data set')
            images = normalise(batch.images.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, DTYPES[precision], enabled=precision != 'float32'):
                output = network(images).features.float()  # (B, D)
                if flip_test:
                    output = (output + network(images.flip(3)).features.float()) / 2
            yield F.normalize(output).cpu()
            done += len(output)
            bar.update(len(output))
            if bar.disable and time.perf_counter() - said > 30:
                said = time.perf_counter()
                logger.info('features of %d of %d images', done, len(samples))


@gin.configurable(denylist=['model', 'dataset', 'device', 'features_dir'])
def write_features(model, dataset, device, features_dir, input_size=gin.REQUIRED, batch_size=64, workers=4, flip_test=False,
                   precision='float32', storage='float32'):
    """Writes the features of query and gallery into a folder, the manifest last; under torchrun each process its part of the images.

    Files, for `query` and `gallery` each: _features.npy (n, D) of `storage`, _pids.npy and _camids.npy (n,) int64, _paths.npy (n,) UTF-8
    bytes, relative to the data set's folder. manifest.json tells what they were made of: network, weights, options and the lists of images,
    but not what the images showed.

    Args:
        model: MGN on `device`. dataset: Dataset. input_size: (H, W) in pixels. batch_size: images at a time. workers: decoding processes.
        flip_test: average the features of image and mirrored image.
        precision: of the forward pass, as in `mgn.evaluation.evaluate`. storage: 'float32', or 'float16' for half the bytes.
    Raises:
        ValueError: options out of range, unreadable images, a folder that holds features or that not all processes share, features that
            are not finite. OSError: what cannot be written.
    """
    if storage not in STORAGES:
        raise ValueError(f'want write_features.storage to be one of {", ".join(STORAGES)}, got {storage!r}')
    precision = resolve(precision, device, 'write_features.precision')
    manifest = os.path.join(features_dir, MANIFEST)
    if processes.share(os.path.exists(manifest)):
        raise ValueError(f'want a features_dir without features, got {manifest}; remove the folder or bind another features_dir')
    check_alike(dataset, ('query', 'gallery'), model)
    try:
        if processes.number() == 0:
            os.makedirs(features_dir, exist_ok=True)
        check_shared(features_dir)
        for part in ('query', 'gallery'):
            samples = getattr(dataset, part)
            if processes.number() == 0:
                for name, array in described(dataset, part).items():
                    np.save(file_of(features_dir, part, name), array)
                header(file_of(features_dir, part, 'features'), (len(samples), model.feature_dim), storage)
            processes.wait()
            write_rows(file_of(features_dir, part, 'features'), processes.part(range(len(samples))).start, (
                finite(rows).to(STORAGES[storage]) for rows in feature_batches(model, processes.part(samples), device, input_size, batch_size,
                                                                               workers, flip_test, precision)))
        processes.wait()
        if processes.number() == 0:
            write_text(manifest, json.dumps({
                'format': FORMAT, **made_of(model, input_size, flip_test, precision), 'storage': storage, 'dataset': dataset.name,
                'D': model.feature_dim, 'images': {part: len(getattr(dataset, part)) for part in ('query', 'gallery')},
                'paths': {part: hash_of([described(dataset, part)['paths']]) for part in ('query', 'gallery')}}, indent=2) + '\n')
    except OSError as error:
        raise OSError(f'want to write features to {features_dir}, got: {error}; free disk space or bind another features_dir, of a file system '
                      f'that all processes share') from error
    logger.info('features of %d query and %d gallery images are in %s', len(dataset.query), len(dataset.gallery), features_dir)


def check_shared(folder):
    """Raises ValueError in all processes where one does not see what process 0 writes there."""
    token = os.path.join(folder, 'shared')
    wanted = processes.share(uuid.uuid4().hex)
    if processes.number() == 0:
        write_text(token, wanted)
    processes.wait()
    try:
        with open(token) as file:
            seen = file.read() == wanted
    except OSError:
        seen = False
    blind = [process for process, sees in enumerate(processes.gather(seen)) if not sees]
    if processes.number() == 0:
        os.remove(token)
    if blind:
        raise ValueError(f'want a features_dir that all processes share, got {folder}, where {", ".join(map(str, blind))} cannot see what 0 writes; '
                         f'bind a folder of a shared file system')


def finite(features):
    if not features.isfinite().all():
        raise ValueError('want finite features, got NaN or infinity; look at the weights, or bind feature_precision = \'float32\'')
    return features


def read_features(features_dir, model, dataset, input_size, flip_test, precision='float32'):
    """The features that write_features wrote, memory-mapped: query (Q, D) and gallery (G, D), read-only NumPy arrays.

    precision: 'float32', 'bfloat16' or 'float16', of the forward pass that they come from.
    Raises FileNotFoundError, or ValueError that says what differs, where they are not of this model and data set, or damaged.
    """
    path = os.path.join(features_dir, MANIFEST)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'want features written by mgn.extract to the end, found no {path}; correct features_dir or extract them again')
    try:
        with open(path) as file:
            manifest = json.load(file)
        if manifest['format'] != FORMAT:
            raise ValueError(f'of the format {manifest["format"]!r}')
        wanted = made_of(model, input_size, flip_test, precision)
        differing = [f'{name}: want {value}, got {manifest[name]}' for name, value in wanted.items() if manifest[name] != value]
        features = []
        for part in ('query', 'gallery'):
            stored = {name: np.load(file_of(features_dir, part, name)) for name in ('pids', 'camids', 'paths')}
            if hash_of([stored['paths']]) != manifest['paths'][part]:
                raise ValueError(f'{file_of(features_dir, part, "paths")} is not the list that they were made of')
            differing += differences(part, described(dataset, part), stored)
            features.append(np.load(file_of(features_dir, part, 'features'), mmap_mode='r'))
            shape = manifest['images'][part], manifest['D']
            if features[-1].shape != shape or features[-1].dtype != manifest['storage']:
                raise ValueError(f'{file_of(features_dir, part, "features")} holds {features[-1].shape} of {features[-1].dtype}, not {shape} of '
                                 f'{manifest["storage"]}')
            odd = [row for row in np.linspace(0, len(features[-1]) - 1, min(SAMPLE, len(features[-1])), dtype=np.int64)
                   if not abs(np.linalg.norm(features[-1][row].astype(np.float32)) - 1) < 0.01]
            if odd:
                raise ValueError(f'{file_of(features_dir, part, "features")} holds in row {odd[0]} no feature of length 1')
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise ValueError(f'want whole features in {features_dir}, got files that do not fit: {error}; extract them again') from error
    if differing:
        raise ValueError(f'want features of these weights and this data set in {features_dir}, got others:\n  ' + '\n  '.join(differing)
                         + '\nbind what they were made of, or extract them again')
    return features


def made_of(model, input_size, flip_test, precision):
    """What features depend on beside the images, as it stands in a manifest."""
    state = {name: tensor for name, tensor in model.state_dict().items() if '.classifier.' not in name}
    arrays = [array for name in sorted(state) for array in (np.frombuffer(f'{name} {tuple(state[name].shape)}'.encode(), np.uint8),
                                                            state[name].detach().cpu().contiguous().numpy())]
    return {**model.architecture, 'weights': hash_of(arrays), 'input_size': list(input_size), 'flip_test': flip_test, 'precision': precision}


def check_alike(dataset, parts, model=None):
    """Raises ValueError in all processes where their lists of images or the weights of their models differ, as of machines with copies of their own."""
    if processes.count() > 1:
        processes.check_same(f'images of {dataset.name}', [hash_of(described(dataset, part).values()) for part in parts],
                             'give all machines the same files in data_root')
        if model:
            processes.check_same('weights', made_of(model, (), False, '')['weights'], 'give all machines the same checkpoint')


def hash_of(arrays):
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def described(dataset, part):
    """What the files tell of each image."""
    samples = getattr(dataset, part)
    paths = [os.path.relpath(sample.path, dataset.root).replace(os.sep, '/').encode() for sample in samples]
    return {'pids': np.array([sample.pid for sample in samples]), 'camids': np.array([sample.camid for sample in samples]), 'paths': np.array(paths)}


def differences(part, wanted, stored):
    """A line for the list of paths where it is another one, else one for each of the ids that differ."""
    for name in ('paths', 'pids', 'camids'):
        want, got = wanted[name], stored[name]
        if len(want) != len(got):
            return [f'{part} images: want {len(want)}, got {len(got)}']
        if want.shape != got.shape:
            return [f'{part} {name}: want one of each image, got an array {got.shape}']
        odd = np.flatnonzero(want != got)
        if len(odd):
            return [f'{part} {name}: {len(odd)} of {len(want)} differ, the first at {odd[0]}: want {want[odd[0]]}, got {got[odd[0]]}']
    return []


def file_of(features_dir, part, name):
    return os.path.join(features_dir, f'{part}_{name}.npy')


def header(path, shape, storage):
    """Makes an .npy file of that shape whose rows are still to be written."""
    with open(path, 'wb') as file:
        np.lib.format.write_array_header_1_0(file, {'descr': np.lib.format.dtype_to_descr(np.dtype(storage)), 'fortran_order': False, 'shape': shape})
        file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(storage).itemsize)


def write_rows(path, first, batches_of_rows):
    """Writes rows from row `first` on into a file that `header` made."""
    array = np.load(path, mmap_mode='r')
    with open(path, 'r+b') as file:
        file.seek(array.offset + first * array.strides[0])
        for rows in batches_of_rows:
            rows.numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())
