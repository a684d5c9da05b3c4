"""The values a plugin hands over: frozen, checked when they are made, and free of torch so that listing is quick.

A family plugin returns `FamilySpec`s, a backend plugin `BackendSpec`s, and so on (see `hookspecs`). Nothing here is a
class to inherit from: a plugin states facts and functions, and core decides what to do with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .checks import check, check_functions, check_members, check_name, check_tuples, check_types
from .needs import DTYPES, DType
from .needs import Machine as Machine
from .needs import Needs as Needs
from .offers import BackendSpec as BackendSpec
from .offers import CommandSpec as CommandSpec
from .offers import ExporterSpec as ExporterSpec
from .offers import ExportRequest as ExportRequest
from .offers import Inner as Inner
from .offers import KernelSpec as KernelSpec
from .offers import Step as Step
from .offers import StepContext as StepContext

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

CONTRACT = 1
"""The contract's version. A plugin states the one it was written for as the capability `contract.1`."""

PoolingMode: TypeAlias = Literal["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"]
"""A pooling mode of Sentence Transformers."""
POOLING_MODES: tuple[PoolingMode, ...] = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean")


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
        check_members(self, "mode", [self.mode], POOLING_MODES)
        check_types(self, normalize=bool, include_prompt=bool)


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
        check_tuples(self, "names", "exclude")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How unpadded input (all texts of a batch in one row, cut by `cu_seqlens`) is made exact.

    Args:
        position_offset: The position id of a text's first token: 0 for BERT, padding_idx + 1 for RoBERTa's kin.
        causal: Whether a token attends to earlier tokens only.
        sliding_window: Whether some layers attend to a window; their modules pass `sliding_window` themselves.
        attention: "interface" where transformers' AttentionInterface reaches every attention module of the model,
            "patch" where the family's own patches make them look up the attention that the config names and hand it
            `cu_seq_lens_q` and `max_length_q`.
    """

    position_offset: int = 0
    causal: bool = False
    sliding_window: bool = False
    attention: Literal["interface", "patch"] = "interface"

    def __post_init__(self) -> None:
        check_types(self, position_offset=int, causal=bool, sliding_window=bool)
        check(self.position_offset >= 0, self, "position_offset is negative")
        check_members(self, "attention", [self.attention], ("interface", "patch"))


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
        check_types(self, refused=Mapping)
        check_tuples(self, "adapter_base", "keep_float32")
        check_members(self, "dtypes", (*self.adapter_base, self.full, *self.refused), DTYPES)
        check(self.full not in self.refused, self, f"full={self.full} is refused by its own policy")
        usable = set(self.adapter_base) - set(self.refused)
        check(bool(usable), self, "adapter_base is empty, or all of it is refused by its own policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How a task head reads a packed batch.

    Args:
        reads: What of each text the head reads: its first token, its last token, the mean of its tokens, or every one.
        logits: From the model with its head, and the (N, hidden) vectors it reads (for "every", (T, hidden)), to the
            (N, labels) logits (for "every", (T, labels)), as the model's own `forward` computes them from padded input,
            in training mode too: its dropout is drawn here.
        columns: From the same two and (K,) int64 columns to the (N, K) logits of these alone, without computing the
            others; None where every column is computed. For a reranker that answers with a word of its vocabulary.
        inside: Suffixes of module paths inside the base model that only this head reads, such as BERT's pooler. They
            train, are saved and stay unquantised with the modules that stand outside of it.
    """

    reads: Literal["first", "last", "mean", "every"]
    logits: HeadRule
    columns: ColumnRule | None = None
    inside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_members(self, "reads", [self.reads], ("first", "last", "mean", "every"))
        check_functions(self, "logits")
        check(self.columns is None or callable(self.columns), self, "columns is not a function")
        check_tuples(self, "inside")


