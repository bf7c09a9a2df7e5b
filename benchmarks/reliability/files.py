"""Files that were damaged at random: each is refused by a sentence, or read as what was written."""

import json
import re
import shutil

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from conftest import write_market
from outcomes import assert_same
from thin import BINDINGS, ThinResNet, fitting_schedule, train

from benchmarks.reliability.driver import Row
from mgn import config, crop_search, evaluation, feature_files, model
from mgn.data import datasets, images
from mgn.features import Extractor
from mgn.ops.errors import UserError
from mgn.runs import checkpoint, log

CASES, GIGABYTE = 10_000, 2 ** 30


def mutated(rng, data):
    """Some bytes damaged: flipped, cut, put in, overwritten, swapped, repeated; often near the beginning or the end."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if not data:
            break
        near = [len(data), min(len(data), 64), len(data)][rng.integers(3)]
        at = int(rng.integers(near)) if rng.random() < 0.8 else len(data) - 1 - int(rng.integers(near))
        end = min(at + int(2 ** rng.uniform(0, 10)), len(data))
        block, other = data[at:end], int(rng.integers(len(data)))
        match rng.integers(8):
            case 0: data[at] ^= 1 << int(rng.integers(8))
            case 1: data[at] = [0, 255, 10, int(rng.integers(256))][rng.integers(4)]
            case 2: del data[at:]
            case 3: del data[at:end]
            case 4: data[at:at] = rng.bytes(end - at)
            case 5: data[at:end] = bytes(end - at)
            case 6: data[other:other] = block
            case 7: data[at:end], data[other:other + len(block)] = data[other:other + len(block)], block
    return bytes(data)


def refused(read):
    """What `read` returns; None where it raises a UserError that reads as a sentence."""
    try:
        return read()
    except UserError as error:
        assert is_sentence(str(error)), f'this is no sentence: {error}'


def is_sentence(message):
    return len(message.split()) >= 4 and not re.search(r"Traceback|'\w+' object ", message)


def any_file(rng, folder, pattern):
    paths = sorted(folder.glob(pattern))
    return paths[rng.integers(len(paths))]


# Images

def write_images(folder):
    """Of every kind that people have: grey, palette, transparent, progressive, interlaced, turned by EXIF, 16 bits."""
    rng = np.random.default_rng(0)
    image = PIL.Image.fromarray(rng.integers(0, 256, (48, 20, 3), np.uint8)).resize((40, 96))
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    image.save(folder / 'a.jpg', quality=90)
    image.save(folder / 'b.jpg', progressive=True, restart_marker_rows=1)
    image.save(folder / 'c.jpg', exif=turned, subsampling=0)
    image.convert('L').save(folder / 'd.jpg')
    for name, mode in (('a', 'RGB'), ('b', 'L'), ('c', 'P'), ('d', 'RGBA')):
        image.convert(mode).save(folder / f'{name}.png')
    PIL.Image.fromarray(rng.integers(0, 2 ** 16, (48, 20), np.uint16)).save(folder / 'e.png')


def image(suffix):
    def case(rng, folder, number):
        torch.set_num_threads(1)
        source = any_file(rng, folder, f'?.{suffix}')
        path = folder / f'damaged.{suffix}'
        path.write_bytes(mutated(rng, source.read_bytes()))
        got = refused(lambda: images.Decoder()(str(path)))
        if got is None:
            return
        assert got.dtype == torch.uint8 and got.ndim == 3 and len(got) == 3 and got.numel() < 3 * 2 ** 28
        images.to_batch([got], (64, 32))
        if source.stem == 'e':  # Pillow makes other colours of 16 bits
            return
        try:
            expected = PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert('RGB')
        except MemoryError:  # of the limit, which the image that was read has taken
            return
        except Exception as error:
            raise AssertionError(f'read, but Pillow says {type(error).__name__}: {error}') from None
        expected = np.asarray(expected).transpose(2, 0, 1)
        assert got.shape == expected.shape, f'read as {tuple(got.shape)}, Pillow reads {expected.shape}'
        apart = np.abs(got.numpy().astype(int) - expected).mean()
        assert apart < 1, f'pixels are {apart:.1f} levels from those that Pillow reads'
    return case


# Checkpoints

def write_run(folder):
    model.make_resnet = lambda backbone, imagenet: ThinResNet()
    train(write_market(folder / 'data'), folder / 'run', 'total_steps = 2')


def with_a_wrong_field(rng, content):
    """Leaves a field out, or gives it another type or shape; returns its name."""
    del content['format']  # which is written anew
    where, keys = content, []
    while isinstance(where, dict) and where and (not keys or rng.random() < 0.5):
        keys.append(list(where)[rng.integers(len(where))])
        parent, where = where, where[keys[-1]]
    if rng.random() < 0.4:
        del parent[keys[-1]]
    else:
        wrong = [None, 'x', -1, 2.5, [], {}, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), 10 ** 20]
        parent[keys[-1]] = wrong[rng.integers(len(wrong))]
    return '.'.join(map(str, keys))


def kinds(value):
    """What has to stay as it is where a checkpoint is accepted: types, and shapes of tensors."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape)
    if isinstance(value, dict):
        return {name: kinds(inner) for name, inner in value.items()}
    return type(value).__name__


