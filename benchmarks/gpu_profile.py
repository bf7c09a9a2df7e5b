"""What a call asks of a GPU, by torch's profiler: kernels, launches, waits of the host."""

import json

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# What the runtime is asked for by whatever makes the host wait.
WAITS = ('cudaStreamSynchronize', 'cudaDeviceSynchronize', 'cudaEventSynchronize', 'cudaMemcpy')


def tell(row, side, **numbers):
    print(json.dumps({'row': row, 'side': side, **numbers}), flush=True)


def finish(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def profiled(run, calls, device):
    """The profile of some calls, after a warm-up."""
    run()
    finish(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == 'cuda')
    with profile(activities=activities) as trace:
        for _ in range(calls):
            run()
        finish(device)
    return trace


def show_kernels(run, device):
    """The kernels that take longest, for the log."""
    print(profiled(run, 1, device).key_averages().table(sort_by='self_device_time_total', row_limit=15), flush=True)


def counted(run, device):
    """(kernels, copies and fills launched; waits; seconds of these) of a call: of three calls less those of one, as
    profiling waits, too."""
    numbers = []
    for calls in (1, 3):
        events = profiled(run, calls, device).events()
        launched = [event.time_range.elapsed_us() for event in events if event.device_type == DeviceType.CUDA]
        waits = sum(event.name in WAITS for event in events)
        numbers.append([len(launched), waits, sum(launched) / 1e6])
    return [(three - one) / 2 for one, three in zip(*numbers)]
