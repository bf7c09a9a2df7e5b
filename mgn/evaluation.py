"""Model and data set → features → ranks → Rank-k, mAP, mINP.

Under torchrun each process makes the features of its part of the images, and process 0 ranks.
"""

import math
import os
import time
from typing import Annotated

import gin
import numpy as np
import torch

from mgn.data.datasets import Dataset
from mgn.feature_files import read_features, write_features
from mgn.features import check_same_data, load_for_features
from mgn.ops import expand_queries, k_reciprocal_ranks, match_ranks, retrieval_metrics
from mgn.ops.arguments import LARGEST_K
from mgn.ops.errors import UserError
from mgn.report_page import report as write_report
from mgn.results import table, write_results
from mgn.runs import checkpoint as checkpoints, processes
from mgn.runs.log import logger


@gin.configurable(denylist=['checkpoint'])
def evaluate_checkpoint(checkpoint, weights: str | None = gin.REQUIRED, dataset: Dataset = gin.REQUIRED,
                        output_dir: str | None = None, device: str = 'auto',
                        features_dir: str | None = None, test_sets: tuple[Dataset, ...] = (),
                        report: bool = False) -> dict:
    """Evaluates a loaded checkpoint on `dataset`; prints a table, writes output_dir/eval.json, returns the results.

    weights: the checkpoint's path. output_dir: None means the working folder.
    features_dir: a folder written by mgn.extract, whose features are read in place of the images of `dataset`.
    test_sets: further data sets, whose results are the list 'test_sets' of the results. What is known is printed and
        written at once, so a data set that fails takes nothing from those before it.
    report: write output_dir/report.html, too, from what has been computed (mgn.report_page).
    """
    (model, extractor), kept = load_for_features(checkpoint, weights, device), {} if report else None
    results = {'weights': weights, 'step': checkpoint['step'],
               **evaluate(model, dataset, extractor, features_dir, kept)}
    publish(results, results, output_dir)
    if report and processes.number() == 0:
        write_report(checkpoint, model, extractor, dataset, results, kept, [], output_dir)
    for test_set in test_sets:
        results.setdefault('test_sets', []).append(evaluate(model, test_set, extractor))
        publish(results['test_sets'][-1], results, output_dir)
    return results


def publish(new, results, output_dir):
    """Writes all results and prints the table of the new ones, in process 0."""
    if processes.number() == 0:
        write_results(results, output_dir or os.getcwd())  # first: who reads what is printed may have gone
        print(table(new), flush=True)


@gin.configurable(denylist=['checkpoint'])
def report_checkpoint(checkpoint, weights: str | None = gin.REQUIRED, dataset: Dataset = gin.REQUIRED,
                      output_dir: str | None = None, device: str = 'auto', features_dir: str | None = None) -> None:
    """Evaluates a loaded checkpoint on `dataset` and writes output_dir/report.html (`mgn.report_page`).

    Images that cannot be read are left out, and features_dir is where it does not fit; the page then says so.
    """
    model, extractor = load_for_features(checkpoint, weights, device)
    kept, unreadable, notices = {}, {}, []
    if features_dir:
        try:
            kept['features'] = features_of(model, dataset, extractor, features_dir)
        except UserError as error:
            notices.append(f'{error.message}\nThis page was made from the images instead.')
    if not kept:
        features = extractor.features(model, dataset.query + dataset.gallery, unreadable)
        query, gallery = ([sample for sample in part if sample.path not in unreadable]
                          for part in (dataset.query, dataset.gallery))
        dataset = dataset._replace(query=query, gallery=gallery)
        kept['features'] = features.to(extractor.place).split([len(query), len(gallery)])
    if unreadable:
        notices.append('The measures leave out these images, which cannot be read:\n' + '\n'.join(unreadable.values()))
        if not dataset.query or not dataset.gallery:
            raise UserError(f'{notices[-1]}\nNo query or no gallery image is left; restore the files.')
    results = {'weights': weights, 'step': checkpoint['step'], **evaluate(model, dataset, extractor, kept=kept)}
    write_report(checkpoint, model, extractor, dataset, results, kept, notices, output_dir)


