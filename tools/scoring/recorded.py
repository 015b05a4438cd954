"""A step of a training as a CUDA graph: launched as one, where Python would launch a thousand kernels one by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ORDINARY_CALLS = 3  # before the recording, on a stream of their own: libraries choose their kernels, optimisers begin


def recorded(function: Callable[..., Any], device: torch.device, pool: Any = None) -> Callable[..., Any]:
    """The function, on a GPU replayed from a recording of its fourth call; every call has its full effect.

    Args:
        function: takes tensors on the device, of the same shapes at every call, and must not wait for the GPU. What it
            returns, a tensor or a tuple of them, is written over by the next call.
        pool: memory that recordings may share which are never replayed at the same time, of
            `torch.cuda.graph_pool_handle()`; None: one of its own.
    """
    return _Recorded(function, pool) if device.type == "cuda" else function


class _Recorded:
    def __init__(self, function: Callable[..., Any], pool: Any) -> None:
        self.function, self.pool = function, pool
        self.ordinary = ORDINARY_CALLS
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.ordinary:
            self.ordinary -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                output = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return output
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.inputs = [given.clone() for given in inputs]
            with torch.cuda.graph(self.graph, pool=self.pool):
                self.output = self.function(*self.inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output
