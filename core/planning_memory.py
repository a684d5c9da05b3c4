"""Where the memory of a training step goes: bytes by what they hold, from a model's sizes and how it is trained.

Every term is a size times bytes a number, and a few measured factors (`planning_fitted`). It is the peak of what torch
has allocated, under the fused backend with bfloat16 products.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from . import planning_fitted as fitted
from .errors import ConfigError
from .options import Checkpointing, EmbeddingStorage
from .planning_shapes import Shapes
from .tiled_loss import LEAST_SCORES

GIB = 2**30
HALF = 2
"""Bytes of a 16-bit number: products, and what they keep."""

STORED: dict[str | None, float] = {None: 2.0, "8bit": 1.004, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a linear layer's frozen weight. 8 bits: and a float32 for each row. 4 bits: and for each 64 weights a byte,
and for each 256 of those a float32 (NF4 with double quantisation; Dettmers et al. 2023)."""

TABLES: dict[EmbeddingStorage | None, float] = {None: 2.0, "8bit": 1 + 4 / 64, "4bit": 0.5 + 4 / 64, "host": 0.0}
"""Bytes of a frozen weight of an embedding table: in 8 and 4 bits with a float32 for each 64 (`stored_table`)."""

OPTIMIZER = {
    "adamw": 8.0,
    "adamw_8bit": 2.03,
    "paged_adamw_8bit": 2.03,
    "paged_adamw": 8.0,
    "adafactor": 0.02,
    "lion": 4.0,
    "sgd": 0.0,
}
"""Bytes of an optimizer's state for each trained weight. AdamW: two float32. In 8 bits: and a scale for each 256. Paged
states leave the device when it is full; the plan counts them in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeps:
    """What checkpointing leaves of a layer's activations on the device until its backward.

    Args:
        share: Of what the layer keeps without checkpointing.
        widths: Rows of the hidden size, each of 16 bits, a token: the layer's input.
        moving: Such rows for all layers together.
        again: Whether the layer is computed again in the backward, which then holds what one layer takes (AGAIN).
    """

    share: float
    widths: float
    again: bool
    moving: float = 0.0


RECOMPUTE: tuple[Checkpointing, ...] = (False, "selective", True, "offload")
"""`use_gradient_checkpointing`, from the one that keeps most to the one that keeps least."""


def keeps_of(checkpointing: Checkpointing) -> Keeps:
    """What the four ways keep.

    Inputs are counted as what they are; fitted like the other factors they come out as 0.92 rows. Of those that go to
    the host two are on the device: the layer's own, and the next, which comes back while that goes backward.
    """
    return {
        False: Keeps(share=1.0, widths=0.0, again=False),
        "selective": Keeps(share=fitted.SELECTIVE, widths=0.0, again=True),
        True: Keeps(share=0.0, widths=1.0, again=True),
        "offload": Keeps(share=0.0, widths=0.0, again=True, moving=2.0),
    }[checkpointing]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a model is trained, as far as memory asks.

    Args:
        method: "lora" or "full".
        storage: "4bit" or "8bit" for the frozen linear layers under an adapter; None for 16 bits.
        rank: Of the adapter.
        checkpointing: One of `RECOMPUTE`.
        optimizer: A key of `OPTIMIZER`, or transformers' name of one.
        half: Whether full fine-tuning has weights, gradients and states in bfloat16, without float32 masters.
        embedding_storage: "8bit", "4bit" or "host" for the frozen embedding tables under an adapter; None for 16 bits.
        trains_after: Whether what comes after the pooling trains under an adapter too (`modules_to_save`).
        whole: Whether the texts of every forward are known to have one length, a multiple of 64, on a card of Hopper's
            kind or later. Grouped heads then take less; False is the safe side.
    """

    method: Literal["lora", "full"] = "lora"
    storage: Literal["4bit", "8bit"] | None = None
    rank: int = 16
    checkpointing: Checkpointing = False
    optimizer: str = "adamw"
    half: bool = False
    embedding_storage: EmbeddingStorage | None = None
    trains_after: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if self.method == "full" and self.storage is not None:
            fix = "Use method lora, or drop load_in_4bit and load_in_8bit"
            raise ConfigError("quantised weights cannot be trained in full", where="method", fix=fix)
        if self.method == "full" and self.embedding_storage is not None:
            fix = "Use method lora, or leave embedding_storage out"
            raise ConfigError("a table that trains lies on the device", where="embedding_storage", fix=fix)
        optimizer_bytes(self.optimizer)


