"""An embedding table in 8 or 4 bits or in host memory: how it is encoded, and the module that reads rows of it.

A table in 8 bits has a scale for each 64 numbers of a row, the largest of them over 127 (Dettmers et al. 2022, section
2.1, by blocks). In 4 bits it is NF4 (Dettmers et al. 2023, section 3) with blocks of 64, bit for bit as bitsandbytes
makes it. On all-MiniLM-L6-v2 a block of 64 in 8 bits has an error of 0.59%, one scale a row of 384 has 0.73%.

V: rows of a table, D: numbers of a row, S: scales of a row, D / 64 rounded up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import ConfigError
from .options import EmbeddingStorage

BLOCK = 64
CHUNK = 1 << 20
"""Numbers that are encoded or decoded at a time: 4 MiB in float32, a few of which are needed beside them."""

# The 16 numbers of NF4 (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass
class Stored:
    """A frozen (V, D) table as it is stored.

    Args:
        kind: "8bit", "4bit" or "host".
        data: (V, D) int8; (V, D / 2) uint8; or on the host the floating rows, pinned where there is a GPU.
        scales: (V, S) float32, on the device of `data`; None on the host.
        code: (16,) float32 of NF4; None for the others.
        dtype: What the rows are given in.
        source: The dtype of the table that was encoded.
        folder: Where the base model's weights lie, if that is known.
    """

    kind: EmbeddingStorage
    data: Tensor
    scales: Tensor | None
    code: Tensor | None
    dtype: torch.dtype
    source: torch.dtype
    folder: Path | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(part.nbytes for part in (self.data, self.scales, self.code) if part is not None)

    def follow(self, weight: Tensor) -> None:
        """Go where `weight` is, and give rows in its dtype. Codes and scales keep theirs, and a table on the host stays
        there."""
        if self.kind == "host":
            self.data = self.data if weight.dtype == self.dtype else _on_host(self.data.to(weight.dtype))
        else:
            self.data = self.data.to(weight.device)
            self.scales, self.code = (
                None if part is None else part.to(weight.device) for part in (self.scales, self.code)
            )
        self.dtype = weight.dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.kind == "host":  # copies and pickles are not pinned
            self.data = _on_host(self.data)


def encode(table: Tensor, kind: EmbeddingStorage, folder: Path | None = None, at: str | None = None) -> Stored:
    """A (V, D) floating table in the storage that was asked for, on its own device but for "host".

    Args:
        table: float32, bfloat16 or float16.
        kind: "8bit", "4bit" (D even) or "host".
        folder: Where the table was read from, for `Stored`.
        at: The device that encodes it, part by part: one core of a CPU takes 18 s for 4 bits of EmbeddingGemma's table.
            None is the table's own.
    """
    table = table.detach()
    if kind == "host":
        return Stored(kind, _on_host(table), None, None, table.dtype, table.dtype, folder)
    height, width = table.shape
    wide, whole = (width, torch.int8) if kind == "8bit" else (width // 2, torch.uint8)
    data = torch.empty(height, wide, dtype=whole, device=table.device)
    scales = torch.empty(height, -(-width // BLOCK), device=table.device)
    for rows in chunks(height, width):
        data[rows], scales[rows] = codes(table[rows].to(at or table.device), kind)
    code = torch.tensor(NF4, device=table.device) if kind == "4bit" else None
    return Stored(kind, data, scales, code, table.dtype, table.dtype, folder)


def codes(rows: Tensor, kind: EmbeddingStorage) -> tuple[Tensor, Tensor]:
    """(codes, scales) of some rows."""
    numbers = rows.float()
    width = numbers.shape[1]
    blocks = functional.pad(numbers, (0, -width % BLOCK)).view(len(numbers), -1, BLOCK)
    scales = blocks.abs().amax(-1)
    if kind == "8bit":
        scales = scales * (1 / 127)  # which every device rounds alike; GPUs do not divide by a number
    # A block of zeros, a padding token's, has the scale 0, which nothing is divided by.
    shares = blocks / torch.where(scales > 0, scales, 1)[..., None]
    flat = shares.view(len(numbers), -1)[:, :width]
    if kind == "8bit":
        return flat.round().to(torch.int8), scales
    levels = torch.tensor(NF4, device=rows.device)
    halves = torch.bucketize(flat.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return halves[:, 0::2] << 4 | halves[:, 1::2], scales


def chunks(height: int, width: int) -> Iterable[slice]:
    step = max(1, CHUNK // width)
    return (slice(first, min(first + step, height)) for first in range(0, height, step))


def _on_host(table: Tensor) -> Tensor:
    """A contiguous copy in host memory, pinned where there is a GPU, which then reads it by itself."""
    held = torch.empty(table.shape, dtype=table.dtype, pin_memory=torch.cuda.is_available())
    return held.copy_(table)


class StoredTable(nn.Embedding):
    """An `nn.Embedding` whose frozen table is stored otherwise. Modules become one by their class, and go back.

    A subclass of `nn.Embedding` keeps its own forward, which gets rows from here where it got them from `nn.Embedding`.
    State dicts have the table under its own key, in host memory. `weight` has no rows and only says where the module is
    and in which dtype it gives rows: models are asked for both by their first parameter. `to` and its kin move what is
    stored after it, and leave a table on the host where it is.
    """

    stored: Stored
    operation: Callable[..., Tensor]
    own_class: type[nn.Embedding]

    def forward(self, input: Tensor) -> Tensor:
        """Integers of any shape to (…, D)."""
        return self.rows(input.reshape(-1)).view(*input.shape, self.embedding_dim)

    def rows(self, ids: Tensor) -> Tensor:
        """(T,) to (T, D), on the device of `ids`."""
        stored = self.stored
        return self.operation(ids, stored.data, stored.scales, stored.code, dtype=stored.dtype, block=BLOCK)

    def dense(self) -> Tensor:
        """The whole (V, D) table, in host memory."""
        if self.stored.kind == "host":
            return self.stored.data
        made = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.stored.dtype)
        for rows in chunks(*made.shape):
            made[rows] = self.rows(torch.arange(rows.start, rows.stop, device=self.stored.data.device)).cpu()
        return made

    def requires_grad_(self, requires_grad: bool = True) -> StoredTable:
        """Frozen it is already.

        Raises:
            ConfigError: If it shall train.
        """
        if requires_grad:
            refuse("a table that is stored otherwise stays frozen")
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """None is added to a table.

        Raises:
            ConfigError: If a weight shall take its place.
        """
        refuse(f"a table that is stored otherwise takes no other {name}")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        above: Any = super()
        moved = above._apply(fn, recurse)
        self.stored.follow(self.weight)
        return moved

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        key, shape = f"{prefix}weight", (self.num_embeddings, self.embedding_dim)
        given = state_dict.get(key)
        if given is not None and tuple(given.shape) != shape:
            error_msgs.append(f"size mismatch for {key}: {tuple(given.shape)}, not {shape}.")
        elif given is not None:
            stored = self.stored
            made = encode(given.to(stored.dtype), stored.kind, stored.folder)
            made.follow(self.weight)
            stored.__dict__.update(made.__dict__)
        if given is not None:
            state_dict = {**state_dict, key: self.weight}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self.own_class,), self.__dict__.copy()


@cache
def stored_class(own: Any) -> Any:
    """`own` over `StoredTable`: what `own` asks of `nn.Embedding` by `super()` is asked of that."""
    bases = (StoredTable,) if own is nn.Embedding else (own, StoredTable)
    return type(f"Stored{own.__name__}", bases, {"__module__": __name__})


def _blank(own: Any) -> StoredTable:
    """What a copied or pickled table is filled into: its class has no name that a pickle could find it by."""
    kind: Any = stored_class(own)
    made: StoredTable = kind.__new__(kind)
    return made


def refuse(what: str) -> NoReturn:
    """Say in one line why a table cannot be stored as asked."""
    raise ConfigError(what, where="embedding_storage", fix="Drop embedding_storage")
