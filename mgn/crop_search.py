"""The nearest of a folder of crops to some query images, by features that are kept for the next time.

A features_dir of crops holds numbered parts, .npz files, whose zip format has a checksum of everything: `features`
(n, D) float32, `paths` (n,) bytes, relative to the folder of crops, `stamps` (n, 2) int64, size and time of each
image's file, and `made_of`, JSON that says what features depend on. A later part wins over an earlier one.
"""

import json
import os
import re
from typing import Annotated, Literal

import gin
import numpy as np
import torch

from mgn.data.datasets import IMAGE_SUFFIXES, Sample
from mgn.feature_files import file_of, kept_gallery, made_of
from mgn.features import load_for_features
from mgn.ops import topk
from mgn.ops.arguments import LARGEST_K
from mgn.ops.errors import MissingFile, UserError
from mgn.runs.files import replacing, writing
from mgn.runs.log import logger

IMAGES_OF_A_PART = 4096


@gin.configurable(denylist=['checkpoint'])
def search(checkpoint, weights: str | None = gin.REQUIRED, query: str | None = gin.REQUIRED,
           gallery: str | None = gin.REQUIRED, features_dir: str | None = None, device: str = 'auto',
           k: Annotated[int, 1, LARGEST_K] = 10, format: Literal['text', 'json'] = 'text') -> None:
    """Prints for each query its k nearest crops with their similarity, the cosine of the features.

    Args:
        query: an image, or a folder of images. gallery: a folder of crops, read with the folders in it, or a
            features_dir of mgn.extract, whose gallery is searched: paths are then relative to the data set's folder.
        features_dir: where the features of crops are kept; None: <gallery>.features beside them.
        format: 'text', or 'json' for a line {"query": …, "nearest": [{"path": …, "similarity": …}, …]} for each.
    Raises:
        UserError: no image, or kept features that are damaged or of other weights or settings. What cannot be read is
            named in the log and left out.
    """
    for name, value in (('query', query), ('gallery', gallery)):
        if not value:
            raise UserError(f"A {name} is needed; give --gin_bindings=\"{name}='…'\"")
    model, extractor = load_for_features(checkpoint, weights, device)
    if os.path.isfile(gallery):
        raise UserError(f'gallery must be a folder, but {gallery} is a file; bind the folder that it is in')
    queries, place = images_in(query), gallery
    if os.path.exists(file_of(gallery, 'gallery', 'features')):
        paths, features = kept_gallery(gallery, model, extractor)
        place = ''  # paths are relative to the data set's folder, which an extraction does not name
    else:
        paths, features = kept_features(model, extractor, gallery, features_dir or f'{gallery.rstrip(os.sep)}.features')
    queries, query_features = computed(model, extractor, queries)
    if not queries:
        raise UserError(f'No image in {query} can be read; restore the files')
    distances, items = topk(query_features, torch.from_numpy(features), k)
    for path, row, indices in zip(queries, distances.tolist(), items.tolist()):
        nearest = [{'path': os.path.join(place, os.fsdecode(paths[i])), 'similarity': round(1 - distance, 6)}
                   for distance, i in zip(row, indices)]
        if format == 'json':
            print(json.dumps({'query': path, 'nearest': nearest}))
        else:
            print(path, *(f'{crop["similarity"]:8.4f}  {crop["path"]}' for crop in nearest), sep='\n')


def images_in(place):
    """Paths of the image `place`, or of all in that folder and those in it, sorted.

    Hidden ones and links to folders are left out.
    """
    if os.path.isfile(place):
        return [place]
    walk = os.walk(place, onerror=lambda error: logger.warning('a folder is left out: %s', error))
    paths = [os.path.join(folder, name) for folder, _, names in walk for name in names
             if name.lower().endswith(IMAGE_SUFFIXES) and '/.' not in os.path.join('/', folder[len(place):], name)]
    if not paths:
        raise MissingFile(f'There is no image in {place} ({", ".join(IMAGE_SUFFIXES)}); correct the path')
    return sorted(paths)


def computed(model, extractor, paths):
    """The images that can be read and their features: a list of paths, and (n, D) float32. The log names the others."""
    unreadable = {}
    features = extractor.features(model, [Sample(path, 0, 0) for path in paths], unreadable)
    if unreadable:
        logger.warning('%d of %d images cannot be read and are left out:\n  %s', len(unreadable), len(paths),
                       '\n  '.join(unreadable.values()))
    return [path for path in paths if path not in unreadable], features


def kept_features(model, extractor, gallery, features_dir):
    """Paths, as bytes, and features (n, D) of the images in a folder of crops. Computes what features_dir has not."""
    present = {os.fsencode(os.path.relpath(path, gallery)): stamp_of(path) for path in images_in(gallery)}
    made = json.dumps(made_of(model, extractor), sort_keys=True)
    with writing(features_dir, 'Bind another features_dir.'):
        os.makedirs(features_dir, exist_ok=True)
    parts = sorted(name for name in os.listdir(features_dir) if re.fullmatch(r'\d{8}\.npz', name))
    rows = {}  # of each path: its features
    for name in parts:
        rows.update(read_part(os.path.join(features_dir, name), made, model.feature_dim, present))
    new = [os.path.join(gallery, os.fsdecode(path)) for path in present if path not in rows]
    logger.info('%s: features of %d images are kept, %d are to be made', features_dir, len(rows), len(new))
    for number, first in enumerate(range(0, len(new), IMAGES_OF_A_PART), 1 + int(parts[-1][:8] if parts else 0)):
        read, features = computed(model, extractor, new[first:first + IMAGES_OF_A_PART])
        paths = [os.fsencode(os.path.relpath(path, gallery)) for path in read]
        if paths:
            with replacing(os.path.join(features_dir, f'{number:08d}.npz'), 'wb') as file:
                np.savez(file, features=features.numpy(), paths=np.array(paths), made_of=made,
                         stamps=np.array([present[path] for path in paths]))
        rows.update(zip(paths, features.numpy()))
    if not rows:
        raise UserError(f'No image in {gallery} can be read; restore the files')
    return list(rows), np.stack(list(rows.values()))


def stamp_of(path):
    """Size and time of a file; of one that is not there, such as behind a broken link, what no file has."""
    try:
        status = os.stat(path)
    except OSError:  # it will be among those that cannot be read
        return -1, -1
    return status.st_size, status.st_mtime_ns


def read_part(path, made, width, present):
    """{path: features} of the images in a part that are still as they were."""
    try:
        with np.load(path) as part:
            features, paths, stamps, found = (part[name] for name in ('features', 'paths', 'stamps', 'made_of'))
        if (features.shape, stamps.shape, paths.shape) != ((paths.size, width), (paths.size, 2), (paths.size,)) or (
                features.dtype != np.float32):
            found = '{}'
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged bytes of a zip file can raise nearly anything
        # NumPy's error, shown in part, goes on with how to run the code in a file.
        raise UserError(f'{path} is damaged: {error!s:.40}; remove it, and its features are made again') from error
    if str(found) != made:
        raise UserError(f'{path} holds features of other weights or settings; bind another features_dir, or remove '
                        f'{os.path.dirname(path)}')
    return {name: row for name, row, stamp in zip(paths.tolist(), features, map(tuple, stamps.tolist()))
            if present.get(name) == stamp}
