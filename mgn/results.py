"""Results of an evaluation as a table and as the file eval.json. The columns are mgn.ops.metrics.METRICS."""

import json
import os

from mgn.ops import METRICS
from mgn.runs.files import write_text


def table(results):
    """The results on a data set in per cent, a row for each stage."""
    rows = [['data set', *METRICS], *([name, *(f'{100 * stage[measure]:.2f}' for measure in METRICS)]
                                      for name, stage in stages(results))]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return '\n'.join([*lines, 'per cent; {queries} queries, {queries_without_match} of them without a match; {gallery} '
                      'in the gallery'.format(**results)])


def stages(results):
    """[(name, results)] of an evaluation's plain ranking and of what follows it."""
    return [(results['dataset'], results), *((name, results[key]) for name, key in (
        ('+ query expansion', 'query_expansion'), ('+ re-ranking', 'rerank')) if results.get(key))]


def write_results(results, output_dir):
    """Writes the results to output_dir/eval.json."""
    write_text(os.path.join(output_dir, 'eval.json'), json.dumps(results, indent=2) + '\n')
