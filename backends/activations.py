"""What a layer keeps of its forward for its backward: most of it, the costly part, its input alone, or nothing here.

Kept activations are most of a step's memory. A layer that is computed again keeps its input, 2 bytes for each token and
hidden unit in place of 20 to 40, and takes a third more time; its input can go to the host meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["kept", "selective", "again", "offload"]

# The share of a layer's activations that is kept for the backward, the cheapest to compute again left out first. Of a
# layer of bge-large 0.7 leaves out the GELU: 753 in place of 1,071 MiB for 32,768 tokens, in less than 1% more time; at
# 0.55 it is 610 MiB and 6% more.
KEPT = 0.7
SHARES: dict[Kind, float] = {"kept": KEPT, "selective": 0.3, "again": 0.0, "offload": 0.0}
OF_OPTION: dict[bool | str, Kind] = {False: "kept", True: "again", "selective": "selective", "offload": "offload"}


@dataclass(slots=True)
class Activations:
    """Chooses for each layer and number of tokens.

    Args:
        layers: How many layers there are.
        option: `use_gradient_checkpointing`: without a budget every layer is treated by it.
        budget: Bytes for all layers' activations, or None. Then as many of the last layers as fit keep theirs, and the
            others are computed again (with "offload", from the host): the last are the first to be done with.
        say: Tells the user once.
        bytes_per_token: What one layer of a kind was seen to keep.
    """

    layers: int
    option: bool | str = False
    budget: float | None = None
    say: Callable[[str], None] = print
    bytes_per_token: dict[Kind, float] = field(default_factory=dict)

    @property
    def spare(self) -> Kind:
        """The kind of layers that a budget has no room for."""
        return "offload" if self.option == "offload" else "again"

    def kind(self, place: int, tokens: int) -> Kind:
        """What the layer at `place` keeps of a batch of so many tokens."""
        if self.budget is None:
            return OF_OPTION[self.option]
        return "kept" if place >= self.layers - self.keeping(tokens) else self.spare

    def keeping(self, tokens: int) -> int:
        """How many layers keep their activations. Before both kinds have been seen: one, to see it."""
        kept, spare = self.bytes_per_token.get("kept"), self.bytes_per_token.get(self.spare)
        if self.budget is None or kept is None or spare is None:
            return 1
        least = self.layers * spare * tokens
        if least > self.budget:
            self.say(
                f"an activation budget of {self.budget / 1e9:.2f} GB is less than the {least / 1e9:.2f} GB that "
                f"{tokens} tokens take with all layers computed again; use_gradient_checkpointing='offload' takes less"
            )
            return 0
        return min(self.layers, int((self.budget - least) / max((kept - spare) * tokens, 1.0)))

    @contextmanager
    def watch(self, kind: Kind, tokens: int, parameters: frozenset[int]) -> Iterator[None]:
        """Count what a layer called in the block keeps, the first time that one of a kind is called.

        Args:
            kind, tokens: Of the call.
            parameters: Where the weights' memory begins, which is not counted.
        """
        if self.budget is None or kind in self.bytes_per_token or not torch.is_grad_enabled():
            yield
            return
        seen: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            yield
        # What has gone to the host is not on the device.
        self.bytes_per_token[kind] = 0.0 if kind == "offload" else sum(seen.values()) / max(tokens, 1)
