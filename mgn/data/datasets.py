"""Files → samples: published data sets, any folder in Market-1501's layout, any table, several joined, a drawn demo.

Every function returns a `Dataset` whose lists are sorted by path (MSMT17: in the order of its list files), with the
ids that the files carry. Ids become labels 0…C−1 only for training (`train_labels`).
"""

import contextlib
import csv
import os
import re
from typing import Annotated, Literal, NamedTuple

import gin
import numpy as np

from mgn.data.pedestrians import FOLDERS, GALLERY, QUERY, TRAIN, write_pedestrians
from mgn.ops.errors import FileError, MissingFile, UserError
from mgn.runs.files import writing
from mgn.runs.log import logger

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png')
NUMBER = r'\d{1,18}'  # fits into 64 bits
COUNTED = 'train_pids', 'train', 'query', 'gallery', 'cameras'  # in published sizes, without junk
Seed = Annotated[int, 0, 2 ** 63 - 1]
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
    not_to_train: str = ''  # why there is nothing to train on: a sentence that lists the files looked for


@gin.configurable
def market1501(root: str) -> Dataset:
    """Market-1501 (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015) under `root`."""
    aliases = ('Market-1501-v15.09.15', 'market1501', 'Market-1501', '')
    return read_market_layout('Market-1501', root, aliases, (751, 12936, 3368, 15913, 6))


@gin.configurable
def dukemtmcreid(root: str) -> Dataset:
    """DukeMTMC-reID (Zheng et al., ICCV 2017; withdrawn by the authors of DukeMTMC in 2019) under `root`."""
    aliases = ('DukeMTMC-reID', 'dukemtmcreid', 'dukemtmc-reid', '')
    return read_market_layout('DukeMTMC-reID', root, aliases, (702, 16522, 2228, 17661, 8))


@gin.configurable
def msmt17(root: str, combine_val: bool = False) -> Dataset:
    """MSMT17 V1 or V2 (Wei et al., "Person Transfer GAN to Bridge Domain Gap", CVPR 2018) under `root`.

    Trains on list_train.txt alone, or with list_val.txt too where `combine_val`.
    """
    to_train, to_evaluate = ('list_train.txt', 'list_val.txt'), ('list_query.txt', 'list_gallery.txt')
    aliases = 'MSMT17_V1', 'MSMT17_V2', 'msmt17', 'MSMT17', ''
    folders = [os.path.join(os.path.expanduser(root), alias) for alias in aliases]
    first, second = (any(os.path.isdir(f'{folder}/{name}') and os.path.isfile(f'{folder}/list_query.txt')
                         for folder in folders) for name in ('test', 'mask_test_v2'))
    in_train, in_test = ('mask_train_v2', 'mask_test_v2') if second and not first else ('train', 'test')
    folder, not_to_train = find_folder(root, aliases, (in_train, *to_train), (in_test, *to_evaluate))
    lists = [] if not_to_train else to_train if combine_val else to_train[:1]
    train = [sample for list_name in lists for sample in read_msmt_list(folder, list_name, in_train)]
    logger.info('MSMT17 trains on %s', ' and '.join(lists) or 'nothing')
    query, gallery = (read_msmt_list(folder, list_name, in_test) for list_name in to_evaluate)
    dataset = Dataset('MSMT17', folder, train, query, gallery, not_to_train)
    return logged(dataset, (1041, 32621 if combine_val else 30248, 11659, 82161, 15))


@gin.configurable
def market_layout(root: str) -> Dataset:
    """A folder of your own in Market-1501's layout: <pid>_c<camera>….jpg (or .png), or <pid>_….jpg without cameras.

    Without cameras every camid is 0; evaluate then with evaluate.cross_camera = False.
    """
    root = os.path.abspath(os.path.expanduser(root))
    return read_market_layout(os.path.basename(root), root, camera_required=False)


