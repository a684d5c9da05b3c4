"""`burnish plan`: the memory that fine-tuning a model takes, by its shapes, and what to do with the memory there is.

The peak of torch's allocations is predicted (`planning_memory`); what must be free on the device is more: a CUDA
context, what the allocator cannot use, and with batches of several lengths the memory of captured steps beside that of
a step which runs for the first time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError
from .options import Checkpointing, EmbeddingStorage
from .planning_memory import RECOMPUTE, Parts, Setup, parts_of
from .planning_shapes import Shapes, shapes_of

CONTEXT = 0.85 * 2**30
"""Bytes of a CUDA context with its libraries, which no allocator counts: 0.81 GiB on an H200, driver 580."""
MARGIN = 1.1
"""What the plan may be off, and the allocator's rounding: of one shape it had reserved 2% to 11% more than its peak."""
GRAPHS = 2
"""A captured step keeps its memory, and a step of a shape that is new runs beside it."""
LEAST = 4096
"""Tokens that a forward of a cached loss should have; below, checkpointing is proposed before smaller chunks."""
MOST_PAIRS, FEWEST_PAIRS = 256, 32
"""A batch that is proposed where none was asked for: as many pairs as fit at once, between these."""
UNITS = {"": 10**9, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What one way of training has room for.

    Args:
        setup: The way.
        held: Bytes that stay from step to step.
        token_bytes: Bytes that each token of a forward takes until its backward is done.
        tokens: The most tokens in a forward and its backward; 0 where not even one text fits.
        pairs: Whole pairs of two texts of the asked length in them.
    """

    setup: Setup
    held: float
    token_bytes: float
    tokens: int
    pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model can be trained in so much memory. All sizes are bytes.

    Args:
        model: Its name.
        memory: The device's memory.
        seq: Tokens of a text.
        shapes: The model's sizes.
        fits: What each way of training has room for.
        chosen: The way that is proposed; None where nothing fits.
        batch: Pairs in a batch: what the loss compares.
        budget: Tokens of a forward where the batch is cut, as `mini_batch_num_tokens` and `auto_batch` do; None where
            it goes through in one.
        parts: What the proposed step holds, at its peak; of the first way where nothing fits, for one text.
        needs: The memory that it needs on the device.
    """

    model: str
    memory: float
    seq: int
    shapes: Shapes
    fits: tuple[Fit, ...]
    chosen: Setup | None
    batch: int
    budget: int | None
    parts: Parts
    needs: float

    @property
    def peak(self) -> float:
        """The most that torch has allocated in the proposed run."""
        return self.parts.total

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values; bytes are whole numbers."""
        return {
            "model": self.model, "memory": round(self.memory), "seq": self.seq, "batch": self.batch,
            "mini_batch_num_tokens": self.budget, "peak": round(self.peak), "needs": round(self.needs),
            "chosen": None if self.chosen is None else asdict(self.chosen),
            "parts": {name: round(value) for name, value in asdict(self.parts).items()},
            "activations_per_layer": round(self.parts.activations / self.shapes.layers),
            "fits": [
                {**asdict(fit.setup), "held": round(fit.held), "token_bytes": round(fit.token_bytes),
                 "tokens": fit.tokens, "pairs": fit.pairs}
                for fit in self.fits
            ],
            "shapes": asdict(self.shapes),
        }  # fmt: skip


def plan(
    model: str,
    *,
    gpu_memory: str | float,
    seq: int,
    method: Literal["lora", "full"] = "lora",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    rank: int = 16,
    batch_size: int | None = None,
    use_gradient_checkpointing: Checkpointing | None = None,
    optimizer: str = "adamw",
    embedding_storage: EmbeddingStorage | None = None,
    plugins: Iterable[str] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Predict what training takes and propose how to train. Reads configs, no weights, and needs no GPU.

    Args:
        model: Folder or Hub id.
        gpu_memory: "16GB", "24GiB", or a number of GB (1e9 bytes).
        seq: Tokens of a text; every text is taken to be as long.
        method: "lora" or "full".
        load_in_4bit: The frozen base in 4 bits; else it is proposed only where 16 bits do not fit.
        load_in_8bit: The frozen base in 8 bits.
        rank: Of the adapter.
        batch_size: Pairs that a loss compares. None: as many as fit at once, from 32 to 256.
        use_gradient_checkpointing: False, True, "selective" or "offload"; None tries them in that order of cost.
        optimizer: "adamw", "adamw_8bit", …, with or without transformers' endings.
        embedding_storage: "8bit", "4bit" or "host" for the frozen embedding tables under an adapter.
        plugins: Plugins to use by name, as in `from_pretrained`.
        trust_remote_code: Whether the repository's own Python may run.

    Raises:
        ConfigError: For a value that is out of range or contradicts another.
        ModelError: If the model has no config to read, or does not run on the meta device.
        PluginError: As `burnish doctor` would.
    """
    from .loading import check_length, read_repository
    from .options import quantization_of
    from .quantised import agreed, stored_as
    from .registry import registry
    from .selection import choose_family

    room = memory_of(gpu_memory)
    for name, value in {"seq": seq, "rank": rank, "batch_size": 2 if batch_size is None else batch_size}.items():
        least = 2 if name == "batch_size" else 1
        if value < least:
            raise ConfigError(f"{value} is less than {least}", where=name, fix="Pass a larger number")
    told = quantization_of(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, load_in_16bit=None)
    asked = Setup(method=method, storage=told, rank=rank, optimizer=optimizer, embedding_storage=embedding_storage)
    named = None if plugins is None else tuple(plugins)
    repository = read_repository(model, trust_remote_code=trust_remote_code, plugins=named)
    family = choose_family(registry(named), repository.config).family
    purpose = "full" if method == "full" else "adapters"
    check_length(seq, repository.config, family.packing.position_offset if family.packing else 0)
    after = _dense_weights(repository.name) if "modules.json" in repository.files else 0
    shapes = shapes_of(repository.config, family.lora, after=after, trust_remote_code=trust_remote_code)
    asked = replace(asked, storage=agreed(told, None, stored_as(repository.config), purpose))
    ways = [asked] if method == "full" or asked.storage else [asked, replace(asked, storage="4bit")]
    recompute = RECOMPUTE if use_gradient_checkpointing is None else (use_gradient_checkpointing,)
    if unknown := [one for one in recompute if one not in RECOMPUTE]:
        fix = 'Pass False, True, "selective" or "offload"'
        raise ConfigError(f"{unknown[0]!r} is unknown", where="use_gradient_checkpointing", fix=fix)
    return propose(
        shapes, [replace(way, checkpointing=one) for way in ways for one in recompute],
        name=model, memory=room, seq=seq, batch=batch_size,
    )  # fmt: skip


def propose(
    shapes: Shapes, ways: Iterable[Setup], *, name: str, memory: float, seq: int, batch: int | None = None
) -> Plan:
    """The plan for a model of these shapes, with the first of `ways` that has room; arguments as of `plan`."""
    fits = tuple(_fit(shapes, way, memory, seq, batch) for way in ways)
    wanted = batch or min(MOST_PAIRS, max(FEWEST_PAIRS, 1 << max(0, fits[0].pairs.bit_length() - 1)))
    chosen = _chosen(fits, wanted, seq)
    whole = chosen is not None and chosen.pairs >= wanted
    budget = None if chosen is None or whole else chosen.tokens
    tokens = seq if chosen is None else 2 * wanted * seq if whole else chosen.tokens
    setup = fits[0].setup if chosen is None else chosen.setup
    parts = parts_of(shapes, setup, tokens, wanted)
    return Plan(
        model=name, memory=memory, seq=seq, shapes=shapes, fits=fits, chosen=None if chosen is None else setup,
        batch=wanted, budget=budget, parts=parts, needs=needed(parts, graphs(setup)) + CONTEXT,
    )  # fmt: skip


def _chosen(fits: tuple[Fit, ...], wanted: int, seq: int) -> Fit | None:
    """Of each storage in turn: the batch at once if what is kept allows it without a second forward, else in chunks."""
    for storage in dict.fromkeys(fit.setup.storage for fit in fits):
        own = [fit for fit in fits if fit.setup.storage == storage]
        cheap = [fit for fit in own if fit.setup.checkpointing in (False, "selective") and fit.pairs >= wanted]
        chunks = [fit for fit in own if fit.tokens >= max(seq, LEAST)] or [fit for fit in own if fit.tokens >= seq]
        if found := cheap or chunks:
            return found[0]
    return None


def _fit(shapes: Shapes, setup: Setup, memory: float, seq: int, batch: int | None) -> Fit:
    tokens = tokens_that_fit(shapes, setup, memory - CONTEXT, pairs=batch or FEWEST_PAIRS)
    one, two = (parts_of(shapes, setup, count).step for count in (2**20, 2**21))
    held = parts_of(shapes, setup, 0).held
    tokens = tokens if tokens >= seq else 0
    return Fit(setup=setup, held=held, token_bytes=(two - one) / 2**20, tokens=tokens, pairs=tokens // (2 * seq))


def tokens_that_fit(
    shapes: Shapes, setup: Setup, memory: float, *, pairs: int = 0, taken: float = 0.0, copies: int | None = None
) -> int:
    """The most tokens, in multiples of 64, that a forward and its backward may have.

    Args:
        shapes: The model's sizes.
        setup: How it is trained.
        memory: Bytes that are free for torch.
        pairs: What the loss compares.
        taken: Bytes of what stays that are not in `memory` any more, such as the weights of a model that is loaded.
        copies: How often a step's memory is there; None is as `graphs` says.
    """
    count = graphs(setup) if copies is None else copies
    return most(lambda tokens: needed(parts_of(shapes, setup, tokens, pairs), count) - taken <= memory)


def most(fits: Callable[[int], bool]) -> int:
    """The largest multiple of 64, up to 2^26, for which `fits` is true, as for all below it; 0 if there is none."""
    low, high = 0, 2**20
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(64 * middle) else (low, middle - 1)
    return 64 * low


def needed(parts: Parts, copies: int) -> float:
    """Bytes that must be free for torch, `copies` times those of the step."""
    return (parts.held + copies * parts.step) * MARGIN


def graphs(setup: Setup) -> int:
    """How often a step's memory is there: steps whose layers' inputs go to the host are not captured."""
    return 1 if setup.checkpointing == "offload" else GRAPHS


def memory_of(said: str | float) -> float:
    """Bytes of "16GB", "24 GiB", or a number of GB.

    Raises:
        ConfigError: For anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(said))
    unit = found.group(2).upper() if found else ""
    if found is None or unit not in UNITS or float(found.group(1)) <= 0:
        raise ConfigError(f"{said!r} is no size of memory", where="gpu_memory", fix="Write 16GB or 24GiB")
    return float(found.group(1)) * UNITS[unit]


def _dense_weights(name: str) -> int:
    """The weights of Dense modules after the pooling, by their configs."""
    from sentence_transformers.util import load_file_path

    def read(file: str) -> Any:
        path = load_file_path(name, file)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))

    total = 0
    for module in read("modules.json"):
        if str(module["type"]).rpartition(".")[2] == "Dense" and (config := read(f"{module['path']}/config.json")):
            total += config["in_features"] * config["out_features"] + config["out_features"] * bool(config.get("bias"))
    return total
