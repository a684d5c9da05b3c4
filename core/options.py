"""What a user asks of a model at load time, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from .contracts import POOLING_MODES
from .errors import ConfigError

if TYPE_CHECKING:
    import torch

Purpose = Literal["adapters", "full", "inference", "script"]
Checkpointing = Literal[False, True, "selective", "offload"]
EmbeddingStorage = Literal["8bit", "4bit", "host"]
# Unsloth's name for checkpoints kept in host memory.
CHECKPOINTING_NAMES: dict[object, Checkpointing] = {
    False: False,
    None: False,
    True: True,
    "selective": "selective",
    "offload": "offload",
    "unsloth": "offload",
}

# What the command line and a run's file call it.
CHECKPOINTING_WORDS: dict[str, Checkpointing] = {
    "off": False,
    "on": True,
    "selective": "selective",
    "offload": "offload",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load a model, in Burnish's own terms.

    Args:
        purpose: What it is for: training adapters, full fine-tuning, inference with stock modules, or "script": what a
            Sentence Transformers script does with it, which `resolved` turns into one of the others.
        dtype: The dtype asked for, "auto" for the checkpoint's own, or None for the family's policy.
        quantization: "4bit" (NF4, double quantisation) or "8bit" storage of the frozen base.
        quantization_config: The config that `model_kwargs` brings instead, as transformers takes it.
        sixteen_bit: True asks for a 16-bit base, False for float32, None leaves it to the policy.
        pooling_mode: Overrides the default pooling of a repository without `modules.json`.
        checkpointing: False, True (a layer keeps its input), "selective" (what is costly to compute again too) or
            "offload" (inputs wait in host memory).
        activation_budget_gb: GB (1e9 bytes) for what layers keep: as many as fit keep all. None for no budget.
        embedding_storage: Where the frozen embedding tables of an adapter's base lie: "8bit", "4bit" (NF4) or "host"
            (the host's memory). None keeps them as they were read.
        backend: Name of the execution backend, or "auto".
        plugins: Plugins named for this run; None is automatic, empty means Burnish's own only.
        packed: Unpadded input: True (must be had), False, or None (where the family and the device gain by it).
        max_seq_length: Longest text in tokens, or None for the model's own.
        attention: The attention implementation that `model_kwargs` names, or None.
        task: "sequence-classification" or "text-generation": the head that a cross-encoder is loaded with; None is what
            the repository says.
        quiet: Say nothing about what was chosen.
    """

    purpose: Purpose = "adapters"
    dtype: torch.dtype | Literal["auto"] | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    quantization_config: Any = None
    sixteen_bit: bool | None = None
    pooling_mode: str | None = None
    checkpointing: Checkpointing = False
    activation_budget_gb: float | None = None
    embedding_storage: EmbeddingStorage | None = None
    backend: str = "auto"
    plugins: tuple[str, ...] | None = None
    packed: bool | None = None
    max_seq_length: int | None = None
    attention: str | None = None
    task: str | None = None
    quiet: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.pooling_mode is not None and self.pooling_mode not in POOLING_MODES:
            fix = f"Pass one of {', '.join(POOLING_MODES)}"
            raise ConfigError(f"{self.pooling_mode!r} is unknown", where="pooling_mode", fix=fix)
        if self.max_seq_length is not None and self.max_seq_length < 1:
            what = f"{self.max_seq_length} is less than one token"
            raise ConfigError(what, where="max_seq_length", fix="Pass a positive number")
        if self.activation_budget_gb is not None and self.activation_budget_gb <= 0:
            what = f"{self.activation_budget_gb} GB hold nothing"
            raise ConfigError(what, where="activation_budget_gb", fix="Leave it out for no budget")
        if self.activation_budget_gb is not None and self.checkpointing == "selective":
            fix = 'Pass True or "offload": what becomes of the layers that the budget has no room for'
            raise ConfigError("a budget chooses by itself", where='use_gradient_checkpointing="selective"', fix=fix)
        if self.embedding_storage is not None:
            _check_embeddings(self.embedding_storage, self.purpose)
        if self.purpose == "full" and self.quantization:
            what = f"full fine-tuning cannot train {self.quantization} weights"
            fix = "Drop load_in_4bit/load_in_8bit, or train adapters"
            raise ConfigError(what, where="full_finetuning", fix=fix)
        if self.purpose == "inference" and (self.checkpointing or self.packed or self.quantization):
            fix = "Drop use_gradient_checkpointing, packed and load_in_4bit/load_in_8bit"
            raise ConfigError("for_inference=True loads stock modules, unpatched", where="for_inference", fix=fix)
        if self.packed and self.attention is not None:
            what = f"packed input has its own attention, model_kwargs asks for {self.attention!r}"
            raise ConfigError(what, where="packed=True", fix="Drop attn_implementation from model_kwargs")

    def resolved(self, base: str | None, stored: str | None = None) -> LoadOptions:
        """These options with "script" replaced by what a script expects of this folder.

        An adapter (`base` is its base model) goes on as one over a float32 base, and weights that are quantised (by
        `stored`, or the script's own config) wait for one; everything else is loaded for full fine-tuning.
        """
        if self.purpose != "script":
            return self
        if base is None and stored is None and self.quantization_config is None:
            return replace(self, purpose="full")
        import torch

        return replace(self, purpose="adapters", dtype=torch.float32 if self.dtype is None else self.dtype)


