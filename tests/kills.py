"""A training run that is killed again and again ends with the files of an uninterrupted one.

    python tests/kills.py --kills=100

Some kills come at a random moment. The others come while a file is written: after a random part of a checkpoint's
bytes, or just before or after one of the calls that give it its name. Linux or macOS.
"""

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from conftest import write_market  # noqa: E402
from outcomes import assert_same, outcome  # noqa: E402
from thin import ThinResNet, train  # noqa: E402

from mgn import model, training
from mgn.runs import checkpoint  # noqa: E402

KINDS = {'float32, workers': ('workers = 2', 'train.keep_last = 2'),
         'bfloat16': ("train.precision = 'bfloat16'",)}


def survive(folder, kills, seed, kind):
    """Kills a run `kills` times, then lets it end; returns how many kills came while a file was written.

    Raises AssertionError where a bit differs.
    """
    draw, data = random.Random(seed), write_market(folder / 'data')
    began = time.monotonic()
    assert run(data, folder / 'uninterrupted', kind) == 0
    seconds, writing = time.monotonic() - began, 0
    for number in range(kills):
        place = draw.choice(['moment', *PLACES])
        # A run that is always killed early would never end; one that is near its end would not be killed.
        when = draw.uniform(0, 1.2 * seconds) if place == 'moment' else draw.randrange(3)
        status = run(data, folder / 'killed', kind, place, when, draw.random())
        assert status in (0, -signal.SIGKILL), f'kill {number}, {place}: status {status}'
        writing += place != 'moment' and status == -signal.SIGKILL
        if status == 0:  # it has ended: another one begins
            compare(folder)
            for path in (folder / 'killed').iterdir():
                path.unlink()
    assert run(data, folder / 'killed', kind) == 0
    compare(folder)
    return writing


def compare(folder):
    assert_same(outcome(folder / 'killed'), outcome(folder / 'uninterrupted'))
    killed, uninterrupted = (sorted(path.name for path in (folder / run).iterdir()) for run in (
        'killed', 'uninterrupted'))
    assert killed == uninterrupted


def run(data, output_dir, kind, place=None, when=0, part=0.0):
    """Trains in a process of its own; returns its status.

    It is killed at `place`: 'moment' after `when` seconds, else at call number `when` there.
    """
    process = os.fork()
    if process == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            model.make_resnet = lambda backbone, imagenet: ThinResNet()
            if place in PLACES:
                PLACES[place](when, part)
            train(data, output_dir, *kind)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    if place == 'moment':
        until = time.monotonic() + when
        while time.monotonic() < until:
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        else:
            os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def within_a_file(when, part):
    """Dies after a part of a checkpoint's bytes was written."""
    real, calls = torch.save, []

    def save(content, file):
        calls.append(0)
        if len(calls) <= when:
            return real(content, file)
        with tempfile.TemporaryFile() as whole:
            real(content, whole)
            whole.seek(0)
            data = whole.read()
        file.write(data[:int(part * len(data))])
        file.flush()
        die()
    checkpoint.torch.save = save


def beside_a_call(name, module):
    def place(when, part):
        """Dies just before or just after the call."""
        real, calls = getattr(module, name), []

        def call(*args):
            calls.append(0)
            if len(calls) > when and part < 0.5:
                die()
            real(*args)
            if len(calls) > when:
                die()
        setattr(module, name, call)
    return place


PLACES = {'within a checkpoint': within_a_file, 'beside fsync': beside_a_call('fsync', os),
          'beside replace': beside_a_call('replace', os),
          'beside the results': beside_a_call('write_results', training)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for name, kind in KINDS.items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            writing = survive(Path(folder), args.kills // len(KINDS), args.seed, kind)
        print(f'{name}: {args.kills // len(KINDS)} kills, {writing} of them while writing; files as of an '
              f'uninterrupted run ({time.monotonic() - began:.0f} s)', flush=True)


if __name__ == '__main__':
    main()
