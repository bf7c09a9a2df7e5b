"""Model and data set → features → ranks → Rank-k, mAP, mINP; under torchrun each process ranks in its part of the gallery."""

import json
import logging
import os
import sys
import time

import gin
import torch

from mgn.runs import checkpoint as checkpoints
from mgn.runs import processes
from mgn.data.datasets import check_dataset
from mgn.ops.query_expansion import expand_queries
from mgn.ops.arguments import LARGEST_K, check_alpha as want_alpha, check_reranking as want_parameters
from mgn.features import check_alike, extract_features, read_features, write_features
from mgn.ops.metrics import retrieval_metrics
from mgn.model import MGN
from mgn.ops import k_reciprocal_ranks, match_ranks, match_ranks_sharded
from mgn.precision import resolve
from mgn.runs.log import write_text

logger = logging.getLogger(__name__)


@gin.configurable(denylist=['checkpoint'])
def evaluate_checkpoint(checkpoint, weights=gin.REQUIRED, dataset=gin.REQUIRED, output_dir=None, device='auto', features_dir=None):
    """Evaluates a loaded checkpoint on `dataset`; prints the table, writes output_dir/eval.json, returns the results.

    features_dir: of mgn.extract, whose features are read in place of the images.
    """
    device = find_device(device)
    results = {'weights': weights, 'step': checkpoint['step'],
               **evaluate(loaded(checkpoint, weights, device), dataset, device, features_dir=features_dir)}
    if processes.number() == 0:
        print(table(results))
        write_results(results, output_dir or os.getcwd())
    return results


@gin.configurable(denylist=['checkpoint'])
def extract_checkpoint(checkpoint, weights=gin.REQUIRED, dataset=gin.REQUIRED, device='auto', features_dir=None):
    """Writes the features of a loaded checkpoint on `dataset` into features_dir (`mgn.features.write_features`)."""
    check_dataset(dataset)
    if features_dir is None:
        raise ValueError("want a folder for the features, got none; give --gin_bindings=\"features_dir='features'\"")
    device = find_device(device)
    write_features(loaded(checkpoint, weights, device), dataset, device, features_dir)


def loaded(checkpoint, weights, device):
    """The checkpoint's MGN without classifiers, on `device`."""
    model = MGN(num_classes=0, fresh=False).to(device, memory_format=torch.channels_last)
    checkpoints.load_model(model, checkpoint['model'], weights, features_only=True)
    return model


