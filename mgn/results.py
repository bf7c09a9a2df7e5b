"""Results of an evaluation as a table and as the file eval.json. The columns are mgn.ops.metrics.METRICS."""

import json
import os

from mgn.runs.files import write_text, writing
from mgn.runs.log import aligned


def table(results):
    """The results of `mgn.evaluation.evaluate` in per cent, a row for each stage."""
    stages = {results['dataset']: results, '+ query expansion': results.get('query_expansion'),
              '+ re-ranking': results.get('rerank')}
    rows = aligned('data set', {label: stage for label, stage in stages.items() if stage})
    notes = '{queries} queries, {queries_without_match} of them without a match; {gallery} in the gallery'
    return f'{rows}\nper cent; {notes.format(**results)}'


def write_results(results, output_dir):
    """Writes the results to output_dir/eval.json."""
    path = os.path.join(output_dir, 'eval.json')
    with writing(path, 'Bind another output_dir.'):
        os.makedirs(output_dir, exist_ok=True)
    write_text(path, json.dumps(results, indent=2) + '\n')
