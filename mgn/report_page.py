"""What an evaluation has found → report.html: one file with its pictures, numbers and script, opened from disk.

The page is mgn/report.html with JSON in it. Its script draws all of it and puts text in as text only.
"""

import json
import os
import re
import shlex
import sys
import time
from base64 import b64encode
from pathlib import Path
from typing import Annotated

import gin
import simplejpeg
import torch
from PIL import Image

from mgn.data.augmentation import normalise
from mgn.data.images import Decoder, to_batch
from mgn.embedder import Embedder
from mgn.features import evaluation_mode
from mgn.ops import match_ranks, retrieval_metrics
from mgn.ops.errors import FileError, UserError
from mgn.ops.metrics import METRICS
from mgn.ranked_lists import by_cameras, by_query, choose, most_changed, ranked_lists, similarities
from mgn.results import stages
from mgn.runs import processes
from mgn.runs.files import replacing
from mgn.runs.log import logger, progress, read_records

TEMPLATE, PLACE = Path(__file__).with_name('report.html'), b'PUT THE DATA HERE'
HEIGHT, WIDTH, CHANGED = 128, 256, 24  # of a crop, at most; queries shown whose AP differs most between two checkpoints


@gin.configurable(denylist=['checkpoint', 'model', 'extractor', 'dataset', 'results', 'kept', 'notices', 'output_dir'])
def report(checkpoint, model, extractor, dataset, results, kept, notices, output_dir,
           queries: Annotated[int, 1, 2000] = 200, blur: bool = False, runs: tuple[str, ...] | None = None,
           compare: str | None = None) -> None:
    """Writes output_dir/report.html (None: into the working folder).

    Args:
        results, kept: of mgn.evaluation.evaluate. notices: sentences for the page, of what is missing in it.
        queries: shown with pictures: the worst, the best and others. All queries are in a table.
        blur: blur the top eighth of every picture.
        runs: folders of training runs, whose metrics.jsonl are drawn over each other; None: the folder of the weights.
        compare: the weights of another network, any that mgn.load reads, for a comparison on the same images.
    """
    features, ids, ranks = (kept[name] for name in ('features', 'ids', 'ranks'))
    (ap, first), images = by_query(ranks), {}
    trained_on, evaluated = re.search(r'(?m)^dataset = (@.*\))', checkpoint['config']), gin.query_parameter('%dataset')
    if trained_on and trained_on[1] != str(evaluated):
        notices.append(f'The weights were trained on {trained_on[1]}; this page is of {evaluated}.')
    weights = re.sub(f'^{re.escape(os.path.expanduser("~"))}(?=/)', '~', results['weights'])
    runs = training_runs([os.path.dirname(weights)] if runs is None else runs, notices)
    other = compared(compare, extractor, dataset, ids, notices) if compare else None
    logger.info('report: ranked lists and curves')
    page = {
        'dataset': dataset.name, 'weights': weights, 'step': results['step'], 'blur': blur,
        'made': time.strftime('%Y-%m-%d %H:%M %Z'), 'command': command(), 'metrics': METRICS,
        'measures': [(name, {metric: each[metric] for metric in METRICS}) for name, each in stages(results)],
        'gallery': len(dataset.gallery), 'branches': model.parts, 'runs': runs,
        'queries': {'file': [os.path.relpath(sample.path, dataset.root) for sample in dataset.query],
                    'pid': [sample.pid for sample in dataset.query], 'camid': [s.camid for s in dataset.query],
                    'ap': ap.round(4), 'first': first},
        'lists': ranked_lists(features, ids, ranks, choose(ap, queries), dataset, images),
        'similarities': similarities(features, ids), 'cameras': by_cameras(features, ids, dataset)}
    if other:
        other_ap, other_first = by_query(other[1])
        changed = most_changed(ap, other_ap, CHANGED)
        page['compare'] = {'weights': compare, 'measures': retrieval_metrics(other[1].offsets, other[1].ranks),
                           'ap': other_ap.round(4), 'first': other_first,
                           'lists': ranked_lists(features, ids, ranks, changed, dataset, images),
                           'others': ranked_lists(other[0], ids, other[1], changed, dataset, images)}
    page['images'] = list(pictures(model, extractor, list(images), blur, dataset.root))
    write(os.path.join(output_dir or os.getcwd(), 'report.html'), {**page, 'notices': notices})


