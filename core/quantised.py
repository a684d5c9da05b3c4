"""Linear layers in bitsandbytes' 4 or 8 bits: where they can be had, what is stored, and their weights read back."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from .contracts import Machine, Precision
from .errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from .precision import PrecisionChoice

Storage = Literal["4bit", "8bit"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
# Before 0.50, bitsandbytes on a CPU cannot read back a 4-bit weight with an odd number of values.
CPU_FLOOR = "0.50"
# What bitsandbytes logs at import on a CPU about a kernel that we do not use, and at every 8-bit layer of every forward
# about the input's dtype, which the `storage` row of a model says once.
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "inputs will be cast from",
}


class _Without(logging.Filter):
    """Lets everything through but one message."""

    def filter(self, record: logging.LogRecord) -> bool:
        return self.name not in record.getMessage()


def hush() -> None:
    """Keep two notes of bitsandbytes from the terminal; best called before it is imported."""
    for logger, message in _NOISE.items():
        if not any(isinstance(one, _Without) for one in logging.getLogger(logger).filters):
            logging.getLogger(logger).addFilter(_Without(message))


def kind_of(settings: Any) -> str | None:
    """How a quantisation config stores weights: "4bit", "8bit", another method's name, or None without a config.

    Args:
        settings: A `BitsAndBytesConfig` or its like, or the same as the mapping that config.json holds.
    """
    if settings is None:
        return None

    def read(name: str) -> Any:
        return settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)

    method = read("quant_method")
    return "4bit" if read("load_in_4bit") else "8bit" if read("load_in_8bit") else str(getattr(method, "value", method))


def stored_as(config: PretrainedConfig) -> str | None:
    """How a checkpoint with this config stores its weights, as `kind_of` says it."""
    return kind_of(getattr(config, "quantization_config", None))


def agreed(asked: Storage | None, given: Any, stored: str | None, purpose: str) -> Storage | None:
    """The storage that the flags, `model_kwargs` and the checkpoint agree on; None for plain weights.

    Args:
        asked: By `load_in_4bit` or `load_in_8bit`.
        given: `model_kwargs["quantization_config"]`.
        stored: From `stored_as`.
        purpose: What the model is loaded for.

    Raises:
        ConfigError: If they contradict each other, or the storage is none that Burnish trains over.
    """
    flag = f"load_in_{asked}" if asked else "model_kwargs['quantization_config']"
    brought = asked or kind_of(given)
    if given is not None and (asked or stored):
        other = f"load_in_{asked}" if asked else f"the checkpoint's own ({stored})"
        fix = "Pass one of them" if asked else "Drop it"
        raise ConfigError(f"there are two, with {other}", where="model_kwargs['quantization_config']", fix=fix)
    if brought and stored and brought != stored:
        raise ConfigError(f"the checkpoint is stored as {stored}", where=flag, fix=f"Drop {flag}")
    kind = brought or stored
    if kind is None or (purpose == "inference" and kind not in STORAGES):
        return None
    if purpose == "full":
        where, fix = "full_finetuning", "Load the model it was made from, or train adapters"
        raise ConfigError(f"the weights are stored as {kind}, which cannot be trained in full", where=where, fix=fix)
    for storage in STORAGES:
        if kind == storage:
            return storage
    what = f"the weights are stored by {kind}; adapters train over bitsandbytes' 4 and 8 bits, or over plain weights"
    raise ConfigError(what, where=flag if brought else "the checkpoint", fix="Load the model it was made from")


def check_device(kind: Storage, machine: Machine, *, trains: bool) -> None:
    """Refuse what bitsandbytes cannot do here, or what nobody has shown to be right.

    Shown are CUDA (tests/gpu) and the CPU (tests/integration/test_quantised.py): outputs and gradients of a dense model
    with the same weights.

    Raises:
        ConfigError: If it cannot be had; in one line.
    """
    where, installed = f"load_in_{kind}", machine.packages.get("bitsandbytes")
    if installed is None:
        raise ConfigError("needs bitsandbytes, which is not installed", where=where, fix="pip install bitsandbytes")
    if not trains or machine.device == "cuda":
        return
    if machine.device != "cpu":
        fix = "Load it without, or on a CUDA device or a CPU"
        raise ConfigError(f"has not been shown to be right on {machine.device}", where=where, fix=fix)
    from packaging.version import Version

    if Version(installed) < Version(CPU_FLOOR):
        what = f"needs bitsandbytes {CPU_FLOOR} on a CPU, and {installed} is installed"
        raise ConfigError(what, where=where, fix="pip install -U bitsandbytes")


def as_object(given: Mapping[str, Any]) -> Any:
    """A quantisation config that came as a mapping, as transformers' own class."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**given)  # type: ignore[no-untyped-call]


def settings(kind: Storage, compute: torch.dtype, policy: Precision) -> Any:
    """The `BitsAndBytesConfig` for a full-precision checkpoint: NF4 with double quantisation, or LLM.int8()."""
    # transformers takes regular expressions over full names. The family's suffixes mean a module and all inside it.
    kept = [rf"(?:.*\.)?{re.escape(name)}(?=\.|$)" for name in policy.keep_float32] or None
    chosen: dict[str, Any] = {f"load_in_{kind}": True, "llm_int8_skip_modules": kept}
    if kind == "4bit":
        chosen |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    return as_object(chosen)


def is_quantised(module: Any) -> bool:
    """Whether a linear layer holds its weight in bitsandbytes' 4-bit or 8-bit form; a PEFT layer over one does not."""
    return _kind(module) is not None


def _kind(module: nn.Module) -> Storage | None:
    return _kind_of(module._parameters.get("weight"))