@gin.configurable(denylist=['checkpoint'])
def extract_checkpoint(checkpoint, weights: str | None = gin.REQUIRED, dataset: Dataset = gin.REQUIRED,
                       device: str = 'auto', features_dir: str | None = None) -> None:
    """Writes the features of a loaded checkpoint on `dataset` into features_dir (`mgn.feature_files`)."""
    if features_dir is None:
        raise UserError("mgn.extract needs a folder for the features; give --gin_bindings=\"features_dir='features'\"")
    model, extractor = load_for_features(checkpoint, weights, device)
    write_features(model, dataset, extractor, features_dir)


@gin.configurable(denylist=['checkpoint'])
def convert_checkpoint(checkpoint, weights: str | None = gin.REQUIRED, output_dir: str | None = None) -> None:
    """Writes weights, also those of another project (`mgn.weights`), as a checkpoint, <name>_mgn.pth in output_dir.

    Its configuration is the present one, bindings of the command line included.
    """
    load_for_features(checkpoint, weights, 'cpu')  # refuses what does not fit
    path = os.path.join(output_dir or os.getcwd(), f'{os.path.splitext(os.path.basename(weights))[0]}_mgn.pth')
    fields = {name: checkpoint.get(name) for name in ('num_classes', 'step', 'mAP', 'model')}
    checkpoints.save(path, {**fields, 'config': checkpoints.configuration(portable=True)})
    logger.info('wrote %s', path)


@gin.configurable(denylist=['model', 'dataset', 'extractor', 'features_dir', 'kept'])
def evaluate(model, dataset, extractor, features_dir=None, kept=None, cross_camera: bool = True,
             query_expansion: Annotated[int, 0, LARGEST_K] = 0, alpha: Annotated[float, 0, math.inf] = 3.0,
             rerank: bool = False, k1: Annotated[int, 1, 2 ** 31 - 1] = 20, k2: Annotated[int, 1, 2 ** 31 - 1] = 6,
             lambda_value: Annotated[float, 0, 1] = 0.3) -> dict:
    """Ranks the gallery for every query by cosine distance; then again, if asked, after expansion and by re-ranking.

    Args:
        model: MGN on the extractor's device. dataset: Dataset. extractor: mgn.features.Extractor.
        features_dir: a folder written by mgn.extract for this model and data set. Its features are read in place of the
            images, and those of the gallery, which may be larger than memory, tile by tile.
        kept: a dict that 'features' (of query and gallery), 'ids' and 'ranks' are kept in. Features in it are taken.
        cross_camera: a true match comes from another camera. False is for data of one camera or of none: then only the
            query's own file, known by its name without folders, is left out.
        query_expansion: gallery items averaged into each query (`mgn.ops.query_expansion.expand_queries`), 0 to 4096.
            alpha: exponent of their weights.
        rerank: re-rank the features, of expanded queries if there are any, by `mgn.ops.k_reciprocal_ranks` with k1, k2
            and lambda_value. As published, neighbours come from the whole gallery, junk too.
    Returns:
        dict with mgn.ops.metrics.METRICS (fractions), what they were measured on, the seconds of both stages, the share
        of pairs of query and gallery that float64 keys settled (`redecided`): all of plain ranking. 'query_expansion'
        and 'rerank', if asked, are dicts of the stage's parameters, METRICS and seconds. Times are process 0's. The
        same in all processes.
    Raises:
        UserError: unreadable images, features of something else, or no query with a match.
    """
    ids, kept = identities(dataset, cross_camera), {} if kept is None else kept
    check_same_data(dataset, ('query', 'gallery'), model)
    start = time.perf_counter()
    query, gallery = kept.get('features') or features_of(model, dataset, extractor, features_dir)
    if processes.number() > 0:
        return processes.share(None)
    extracted = time.perf_counter()
    ranks = match_ranks(query, gallery, *ids)
    kept.update(features=(query, gallery), ids=ids, ranks=ranks)
    results = {'dataset': dataset.name, 'data_root': dataset.root, **retrieval_metrics(ranks.offsets, ranks.ranks),
               **counts(dataset, ranks), 'cross_camera': cross_camera, **extractor.settings(),
               'features_dir': features_dir, 'processes': processes.count(), 'features_s': round(extracted - start, 3),
               'ranking_s': round(time.perf_counter() - extracted, 3)}
    logger.info('features %.3f s, ranking %.3f s', results['features_s'], results['ranking_s'])
    if (query_expansion or rerank) and query.device.type != 'cpu':  # unlike match_ranks, they take no gallery in a file
        gallery = torch.tensor(gallery, device=query.device) if isinstance(gallery, np.ndarray) else gallery
    if query_expansion:
        start = time.perf_counter()
        query = expand_queries(query, gallery, query_expansion, alpha)
        results['query_expansion'] = {'k': query_expansion, 'alpha': alpha, **stage(
            'query expansion and ranking', start, match_ranks(query, gallery, *ids))}
    if rerank:
        start = time.perf_counter()
        results['rerank'] = {'k1': k1, 'k2': k2, 'lambda_value': lambda_value, 'expanded': query_expansion > 0, **stage(
            're-ranking', start, k_reciprocal_ranks(query, gallery, *ids, k1, k2, lambda_value))}
    return processes.share(results)


