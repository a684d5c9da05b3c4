"""The values a plugin hands over. Frozen, checked when they are made, and free of torch so that listing plugins is quick.

A family plugin returns `FamilySpec`s, a backend plugin `BackendSpec`s, and so on (see `hookspecs`). Nothing here is a
class to inherit from: a plugin states facts and functions, and core decides what to do with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

CONTRACT = 1
"""The contract's version. A plugin states the one it was written for as the capability `contract.1`."""

DType: TypeAlias = Literal["float32", "bfloat16", "float16"]
PoolingMode: TypeAlias = Literal["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
POOLING_MODES: tuple[PoolingMode, ...] = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean")

# Letters, digits, "_" and "-": what an entry point's name may hold beside the dot that parts kind from value.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _check(condition: bool, owner: object, message: str) -> None:
    if not condition:
        raise ValueError(f"{type(owner).__name__}: {message}")


def _check_name(owner: object, name: str) -> None:
    _check(isinstance(name, str) and _NAME.fullmatch(name) is not None, owner, f"name {name!r} is not letters, digits, '_', '-'")


def _check_members(owner: object, what: str, given: Iterable[str], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    _check(not unknown, owner, f"{what} {unknown} not among {list(known)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How token vectors become one embedding where the repository does not say (no `modules.json`).

    Args:
        mode: Sentence Transformers' pooling mode.
        normalize: Whether a Normalize module (unit L2 norm) follows.
        include_prompt: Whether prompt tokens take part in the pooling.
    """

    mode: PoolingMode = "mean"
    normalize: bool = False
    include_prompt: bool = True

    def __post_init__(self) -> None:
        _check_members(self, "mode", [self.mode], POOLING_MODES)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTargets:
    """Which linear layers LoRA adapts by default: none dead, none missing.

    Args:
        names: Suffixes of module paths; empty means every linear layer that `exclude` leaves.
        exclude: Suffixes of module paths that stay unadapted, such as a pooler whose output nothing reads.
    """

    names: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(all(isinstance(name, str) and name for name in (*self.names, *self.exclude)), self, "names must be non-empty strings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How unpadded input (all texts of a batch in one row, cut by `cu_seqlens`) is made exact.

    Args:
        position_offset: The position id of a text's first token: 0 for BERT, padding_idx + 1 for RoBERTa's kin.
        causal: Whether a token attends to earlier tokens only.
        sliding_window: Whether some layers attend to a window; their modules pass `sliding_window` themselves.
        attention: "interface" where transformers' AttentionInterface reaches every attention module of the model,
            "patch" where the family's own patches read `cu_seq_lens_q`.
    """

    position_offset: int = 0
    causal: bool = False
    sliding_window: bool = False
    attention: Literal["interface", "patch"] = "interface"

    def __post_init__(self) -> None:
        _check(self.position_offset >= 0, self, "position_offset is negative")
        _check_members(self, "attention", [self.attention], ("interface", "patch"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The dtype policy.

    Args:
        adapter_base: Dtypes for a frozen base under an adapter on an accelerator, best first.
        full: Dtype of the master weights in full fine-tuning.
        refused: Dtype to reason, for those the architecture must never run in.
        keep_float32: Suffixes of module paths that stay float32 whatever the rest is in.
    """

    adapter_base: tuple[DType, ...] = ("bfloat16", "float32")
    full: DType = "float32"
    refused: Mapping[str, str] = field(default_factory=dict)
    keep_float32: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_members(self, "dtypes", (*self.adapter_base, self.full, *self.refused), DTYPES)
        _check(bool(self.adapter_base), self, "adapter_base is empty")
        _check(self.full not in self.refused, self, f"full={self.full} is refused by its own policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Where a task head reads a packed batch: each text's first token, last token, or every token."""

    reads: Literal["first", "last", "every"]

    def __post_init__(self) -> None:
        _check_members(self, "reads", [self.reads], ("first", "last", "every"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Exports:
    """Which export targets apply.

    Args:
        gguf: The architecture's name in GGUF, or None where llama.cpp has none.
        onnx: Whether the stock module exports to ONNX.
        refused: Target to reason, for exports that are known to come out wrong.
    """

    gguf: str | None = None
    onnx: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One reversible replacement on one module of one model.

    Args:
        path: The module's path inside the transformer (`named_modules`), such as "encoder.layer.0.attention.self".
        old: The class the module must have, exactly. Anything else is skipped, and said so.
        new: The class it gets (`module.__class__ = new`). It must keep parameters, buffers and state-dict keys.
        why: What it is for, one line; the user reads it.
    """

    path: str
    old: type
    new: type
    why: str

    def __post_init__(self) -> None:
        _check(bool(self.path), self, "path is empty: a patch replaces a module inside the model, not the model")
        _check(isinstance(self.old, type) and isinstance(self.new, type), self, f"{self.path}: old and new must be classes")
        _check(issubclass(self.new, self.old), self, f"{self.path}: {self.new.__name__} does not subclass {self.old.__name__}")
        _check(self.new is not self.old, self, f"{self.path}: old and new are the same class")
        _check(bool(self.why), self, f"{self.path}: why is empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a step may use: the device and what is installed.

    Args:
        device: "cpu", "cuda", "mps", … without an index.
        compute_capability: CUDA's, such as (9, 0) for an H100; None elsewhere.
        dtypes: What the device computes in at speed.
        packages: Installed version of each optional package that is there (triton, bitsandbytes, …).
    """

    device: str
    compute_capability: tuple[int, int] | None = None
    dtypes: frozenset[str] = frozenset({"float32"})
    packages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a backend, kernel or exporter cannot do without. Empty means anything will do."""

    devices: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    dtypes: tuple[DType, ...] = ()
    packages: tuple[str, ...] = ()

    def missing(self, machine: Machine) -> str | None:
        """Say in a few words why `machine` will not do, or None if it will."""
        if self.devices and machine.device not in self.devices:
            return f"needs {' or '.join(self.devices)}, this is {machine.device}"
        if self.compute_capability and (machine.compute_capability or (0, 0)) < self.compute_capability:
            return f"needs compute capability {'.'.join(map(str, self.compute_capability))}"
        if lacking := [name for name in self.dtypes if name not in machine.dtypes]:
            return f"needs {', '.join(lacking)}, which {machine.device} lacks"
        if lacking := [name for name in self.packages if name not in machine.packages]:
            return f"needs the package {', '.join(lacking)}"
        return None


PoolingRule: TypeAlias = "Pooling | Callable[[PretrainedConfig, frozenset[str]], Pooling]"
PatchRule: TypeAlias = "Callable[[PreTrainedModel, Machine], Sequence[Patch]]"


def no_patches(model: PreTrainedModel, machine: Machine) -> Sequence[Patch]:
    """The patch rule of a family that leaves transformers' modules as they are."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What Burnish knows about one architecture, for one config.

    Args:
        name: The family's name, as `burnish plugins` lists it.
        pooling: The default pooling, or a function of the config and the repository's file names.
        lora: The layers LoRA adapts by default.
        packing: How unpadded input is exact; None where the model only takes padded input.
        precision: The dtype policy.
        patches: Replacements for training, given the loaded transformer and the machine.
        checkpointing: Replacements needed before transformers' own gradient checkpointing works or is right; None
            where it is right as it is.
        heads: Task ("sequence-classification", "text-generation") to where its head reads a packed batch.
        exports: Which export targets apply.
        leaves: What this family leaves on the table, one line each, told to the user by `burnish doctor`.
    """

    name: str
    pooling: PoolingRule = Pooling()
    lora: LoraTargets = LoraTargets()
    packing: Packing | None = None
    precision: Precision = Precision()
    patches: PatchRule = no_patches
    checkpointing: PatchRule | None = None
    heads: Mapping[str, Head] = field(default_factory=dict)
    exports: Exports = Exports()
    leaves: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self, self.name)
        for part, kind in {"lora": LoraTargets, "precision": Precision, "exports": Exports}.items():
            _check(isinstance(getattr(self, part), kind), self, f"{self.name}: {part} is not a {kind.__name__}")
        _check(self.packing is None or isinstance(self.packing, Packing), self, f"{self.name}: packing is not a Packing")
        _check(isinstance(self.pooling, Pooling) or callable(self.pooling), self, f"{self.name}: pooling is not a Pooling")
        _check(callable(self.patches), self, f"{self.name}: patches is not a function")

    def default_pooling(self, config: PretrainedConfig, files: frozenset[str]) -> Pooling:
        """The pooling for a repository without `modules.json`."""
        return self.pooling if isinstance(self.pooling, Pooling) else self.pooling(config, files)


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySpec:
    """A family before a config is known.

    Args:
        name: The family's name.
        model_types: The `config.model_type`s it takes; each also stands in the distribution's metadata as a capability
            `model_type.NAME`, which is how core knows when to import the plugin. Empty with `fallback=True`.
        build: Makes the `Family` for a config.
        specificity: For a config of a claimed type: 0 if it does not take it after all, 1 if it takes any of that type,
            more for a narrower claim. The narrowest claim wins; equal claims of two plugins are an error.
        fallback: Takes any config, and only where nobody claims it.
    """

    name: str
    model_types: tuple[str, ...] = ()
    build: Callable[[PretrainedConfig], Family]
    specificity: Callable[[PretrainedConfig], int] | None = None
    fallback: bool = False

    def __post_init__(self) -> None:
        _check_name(self, self.name)
        _check(callable(self.build), self, f"{self.name}: build is not a function")
        _check(isinstance(self.model_types, tuple), self, f"{self.name}: model_types is not a tuple")
        _check(bool(self.model_types) != self.fallback, self, f"{self.name}: needs model_types, or fallback=True without any")

    def matches(self, config: PretrainedConfig) -> int:
        """How specifically this family takes `config`; 0 means not at all."""
        if self.fallback:
            return 0
        if config.model_type not in self.model_types:
            return 0
        return 1 if self.specificity is None else int(self.specificity(config))


Step: TypeAlias = "Callable[[torch.nn.Module, Mapping[str, Any], Any], torch.Tensor]"
"""Forward and backward of one micro-batch: (model, the collator's batch, items in the whole batch or None) to the loss,
detached, a float32 scalar; gradients are added to the parameters' `.grad`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What a backend gets to build a training step from.

    Args:
        model: The SentenceTransformer in training.
        family: What the model's plugin says about it.
        machine: Where it runs.
        arguments: The trainer's arguments.
        eager: Sentence Transformers' own step: exact, on any device, the thing to be equal to.
    """

    model: torch.nn.Module
    family: Family
    machine: Machine
    arguments: Any
    eager: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """A way to execute a training step.

    Args:
        name: What the user passes as `backend=`.
        summary: One line for `burnish plugins`.
        build_step: Turns a loaded model into an executable step.
        needs: What it cannot run without.
        priority: With `backend="auto"` the highest priority that can be had wins; the reference has 0.
    """

    name: str
    summary: str
    build_step: Callable[[StepContext], Step]
    needs: Needs = Needs()
    priority: int = 0

    def __post_init__(self) -> None:
        _check_name(self, self.name)
        _check(self.name != "auto", self, "a backend cannot be called 'auto'")
        _check(callable(self.build_step), self, f"{self.name}: build_step is not a function")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """An implementation of a named operation.

    Args:
        operation: The operation's name, such as "packed_attention".
        name: The implementation's name, such as "reference".
        load: Imports and returns the function; called once, when it is first needed.
        needs: What it cannot run without.
        priority: The highest priority that can be had wins; a plain reference has 0.
    """

    operation: str
    name: str
    load: Callable[[], Callable[..., Any]]
    needs: Needs = Needs()
    priority: int = 0

    def __post_init__(self) -> None:
        _check_name(self, self.operation)
        _check_name(self, self.name)
        _check(callable(self.load), self, f"{self.operation}: load is not a function")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What an exporter gets: a saved folder, where to write, and the target's own options."""

    source: Path
    output: Path
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExporterSpec:
    """A target of `burnish export --target NAME`. `run` writes into `request.output` and returns the files it made."""

    target: str
    summary: str
    run: Callable[[ExportRequest], Sequence[Path]]
    needs: Needs = Needs()

    def __post_init__(self) -> None:
        _check_name(self, self.target)
        _check(callable(self.run), self, f"{self.target}: run is not a function")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSpec:
    """A command `burnish NAME …`. `run` gets the arguments after the name and returns the exit code."""

    name: str
    summary: str
    run: Callable[[Sequence[str]], int]

    def __post_init__(self) -> None:
        _check_name(self, self.name)
        _check(callable(self.run), self, f"{self.name}: run is not a function")
