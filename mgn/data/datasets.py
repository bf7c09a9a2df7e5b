"""Files → samples: Market-1501, DukeMTMC-reID, MSMT17, any folder in Market-1501's layout, and a drawn demo.

Every function returns a `Dataset` whose lists are sorted by path (MSMT17: in the order of its list files), with the
ids that the files carry. Ids become labels 0…C−1 only for training (`train_labels`).
"""

import logging
import os
import re
from typing import NamedTuple

import gin

from mgn.data import pedestrians as drawn_pedestrians
from mgn.ops.errors import MissingFile, UserError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png')
JUNK_PID = -1  # boxes that show no whole person; they are neither matches nor non-matches


class Sample(NamedTuple):
    path: str
    pid: int
    camid: int


class Dataset(NamedTuple):
    name: str
    root: str
    train: list[Sample]
    query: list[Sample]
    gallery: list[Sample]


class Counts(NamedTuple):
    """Published sizes; the gallery is counted without junk."""
    train_pids: int
    train: int
    query: int
    gallery: int
    cameras: int


@gin.configurable
def market1501(root):
    """Market-1501 (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015) under `root`."""
    aliases = ('Market-1501-v15.09.15', 'market1501', 'Market-1501', '')
    return read_market_layout('Market-1501', root, aliases, Counts(751, 12936, 3368, 15913, 6))


@gin.configurable
def dukemtmcreid(root):
    """DukeMTMC-reID (Zheng et al., ICCV 2017; withdrawn by the authors of DukeMTMC in 2019) under `root`."""
    aliases = ('DukeMTMC-reID', 'dukemtmcreid', 'dukemtmc-reid', '')
    return read_market_layout('DukeMTMC-reID', root, aliases, Counts(702, 16522, 2228, 17661, 8))


@gin.configurable
def msmt17(root, combine_val=False):
    """MSMT17 V1 or V2 (Wei et al., "Person Transfer GAN to Bridge Domain Gap", CVPR 2018) under `root`.

    Trains on list_train.txt alone, or with list_val.txt too where `combine_val`.
    """
    lists = ('list_train.txt', 'list_val.txt', 'list_query.txt', 'list_gallery.txt')
    folder = find_folder(root, ('MSMT17_V1', 'MSMT17_V2', 'msmt17', 'MSMT17', ''), lists)
    versions = (('train', 'test'), ('mask_train_v2', 'mask_test_v2'))
    for train_folder, test_folder in versions:
        if os.path.isdir(os.path.join(folder, train_folder)) and os.path.isdir(os.path.join(folder, test_folder)):
            break
    else:
        tried = ', '.join(os.path.join(folder, name) for pair in versions for name in pair)
        raise MissingFile(f'The images of MSMT17 are missing, looked for the folders of V1 and V2, {tried}; '
                          f'unpack the images there')
    train = read_msmt_list(folder, 'list_train.txt', train_folder)
    if combine_val:
        train += read_msmt_list(folder, 'list_val.txt', train_folder)
    logger.info('MSMT17 trains on %s', 'list_train.txt and list_val.txt' if combine_val else 'list_train.txt alone')
    dataset = Dataset('MSMT17', folder, train, read_msmt_list(folder, 'list_query.txt', test_folder),
                      read_msmt_list(folder, 'list_gallery.txt', test_folder))
    return report(dataset, Counts(1041, 32621 if combine_val else 30248, 11659, 82161, 15))


@gin.configurable
def market_layout(root):
    """A folder of your own in Market-1501's layout: <pid>_c<camera>….jpg (or .png), or <pid>_….jpg without cameras.

    Without cameras every camid is 0; evaluate then with evaluate.cross_camera = False.
    """
    root = os.path.abspath(os.path.expanduser(root))
    return read_market_layout(os.path.basename(root), root, camera_required=False)


@gin.configurable
def pedestrians(root, seed=0):
    """Drawn pedestrians, written under `root` on first use, then read as any data set (mgn/data/pedestrians.py)."""
    drawn_pedestrians.write_pedestrians(os.path.expanduser(root), seed)
    return read_market_layout('pedestrians', root)


MARKET_FOLDERS = ('bounding_box_train', 'query', 'bounding_box_test')