def restored(content, path):
    """What a run holds that resumed from the content."""
    states, real = [], checkpoint.State
    checkpoint.State = lambda *args: states.append(real(*args)) or states[-1]
    try:
        train(path.parent / 'data', path.parent / 'other', 'total_steps = 1')
    finally:
        checkpoint.State = real
        shutil.rmtree(path.parent / 'other')
    states[0].restore(content, str(path))
    return states[0].content()


def evaluated(path):
    """What mgn.eval takes from a checkpoint."""
    content = config.load_checkpoint([], [f"weights = '{path}'"])
    return evaluation.load_for_features(content, str(path), 'cpu')[0].state_dict()


def last(rng, folder, number):
    model.make_resnet = lambda backbone, imagenet: ThinResNet()
    original, path = folder / 'run' / 'last.pth', folder / 'damaged.pth'
    if rng.random() < 0.1:
        content, expected = checkpoint.load(str(original)), kinds(checkpoint.load(str(original)))
        changed = with_a_wrong_field(rng, content)
        checkpoint.save(str(path), content)
        got = refused(lambda: restored(checkpoint.load(str(path)), path))
        # A parameter without a state is one that had no gradient yet.
        unseen = re.fullmatch(r'optimizer\.state\.\d+', changed)
        assert got is None or unseen or kinds({'format': '', **got}) == expected, f'accepted with a wrong {changed}'
        return
    path.write_bytes(mutated(rng, original.read_bytes()))
    got = refused(lambda: checkpoint.load(str(path)))
    if got is not None:
        assert_same(got, checkpoint.load(str(original)))


def best(rng, folder, number):
    model.make_resnet = lambda backbone, imagenet: ThinResNet()
    original, path = folder / 'run' / 'best.pth', folder / 'damaged.pth'
    if rng.random() < 0.5:
        content = checkpoint.load(str(original))
        changed = with_a_wrong_field(rng, content)
        checkpoint.save(str(path), content)
        used = changed.split('.')[0] not in ('mAP', 'num_classes') and '.classifier.' not in changed
        assert refused(lambda: evaluated(path)) is None or not used, f'accepted with a wrong {changed}'
        return
    path.write_bytes(mutated(rng, original.read_bytes()))
    got = refused(lambda: checkpoint.load(str(path)))
    if got is not None:
        assert_same(got, checkpoint.load(str(original)))


# Features

def an_extraction(folder):
    model.make_resnet = lambda backbone, imagenet: ThinResNet()
    torch.manual_seed(0)
    return (model.MGN(0, embedding_dim=8), datasets.market_layout(str(folder / 'data')),
            Extractor(torch.device('cpu'), (48, 24), 4, 0))


def write_features(folder):
    write_market(folder / 'data')
    feature_files.write_features(*an_extraction(folder), str(folder / 'features'))


def features(pattern):
    def case(rng, folder, number):
        source = folder / 'features'
        extraction, expected = an_extraction(folder), [np.load(source / f'{part}_features.npy')
                                                       for part in ('query', 'gallery')]
        damaged, path = folder / 'damaged', any_file(rng, source, pattern)
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(source, damaged)
        (damaged / path.name).write_bytes(mutated(rng, path.read_bytes()))
        got = refused(lambda: feature_files.read_features(str(damaged), *extraction))
        assert got is None or all(map(np.array_equal, got, expected)), f'accepted a damaged {path.name}'
    return case


# What mgn.search keeps

PRESENT = {f'{i}.jpg'.encode(): (100 + i, i) for i in range(20)}


def write_kept(folder):
    features = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32)
    np.savez(folder / 'kept.npz', features=features, paths=np.array(list(PRESENT)), made_of='{}',
             stamps=np.array(list(PRESENT.values())))


def kept(rng, folder, number):
    path, expected = folder / 'damaged.npz', crop_search.read_part(folder / 'kept.npz', '{}', 16, PRESENT)
    path.write_bytes(mutated(rng, (folder / 'kept.npz').read_bytes()))
    got = refused(lambda: crop_search.read_part(str(path), '{}', 16, PRESENT))
    assert got is None or all(np.array_equal(row, expected[name]) for name, row in got.items()), 'accepted'


