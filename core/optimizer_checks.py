"""What the optimizers cannot do, said in one line before the work begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .errors import ConfigError

FLAGS = ("optimizer_in_backward", "stochastic_rounding", "sparse_embeddings")
"""The fields of `TrainingArguments` that choose an optimizer of ours."""

TORCH = ("adamw_torch", "adamw_torch_fused")
# bitsandbytes' AdamW by transformers' names. It steps each weight for itself, so it can in a backward.
BITSANDBYTES = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
# The others that transformers takes from there.
BITSANDBYTES_OTHERS = (
    "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit",
    "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip


def wants(arguments: Any, flag: str) -> bool:
    """Whether a flag is set; Sentence Transformers' own arguments have none."""
    return bool(getattr(arguments, flag, False))


def check_arguments(arguments: Any) -> None:
    """Refuse what can be known from the arguments alone.

    Raises:
        ConfigError: If a flag is no bool, settings contradict each other, or bitsandbytes cannot step on the device.
    """
    for flag in FLAGS:
        if not isinstance(value := getattr(arguments, flag, False), bool):
            raise ConfigError(f"{value!r} is neither True nor False", where=flag, fix="Pass True or False")
        if value:
            _check_flag(arguments, flag)
    if wants(arguments, "optimizer_in_backward"):
        _check_in_backward(arguments)
    if is_bitsandbytes(arguments):
        check_bitsandbytes(_name(arguments), arguments.device)


def _name(arguments: Any) -> str:
    return str(getattr(arguments.optim, "value", arguments.optim))


def is_bitsandbytes(arguments: Any) -> bool:
    """Whether transformers takes the optimizer that the arguments name from bitsandbytes."""
    return _name(arguments) in BITSANDBYTES + BITSANDBYTES_OTHERS


def _check_flag(arguments: Any, flag: str) -> None:
    """What none of the flags, or only some, can be combined with."""
    able = TORCH + BITSANDBYTES if flag == "optimizer_in_backward" else TORCH
    if (name := _name(arguments)) not in able:
        fix = f"Leave optim out, or pass one of {', '.join(able)}"
        raise ConfigError(f"is not for optim={name!r}", where=flag, fix=fix)
    if arguments.fp16:
        what = "cannot be combined with fp16=True, whose gradients are scaled until the optimizer's step"
        raise ConfigError(what, where=flag, fix="Pass bf16=True in place of fp16=True")
    other = next((name for name in ("deepspeed", "fsdp") if getattr(arguments, name, None)), None)
    if other:
        raise ConfigError(f"is not for {other}, which steps weights itself", where=flag, fix=f"Leave {other} out")
    several = arguments.world_size > 1 or arguments.n_gpu > 1
    if several and flag != "stochastic_rounding":
        what = f"works in one process with one device, not {max(arguments.world_size, arguments.n_gpu)}"
        raise ConfigError(what, where=flag, fix=f"Leave {flag} out, or train on one device")


def _check_in_backward(arguments: Any) -> None:
    where = "optimizer_in_backward"
    if arguments.gradient_accumulation_steps > 1:
        what = f"cannot be combined with gradient_accumulation_steps={arguments.gradient_accumulation_steps}"
        what += ", which adds gradients up before the step"
        raise ConfigError(what, where=where, fix="Pass gradient_accumulation_steps=1 and a larger batch")
    if arguments.max_grad_norm > 0:
        what = f"cannot clip to max_grad_norm={arguments.max_grad_norm}: the norm of all gradients is known only when"
        raise ConfigError(f"{what} all weights have been stepped", where=where, fix="Pass max_grad_norm=0")


def check_bitsandbytes(name: str, device: torch.device) -> None:
    """Refuse an optimizer of bitsandbytes that cannot run here; on a CPU it leaves paging out with a warning.

    Raises:
        ConfigError: If the package is missing, or has no kernel for the device.
    """
    from transformers.utils.import_utils import is_bitsandbytes_available

    where = f"optim={name!r}"
    if not is_bitsandbytes_available():
        fix = "Run `pip install -U bitsandbytes`, or leave optim out for AdamW"
        raise ConfigError("needs bitsandbytes", where=where, fix=fix)
    if "paged" in name and device.type not in ("cuda", "xpu"):
        other = "adamw_8bit" if "8bit" in name else "adamw_torch"
        what = f"moves its state between a GPU and its host, and this is a {device.type}"
        raise ConfigError(what, where=where, fix=f"Pass optim={other!r}")
    import bitsandbytes
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    version = bitsandbytes.__version__
    if device.type == "cuda" and isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        fix = "Run `python -m bitsandbytes`, which says why, or leave optim out for AdamW"
        raise ConfigError(f"bitsandbytes {version} has no library for this CUDA", where=where, fix=fix)
    operation = "optimizer_update_8bit_blockwise" if "8bit" in name else "optimizer_update_32bit"
    key = torch._C._dispatch_key_for_device(device.type)
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"bitsandbytes::{operation}", key):
        fix = "Leave optim out for AdamW"
        raise ConfigError(f"bitsandbytes {version} cannot step on a {device.type}", where=where, fix=fix)


def check_model(arguments: Any, model: nn.Module, losses: Iterable[Any], given: bool, tables: int) -> None:
    """Refuse what the model or the loss rules out.

    Args:
        arguments: The training arguments.
        model: What is trained.
        losses: Its losses.
        given: Whether the caller brings an optimizer.
        tables: How many embedding tables get sparse gradients.

    Raises:
        ConfigError: If a flag would do nothing, or something wrong.
    """
    flags = [flag for flag in FLAGS if wants(arguments, flag)]
    if flags and given:
        fix = f"Leave {flags[0]} out, or the optimizer"
        raise ConfigError("is not for an optimizer that is passed to the trainer", where=flags[0], fix=fix)
    if "optimizer_in_backward" in flags:
        for loss in losses:
            modules = loss.modules() if isinstance(loss, nn.Module) else ()
            if any(map(_goes_back_in_parts, modules)):
                what = f"{type(loss).__name__} goes back through the model once for each part of a batch: gradients are"
                what += " complete only after the last"
                fix = "Leave optimizer_in_backward out, or use a loss that is not cached"
                raise ConfigError(what, where="optimizer_in_backward", fix=fix)
    if "stochastic_rounding" in flags:
        _check_rounding(model)
    if "sparse_embeddings" in flags and not tables:
        what = "the model has no embedding table of 2^20 weights or more that is trained and not shared"
        fix = "Leave sparse_embeddings out, or load with full_finetuning=True"
        raise ConfigError(what, where="sparse_embeddings", fix=fix)


def _goes_back_in_parts(loss: nn.Module) -> bool:
    """Whether a loss goes backward once a mini-batch. For cross-encoders only cached losses do."""
    kinds = type(loss).__mro__
    forward_only = any(kind.__module__.startswith("sentence_transformers.cross_encoder.") for kind in kinds)
    cached = any(kind.__name__.startswith("Cached") for kind in kinds)
    return hasattr(loss, "mini_batch_size") and (cached or not forward_only)


def _check_rounding(model: nn.Module) -> None:
    where = "stochastic_rounding"
    if all(weight.dtype != torch.bfloat16 for weight in model.parameters() if weight.requires_grad):
        fix = 'Leave it out, or load with full_finetuning=True, dtype="bfloat16"'
        raise ConfigError("no weight that is trained is bfloat16", where=where, fix=fix)
    if getattr(model, "burnish", None) is None:
        fix = "Load it with burnish.FastSentenceTransformer"
        raise ConfigError("the model was not loaded by Burnish", where=where, fix=fix)