def find_folder(root, aliases, contents):
    """The first root/alias that holds all of `contents`; MissingFile lists every path tried."""
    root = os.path.abspath(os.path.expanduser(root))
    folders = [os.path.join(root, alias) if alias else root for alias in aliases]
    for folder in folders:
        if all(os.path.exists(os.path.join(folder, name)) for name in contents):
            return folder
    paths = [os.path.join(folder, name) for folder in folders for name in contents]
    tried = '\n  '.join(path if os.path.exists(path) else f'{path} (missing)' for path in paths)
    raise MissingFile(f'No folder holds {", ".join(contents)}; looked for\n  {tried}\n'
                      f"bind data_root to the folder that holds them, e.g. data_root='datasets'")


def read_market_layout(name, root, aliases=('',), published=None, camera_required=True):
    """The data set in the first root/alias that has Market-1501's folders. published: Counts to compare it with."""
    folder = find_folder(root, aliases, MARKET_FOLDERS)
    parts = [read_market_folder(os.path.join(folder, part), camera_required) for part in MARKET_FOLDERS]
    without_camera = [sample.path for part in parts for sample in part if sample.camid is None]
    if without_camera and len(without_camera) < sum(map(len, parts)):
        raise UserError(f'Either all file names of {folder} contain a camera or none, but {without_camera[0]} has none '
                        f'among others with one; rename it as in 0002_c1_….jpg')
    parts = [[sample._replace(camid=sample.camid or 0) for sample in part] for part in parts]
    return report(Dataset(name, folder, *parts), published)


def read_market_folder(folder, camera_required):
    """Samples of one folder, sorted by file name, junk (id −1) left out; camid None where the name has no camera.

    Files that are not images are ignored.
    """
    samples = []
    for file_name in sorted(os.listdir(folder)):
        if not file_name.lower().endswith(IMAGE_SUFFIXES) or file_name.startswith('.'):
            continue
        path = os.path.join(folder, file_name)
        fields = re.match(r'(-?\d+)_(?:c(\d+))?', file_name)
        if fields is None or (camera_required and fields[2] is None):
            raise UserError(f'File names must look like 0002_c1s1_000451_03.jpg (identity 2, camera 1), '
                            f'but {path} does not; rename or remove it')
        if int(fields[1]) != JUNK_PID:
            samples.append(Sample(path, int(fields[1]), fields[2] and int(fields[2])))
    if not samples:
        raise UserError(f'{folder} holds no images ({", ".join(IMAGE_SUFFIXES)}); add them or correct data_root')
    return samples


def read_msmt_list(folder, list_name, image_folder):
    """Samples of one list file, whose lines are `0000/0000_000_01_0303morning_0008_0.jpg 0`: a path and the identity.

    The third field of the file name is the camera.
    """
    samples, list_file = [], os.path.join(folder, list_name)
    with open(list_file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            fields = re.fullmatch(r'((?:\S*/)?[^/\s_]+_[^/\s_]+_(\d+)_[^/\s]+)\s+(\d+)\s*', line)
            if fields is None:
                raise UserError(f'Lines must look like 0000/0000_000_01_0303morning_0008_0.jpg 0, but line {number} of '
                                f'{list_file} is {line.rstrip()!r}; restore the list')
            samples.append(Sample(os.path.join(folder, image_folder, fields[1]), int(fields[3]), int(fields[2])))
    if not samples:
        raise UserError(f'{list_file} lists no images; restore the list')
    return samples


def check_dataset(dataset):
    """Raises UserError where gin was given a data set's function instead of its value."""
    if not isinstance(dataset, Dataset):
        raise UserError(f'dataset must be a data set, but it is {dataset!r}; bind it with parentheses, '
                        f'e.g. dataset = @market1501()')


def report(dataset, published):
    """Logs the sizes of a data set, warns where they differ from the published ones; returns the data set."""
    counts = Counts(len({s.pid for s in dataset.train}), len(dataset.train), len(dataset.query), len(dataset.gallery),
                   len({s.camid for part in dataset[2:] for s in part}))
    logger.info('%s in %s: %d identities and %d images to train, %d query, %d gallery, %d cameras', dataset.name,
                dataset.root, *counts)
    for field, count, published_count in zip(Counts._fields, counts, published or counts):
        if count != published_count:
            logger.warning('%s should have %d %s as published, but has %d; its figures are not comparable',
                           dataset.name, published_count, field, count)
    return dataset


def train_labels(samples):
    """Labels 0…C−1 of training samples, by ascending id, and C."""
    label_of = {pid: label for label, pid in enumerate(sorted({sample.pid for sample in samples}))}
    return [label_of[sample.pid] for sample in samples], len(label_of)
