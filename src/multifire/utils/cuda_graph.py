"""Run a function of tensors as a CUDA graph: one launch by the host for all of its kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multifire.utils.log import log
from multifire.utils.memory import is_out_of_memory

WARM_UP_CALLS = 3
"""Ordinary calls before the capture, in which libraries choose kernels and allocate what they keep."""


class CapturedFunction:
    """Calls a function of tensors; after a few ordinary calls it captures the function's kernels and replays them.

    A replay reads the inputs from fixed tensors, to which each call copies its own, and writes the results to fixed
    tensors: a result is valid until the next call. Inputs of other shapes than the first go to the function itself.

    The function must do the same work in every call and must not read a tensor's value on the host. What it does on the
    host is not repeated in a replay. On a CPU there is no graph: the function is called on the fixed tensors, which
    tests that it depends on nothing else.
    """

    def __init__(self, function: Callable[..., Any], name: str):
        """`name` names the function in messages, such as "training steps"."""
        self._function, self._name = function, name
        self._calls = 0
        self._signature: list[Any] = []
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], Any] | None = None
        self._told = False

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the results of the function for these inputs, which lie on one device.

        Raises:
            torch.OutOfMemoryError: the graph does not fit into the device's memory.
        """
        signature = [(x.shape, x.stride(), x.dtype) for x in inputs]
        self._signature = self._signature or signature
        if signature != self._signature:
            self._tell(f"{self._name} with another batch size run without a CUDA graph")
            return self._function(*inputs)
        self._calls += 1
        if self._calls <= WARM_UP_CALLS:
            return self._call_beside(*inputs)
        if self._replay is None:
            self._inputs = [_fixed_copy(x) for x in inputs]
            self._replay = self._capture()
        for fixed, x in zip(self._inputs, inputs, strict=True):
            _stored(fixed).copy_(_stored(x))
        return self._replay()

    def _call_beside(self, *inputs: Tensor) -> Any:
        """Call the function on the stream of later captures, so that what is made for a stream exists before."""
        if not inputs[0].is_cuda:
            return self._function(*inputs)
        stream, current = _capture_stream(inputs[0].device), torch.cuda.current_stream(inputs[0].device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results = self._function(*inputs)
        current.wait_stream(stream)
        return results

    def _capture(self) -> Callable[[], Any]:
        """Return a function that replays the captured kernels and returns their fixed results."""
        device = self._inputs[0].device
        if device.type != "cuda":
            return lambda: self._function(*self._inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread's calls are captured; another one may read the next batch meanwhile.
            with torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"):
                results = self._function(*self._inputs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            log.warning("%s run without a CUDA graph, since the capture failed: %s", self._name, error)
            return lambda: self._function(*self._inputs)

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def _tell(self, message: str) -> None:
        if not self._told:
            log.info(message)
            self._told = True


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return _streams.setdefault(device, torch.cuda.Stream(device))


def _fixed_copy(x: Tensor) -> Tensor:
    """Return an uninitialised tensor of the same shape and strides; dimensions of stride 0 share their memory."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _stored(x: Tensor) -> Tensor:
    """Return the part of x that lies in memory: one element of every dimension of stride 0."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
