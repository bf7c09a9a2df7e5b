"""The processes of one run, started by torchrun: who this one is, what they tell each other; alone, everything is as without it.

They form a gloo group, whose messages go through main memory: features, checkpoints, sums. Gradients have `group_of` their device.
"""

import os
import re
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

MEETING = timedelta(minutes=5)
PATIENCE = timedelta(hours=2)  # the others wait while process 0 re-ranks; a lost process is noticed by its connection
_store = None


def join():
    """Forms the group where torchrun started this process as one of several. To be called once."""
    global _store
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        return
    store, rank, processes = next(dist.rendezvous('env://', timeout=MEETING))
    while isinstance(store, dist.PrefixStore):  # named by TORCHELASTIC_RESTART_COUNT, which the machines of a run count for themselves
        store = store.underlying_store
    try:
        _store = dist.PrefixStore(f'mgn {met(store, rank, processes)}', store)
        dist.init_process_group('gloo', store=_store, rank=rank, world_size=processes, timeout=PATIENCE)
    except RuntimeError as error:
        raise ConnectionError(f'want {processes} processes to meet, got in number {rank}: {str(error).splitlines()[0]}; torchrun tells which one ended; '
                              f'start all of them again') from error


def met(store, rank, processes):
    """A name that these processes, all alive, have for their group alone.

    Torch 2.15 keeps its store, with the addresses of processes that were, when torchrun starts all anew. So each asks under a name never used
    before, process 0 answers whom it sees, again and again, and is done once all of them have said that they got its latest answer.
    """
    asked = uuid.uuid4().hex
    store.set(f'mgn asked {rank}', asked)
    if rank > 0:
        store.wait([f'mgn answer {asked}'], MEETING)
        name = store.get(f'mgn answer {asked}').decode()
        store.set(f'mgn got {name} {rank}', '')
        return name
    answered, until = {}, time.monotonic() + MEETING.total_seconds()
    while not store.check([f'mgn got {asked} {other}' for other in range(1, processes)]):
        for other in range(1, processes):
            if store.check([f'mgn asked {other}']) and (now := store.get(f'mgn asked {other}').decode()) != answered.get(other):
                store.set(f'mgn answer {now}', asked)
                answered[other] = now
        if time.monotonic() > until:
            raise RuntimeError(f'only {len(answered) + 1} of {processes} came within {MEETING}')
        time.sleep(0.02)
    return asked


def leave():
    if count() > 1:
        dist.destroy_process_group()


def count():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number():
    """This process among all, from 0; process 0 alone writes and speaks."""
    return dist.get_rank() if count() > 1 else 0


def number_on_this_machine():
    return int(os.environ.get('LOCAL_RANK', 0)) if count() > 1 else 0


def first_to_fail():
    """Whether no other process has asked before; one alone is to say what went wrong."""
    if _store is None:
        return True
    try:
        return _store.add('failed', 1) == 1
    except RuntimeError:  # the store has ended, with the process that held it
        return True


def lost(error):
    """What to say of an error that a collective raised as another process had ended; None for any other error."""
    if count() == 1 or not isinstance(error, RuntimeError) or not re.search('gloo|nccl', str(error), re.IGNORECASE):
        return None
    return (f'want all {count()} processes to the end, but process {number()} lost its connection to another ({str(error).splitlines()[0]}); torchrun '
            f'tells which one ended; start it again with the same command, or with torchrun --max-restarts, and training goes on from last.pth')


def check_same(what, value, remedy):
    """Raises ValueError in all where they differ in `value`."""
    values = gather(value)
    odd = [process for process, other in enumerate(values) if other != values[0]]
    if odd:
        raise ValueError(f'want the same {what} in all {count()} processes, got another in {", ".join(map(str, odd))} than in 0; {remedy}')


def part(items):
    """This process's contiguous part of a list, which differ in length by one at most."""
    return items[len(items) * number() // count():len(items) * (number() + 1) // count()]


def share(value):
    """Process 0's value, in all."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value):
    """The values of all, in their order."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def wait():
    if count() > 1:
        dist.barrier()


def any_of(flag):
    """Whether it is true in any; a number that travels through main memory, so no device is waited for."""
    if count() == 1:
        return flag
    number = torch.tensor([int(flag)])
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return bool(number)


def mean(tensor):
    """The mean over all, rounded once: equal values stay as they are."""
    if count() == 1:
        return tensor
    total = tensor.to('cpu', torch.float64, copy=True)
    dist.all_reduce(total)
    return (total / count()).to(tensor)


def minimum(tensor):
    if count() == 1:
        return tensor
    least = tensor.to('cpu', copy=True)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return least.to(tensor.device)


def to_first(rows):
    """The rows of all, in their order, in process 0; None in the others."""
    lengths = gather(len(rows))
    if number() > 0:
        if len(rows):
            dist.send(rows.contiguous(), 0)
        return None
    whole = torch.empty(sum(lengths), *rows.shape[1:], dtype=rows.dtype)
    for process, of in enumerate(whole.split(lengths)):
        if process == 0:
            of.copy_(rows)
        elif len(of):
            dist.recv(of, process)
    return whole


def group_of(device):
    """The group whose messages are tensors of `device`, None for one process alone. Every process has to call it."""
    if count() == 1:
        return None
    return dist.new_group(backend='nccl', device_id=device) if device.type == 'cuda' else dist.group.WORLD


class GatherWithGradient(torch.autograd.Function):
    """The tensors of all, stacked in their order; each gets the sum of the gradients that it has in all processes."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


def gather_with_gradient(tensor, dim, group):
    """The tensors of all, one behind the other along `dim`."""
    return torch.cat(GatherWithGradient.apply(tensor, group).unbind(), dim)
