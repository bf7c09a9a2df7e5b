"""Features as files: written by mgn.extract, checked and read by evaluation in place of the images.

A folder holds for `query` and `gallery` each _features.npy (n, D), _pids.npy and _camids.npy (n,) int64 and _paths.npy
(n,) UTF-8 bytes, relative to the data set's folder. manifest.json, written last, says what the features were made of:
network, weights, settings and lists of images. Image contents are not checked.
"""

import contextlib
import json
import logging
import os
import tempfile

import gin
import numpy as np

from mgn.features import check_alike, hash_of, hash_of_weights, image_lists
from mgn.ops.errors import FileError, MissingFile, UserError
from mgn.runs import processes
from mgn.runs.files import write_text

logger = logging.getLogger(__name__)

FORMAT = 'mgn features 2'
MANIFEST = 'manifest.json'
PARTS = ('query', 'gallery')
CHECKED_ROWS = 1000  # of a file of features, whose lengths are checked where it is read
STORAGES = ('float32', 'float16')


@gin.configurable(denylist=['model', 'dataset', 'extractor', 'features_dir'])
def write_features(model, dataset, extractor, features_dir, storage='float32'):
    """Writes the features of query and gallery into a folder. Under torchrun each process writes those of its images.

    Args:
        model: MGN on the extractor's device. dataset: Dataset. extractor: mgn.features.Extractor.
        storage: 'float32', or 'float16' for half the bytes.
    Raises:
        UserError: storage out of range, unreadable images, a folder that holds features or that not all processes
            share, features that are not finite. FileError: files that cannot be written.
    """
    if storage not in STORAGES:
        raise UserError(f'write_features.storage must be one of {", ".join(STORAGES)}, found {storage!r}')
    manifest = os.path.join(features_dir, MANIFEST)
    if processes.share(os.path.exists(manifest)):
        raise UserError(f'The features_dir holds features already: {manifest}; remove it or bind another features_dir')
    check_alike(dataset, PARTS, model)
    first = processes.number() == 0
    try:
        if first:
            os.makedirs(features_dir, exist_ok=True)
        check_shared(features_dir)
        for part in PARTS:
            samples, path = getattr(dataset, part), file_of(features_dir, part, 'features')
            rows = processes.part(range(len(samples)))
            if first:
                for name, array in image_lists(dataset, part).items():
                    np.save(file_of(features_dir, part, name), array)
                np.lib.format.open_memmap(path, 'w+', storage, (len(samples), model.feature_dim))
            processes.wait()
            write_rows(path, rows.start, extractor.batches(model, samples[rows.start:rows.stop]))
        processes.wait()
        if first:
            write_text(manifest, json.dumps({
                'format': FORMAT, **made_of(model, extractor), 'storage': storage, 'dataset': dataset.name,
                'D': model.feature_dim, 'images': {part: len(getattr(dataset, part)) for part in PARTS},
                'paths': {part: hash_of([image_lists(dataset, part)['paths']]) for part in PARTS}}, indent=2) + '\n')
    except OSError as error:
        raise FileError(f'Features cannot be written to {features_dir}: {error}; free disk space or bind another '
                        f'features_dir, in a file system that all processes share') from error
    logger.info('%d query and %d gallery features: %s', len(dataset.query), len(dataset.gallery), features_dir)