@gin.configurable(denylist=['model', 'dataset', 'device', 'features_dir'])
def evaluate(model, dataset, device, input_size=gin.REQUIRED, batch_size=64, workers=4, flip_test=False, precision='float32',
             cross_camera=True, query_expansion=0, alpha=3.0, rerank=False, k1=20, k2=6, lambda_value=0.3, features_dir=None):
    """Ranks the gallery for every query by cosine distance of the test features; then again, where asked, with query expansion and re-ranking.

    Under torchrun each process extracts and holds its part of query and gallery, and ranks in that (`match_ranks_sharded`); query expansion and
    re-ranking are process 0's, which the gallery's features travel to.

    Args:
        model: MGN. dataset: Dataset. device: torch.device that the model is on.
        input_size: (H, W) in pixels. batch_size: images at a time. workers: decoding processes.
        flip_test: average the features of image and mirrored image.
        precision: of the model's forward pass, by autocast: 'float32', 'bfloat16', 'float16', or 'auto' for bfloat16 where the device has
            units for it, else float32. What features are averaged, normalised and ranked in is float32, whichever.
        cross_camera: a true match comes from another camera. False for data of one camera or none: then only the
            query's own file, known by its name, is left out.
        query_expansion: gallery items averaged into each query (`mgn.ops.query_expansion.expand_queries`), at most 4096; 0: none. alpha: exponent
            of their weights.
        rerank: re-rank the features, of expanded queries if there are, by `mgn.ops.k_reciprocal_ranks`, whose k1, k2 and lambda_value are
            given. As published, neighbours are all of the gallery, also what is left out of a query's ranks.
        features_dir: of mgn.extract, with features of this model and data set; they are read in place of the images, and the gallery, which may
            be larger than memory, tile by tile.
    Returns:
        dict with rank1, rank5, rank10, mAP, mAP_trapezoid, mINP (fractions), what they were measured on, the seconds of both
        stages, the share of pairs of query and gallery that their keys decided, and the process's peak memory, all of plain ranking.
        Where asked, 'query_expansion' and 'rerank' are dicts: the stage's parameters, the same six fractions, its seconds, and the
        peak memory. That is the most since the process began, so a stage cannot show less than those before it. Times and memory are
        process 0's. The same in all processes.
    Raises:
        ValueError: options out of range, before any image is read; unreadable images, features of something else, or no query with a match.
    """
    check_dataset(dataset)
    if isinstance(query_expansion, bool) or not isinstance(query_expansion, int) or not 0 <= query_expansion <= LARGEST_K:
        raise ValueError(f'want evaluate.query_expansion as an integer from 0 to {LARGEST_K}, got {query_expansion!r}; it is how many gallery items '
                         f'are averaged into a query, 0 for none')
    if not isinstance(rerank, bool):
        raise ValueError(f'want evaluate.rerank True or False, got {rerank!r}; bind evaluate.k1, k2 and lambda_value for its parameters')
    want_alpha(alpha)
    want_parameters(k1, k2, lambda_value)
    precision = resolve(precision, device, 'evaluate.precision')
    camids = match_groups(dataset, cross_camera)
    ids = *([sample.pid for sample in part] for part in (dataset.query, dataset.gallery)), *camids
    check_alike(dataset, ('query', 'gallery'), model)
    start = time.perf_counter()
    if features_dir:
        query, gallery = (processes.part(rows) for rows in read_features(features_dir, model, dataset, input_size, flip_test, precision))
        query = torch.from_numpy(query.copy()).to(device if device.type == 'cuda' else 'cpu')
    else:
        mine = processes.part(dataset.query), processes.part(dataset.gallery)
        features = extract_features(model, mine[0] + mine[1], device, input_size, batch_size, workers, flip_test, precision)
        query, gallery = features.to(device if device.type == 'cuda' else 'cpu').split([len(part) for part in mine])
    extracted = time.perf_counter()
    rank = match_ranks_sharded if processes.count() > 1 else match_ranks
    ranks = rank(query, gallery, *(processes.part(of) for of in ids))
    ranked = time.perf_counter()
    redecided = ranks.redecided / max(len(dataset.query) * len(dataset.gallery), 1)
    logger.info('%s %.3f s, matrix product and counting %.3f s, %.4f %% of pairs decided by their keys, peak memory %s MB',
                'opening features' if features_dir else 'decoding and features', extracted - start, ranked - extracted, 100 * redecided,
                peak_memory_mb())
    unmatched = int((ranks.offsets[1:] == ranks.offsets[:-1]).sum())
    if unmatched:
        logger.warning('%d of %d queries have no true match and are left out', unmatched, len(dataset.query))
    results = {'dataset': dataset.name, 'data_root': dataset.root, **retrieval_metrics(ranks.offsets, ranks.ranks),
               'queries': len(dataset.query), 'queries_without_match': unmatched, 'gallery': len(dataset.gallery),
               'cross_camera': cross_camera, 'flip_test': flip_test, 'precision': precision, 'input_size': list(input_size),
               'features_dir': features_dir, 'processes': processes.count(), 'features_s': round(extracted - start, 3), 'ranking_s': round(ranked - extracted, 3),
               'redecided': redecided, **peak_memory(device)}
    if query_expansion or rerank:
        if processes.count() > 1:
            logger.info('query expansion and re-ranking run in process 0 alone, on the features of all %d', processes.count())
        query, gallery = (in_process_0(rows, query.device) for rows in (query, gallery))
    if processes.number() > 0:
        return processes.share(None)
    if query_expansion:
        start = time.perf_counter()
        query = expand_queries(query, gallery, query_expansion, alpha)
        ranks = match_ranks(query, gallery, *ids)
        results['query_expansion'] = {'k': query_expansion, 'alpha': alpha, **retrieval_metrics(ranks.offsets, ranks.ranks),
                                      **spent('query expansion and ranking', start, device)}
    if rerank:
        start = time.perf_counter()
        ranks = k_reciprocal_ranks(query, gallery, *ids, k1, k2, lambda_value)
        results['rerank'] = {'k1': k1, 'k2': k2, 'lambda_value': lambda_value, 'expanded': query_expansion > 0,
                             **retrieval_metrics(ranks.offsets, ranks.ranks), **spent('re-ranking', start, device)}
    return processes.share(results)


