"""Results of an evaluation as a table and as the file eval.json. The columns are mgn.ops.metrics.METRICS."""

import json
import os

from mgn.ops.metrics import METRICS
from mgn.runs.log import write_text


def table(results):
    """The results of `mgn.evaluation.evaluate` in per cent, a row for each stage."""
    stages = {results['dataset']: results, '+ query expansion': results.get('query_expansion'),
              '+ re-ranking': results.get('rerank')}
    rows = [['data set', *METRICS]]
    rows += [[label, *(f'{100 * stage[name]:.2f}' for name in METRICS)] for label, stage in stages.items() if stage]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    notes = '{queries} queries, {queries_without_match} of them without a match; {gallery} in the gallery'
    return '\n'.join([*lines, 'per cent; ' + notes.format(**results)])


def write_results(results, output_dir):
    """Writes the results to output_dir/eval.json."""
    os.makedirs(output_dir, exist_ok=True)
    write_text(os.path.join(output_dir, 'eval.json'), json.dumps(results, indent=2) + '\n')
