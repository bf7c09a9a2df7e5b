"""What a run reports: metrics.jsonl, progress bars or plain lines."""

import json
import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

from mgn.ops.errors import UserError
from mgn.runs import processes
from mgn.runs.files import write_text, writing

logger = logging.getLogger('mgn')  # of the whole package; mgn.command_line says where its lines go


class RunLog:
    """Appends records {'step': int, name: number, …} to output_dir/metrics.jsonl, a line each.

    Opened at `step`, it drops the lines of later steps first: what a stopped run did after its last checkpoint is done
    again. `evaluated`: the steps whose evaluation the file held then. Process 0 alone has one.
    """

    def __init__(self, output_dir, step):
        self.path = os.path.join(output_dir, 'metrics.jsonl')
        records = [record for record in read_records(self.path) if record['step'] <= step]
        self.evaluated = {record['step'] for record in records if 'mAP' in record}
        write_text(self.path, ''.join(json.dumps(record) + '\n' for record in records))

    def write(self, record):
        with writing(self.path, 'Free disk space; then the same command resumes.'), open(self.path, 'a') as file:
            file.write(json.dumps(record) + '\n')


def read_records(path):
    """The lines of a metrics.jsonl. A last line that a kill cut short is dropped; damage elsewhere is a UserError."""
    lines = Path(path).read_text(errors='replace').splitlines() if os.path.exists(path) else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get('step'), int):
                raise ValueError
            records.append(record)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(f'Line {number} of {path} is no JSON object with a step: {line!r:.200}. '
                                f'Repair or move the file.') from None
    return records


def progress(total, initial=0, unit='step', what=''):
    """A tqdm bar on a terminal; elsewhere one that shows nothing (`disable` is true), as plain lines are logged."""
    on_terminal = sys.stdout and sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns > 0
    return tqdm(total=total, initial=initial, unit=unit, desc=what, dynamic_ncols=True, file=sys.stdout,
                disable=processes.number() > 0 or not on_terminal)