def in_process_0(rows, device):
    """The rows of all processes, on `device`, in process 0; None elsewhere."""
    rows = torch.as_tensor(rows)
    if processes.count() > 1:
        rows = processes.to_first(rows.cpu())
    return rows if rows is None else rows.to(device)


def spent(stage, start, device):
    """Seconds since `start` and peak memory so far, logged."""
    seconds = time.perf_counter() - start
    logger.info('%s %.3f s, peak memory %s MB', stage, seconds, peak_memory_mb())
    return {'seconds': round(seconds, 3), **peak_memory(device)}


def peak_memory(device):
    gpu = {'peak_gpu_memory_mb': torch.cuda.max_memory_allocated(device) // 2 ** 20} if device.type == 'cuda' else {}
    return {'peak_memory_mb': peak_memory_mb(), **gpu}


def peak_memory_mb():
    """The most that this process has held in main memory so far; None on Windows, which does not tell."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)


def match_groups(dataset, cross_camera):
    """Camids of query and gallery, or the numbers of their files; ValueError where no query could have a match."""
    if not cross_camera:
        numbers = {}
        return tuple([numbers.setdefault(os.path.basename(s.path), len(numbers)) for s in part]
                     for part in (dataset.query, dataset.gallery))
    cameras = {sample.camid for sample in dataset.query + dataset.gallery}
    if len(cameras) == 1:
        raise ValueError(f'want query and gallery of {dataset.root} from several cameras, found camera {cameras.pop()} alone; '
                         f'bind evaluate.cross_camera = False')
    seen = {}
    for sample in dataset.gallery:
        seen.setdefault(sample.pid, set()).add(sample.camid)
    if not any(seen.get(sample.pid, set()) - {sample.camid} for sample in dataset.query):
        raise ValueError(f'want a query of {dataset.root} whose identity another camera has in the gallery, found none; '
                         f'check the folders, or bind evaluate.cross_camera = False')
    return [sample.camid for sample in dataset.query], [sample.camid for sample in dataset.gallery]


def find_device(name):
    """torch.device of 'auto' (cuda, else mps, else cpu) or of a name; ValueError where this machine lacks it.

    Of several processes on a machine, each gets the GPU of its own number.
    """
    several = processes.count() > 1
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() and not several else 'cpu'
    if several and (str(name) == 'mps' or str(name).startswith('cuda:')):
        raise ValueError(f"want the device 'cuda' or 'cpu' for {processes.count()} processes, got {name!r}; bind device = 'cuda' for a GPU each")
    try:
        device = torch.device(f'cuda:{processes.number_on_this_machine()}' if several and name == 'cuda' else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # CPU builds of torch assert
        raise ValueError(f'want the device {name!r}{" for each process" if several else ""}, this machine or this build of torch has none: '
                         f"{str(error).splitlines()[0]}; bind device = 'cpu' or 'auto'{', or start fewer processes' if several else ''}") from None
    if several and device.type == 'cuda':
        torch.cuda.set_device(device)
    return device


def table(results):
    """The results in per cent, as one prints them."""
    names = ('rank1', 'rank5', 'rank10', 'mAP', 'mAP_trapezoid', 'mINP')
    widths = [max(len(name), 6) for name in names]
    stages = [(results['dataset'], results), ('+ query expansion', results.get('query_expansion')), ('+ re-ranking', results.get('rerank'))]
    stages = [(label, figures) for label, figures in stages if figures]
    first = max(len(label) for label in ('data set', *(label for label, _ in stages)))
    rows = [['data set'.ljust(first), *(name.rjust(w) for name, w in zip(names, widths))]]
    for label, figures in stages:
        rows.append([label.ljust(first), *(f'{100 * figures[name]:.2f}'.rjust(w) for name, w in zip(names, widths))])
    notes = f"per cent; {results['queries']} queries, {results['queries_without_match']} of them without a match; " \
            f"{results['gallery']} in the gallery"
    return '\n'.join(['  '.join(row) for row in rows] + [notes])


def write_results(results, output_dir):
    os.makedirs(output_dir, exist_ok=True)
    write_text(os.path.join(output_dir, 'eval.json'), json.dumps(results, indent=2) + '\n')
