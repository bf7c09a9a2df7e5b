"""Runs a binary over a thin network, and what happens to it on the way. Started by runs.py in a process of its own."""

import errno
import importlib
import json
import os
import runpy
import signal
import sys
import time

PHASES = {  # where the time of a binary goes: the functions that it is in
    'decoding': 'mgn.data.images.Decoder.__call__', 'features': 'mgn.features.Extractor.forward',
    'ranking': 'mgn.evaluation.match_ranks', 're-ranking': 'mgn.evaluation.k_reciprocal_ranks',
    'step': 'mgn.training.train_step', 'writing': 'os.fsync', 'results': 'mgn.evaluation.write_results',
    'results of training': 'mgn.training.write_results'}
COLLECTIVES = 'broadcast_object_list', 'all_gather_object', 'barrier', 'all_reduce', 'all_gather', 'send', 'recv'


def before(function, number, act):
    """act() runs before call `number`, from 0, of the function."""
    where, name = function.rsplit('.', 1)
    try:
        owner = importlib.import_module(where)
    except ModuleNotFoundError:  # a class
        module, owner = where.rsplit('.', 1)
        owner = getattr(importlib.import_module(module), owner)
    real, calls = getattr(owner, name), []

    def call(*args, **keywords):
        calls.append(0)
        if len(calls) == number + 1:
            act()
        return real(*args, **keywords)
    setattr(owner, name, call)


def wait(phase, number, at, seconds):
    """Says by the file `at` that the phase has begun, and stays in it."""
    def stay():
        with open(at, 'w'):
            pass
        time.sleep(seconds)
    before(PHASES[phase], number, stay)


def fail(function, number):
    """The disk is full at that call."""
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    before(function, number, full)


def workers(counter, numbers, seconds):
    """The worker process that decodes an image of one of these numbers is killed, or sleeps."""
    import torch.utils.data

    from mgn.data import images
    real = images.Decoder.__call__

    def decode(self, path):
        if torch.utils.data.get_worker_info():
            with open(counter, 'ab') as file:
                file.write(b'.')
                number = file.tell()
            if number in numbers:
                time.sleep(seconds) if seconds else os.kill(os.getpid(), signal.SIGKILL)
        return real(self, path)
    images.Decoder.__call__ = decode


def die(number):
    """In the collective of this number, counting all kinds of them. A backward pass has some within."""
    import torch
    import torch.distributed as dist
    calls = []

    def counted(real):
        def call(*args, **keywords):
            calls.append(0)
            if len(calls) == number + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **keywords)
        return call
    for name in COLLECTIVES:
        setattr(dist, name, counted(getattr(dist, name)))
    torch.Tensor.backward = counted(torch.Tensor.backward)


MEDDLE = {'wait': wait, 'fail': fail, 'workers': workers, 'die': die}


def main(binary, meddle, *flags):
    import torch
    from thin import ThinResNet

    from mgn import model
    torch.set_num_threads(1)
    model.make_resnet = lambda backbone, imagenet: ThinResNet()
    if meddle:
        MEDDLE[meddle[0]](*meddle[1:])
    sys.argv[1:] = flags
    runpy.run_module(f'mgn.{binary}', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    sys.path[:0] = os.environ['PYTHONPATH'].split(os.pathsep)
    main(sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:])