# Texts

def gin_file(rng, folder, number):
    path = folder / 'damaged.gin'
    path.write_bytes(mutated(rng, any_file(rng, folder / 'gin', '*.gin').read_bytes()))
    refused(lambda: config.load([str(path)], []))


def copy_recipes(folder):
    shutil.copytree(f'{config.RECIPES}/gin', folder / 'gin')
    shutil.copy(config.DEFAULTS, folder / 'gin')
    with (folder / 'gin' / 'thin.gin').open('w') as file:
        print(*BINDINGS, *fitting_schedule(*BINDINGS), sep='\n', file=file)


def write_lists(folder):
    for name in ('train', 'test'):
        (folder / name).mkdir()
    for name, shots in (('train', '012'), ('val', '345'), ('query', '012'), ('gallery', '012')):
        lines = [f'{i:04d}/{i:04d}_000_{i % 15 + 1:02d}_0303morning_0008_{j}.jpg {i}' for i in range(9) for j in shots]
        (folder / f'list_{name}.txt').write_text('\n'.join(lines) + '\n')


def list_file(rng, folder, number):
    path, names = folder / 'list_train.txt', ('train', 'test', 'list_val.txt', 'list_query.txt', 'list_gallery.txt')
    root = folder / 'damaged'
    if not root.exists():
        root.mkdir()
        for name in names:
            (root / name).symlink_to(folder / name)
    data = mutated(rng, path.read_bytes())
    (root / path.name).write_bytes(data)
    got = refused(lambda: datasets.msmt17(str(root)))
    if got is not None:
        lines = [line.split() for line in re.split('\r\n|\r|\n', data.decode('utf-8-sig', 'surrogateescape'))
                 if line.strip()]
        expected = [(f'{root}/train/{name}', int(pid), int(name.split('/')[-1].split('_')[2])) for name, pid in lines]
        assert list(map(tuple, got.train)) == expected


def metrics(rng, folder, number):
    run = folder / 'run'
    run.mkdir(exist_ok=True)
    records = [{'step': step, 'epoch': 0, 'loss': 1.5, **({'mAP': 0.5, 'rank1': 0.25} if step % 2 else {})}
               for step in range(6)]
    data = mutated(rng, ''.join(json.dumps(record) + '\n' for record in records).encode())
    (run / 'metrics.jsonl').write_bytes(data)
    got = refused(lambda: log.RunLog(str(run), 4))
    if got is not None:
        remaining = log.read_records(str(run / 'metrics.jsonl'))
        assert all(type(record) is dict and type(record['step']) is int for record in remaining)
        assert got.evaluated == {record['step'] for record in remaining if 'mAP' in record}
        got.write({'step': 5, 'mAP': 0.5})
        assert re.fullmatch(rb'(\{.*\}\n)*', (run / 'metrics.jsonl').read_bytes())


ROWS = {
    'jpeg': Row('JPEG images', CASES, image('jpg'), write_images, memory=GIGABYTE,
                fixed='orientation ignored; 13 GB for a header of 2.5 kB; a buffer of 1 GB for every file'),
    'png': Row('PNG images', CASES, image('png'), write_images, memory=GIGABYTE,
               fixed='crashes of the decoder; messages such as "Internal error"'),
    'last': Row('`last.pth`, to resume from', CASES, last, write_run, memory=2 * GIGABYTE,
                fixed='missing and wrong fields ended with Python\'s own words'),
    'best': Row('`best.pth`, to evaluate', CASES, best, write_run, memory=2 * GIGABYTE,
                fixed='its configuration could run code; missing and wrong fields'),
    'features': Row('features, ids and paths (`.npy`)', CASES, features('*.npy'), write_features, memory=2 * GIGABYTE,
                    fixed='changed files were accepted; broken headers ended with Python\'s own words'),
    'manifest': Row('`manifest.json`', CASES, features('manifest.json'), write_features, memory=2 * GIGABYTE),
    'kept': Row('features that `mgn.search` keeps', CASES, kept, write_kept, memory=GIGABYTE),
    'gin': Row('gin files', CASES, gin_file, copy_recipes, memory=GIGABYTE,
               fixed='addresses of objects in messages'),
    'lists': Row('list files of MSMT17', CASES, list_file, write_lists, memory=GIGABYTE,
                 fixed='bytes that are not UTF-8'),
    'metrics': Row('`metrics.jsonl`', CASES, metrics, memory=GIGABYTE,
                   fixed='bytes that are not UTF-8; lines without a step'),
}