def _kind_of(parameter: Any) -> Storage | None:
    name = type(parameter).__name__
    return "4bit" if name == "Params4bit" else "8bit" if name == "Int8Params" else None


def has_short_rows(layer: Any) -> bool:
    """Whether bitsandbytes reads this layer wrong on a CPU (`short_rows`)."""
    state = getattr(layer.weight, "quant_state", None)
    return state is not None and layer.weight.device.type == "cpu" and bool(state.shape[-1] % state.blocksize)


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The quantised layers of a model, by full name."""
    return ((name, module) for name, module in model.named_modules() if is_quantised(module))


def settle(transformer: PreTrainedModel, precision: PrecisionChoice, *, fresh: bool = False) -> list[str]:
    """Make a quantised model compute what a dense one with the same weights does; what it holds, in words.

    * 4-bit layers compute in the chosen dtype, forward and backward, whatever a pre-quantised checkpoint names.
    * What such a checkpoint holds beside them is brought to the chosen dtype: transformers casts its biases, and leaves
      every tensor called "weight" as it was saved.
    * Layers that bitsandbytes reads wrong on a CPU are read right (`short_rows`).
    * bitsandbytes' own inference path on CPUs with AVX512-BF16 stays off. In evaluation mode it repacks the weights for
      good: from then on results are rounded to bfloat16, no gradient passes the layer, and saving loses bits.

    Args:
        transformer: The loaded model; left alone if nothing in it is quantised.
        precision: What was chosen for it.
        fresh: Whether transformers has just made it, and no adapter been read.

    Raises:
        ModelError: If the model was to be quantised and no layer of it is.
    """
    found = dict(layers(transformer))
    if not found:
        if getattr(transformer, "is_quantized", False):
            what = f"no linear layer of this {transformer.config.model_type} model could be stored in fewer bits"
            raise ModelError(what, where="load_in_4bit, load_in_8bit", fix="Load it without")
        return []
    hush()
    from .short_rows import ShortRows

    compute: torch.dtype = precision.compute or precision.dtype or transformer.dtype
    own = precision.storage is not None and precision.quantization_config is None
    for parameter in transformer.parameters() if fresh and own else ():
        if parameter.is_floating_point() and _kind_of(parameter) is None:
            parameter.data = parameter.data.to(compute)
    for layer in found.values():
        if _kind(layer) == "4bit":
            layer.compute_dtype, layer.compute_type_is_set = compute, True
            layer.weight.quant_state.dtype = compute
            layer.support_avx512bf16_for_cpu = False
            if has_short_rows(layer):
                layer.__class__ = ShortRows
    return [_described(transformer, found, compute)]


def _described(transformer: PreTrainedModel, found: Mapping[str, Any], compute: torch.dtype) -> str:
    from torch import nn

    own, kind = transformer.config.quantization_config, _kind(next(iter(found.values())))
    if kind == "4bit":
        own.bnb_4bit_compute_dtype = compute
        double = ", double quantisation" if own.bnb_4bit_use_double_quant else ""
        how = f"{own.bnb_4bit_quant_type.upper()}{double}, computed in {str(compute).removeprefix('torch.')}"
    else:
        # MatMul8bitFp and MatMul8bitLt of bitsandbytes: on a CPU, training takes the first.
        when = " in evaluation" if transformer.device.type == "cpu" else ""
        how = f"LLM.int8(): the inputs of these layers are rounded to 8 bits too{when}"
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    plain = [name for name in linear if name not in found and ".lora_" not in name]
    left = f"; not {', '.join(plain[:3])}{' …' if len(plain) > 3 else ''}" if plain else ""
    return f"{len(found)} linear layers in {kind} ({how}){left}"


def size(parameter: Tensor) -> int:
    """How many weights a parameter stands for: a 4-bit one has two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def dequantised(layer: Any) -> Tensor:
    """(out, in) float32: what a quantised layer stores, read without touching it.

    4 bits: NF4 value of the code × scale of its 64 weights, which is itself 8 bits × scale of 256 scales + offset
    (QLoRA, Dettmers et al. 2023). 8 bits: code × row's largest value / 127 (LLM.int8(), Dettmers et al. 2022).

    PEFT's own reader rounds to the dtype of the layer, and on a CPU puts a new parameter into an 8-bit layer, which
    then lacks its scales.
    """
    import torch

    check_intact(layer)
    weight = layer.weight
    if _kind(layer) == "4bit":
        from .short_rows import read

        return read(weight, torch.float32)
    if weight.dtype != torch.int8:  # llm_int8_has_fp16_weight: 8 bits are made anew in each forward
        return torch.Tensor.float(weight.detach())
    scale = layer.state.SCB if layer.state.SCB is not None else weight.SCB
    codes = layer.state.CB if layer.state.CB is not None else weight.data
    rows: Tensor = codes.detach().float() * (scale.float() * (1.0 / 127.0))[:, None]
    return rows


def check_intact(model: nn.Module) -> None:
    """Refuse to read weights that bitsandbytes has repacked for inference on a CPU: their scales are rounded.

    Raises:
        ModelError: If a layer of `model` is one.
    """
    for _, layer in layers(model):
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            what = "bitsandbytes has repacked its 4-bit weights for inference on this CPU, with rounded scales"
            raise ModelError(what, where="this model", fix="Load it again without for_inference, and save that")


def transposed(layer: Any) -> bool:
    """Whether the stock layer holds the transpose: GPT-2's kin, whose Conv1D is (in, out)."""
    return getattr(getattr(layer, "source_cls", None), "__name__", "") == "Conv1D"