def write_rows(path, row, batches):
    """Writes batches of features from row number `row` on into an .npy file.

    Not through a memory map: a full disk would end the process by SIGBUS, and machines that share the file would
    overwrite each other's rows in pages that they both touch.
    """
    array = np.load(path, mmap_mode='r')
    with open(path, 'r+b') as file:
        file.seek(array.offset + row * array.strides[0])
        for features in batches:
            if not features.isfinite().all():
                raise UserError('A feature is NaN or infinite; look at the weights, or bind '
                                "feature_precision = 'float32'")
            file.write(features.numpy().astype(array.dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())


def check_shared(folder):
    """UserError in all processes where one of them does not see what process 0 writes into the folder."""
    with tempfile.NamedTemporaryFile(dir=folder) if processes.number() == 0 else contextlib.nullcontext() as file:
        name = processes.share(file and os.path.basename(file.name))
        sees = processes.gather(os.path.exists(os.path.join(folder, name)))
    blind = [str(process) for process, seen in enumerate(sees) if not seen]
    if blind:
        raise UserError(f'All processes must share the features_dir, but what process 0 writes to {folder} is not seen '
                        f'by process {", ".join(blind)}; bind a folder of a shared file system')


def read_features(features_dir, model, dataset, extractor):
    """The features that write_features wrote, memory-mapped: query (Q, D) and gallery (G, D), read-only NumPy arrays.

    Raises MissingFile where the folder holds no features, UserError where files are damaged, or where the features are
    of another model, data set or extractor: with what differs.
    """
    path = os.path.join(features_dir, MANIFEST)
    if not os.path.isfile(path):
        raise MissingFile(f'The features_dir holds no complete extraction: there is no {path}, which mgn.extract '
                          f'writes last; correct features_dir or extract again')
    try:
        with open(path) as file:
            found = json.load(file)
        if found['format'] != FORMAT:
            raise ValueError(f'{path} has the format {found["format"]!r} instead of {FORMAT!r}')
        expected, features = made_of(model, extractor), []
        for part in PARTS:
            lists, rows = read_part(features_dir, part, found)
            features.append(rows)
            expected.update({f'{part} {name}': array for name, array in image_lists(dataset, part).items()})
            found.update({f'{part} {name}': array for name, array in lists.items()})
        differences = list(filter(None, (difference(name, value, found[name]) for name, value in expected.items())))
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise UserError(f'The features in {features_dir} are damaged: {error!r}; extract them again') from error
    if differences:
        raise UserError(f'The features in {features_dir} are of other weights, settings or images:\n  '
                        + '\n  '.join(differences) + '\nbind what they were made of, or extract them again')
    return features


def read_part(features_dir, part, manifest):
    """The lists of images and the memory-mapped features of 'query' or 'gallery'; ValueError where they are damaged."""
    lists = {name: np.load(file_of(features_dir, part, name)) for name in ('pids', 'camids', 'paths')}
    if hash_of([lists['paths']]) != manifest['paths'][part]:
        raise ValueError(f'{file_of(features_dir, part, "paths")} is not the list of the images that were extracted')
    path = file_of(features_dir, part, 'features')
    features = np.load(path, mmap_mode='r')
    shape, storage = (manifest['images'][part], manifest['D']), manifest['storage']
    if features.shape != shape or features.dtype != storage:
        raise ValueError(f'{path} holds {features.shape} of {features.dtype} instead of {shape} of {storage}')
    for row in np.linspace(0, len(features) - 1, min(CHECKED_ROWS, len(features)), dtype=np.int64):
        if not abs(np.linalg.norm(features[row].astype(np.float32)) - 1) < 0.01:
            raise ValueError(f'{path} holds no feature of length 1 in row {row}')
    return lists, features


def made_of(model, extractor):
    """What features depend on beside the images."""
    return {**model.architecture, 'weights': hash_of_weights(model), **extractor.settings()}


def difference(name, expected, found):
    """A line that says how two values, or two lists, differ; None where they are equal."""
    if not isinstance(expected, np.ndarray):
        return None if expected == found else f'{name}: expected {expected}, found {found}'
    if expected.shape != found.shape:
        return f'{name}: expected an array of shape {expected.shape}, found {found.shape}'
    rows = np.flatnonzero(expected != found)
    if len(rows):
        return (f'{name}: {len(rows)} of {len(found)} differ, the first at {rows[0]}: '
                f'expected {expected[rows[0]]}, found {found[rows[0]]}')


def file_of(features_dir, part, name):
    return os.path.join(features_dir, f'{part}_{name}.npy')
