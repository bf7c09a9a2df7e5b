"""Features as files: written by mgn.extract, checked and read by evaluation in place of the images.

A folder holds for `query` and `gallery` each _features.npy (n, D), _pids.npy and _camids.npy (n,) int64 and _paths.npy
(n,) UTF-8 bytes, relative to the data set's folder. manifest.json, written last, says what the features were made of
(network, weights, settings) and holds the SHA-256 of every file and of itself. Image contents are not checked.
"""

import itertools
import json
import os
from contextlib import nullcontext
from typing import Literal

import gin
import numpy as np

from mgn.features import check_same_data, hash_of, hash_of_weights, image_lists
from mgn.ops.errors import MissingFile, UserError
from mgn.runs import processes
from mgn.runs.files import write_text, writing
from mgn.runs.folder import locked
from mgn.runs.log import logger

FORMAT = 'mgn features 3'
MANIFEST = 'manifest.json'
PARTS = ('query', 'gallery')
NAMES = ('pids', 'camids', 'paths', 'features')


@gin.configurable(denylist=['model', 'dataset', 'extractor', 'features_dir'])
def write_features(model, dataset, extractor, features_dir, storage: Literal['float32', 'float16'] = 'float32'):
    """Writes the features of query and gallery into a folder: batch by batch, as they may be larger than memory.

    Under torchrun each process makes the features of a part of the images, and process 0 writes once it has them all.

    Args:
        model: MGN on the extractor's device. dataset: Dataset. extractor: mgn.features.Extractor.
        storage: 'float32', or 'float16' for half the bytes.
    Raises:
        UserError: unreadable images, a folder that holds features or that another command writes to, features that are
            not finite. FileError: files that cannot be written.
    """
    manifest = os.path.join(features_dir, MANIFEST)
    with locked(features_dir, 'features_dir') if processes.number() == 0 else nullcontext():
        if processes.share(os.path.exists(manifest)):
            raise UserError(f'The features_dir holds features: {manifest}; remove it or bind another features_dir')
        check_same_data(dataset, PARTS, model)
        for part in PARTS:
            write_part(model, dataset, extractor, features_dir, storage, part)
        if processes.number() == 0:
            content = {'format': FORMAT, **made_of(model, extractor), 'storage': storage, 'dataset': dataset.name,
                       'D': model.feature_dim, 'images': {part: len(getattr(dataset, part)) for part in PARTS},
                       'sha256': {part: {name: file_hash(file_of(features_dir, part, name)) for name in NAMES}
                                  for part in PARTS}}
            write_text(manifest, json.dumps({**content, 'sha256 of the above': text_hash(content)}, indent=2) + '\n')
    logger.info('%d query and %d gallery features: %s', len(dataset.query), len(dataset.gallery), features_dir)


def write_part(model, dataset, extractor, features_dir, storage, part):
    """Makes the features of `part`, query or gallery, in all processes; process 0 writes all of its files."""
    samples = getattr(dataset, part)
    batches = [extractor.gathered(model, samples)] if processes.count() > 1 else extractor.batches(model, samples)
    if processes.number() == 0:
        with writing(features_dir, 'Free disk space or bind another features_dir.'):
            for name, array in image_lists(dataset, part).items():
                np.save(file_of(features_dir, part, name), array)
            write_rows(file_of(features_dir, part, 'features'), (len(samples), model.feature_dim), storage, batches)


def write_rows(path, shape, storage, batches):
    """Writes batches of features as an .npy file. Not by a memory map: a full disk would end the process by SIGBUS."""
    with open(path, 'wb') as file:
        np.lib.format.write_array_header_1_0(file, {
            'descr': np.lib.format.dtype_to_descr(np.dtype(storage)), 'fortran_order': False, 'shape': shape})
        for features in batches:
            file.write(features.numpy().astype(storage).tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_features(features_dir, model, dataset, extractor):
    """The features that write_features wrote, memory-mapped: query (Q, D) and gallery (G, D), read-only NumPy arrays.

    MissingFile where the folder holds no features, UserError where files are damaged, or where the features are of
    another model, data set or extractor: with what differs.
    """
    check_features(features_dir, model, extractor, dataset)
    return [np.load(file_of(features_dir, part, 'features'), mmap_mode='r') for part in PARTS]


def check_features(features_dir, model, extractor, dataset=None):
    """Raises what read_features raises. dataset: None where images do not matter."""
    try:
        found, expected = read_manifest(features_dir), made_of(model, extractor)
        for part, name in itertools.product(PARTS, NAMES):
            path = file_of(features_dir, part, name)
            if file_hash(path) != found['sha256'][part][name]:
                raise ValueError(f'{path} is not as mgn.extract wrote it')
        for part in PARTS if dataset else ():
            expected.update({f'{part} {name}': array for name, array in image_lists(dataset, part).items()})
            found.update({f'{part} {name}': np.load(file_of(features_dir, part, name)) for name in NAMES[:3]})
        differing = [name for name, value in expected.items() if not np.array_equal(value, found[name])]
    except (PermissionError, UserError):  # no damage; a binary says which file it is
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OSError, EOFError) as error:
        raise UserError(f'The features in {features_dir} are damaged: {error}; extract them again') from error
    if differing:
        raise UserError(f'The features in {features_dir} are of other weights, settings or images; what differs is '
                        f'{", ".join(differing)}. Bind what they were made of, or extract them again')


def kept_gallery(features_dir, model, extractor):
    """Paths, as bytes, and features (G, D) of the gallery that write_features wrote; UserError if of another model."""
    check_features(features_dir, model, extractor)
    paths, features = (np.load(file_of(features_dir, 'gallery', name)) for name in ('paths', 'features'))
    return paths.tolist(), features.astype(np.float32, copy=False)


def read_manifest(features_dir):
    """The manifest's content, as write_features wrote it; ValueError where it is not so."""
    path = os.path.join(features_dir, MANIFEST)
    if not os.path.isfile(path):
        raise MissingFile(f'The features_dir holds no complete extraction: there is no {path}, which mgn.extract '
                          f'writes last; correct features_dir or extract again')
    try:
        with open(path) as file:
            content = json.load(file)
        written, is_whole = content.get('format'), content.pop('sha256 of the above', None) == text_hash(content)
    except (ValueError, AttributeError, RecursionError):  # no JSON, no dictionary
        written, is_whole = FORMAT, False
    if written != FORMAT:
        raise UserError(f'The features in {features_dir} have the format {written!r:.60}, and this version reads '
                        f'{FORMAT!r} only; extract them again')
    if not is_whole:
        raise ValueError(f'{path} is not as mgn.extract wrote it')
    return content


def made_of(model, extractor):
    """What features depend on beside the images."""
    return {**model.architecture, 'weights': hash_of_weights(model), **extractor.settings()}


def file_of(features_dir, part, name):
    return os.path.join(features_dir, f'{part}_{name}.npy')


def text_hash(content):
    return hash_of([json.dumps(content, sort_keys=True).encode()])


def file_hash(path):
    with open(path, 'rb') as file:
        return hash_of(iter(lambda: file.read(2 ** 20), b''))
