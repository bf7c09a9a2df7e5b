"""Results of an evaluation as a table and as the file eval.json. The columns are mgn.ops.metrics.METRICS."""

import json
import os

from mgn.runs.files import write_text, writing
from mgn.runs.log import aligned


def table(results):
    """The results of an evaluation in per cent, a row for each data set and stage."""
    rows, notes = [], []
    for each in (results, *results.get('test_sets', ())):
        rows += stages(each)
        notes.append('{queries} queries, {queries_without_match} of them without a match; {gallery} in the gallery'
                     .format(**each))
    return aligned('data set', rows) + '\nper cent; ' + '\n'.join(notes)


def stages(results):
    """[(name, results)] of an evaluation's plain ranking and of what follows it."""
    return [(results['dataset'], results), *((name, results[key]) for name, key in (
        ('+ query expansion', 'query_expansion'), ('+ re-ranking', 'rerank')) if results.get(key))]


def write_results(results, output_dir):
    """Writes the results to output_dir/eval.json."""
    path = os.path.join(output_dir, 'eval.json')
    with writing(path, 'Bind another output_dir.'):
        os.makedirs(output_dir, exist_ok=True)
    write_text(path, json.dumps(results, indent=2) + '\n')
