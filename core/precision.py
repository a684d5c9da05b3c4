"""Which dtype the weights are loaded in, and why: decided once, before they are read, and told to the user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .contracts import Machine, Precision
from .errors import ConfigError, ModelError
from .options import LoadOptions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionChoice:
    """The outcome: `dtype` None means the checkpoint's own; `quantization_config` goes to transformers."""

    dtype: torch.dtype | None
    reason: str
    quantization_config: Any = None

    def __str__(self) -> str:
        name = "the checkpoint's dtype" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return f"{name} ({self.reason})"


def choose_precision(options: LoadOptions, policy: Precision, machine: Machine) -> PrecisionChoice:
    """The dtype for `options` under the family's policy on this machine.

    Full fine-tuning gets the policy's master dtype (float32): transformers would load a half-precision checkpoint as it
    is, and at a learning rate of 2e-5 bfloat16 masters do not move at all. Adapters get the best base dtype of the
    policy that the device has; a CPU gets float32, since bfloat16 is many times slower there.

    Raises:
        ModelError: If the policy refuses the dtype that was asked for.
        ConfigError: If quantised storage cannot be had here.
    """
    if options.purpose == "inference":
        reason = "asked for" if options.dtype is not None else "inference, as Sentence Transformers loads it"
        return PrecisionChoice(dtype=options.dtype, reason=reason)
    choice = _float(options, policy, machine)
    name = str(choice.dtype).removeprefix("torch.")
    if name in policy.refused:
        raise ModelError(f"this architecture must not run in {name}: {policy.refused[name]}", where="dtype", fix="Pass dtype=None for the family's policy")
    if options.quantization:
        assert choice.dtype is not None
        config = _quantization(options.quantization, choice.dtype, policy, machine)
        return PrecisionChoice(dtype=choice.dtype, reason=f"{options.quantization} storage, {choice.reason}", quantization_config=config)
    return choice


def _float(options: LoadOptions, policy: Precision, machine: Machine) -> PrecisionChoice:
    import torch

    able = [name for name in policy.adapter_base if name in machine.dtypes and name not in policy.refused]
    half = next((name for name in able if name != "float32"), None)
    if options.dtype is not None:
        if options.sixteen_bit is not None and options.sixteen_bit != (options.dtype != torch.float32):
            raise ConfigError(f"contradicts dtype={options.dtype}", where=f"load_in_16bit={options.sixteen_bit}", fix="Pass one of them")
        warning = ", pure low-precision training: small updates round away" if options.purpose == "full" and options.dtype != torch.float32 else ""
        return PrecisionChoice(dtype=options.dtype, reason=f"asked for{warning}")
    if options.sixteen_bit:
        # Where the device has no 16-bit arithmetic at speed, bfloat16 is stored and emulated: slow, but what was asked.
        return PrecisionChoice(dtype=getattr(torch, half or "bfloat16"), reason="load_in_16bit")
    if options.sixteen_bit is False:
        return PrecisionChoice(dtype=torch.float32, reason="load_in_16bit=False")
    if options.purpose == "full":
        return PrecisionChoice(dtype=getattr(torch, policy.full), reason="master weights for full fine-tuning")
    if half is not None:
        return PrecisionChoice(dtype=getattr(torch, half), reason=f"frozen base under adapters on {machine.device}")
    return PrecisionChoice(dtype=torch.float32, reason=f"adapters on {machine.device}")


def _quantization(kind: str, compute: torch.dtype, policy: Precision, machine: Machine) -> Any:
    where = f"load_in_{kind}"
    if machine.device != "cuda":
        raise ConfigError(f"needs a CUDA device, this is {machine.device}", where=where, fix=f"Drop {where}; adapters on a {machine.device} train over float32")
    if "bitsandbytes" not in machine.packages:
        raise ConfigError("needs bitsandbytes", where=where, fix="pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(policy.keep_float32) or None)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
