"""What the tests on a GPU share: that nothing waits for it, and that a captured graph can be replayed."""

from contextlib import contextmanager

import torch


@contextmanager
def nothing_waits():
    """Whatever waits for the GPU raises, as copies from and to the host do: make tensors before, read them after."""
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def captured(function):
    """(replay, results) of a CUDA graph of the function; replay() writes the same results anew.

    Before it is captured it runs on a side stream, as whatever is made at first use cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results