def no_legacy(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rule of a family whose config has kept its keys."""
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exports:
    """Which export targets apply.

    Args:
        gguf: The architecture's name in GGUF, or None where llama.cpp has none.
        onnx: Whether the stock module exports to ONNX.
        refused: Target to reason, for exports that are known to come out wrong.
        legacy_config: From a config.json as transformers 5 writes it to the keys that transformers 4, TEI, vLLM and
            llama.cpp's converter look for in it, to be written beside the others. `torch_dtype`, and `rope_theta` where
            all layers share one, are there without it. A value that the older keys cannot hold is best given as None:
            a reader that needs it stops, where its default would be another model.
    """

    gguf: str | None = None
    onnx: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)
    legacy_config: Callable[[Mapping[str, Any]], Mapping[str, Any]] = no_legacy

    def __post_init__(self) -> None:
        check_types(self, gguf=(str, NoneType), onnx=bool, refused=Mapping)
        check_functions(self, "legacy_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One reversible replacement on one module of one model.

    Args:
        path: The module's path inside the transformer (`named_modules`), such as "encoder.layer.0.attention.self".
            Empty for the transformer itself, whose `new` must be called as `old` is (`new.__name__ = old.__name__`),
            since that name is what a saved config says of the architecture.
        old: The class the module must have, exactly. Anything else is skipped, and said so.
        new: The class it gets (`module.__class__ = new`). It must keep parameters, buffers and state-dict keys.
        why: What it is for, one line; the user reads it.
    """

    path: str
    old: type
    new: type
    why: str

    def __post_init__(self) -> None:
        classes = isinstance(self.old, type) and isinstance(self.new, type)
        check(classes, self, f"{self.path}: old and new must be classes")
        check(self.new is not self.old, self, f"{self.path}: old and new are the same class")
        inherits = issubclass(self.new, self.old)
        check(inherits, self, f"{self.path}: {self.new.__name__} does not subclass {self.old.__name__}")
        check(bool(self.why), self, f"{self.path}: why is empty")
        named = bool(self.path) or self.new.__name__ == self.old.__name__
        check(named, self, f"the transformer's own class must keep its name: set {self.new.__qualname__}.__name__")


HeadRule: TypeAlias = "Callable[[PreTrainedModel, Tensor], Tensor]"
"""From the model with its head and the vectors that the head reads, to its logits."""
ColumnRule: TypeAlias = "Callable[[PreTrainedModel, Tensor, Tensor], Tensor]"
"""From the model with its head, the vectors that the head reads and the numbers of some columns, to those logits."""
PoolingRule: TypeAlias = "Pooling | Callable[[PretrainedConfig, frozenset[str]], Pooling]"
"""A pooling, or a function of the config and the names of the repository's files."""
SampleRule: TypeAlias = "Callable[[Literal['tiny', 'base']], PretrainedConfig]"
"""From a size to a config for random weights."""
PatchRule: TypeAlias = "Callable[[PreTrainedModel, Machine], Sequence[Patch]]"
"""From the loaded transformer (on the meta device for `burnish doctor`) and the machine it is on, to its patches."""


def patch_all(model: PreTrainedModel, old: type, new: type, why: str) -> tuple[Patch, ...]:
    """A patch for every module of `model` whose class is exactly `old`."""
    return tuple(
        Patch(path=path, old=old, new=new, why=why) for path, module in model.named_modules() if type(module) is old
    )


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
        prompts: Prompt texts by name for a repository that says nothing of its own (no `modules.json`), such as
            {"query": "query: "}. What a repository saved always wins.
        patches: Replacements for training, given the loaded transformer and the machine.
        checkpointing: Replacements needed before transformers' own gradient checkpointing works or is right; None
            where it is right as it is.
        heads: Task ("sequence-classification", "text-generation") to how its head reads a packed batch.
        exports: Which export targets apply.
        leaves: What this family leaves on the table, one line each, told to the user by `burnish doctor`.
    """

    name: str
    pooling: PoolingRule = Pooling()
    lora: LoraTargets = LoraTargets()
    packing: Packing | None = None
    precision: Precision = Precision()
    prompts: Mapping[str, str] = field(default_factory=dict)
    patches: PatchRule = no_patches
    checkpointing: PatchRule | None = None
    heads: Mapping[str, Head] = field(default_factory=dict)
    exports: Exports = Exports()
    leaves: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self, self.name)
        check_types(self, lora=LoraTargets, precision=Precision, exports=Exports, heads=Mapping, prompts=Mapping)
        check_types(self, packing=(Packing, NoneType))
        check_tuples(self, "leaves")
        check_functions(self, "patches")
        pooled = isinstance(self.pooling, Pooling) or callable(self.pooling)
        check(pooled, self, "pooling is not a Pooling or a function")
        check(self.checkpointing is None or callable(self.checkpointing), self, "checkpointing is not a function")
        texts = all(isinstance(text, str) for pair in self.prompts.items() for text in pair)
        check(texts, self, "prompts do not map names to texts")
        odd = [task for task, head in self.heads.items() if not isinstance(head, Head)]
        check(not odd, self, f"heads {odd} are not a Head")

    def default_pooling(self, config: PretrainedConfig, files: frozenset[str]) -> Pooling:
        """The pooling for a repository without `modules.json`."""
        rule = self.pooling if isinstance(self.pooling, Pooling) else self.pooling(config, files)
        check(isinstance(rule, Pooling), self, f"{self.name}: its pooling rule returned a {type(rule).__name__}")
        return rule


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
        sample: Makes a config for random weights: "tiny" (hidden size 32, two layers or as many as the architecture has
            kinds of, vocabulary of 200 or more) for the conformance suite, "base" (a common size) for timing.
    """

    name: str
    model_types: tuple[str, ...] = ()
    build: Callable[[PretrainedConfig], Family]
    specificity: Callable[[PretrainedConfig], int] | None = None
    fallback: bool = False
    sample: SampleRule | None = None

    def __post_init__(self) -> None:
        check_name(self, self.name)
        check_functions(self, "build")
        check(self.sample is None or callable(self.sample), self, "sample is not a function")
        check_tuples(self, "model_types")
        for model_type in self.model_types:
            check_name(self, model_type)
        check(self.specificity is None or callable(self.specificity), self, "specificity is not a function")
        check(bool(self.model_types) != self.fallback, self, "needs model_types, or fallback=True without any")

    def matches(self, config: PretrainedConfig) -> int:
        """How specifically this family takes `config`; 0 means not at all."""
        if self.fallback or config.model_type not in self.model_types:
            return 0
        return 1 if self.specificity is None else int(self.specificity(config))