def compared(path, extractor, dataset, ids, notices):
    """Features by another network of the same images, and their ranks; None, and a notice, where it cannot be used."""
    try:
        device = extractor.device.type if processes.count() > 1 else str(extractor.device)
        how = ('cpu', 'auto') if path.endswith('.onnx') else (device, extractor.precision)
        other = Embedder(path, *how, extractor.flip_test, extractor.batch_size)
        rows, paths = [], [sample.path for sample in dataset.query + dataset.gallery]
        logger.info('report: features of %d images by %s', len(paths), path)
        with progress(len(paths), unit='image', what='features') as bar:
            for first in range(0, len(paths), other.batch_size):
                rows.append(other.embed(paths[first:first + other.batch_size]))
                bar.update(len(rows[-1]))
        features = torch.cat(rows).split([len(dataset.query), len(dataset.gallery)])
        return features, match_ranks(*features, *ids)
    except (UserError, OSError) as error:
        notices.append(f'There is no comparison with {path}: {getattr(error, "message", error)}')


def training_runs(folders, notices):
    """The records of each folder's metrics.jsonl; a notice where there are none."""
    runs = []
    for folder in folders:
        try:
            runs.append({'name': folder, 'records': read_records(f'{os.path.expanduser(folder)}/metrics.jsonl')})
        except (UserError, OSError) as error:
            notices.append(f'There are no curves of the training in {folder}: {error}')
    notices += [f'{run["name"]} has no metrics.jsonl with records of a training.' for run in runs if not run['records']]
    return [run for run in runs if run['records']]


def pictures(model, extractor, samples, blur, root):
    """Yields for each sample its name and ids, the crop and the maps of `activation`, or why it cannot be read."""
    decode = Decoder()
    with progress(len(samples), unit='image', what='pictures') as bar:
        logger.info('report: pictures and activation maps of %d images', len(samples))
        for start in range(0, len(samples), extractor.batch_size):
            images, found = [], []
            for sample in samples[start:start + extractor.batch_size]:
                found.append({**sample._asdict(), 'path': os.path.relpath(sample.path, root)})
                try:
                    images.append(decode(sample.path))
                    found[-1]['jpeg'] = crop(images[-1], blur)
                except FileError as error:
                    found[-1]['error'] = error.message.removeprefix(f'{sample.path}: ')
            read = (image for image in found if 'jpeg' in image)
            for image, *maps in zip(read, *(activation(model, extractor, images) if images else ())):
                image['maps'] = [{'size': each.shape, 'values': b64encode(each.tobytes()).decode()} for each in maps]
            yield from found
            bar.update(len(found))


def crop(image, blur):
    """(3, h, w) uint8 → the bytes of a JPEG file, as text."""
    scale = min(1, HEIGHT / image.shape[1], WIDTH / image.shape[2])
    size = tuple(max(round(scale * side), 1) for side in image.shape[1:])
    pixels = to_batch([image], size)[0].permute(1, 2, 0).contiguous().numpy()
    if blur:
        top = Image.fromarray(pixels[:-(-len(pixels) // 8)])
        pixels[:top.height] = top.resize((3, 1), Image.Resampling.BOX).resize(top.size, Image.Resampling.BILINEAR)
    return b64encode(simplejpeg.encode_jpeg(pixels, 80, 'RGB', '420')).decode()


@torch.no_grad()
def activation(model, extractor, images):
    """Where each branch responds: for each the sum of squares over channels of its last map, (B, h, w) uint8.

    From the least of the image, 0, to the most, 255, as in the visualisations of torchreid and fast-reid.
    """
    batch = normalise(to_batch(images, extractor.input_size).to(extractor.device))
    with evaluation_mode(model):
        shared = model.trunk(batch.contiguous(memory_format=torch.channels_last))
        maps = [branch(shared).square().sum(1) for branch in model.branches]
    maps = [energy - energy.amin((1, 2), keepdim=True) for energy in maps]
    return [(255 * energy / energy.amax((1, 2), keepdim=True).clamp(min=1e-12)).byte().cpu().numpy() for energy in maps]


def command():
    """The command line of this process, as a shell takes it."""
    return shlex.join(['python', *sys.orig_argv[1:]])


def write(path, page):
    """The template with the page's data in it. JSON knows no NaN, and no `<` may end the script that holds it."""
    data = json.dumps(page, default=lambda array: array.tolist())
    data = json.dumps(json.loads(data, parse_constant=lambda _: None), separators=(',', ':')).replace('<', '\\u003c')
    with replacing(path, 'wb') as file:
        file.write(TEMPLATE.read_bytes().replace(PLACE, data.encode(), 1))
    logger.info('\n'.join([*page['notices'], f'wrote {path}, {os.path.getsize(path) / 1e6:.1f} MB; it shows people']))
