"""Which dtype the weights are loaded in, and why: decided once, before they are read, and told to the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .contracts import Machine, Precision
from .errors import ConfigError, ModelError
from .options import LoadOptions
from .quantised import Storage, agreed, as_object, check_device, settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionChoice:
    """The outcome.

    Args:
        dtype: Of all weights that are not quantised; None means the checkpoint's own.
        reason: Why.
        storage: How the linear layers of the frozen base are stored, or None for plain weights.
        compute: What 4-bit layers compute in; None means as the rest.
        quantization_config: What goes to transformers; None where the checkpoint brings its own.
    """

    dtype: torch.dtype | None
    reason: str
    storage: Storage | None = None
    compute: torch.dtype | None = None
    quantization_config: Any = None

    def __str__(self) -> str:
        name = "the checkpoint's dtype" if self.dtype is None else _name(self.dtype)
        return f"{name} ({self.reason})"


def is_bf16_supported() -> bool:
    """Whether to train with `bf16=True` on this machine's accelerator; without one, transformers refuses that.

    CUDA cards before compute capability 8.0 emulate bfloat16, at a cost that makes float16 the better choice.
    """
    import torch
    from transformers.utils.import_utils import is_torch_bf16_gpu_available

    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(is_torch_bf16_gpu_available())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_precision(
    options: LoadOptions,
    policy: Precision,
    machine: Machine,
    *,
    checkpoint: torch.dtype | None = None,
    stored: str | None = None,
) -> PrecisionChoice:
    """The dtype for `options` under the family's policy on this machine.

    Full fine-tuning gets the policy's master dtype (float32): transformers would load a half-precision checkpoint as it
    is, and at a learning rate of 2e-5 bfloat16 masters do not move at all. Adapters get the best base dtype of the
    policy that the device has; a CPU gets float32, since bfloat16 is many times slower there.

    Args:
        options: What was asked for.
        policy: What the family allows.
        machine: What the device has.
        checkpoint: The dtype that the repository's config names, for `dtype="auto"`; None if it names none.
        stored: How the repository stores its weights (`quantised.stored_as`); None for plain weights.

    Raises:
        ModelError: If the policy refuses the dtype that was asked for.
        ConfigError: If the settings contradict each other, or quantised storage cannot be had here.
    """
    storage = agreed(options.quantization, options.quantization_config, stored, options.purpose)
    if storage and options.sixteen_bit:
        raise ConfigError(f"the weights are stored as {storage}", where="load_in_16bit", fix="Drop load_in_16bit")
    _check_sixteen_bit(options, checkpoint)
    choice = _asked(options, machine, policy, checkpoint) or _by_policy(options, policy, machine, checkpoint)
    _check_refused(choice.dtype, policy, "dtype", "Pass dtype=None for the family's policy")
    if storage is None:
        return choice
    check_device(storage, machine, trains=options.purpose != "inference")
    return _quantised(options, policy, storage, choice, own=stored is not None)


def _check_refused(dtype: torch.dtype | None, policy: Precision, where: str, fix: str) -> None:
    if dtype is not None and (name := _name(dtype)) in policy.refused:
        what = f"this architecture must not run in {name}: {policy.refused[name]}"
        raise ModelError(what, where=where, fix=fix)


def _quantised(
    options: LoadOptions, policy: Precision, storage: Storage, choice: PrecisionChoice, *, own: bool
) -> PrecisionChoice:
    """`choice` with the storage; `own` where it is the checkpoint's own."""
    import torch

    # A checkpoint that names no dtype is float32, as transformers' own default is.
    compute, config = choice.dtype or torch.float32, None
    if options.quantization_config is not None:
        config = options.quantization_config
        config = as_object(config) if isinstance(config, Mapping) else config
        named = getattr(config, "bnb_4bit_compute_dtype", None)
        compute = named if storage == "4bit" and isinstance(named, torch.dtype) else compute
        _check_refused(compute, policy, "bnb_4bit_compute_dtype", "Pass load_in_4bit=True instead of a config")
    elif not own:
        config = settings(storage, compute, policy)
    reason = f"{storage} storage{' of the checkpoint' if own else ''}, {choice.reason}"
    return replace(choice, reason=reason, storage=storage, compute=None if own else compute, quantization_config=config)


def _check_sixteen_bit(options: LoadOptions, checkpoint: torch.dtype | None) -> None:
    import torch

    dtype = checkpoint if options.dtype == "auto" else options.dtype
    if dtype is not None and options.sixteen_bit is not None and options.sixteen_bit != (dtype != torch.float32):
        where = f"load_in_16bit={options.sixteen_bit}"
        raise ConfigError(f"contradicts dtype={_name(dtype)}", where=where, fix="Pass one of them")


def _half(policy: Precision, machine: Machine) -> str | None:
    """The best 16-bit dtype that the policy allows and the device has."""
    able = (name for name in policy.adapter_base if name in machine.dtypes and name not in policy.refused)
    return next((name for name in able if name != "float32"), None)


def _asked(
    options: LoadOptions, machine: Machine, policy: Precision, checkpoint: torch.dtype | None
) -> PrecisionChoice | None:
    import torch

    if options.dtype is not None:
        dtype = checkpoint if options.dtype == "auto" else options.dtype
        asked = "asked for as the checkpoint's own" if options.dtype == "auto" else "asked for"
        return PrecisionChoice(dtype=dtype, reason=asked + _pure(options, dtype))
    if options.sixteen_bit:
        # Where the device has no 16-bit arithmetic at speed, bfloat16 is stored and emulated: slow, but what was asked.
        dtype = getattr(torch, _half(policy, machine) or "bfloat16")
        return PrecisionChoice(dtype=dtype, reason="load_in_16bit" + _pure(options, dtype))
    if options.sixteen_bit is False:
        return PrecisionChoice(dtype=torch.float32, reason="load_in_16bit=False")
    return None


def _pure(options: LoadOptions, dtype: torch.dtype | None) -> str:
    """The warning that goes with masters below float32."""
    import torch

    pure = options.purpose == "full" and dtype not in (None, torch.float32)
    if not pure:
        return ""
    fix = " unless TrainingArguments has stochastic_rounding=True" if dtype == torch.bfloat16 else ""
    return f", pure low-precision training: small updates round away{fix}"


def _by_policy(
    options: LoadOptions, policy: Precision, machine: Machine, checkpoint: torch.dtype | None
) -> PrecisionChoice:
    """The policy's dtype; that the checkpoint has another one is said, since transformers would have kept it."""
    import torch

    if options.purpose == "inference":
        return PrecisionChoice(dtype=None, reason="inference, as Sentence Transformers loads it")
    if options.purpose == "full":
        dtype, reason = getattr(torch, policy.full), "master weights for full fine-tuning"
    elif (half := _half(policy, machine)) is not None:
        dtype, reason = getattr(torch, half), f"frozen base under adapters on {machine.device}"
    else:
        dtype, reason = torch.float32, f"adapters on {machine.device}"
    other = "" if checkpoint in (None, dtype) else f"; the checkpoint is {_name(checkpoint)}"
    return PrecisionChoice(dtype=dtype, reason=reason + other)
