"""What a run says: metrics.jsonl, TensorBoard event files where it is installed, progress bars or plain lines."""

import json
import logging
import os
import sys

from tqdm import tqdm

from mgn.runs import processes

logger = logging.getLogger(__name__)


class RunLog:
    """Appends records {'step': int, name: number, …} to output_dir/metrics.jsonl, each a line; to nothing where output_dir is None.

    Opened at `step`, it drops the lines of later steps first: what a stopped run did after its last checkpoint is done
    again.
    """

    def __init__(self, output_dir, step):
        self.path, self.records, self.events = None, [], None
        if output_dir is None:
            return
        self.path = os.path.join(output_dir, 'metrics.jsonl')
        self.records = [record for record in read_records(self.path) if record['step'] <= step]
        write_text(self.path, ''.join(json.dumps(record) + '\n' for record in self.records))
        self.events = event_writer(output_dir, step)

    def evaluated(self, step):
        return any(record['step'] == step and 'mAP' in record for record in self.records)

    def write(self, record):
        if self.path is None:
            return
        self.records.append(record)
        try:
            with open(self.path, 'a') as file:
                file.write(json.dumps(record) + '\n')
        except OSError as error:
            raise OSError(f'want to write to {self.path}, got: {error}; free disk space, and the same command goes on from the last checkpoint') from error
        for name, value in record.items():
            if self.events and name != 'step':
                self.events.add_scalar(('evaluation/' if 'mAP' in record else 'training/') + name, value, record['step'])

    def flush(self):
        if self.events:
            self.events.flush()

    def close(self):
        if self.events:
            self.events.close()


def event_writer(output_dir, step):
    """TensorBoard's writer that forgets what was written after `step`; None where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import
    except ImportError:
        return None
    return SummaryWriter(output_dir, purge_step=step + 1 if step else None)


def read_records(path):
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out, damage elsewhere is a ValueError."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        lines = file.read().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f'want a JSON object in line {number} of {path}, got {line!r}; repair or move the file') from None
    return records


def write_text(path, text):
    """Writes a small file whole or not at all."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'w') as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f'want to write {path}, got: {error}; free disk space or bind another output_dir') from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def progress(total, initial=0, unit='step', what=''):
    """A tqdm bar on a terminal; elsewhere one that shows nothing (`disable` is true), and plain lines are logged instead."""
    return tqdm(total=total, initial=initial, unit=unit, desc=what, dynamic_ncols=True, file=sys.stdout,
                disable=processes.number() > 0 or not sys.stdout.isatty())