def optimizer_bytes(name: str) -> float:
    """Bytes of state for each trained float32 weight; `name` may carry transformers' prefixes and endings.

    Raises:
        ConfigError: For one that is not in `OPTIMIZER`.
    """
    bare = name.replace("_torch_fused", "").replace("_torch", "").replace("_32bit", "").replace("_bnb", "")
    if bare not in OPTIMIZER:
        raise ConfigError(
            f"{name!r} is not one that a plan knows", where="optimizer", fix=f"Use {', '.join(OPTIMIZER)}"
        )
    return OPTIMIZER[bare]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The bytes of a training step, by what they hold. Together they are the most that torch has allocated.

    Args:
        weights: The model's own.
        adapter: The adapter's, in float32.
        gradients: Of all that trains.
        optimizer: The optimizer's states.
        products: The weights that the products of a step read, in 16 bits: W + s B A, or a 16-bit copy of masters.
        activations: What all layers keep for the backward.
        outside: Embeddings, pooling and one layer's backward; with checkpointing what one layer takes that is computed
            again and goes backward, when pooling is done.
        table_gradient: A trained embedding table's new gradient beside the one it is added to, as far as it does not
            fit where activations were.
        loss: The scores of all pairs of a batch, and what the loss makes of them.
        workspace: What is there whatever the model.
    """

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    products: float
    activations: float
    outside: float
    table_gradient: float
    loss: float
    workspace: float

    @property
    def total(self) -> float:
        """The peak."""
        return float(sum(asdict(self).values()))

    @property
    def held(self) -> float:
        """What stays from step to step, and the workspace."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.workspace

    @property
    def step(self) -> float:
        """What a step takes and gives back."""
        return self.total - self.held


def parts_of(shapes: Shapes, setup: Setup, tokens: int, pairs: int = 0) -> Parts:
    """What a step of `tokens` tokens in one forward takes, with a loss of `pairs` pairs."""
    trained, own = trained_weights(shapes, setup)
    wide = HALF if setup.half else 4
    of = {name: size * float(getattr(fitted, name)) for name, size in coefficients(shapes, setup, tokens).items()}
    activations, read = of["KEPT"] + checkpoints(shapes, setup, tokens), of["PRODUCTS"]
    table = shapes.tables * wide if setup.method == "full" else 0
    return Parts(
        weights=_weights(shapes, setup), adapter=own * 4, gradients=trained * wide,
        optimizer=_states(shapes, setup, trained), products=read, activations=activations,
        outside=of["OUTSIDE"] + of["AGAIN"], table_gradient=max(0.0, table - activations - read), loss=_loss(pairs),
        workspace=of["WORKSPACE"],
    )  # fmt: skip


def coefficients(shapes: Shapes, setup: Setup, tokens: int) -> dict[str, float]:
    """The bytes that each fitted factor is a factor of, by its name.

    Without checkpointing the peak is where the backward begins: all layers' activations, and OUTSIDE. With it the peak
    is in a layer in the middle of the backward, of which everything is there at once: AGAIN in its place.
    """
    keeps = keeps_of(setup.checkpointing)
    read = shapes.repeated / (shapes.layers if keeps.again else 1)
    if setup.storage is not None:  # the few bits are what is kept; one layer at a time is made of them
        read = shapes.largest
    if setup.method == "full" and setup.half:  # products read the weights themselves
        read = 0
    kept = shapes.kept - (shapes.spared if setup.whole else 0)
    return {
        "KEPT": HALF * tokens * kept * keeps.share,
        "OUTSIDE": 0 if keeps.again else HALF * tokens * shapes.hidden,
        "PRODUCTS": HALF * read,
        "WORKSPACE": GIB * (1 if setup.checkpointing == "offload" else 2),  # a captured step has its own
        "AGAIN": HALF * tokens * shapes.widest if keeps.again else 0,
    }


def checkpoints(shapes: Shapes, setup: Setup, tokens: int) -> float:
    """Bytes of the layers' own inputs where they are kept in place of activations."""
    keeps = keeps_of(setup.checkpointing)
    return HALF * tokens * shapes.hidden * (shapes.layers * keeps.widths + keeps.moving)


def trained_weights(shapes: Shapes, setup: Setup) -> tuple[int, int]:
    """(weights that train, those of them that are the adapter's own)."""
    if setup.method == "full":
        return shapes.weights + shapes.after, 0
    adapter = setup.rank * shapes.adapted
    return adapter + (shapes.after if setup.trains_after else 0), adapter


def _states(shapes: Shapes, setup: Setup, trained: int) -> float:
    """The optimizer's states. bitsandbytes' 8 bits leave out embedding tables, as transformers asks it to."""
    each = optimizer_bytes(setup.optimizer)
    tables = shapes.tables if setup.method == "full" and "8bit" in setup.optimizer else 0
    return ((trained - tables) * each + tables * OPTIMIZER["adamw"]) * (0.5 if setup.half else 1)


def _weights(shapes: Shapes, setup: Setup) -> float:
    if setup.method == "full":
        return float((shapes.weights + shapes.after) * (HALF if setup.half else 4))
    tables, linear = shapes.tables * TABLES[setup.embedding_storage], shapes.linear * STORED[setup.storage]
    rest = (shapes.weights - shapes.linear - shapes.tables) * HALF
    return tables + linear + rest + shapes.after * (4 if setup.trains_after else HALF)


def _loss(pairs: int) -> float:
    """Five float32 matrices of scores; a batch from `LEAST_SCORES` scores on is tiled and holds no matrix."""
    scores = pairs * pairs
    return 5.0 * 4 * (scores if scores < LEAST_SCORES else 0)
