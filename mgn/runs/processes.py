"""The processes of one run, started by torchrun: their numbers and what they send each other.

They form a gloo group, whose messages (features, sums) go through main memory; gradients go through the group that
`group_of` gives for their device. In a run of one process every function here returns at once.
"""

import contextlib
import os
import re
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from mgn.ops.errors import UserError

MEETING = timedelta(minutes=5)  # for all processes to start
PATIENCE = timedelta(hours=2)   # the others wait while process 0 re-ranks; a lost process is noticed by its connection
_store = None


def join():
    """Forms the group if torchrun started this process as one of several. To be called once.

    Raises UserError where the processes do not find each other.
    """
    global _store
    if os.environ.get('WORLD_SIZE', '1') == '1':
        return
    try:
        store, rank, processes = next(dist.rendezvous('env://', timeout=MEETING))
        while isinstance(store, dist.PrefixStore):  # its prefix is a count of restarts that differs between machines
            store = store.underlying_store
        _store = dist.PrefixStore(f'mgn {agree_on_name(store, rank, processes)}', store)
        dist.init_process_group('gloo', store=_store, rank=rank, world_size=processes, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(f'The processes of WORLD_SIZE = {os.environ["WORLD_SIZE"]} did not find each other; process '
                        f'{os.environ.get("RANK", "without RANK")} says: {str(error).splitlines()[0]}. torchrun names '
                        f'the one that ended. Start all of them by torchrun, or unset WORLD_SIZE for one.') from error


def agree_on_name(store, rank, processes):
    """A name that these processes, all alive, share for their group alone.

    Torch 2.15 keeps its store, with addresses of ended processes, when torchrun restarts all processes. So each process
    posts a fresh request, process 0 answers the latest request of every other one, and is done once all of them have
    confirmed its present name.
    """
    request = uuid.uuid4().hex
    store.set(f'mgn request {rank}', request)
    if rank > 0:
        store.wait([f'mgn answer {request}'], MEETING)
        name = store.get(f'mgn answer {request}').decode()
        store.set(f'mgn confirmed {name} {rank}', '')
        return name
    until = time.monotonic() + MEETING.total_seconds()
    for other in range(1, processes):
        while not store.check([f'mgn confirmed {request} {other}']):
            if store.check([f'mgn request {other}']):
                store.set(f'mgn answer {store.get(f"mgn request {other}").decode()}', request)
            if time.monotonic() > until:
                raise RuntimeError(f'process {other} did not come within {MEETING}')
            time.sleep(0.02)
    return request


def leave():
    if count() > 1:
        dist.destroy_process_group()


def count():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number():
    """The number of this process, from 0; only process 0 writes files and logs."""
    return dist.get_rank() if count() > 1 else 0


def first_to_fail():
    """Whether this process is the first to ask, so that only one reports what went wrong."""
    with contextlib.suppress(RuntimeError):  # the store has ended with the process that held it
        return _store is None or _store.add('failed', 1) == 1
    return True


def lost(error):
    """The message for an error that a collective raised, as when another process has ended; None for other errors."""
    if count() == 1 or not isinstance(error, RuntimeError) or not re.search('gloo|nccl', str(error), re.IGNORECASE):
        return None
    return (f'Process {number()} of {count()} lost its connection to the others, or its GPU failed '
            f'({" ".join(str(error).split()):.500}). torchrun names the one that ended. Start the same command again, '
            f'or use torchrun --max-restarts: training resumes from last.pth.')


def check_same(what, value, remedy):
    """Raises UserError in all processes where they differ in `value`; `remedy` is a sentence."""
    values = gather(value)
    differing = [str(process) for process, other in enumerate(values) if other != values[0]]
    if differing:
        raise UserError(f'All {count()} processes need the same {what}, but it differs between process 0 and '
                        f'{", ".join(differing)}. {remedy}')


def part(items):
    """This process's part of a list: contiguous slices whose lengths differ by at most one."""
    return items[len(items) * number() // count():len(items) * (number() + 1) // count()]


def share(value):
    """Process 0's value, in all processes."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value):
    """The values of all processes, in order of their numbers."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def reduced(tensor, operation):
    """`tensor` after an elementwise 'SUM', 'MIN' or 'MAX' over all processes."""
    if count() == 1:
        return tensor
    result = tensor.to('cpu', copy=True)
    dist.all_reduce(result, getattr(dist.ReduceOp, operation))
    return result.to(tensor.device)


def mean(tensor):
    """The mean over all processes, rounded once, so that equal values stay as they are."""
    if count() == 1:
        return tensor
    return (reduced(tensor.to('cpu', torch.float64), 'SUM') / count()).to(tensor)


def to_first(rows):
    """The rows of all processes, in order of their numbers, in process 0; None in the others."""
    if count() == 1:
        return rows
    lengths = gather(len(rows))
    if number() > 0:
        if len(rows):
            dist.send(rows.contiguous(), 0)
        return None
    whole = torch.empty(sum(lengths), *rows.shape[1:], dtype=rows.dtype)
    for process, block in enumerate(whole.split(lengths)):
        if len(block):
            dist.recv(block, process) if process else block.copy_(rows)
    return whole


def group_of(device):
    """The group that sends tensors of `device`; None for a run of one process. All processes have to call it."""
    if count() == 1:
        return None
    return dist.new_group(backend='nccl', device_id=device) if device.type == 'cuda' else dist.group.WORLD


class GatherWithGradient(torch.autograd.Function):
    """The tensors of all processes, concatenated along `dim`; the gradient of each is summed over all processes."""

    @staticmethod
    def forward(ctx, tensor, dim, group):
        ctx.dim, ctx.group = dim, group
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format)
                 for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(dist.get_world_size(ctx.group), ctx.dim)[dist.get_rank(ctx.group)], None, None


gather_with_gradient = GatherWithGradient.apply  # (tensor, dim, group)
