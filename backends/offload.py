"""Layers' inputs in host memory between forward and backward, copied while the device computes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AHEAD = 2**28
"""Bytes of the largest input that is fetched before it is wanted. A larger one's layer takes twenty times as long as
its copy (H100, 57,000 tokens of 1,024: 100 and 5 ms), and a second input on the device is a fifteenth of the peak."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Parked:
    """One tensor on the host: `done` marks the end of the last copy, `fetched` is its way back, once begun."""

    host: Tensor
    device: torch.device
    done: Any
    fetched: Tensor | None = None


class Offload:
    """Keeps the large inputs of layers in pinned host memory.

    Copies run on a stream of their own: a layer's input leaves while the layer computes, and comes back while the layer
    after it goes backward, or when it is wanted if it is larger than `AHEAD`. On a CPU everything stays where it is.
    """

    def __init__(self) -> None:
        self._stream: Any = None
        # In the order of the forward. A graph that is dropped before its backward takes its tensors along.
        self._parked: list[weakref.ref[Parked]] = []
        self.bytes_moved = 0
        """To the host, in all."""

    @contextmanager
    def of(self, states: Tensor) -> Iterator[None]:
        """Park what shares memory with `states`, a layer's input, of all that is kept in the block."""
        if not states.is_cuda or not torch.is_grad_enabled():
            yield
            return
        if self._stream is None:
            stream: Any = torch.cuda.Stream
            self._stream = stream(states.device)
        memory = states.untyped_storage().data_ptr()

        def pack(value: Tensor) -> Tensor | Parked:
            return self._park(value) if value.untyped_storage().data_ptr() == memory else value

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield

    def _park(self, value: Tensor) -> Parked:
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(self._stream):
            host.copy_(value.detach(), non_blocking=True)
        value.record_stream(self._stream)  # its memory is not reused before the copy is through
        self.bytes_moved += host.nbytes
        parked = Parked(host, value.device, self._stream.record_event())
        self._parked.append(weakref.ref(parked))
        return parked

    def _unpack(self, value: Tensor | Parked) -> Tensor:
        if isinstance(value, Tensor):
            return value
        while self._parked and self._parked.pop()() is not value:
            pass
        current = torch.cuda.current_stream(value.device)
        if value.host.nbytes > AHEAD:
            current.wait_event(value.done)
            return value.host.to(value.device, non_blocking=True)
        self._fetch(value)
        found, value.fetched = value.fetched, None
        assert found is not None
        current.wait_event(value.done)
        found.record_stream(current)
        before = next((one for held in reversed(self._parked) if (one := held()) is not None), None)
        if before is not None and before.host.nbytes <= AHEAD:  # it is the next to be wanted
            self._fetch(before)
        return found

    def _fetch(self, parked: Parked) -> None:
        if parked.fetched is not None:
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(parked.done)
            parked.fetched = parked.host.to(parked.device, non_blocking=True)
        parked.done = self._stream.record_event()
