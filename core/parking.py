"""What a forward keeps for its backward, outside of the layers, in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LEAST = 2**20
"""Bytes below which a tensor stays where it is."""


@dataclass(frozen=True, slots=True)
class Parked:
    """A tensor on the host, and the device it goes back to."""

    host: Tensor
    device: torch.device


@contextmanager
def on_the_host(device: str = "cuda", least: int = LEAST) -> Iterator[None]:
    """Copy what the block keeps for its backward to pinned memory, and back when it is wanted.

    For many forwards whose backward comes after the last of them: a final norm and the pooling keep up to 16 bytes a
    token and hidden unit of each (float32 copies), which adds up where layers keep next to nothing. Hooks that are set
    inside, by a layer for its input, come before these. Copies wait for the device.

    Args:
        device: The type of device that tensors leave; those elsewhere, and weights, stay.
        least: Bytes of the smallest tensor that leaves.
    """

    def pack(value: Tensor) -> Tensor | Parked:
        weight = isinstance(value, nn.Parameter) or isinstance(value._base, nn.Parameter)
        if weight or value.device.type != device or value.nbytes < least:
            return value
        host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return Parked(host.copy_(value.detach()), value.device)

    def unpack(kept: Tensor | Parked) -> Tensor:
        return kept.host.to(kept.device) if isinstance(kept, Parked) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