def _check_embeddings(storage: str, purpose: Purpose) -> None:
    if storage not in get_args(EmbeddingStorage):
        fix = f"Pass None or one of {', '.join(get_args(EmbeddingStorage))}"
        raise ConfigError(f"{storage!r} is unknown", where="embedding_storage", fix=fix)
    if purpose in ("full", "inference"):
        what = "only the frozen tables under an adapter can be stored otherwise"
        fix = "Drop embedding_storage, or full_finetuning and for_inference"
        raise ConfigError(what, where="embedding_storage", fix=fix)


def checkpointing_option(value: object) -> Checkpointing:
    """`use_gradient_checkpointing` as users write it, in Burnish's terms.

    Raises:
        ConfigError: For anything else.
    """
    try:
        return CHECKPOINTING_NAMES[value]
    except (KeyError, TypeError):
        fix = 'Pass False, True, "selective", or "offload" (also written "unsloth")'
        raise ConfigError(f"{value!r} is unknown", where="use_gradient_checkpointing", fix=fix) from None


def purpose_of(*, full_finetuning: bool, for_inference: bool) -> Purpose:
    """The purpose behind the two flags.

    Raises:
        ConfigError: If both are set.
    """
    if full_finetuning and for_inference:
        raise ConfigError("both are set", where="full_finetuning, for_inference", fix="Pass one of them")
    return "inference" if for_inference else "full" if full_finetuning else "adapters"


def quantization_of(
    *, load_in_4bit: bool, load_in_8bit: bool, load_in_16bit: bool | None
) -> Literal["4bit", "8bit"] | None:
    """The storage behind the three flags.

    Raises:
        ConfigError: If two of them are set.
    """
    flags = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit, "load_in_16bit": load_in_16bit}
    asked = [name for name, on in flags.items() if on]
    if len(asked) > 1:
        raise ConfigError("more than one is set", where=", ".join(asked), fix="Pass one of them")
    return "4bit" if load_in_4bit else "8bit" if load_in_8bit else None


def dtype_of(value: torch.dtype | str | None) -> torch.dtype | Literal["auto"] | None:
    """A dtype by name or as itself; "auto" and None stay what they are.

    Raises:
        ConfigError: If it is not a dtype to train in.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if value is None or (isinstance(value, torch.dtype) and value in known.values()):
        return value
    if isinstance(value, str) and (name := value.removeprefix("torch.")) in (*known, "auto"):
        return "auto" if name == "auto" else known[name]
    fix = f"Pass None, 'auto', or one of {', '.join(known)}"
    raise ConfigError(f"{value!r} is not a dtype to load in", where="dtype", fix=fix)


def one_of(first_name: str, first: Any, alias_name: str, alias: Any) -> Any:
    """A parameter that goes by two names.

    Raises:
        ConfigError: If both are given and differ.
    """
    if first is not None and alias is not None and first != alias:
        raise ConfigError(
            "both are given and differ", where=f"{first_name}, {alias_name}", fix=f"Pass {first_name} only"
        )
    return alias if first is None else first


def model_kwargs_dtype(model_kwargs: Mapping[str, Any] | None) -> torch.dtype | Literal["auto"] | None:
    """The dtype in `model_kwargs`, under either of the names transformers takes."""
    given = dict(model_kwargs or {})
    return dtype_of(one_of("dtype", given.get("dtype"), "torch_dtype", given.get("torch_dtype")))