@gin.configurable
def cuhk03(root: str, boxes: Literal['detected', 'labeled'] = 'detected') -> Dataset:
    """CUHK03 (Li et al., "DeepReID", CVPR 2014) by the protocol of 767 and 700 identities, in Market-1501's layout.

    The protocol and the folder CUHK03-NP with `detected` and `labeled` are those of Zhong et al., "Re-ranking Person
    Re-identification with k-reciprocal Encoding", CVPR 2017. boxes: by a detector, or drawn by hand.
    """
    aliases = [os.path.join(alias, boxes) for alias in ('cuhk03-np', 'CUHK03-NP', 'CUHK03_New_Protocol', 'cuhk03', '')]
    counts = (767, 7365, 1400, 5332, 2) if boxes == 'detected' else (767, 7368, 1400, 5328, 2)
    return read_market_layout(f'CUHK03 ({boxes})', root, aliases, counts)


@gin.configurable
def cuhk01(root: str, seed: Seed = 0) -> Dataset:
    """CUHK01 (Li et al., "Human Reidentification with Transferred Metric Learning", ACCV 2012) under `root`.

    File names such as 0001003.png: identity 1, its third image of four, of which the first two are camera 1's. There is
    no published split: `seed` draws the 485 identities to train on; of the others camera 1 is the query.
    """
    folder = find_folder(root, ('CUHK01', 'cuhk01', ''), (), ('campus',))[0]
    samples, folder = [], os.path.join(folder, 'campus')
    for file_name in file_names(folder):
        if fields := re.fullmatch(r'(\d{4})(\d{3})\.png', file_name):
            samples.append(Sample(os.path.join(folder, file_name), int(fields[1]), (int(fields[2]) + 1) // 2))
    if not samples:
        raise UserError(f'{folder} holds no images with names such as 0001003.png; add them or correct data_root')
    chosen = {*np.random.default_rng(seed).permutation(sorted({sample.pid for sample in samples}))[:485].tolist()}
    parts = ([s for s in samples if s.pid in chosen], [s for s in samples if s.pid not in chosen and s.camid == 1],
             [s for s in samples if s.pid not in chosen and s.camid > 1])
    return logged(Dataset('CUHK01', folder, *parts), (485, 1940, 972, 972, 2))


@gin.configurable
def csv_table(root: str, file: str = 'dataset.csv') -> Dataset:
    """Any images, listed in root/file, whose first line is path,pid,camid,split, in any order and among others.

    path: of an image, relative to `root` or whole. pid, camid: numbers from 0 on. split: train, query or gallery. Rows
    with the pid −1 are left out as junk.
    """
    root, parts = os.path.abspath(os.path.expanduser(root)), {'train': [], 'query': [], 'gallery': []}
    path = os.path.join(root, file)
    with reading(path), open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as lines:
        table = csv.DictReader(lines, restval='')
        if any((table.fieldnames or ()).count(name) != 1 for name in ('path', 'pid', 'camid', 'split')):
            raise UserError(f'{path} should begin with the line path,pid,camid,split, but begins with the columns '
                            f'{table.fieldnames}; begin with each of these columns, once')
        for row in table:
            numbers = [re.fullmatch(rf'\s*({NUMBER}|-1)\s*', row[name]) for name in ('pid', 'camid')]
            if None in numbers or numbers[1][1] == '-1' or not row['path'] or row['split'] not in parts:
                raise UserError(f'Rows must hold a path, the numbers pid and camid, and train, query or gallery, but '
                                f'line {table.line_num} of {path} is {row!s:.300}; correct it')
            sample = Sample(os.path.join(root, row['path']), *(int(number[1]) for number in numbers))
            if sample.pid != JUNK_PID:
                parts[row['split']].append(sample)
    if missing := [part for part in ('query', 'gallery') if not parts[part]]:
        raise UserError(f'{path} lists no image of {" and ".join(missing)}; add rows with that split')
    return logged(Dataset(os.path.basename(root), root, **parts, not_to_train='' if parts['train'] else (
        f'{path} lists no image to train on; add rows with the split train')))


@gin.configurable
def joined(datasets: tuple[Dataset, ...] = ()) -> Dataset:
    """Several data sets to train on at once: their identities and cameras are all different. Tests on the first."""
    if not datasets:
        raise UserError('joined.datasets is empty; bind e.g. joined.datasets = (@market1501(), @msmt17())')
    train, pids, camids = [], 0, 0
    for dataset in datasets:
        check_trainable(dataset)
        train += [sample._replace(pid=pids + sample.pid, camid=camids + sample.camid) for sample in dataset.train]
        pids, camids = (1 + max(getattr(sample, name) for sample in train) for name in ('pid', 'camid'))
    return logged(datasets[0]._replace(name='+'.join(dataset.name for dataset in datasets), train=train))


@gin.configurable
def pedestrians(root: str, seed: Seed = 0, draw: bool = True) -> Dataset:
    """Drawn pedestrians, written under `root` on first use, then read as any data set (mgn/data/pedestrians.py).

    draw: False writes nothing; a checkpoint's configuration is read so.
    """
    if draw:
        with writing(root, 'Free disk space or bind data_root to another folder.'):
            write_pedestrians(os.path.expanduser(root), seed)
    return read_market_layout('pedestrians', root)


def find_folder(root, aliases, to_train, to_evaluate):
    """The first root/alias that holds all these files, or else those to evaluate; and a sentence.

    The sentence lists every folder tried, with what it lacks; it is empty where nothing is missing. It is the message
    of a MissingFile where no root/alias holds the files to evaluate.
    """
    root, names = os.path.abspath(os.path.expanduser(root)), (*to_train, *to_evaluate)
    folders = [os.path.join(root, alias) if alias else root for alias in aliases]
    lacking = {folder: [name for name in names if not os.path.exists(os.path.join(folder, name))] for folder in folders}
    tried = '\n  '.join(f'{folder} ({"lacks " + ", ".join(lacks) if os.path.isdir(folder) else "no such folder"})'
                        for folder, lacks in lacking.items())
    missing = (f'No folder holds {", ".join(names)}; looked into\n  {tried}\n'
               f"bind data_root to the folder that holds them, e.g. data_root='datasets'")
    for needed, sentence in ((names, ''), (to_evaluate, missing)):
        for folder, lacks in lacking.items():
            if not {*needed} & {*lacks}:
                return folder, sentence
    raise MissingFile(missing)


def read_market_layout(name, root, aliases=('',), published=None, camera_required=True):
    """The data set in the first root/alias that has Market-1501's folders. published: sizes, as COUNTED, or None."""
    folder, not_to_train = find_folder(root, aliases, (TRAIN,), (QUERY, GALLERY))
    parts = [[] if part == TRAIN and not_to_train else read_market_folder(os.path.join(folder, part), camera_required)
             for part in FOLDERS]
    without_camera = [sample.path for part in parts for sample in part if sample.camid is None]
    if without_camera and len(without_camera) < sum(map(len, parts)):
        raise UserError(f'Either all file names of {folder} contain a camera or none, but {without_camera[0]} has none '
                        f'among others with one; rename it as in 0002_c1_….jpg')
    if nobody := [sample for sample in parts[0] + parts[1] if sample.pid < 1]:
        raise UserError(f'Identities of {TRAIN} and {QUERY} are numbered from 1 on, as 0 means nobody in this layout, '
                        f'but {nobody[0].path} has {nobody[0].pid}; number people from 1 on')
    parts = [[sample._replace(camid=sample.camid or 0) for sample in part] for part in parts]
    return logged(Dataset(name, folder, *parts, not_to_train), published)


def file_names(folder):
    with reading(folder):
        return sorted(os.listdir(folder))


def read_market_folder(folder, camera_required):
    """Samples of one folder, sorted by file name, junk (id −1) left out; camid None where the name has no camera.

    Files that are not images are ignored.
    """
    samples = []
    for file_name in file_names(folder):
        if not file_name.lower().endswith(IMAGE_SUFFIXES) or file_name.startswith('.'):
            continue
        path = os.path.join(folder, file_name)
        fields = re.match(rf'(-?{NUMBER})_(?:c({NUMBER})(?!\d))?', file_name)
        if fields is None or (camera_required and fields[2] is None):
            raise UserError(f'File names must look like 0002_c1s1_000451_03.jpg (identity 2, camera 1), '
                            f'but {path} does not; rename or remove it')
        if int(fields[1]) != JUNK_PID:
            samples.append(Sample(path, int(fields[1]), fields[2] and int(fields[2])))
    if not samples:
        raise UserError(f'{folder} holds no images ({", ".join(IMAGE_SUFFIXES)}); add them or correct data_root')
    return samples


def read_msmt_list(folder, list_name, images):
    """Samples of one list file, of images in folder/images; its lines are `0000/0000_000_01_0303morning_0008_0.jpg 0`.

    A path, whose third field is the camera, and the identity. Bytes that are not UTF-8 belong to file names, as
    everywhere.
    """
    samples, list_file = [], os.path.join(folder, list_name)
    with reading(list_file), open(list_file, encoding='utf-8-sig', errors='surrogateescape') as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            fields = re.fullmatch(rf'((?:[^\s/]+/)*[^/\s_]+_[^/\s_]+_({NUMBER})_[^/\s]+)\s+({NUMBER})\s*', line)
            if fields is None or '..' in fields[1].split('/') or '\0' in line:
                raise UserError(f'Lines must look like 0000/0000_000_01_0303morning_0008_0.jpg 0, but line {number} of '
                                f'{list_file} is {line.rstrip()!r:.200}; restore the list')
            samples.append(Sample(os.path.join(folder, images, fields[1]), int(fields[3]), int(fields[2])))
    if not samples:
        raise UserError(f'{list_file} lists no images; restore the list')
    return samples


@contextlib.contextmanager
def reading(path):
    """An OSError or csv.Error within the block becomes a FileError that names `path`."""
    try:
        yield
    except (OSError, csv.Error) as error:
        raise FileError(f'{path} cannot be read: {getattr(error, "strerror", error)}; restore it or correct data_root'
                        ) from error


def check_trainable(dataset):
    """MissingFile without images to train on."""
    if dataset.not_to_train:
        raise MissingFile(dataset.not_to_train)


def logged(dataset, published=None):
    """Logs the sizes of a data set, warns where they differ from the published ones; returns the data set.

    UserError where training images, queries or gallery hold an image twice: it would count twice.
    """
    parts = dataset.train, dataset.query, dataset.gallery
    for paths in (sorted(sample.path for sample in part) for part in parts):
        if twice := [path for path, following in zip(paths, paths[1:]) if path == following]:
            raise UserError(f'{dataset.name} lists images twice ({len(twice)}), first {twice[0]}; list each once')
    counts = (len({s.pid for s in dataset.train}), *map(len, parts), len({s.camid for part in parts for s in part}))
    logger.info('%s in %s: %d identities and %d images to train, %d query, %d gallery, %d cameras', dataset.name,
                dataset.root, *counts)
    if published and dataset.not_to_train:
        published = (0, 0, *published[2:])
    for field, count, published_count in zip(COUNTED, counts, published or counts):
        if count != published_count:
            logger.warning('%s should have %d %s as published, but has %d; its figures are not comparable',
                           dataset.name, published_count, field, count)
    return dataset


def train_labels(samples):
    """Labels 0…C−1 of training samples, by ascending id, and C."""
    label_of = {pid: label for label, pid in enumerate(sorted({sample.pid for sample in samples}))}
    return [label_of[sample.pid] for sample in samples], len(label_of)