def identities(dataset, cross_camera):
    """pids of query and gallery, then camids of both. UserError where no query could have a match.

    Without cross_camera the numbers of their files, by name, take the place of camids.
    """
    parts = dataset.query, dataset.gallery
    pids = [[sample.pid for sample in part] for part in parts]
    if not cross_camera:
        names = [[os.path.basename(sample.path) for sample in part] for part in parts]
        queries = {*zip(pids[0], names[0])}
        logger.info('%d gallery images have the name and the pid of a query, and are left out for it as the same image',
                    sum(image in queries for image in zip(pids[1], names[1])))
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names[0] + names[1]))}
        return *pids, *([numbers[name] for name in part] for part in names)
    cameras_of, cameras = {}, {sample.camid for part in parts for sample in part}
    for sample in dataset.gallery:
        cameras_of.setdefault(sample.pid, set()).add(sample.camid)
    if len(cameras) == 1:
        raise UserError(f'Query and gallery of {dataset.root} must come from several cameras, found camera '
                        f'{cameras.pop()} alone; bind evaluate.cross_camera = False')
    if not any(cameras_of.get(sample.pid, set()) - {sample.camid} for sample in dataset.query):
        raise UserError(f'No query of {dataset.root} has an image of its identity from another camera in the gallery; '
                        f'check the folders, or bind evaluate.cross_camera = False')
    return *pids, *([sample.camid for sample in part] for part in parts)


def features_of(model, dataset, extractor, features_dir):
    """The features of query and gallery in process 0, on the GPU if the extractor has one; None in the others.

    Those of a gallery from files stay there, as a memory-mapped array.
    """
    if features_dir:
        if processes.number() > 0:
            return None, None
        query, gallery = read_features(features_dir, model, dataset, extractor)
        return torch.from_numpy(query.copy()).to(extractor.place), gallery
    features = extractor.gathered(model, dataset.query + dataset.gallery)
    sizes = len(dataset.query), len(dataset.gallery)
    return (None, None) if features is None else features.to(extractor.place).split(sizes)


def counts(dataset, ranks):
    """How many images and pairs were evaluated; a warning for queries without a match."""
    queries, unmatched = len(dataset.query), int((ranks.offsets[1:] == ranks.offsets[:-1]).sum())
    if unmatched:
        logger.warning('%d of %d queries have no true match and are left out', unmatched, queries)
    return {'queries': queries, 'queries_without_match': unmatched, 'gallery': len(dataset.gallery),
            'redecided': ranks.redecided / (queries * len(dataset.gallery))}


def stage(name, start, ranks):
    """The results of a stage that began at `start`: METRICS and seconds."""
    seconds = time.perf_counter() - start
    logger.info('%s %.3f s', name, seconds)
    return {**retrieval_metrics(ranks.offsets, ranks.ranks), 'seconds': round(seconds, 3)}
