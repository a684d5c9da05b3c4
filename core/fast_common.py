"""What `FastSentenceTransformer` and `FastCrossEncoder` have in common: parameters to options, an adapter put on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from .adapters import add_lora, check_adaptable, freeze_after_pooling
from .errors import ConfigError, ModelError
from .loading import first_line
from .options import (
    LoadOptions,
    checkpointing_option,
    dtype_of,
    model_kwargs_dtype,
    one_of,
    purpose_of,
    quantization_of,
)
from .preparation import set_checkpointing
from .prepared import Prepared
from .quantised import size
from .tables import check_untouched, hidden_size

if TYPE_CHECKING:
    import torch

    from .options import EmbeddingStorage

KEEP: Any = object()
"""Stands for a parameter that was left out, where None means something."""
Model = TypeVar("Model", bound=Prepared)


def load(
    kind: type[Model],
    model_name: str | os.PathLike[str],
    *,
    max_seq_length: int | None,
    dtype: torch.dtype | str | None,
    load_in_4bit: bool,
    load_in_8bit: bool,
    load_in_16bit: bool | None,
    full_finetuning: bool,
    for_inference: bool,
    use_gradient_checkpointing: bool | str,
    activation_budget_gb: float | None,
    embedding_storage: EmbeddingStorage | None,
    backend: str,
    device: str | None,
    device_map: str | dict[str, Any] | None,
    prompts: Mapping[str, str] | None,
    model_kwargs: Mapping[str, Any] | None,
    processor_kwargs: Mapping[str, Any] | None,
    tokenizer_kwargs: Mapping[str, Any] | None,
    config_kwargs: Mapping[str, Any] | None,
    cache_folder: str | None,
    cache_dir: str | None,
    plugins: Sequence[str] | None,
    packed: bool | None,
    random_state: int,
    pooling_mode: str | None = None,
    task: str | None = None,
    **keywords: Any,
) -> Model:
    """A model of class `kind`; parameters as `FastSentenceTransformer.from_pretrained` explains them.

    Args:
        kind: The class to make.
        model_name: Hub id or folder.
        **keywords: What the class takes as it is.

    Raises:
        ConfigError: For parameters that contradict each other or cannot be honoured here.
        ModelError: If the model cannot be loaded as asked.
        PluginError: If a plugin that is needed is missing, broken or in conflict.
    """
    import torch

    given = dict(model_kwargs or {})
    placement = one_of("device_map", device_map, "model_kwargs['device_map']", given.pop("device_map", None))
    if device is not None and placement is not None:
        raise ConfigError("both are given", where="device, device_map", fix="Pass one of them")
    if placement is not None:
        given["device_map"] = placement
    options = LoadOptions(
        purpose=purpose_of(full_finetuning=full_finetuning, for_inference=for_inference),
        dtype=one_of("dtype", dtype_of(dtype), "model_kwargs['dtype']", model_kwargs_dtype(given)),
        quantization=quantization_of(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, load_in_16bit=load_in_16bit),
        quantization_config=given.get("quantization_config"),
        sixteen_bit=load_in_16bit,
        pooling_mode=pooling_mode,
        checkpointing=checkpointing_option(use_gradient_checkpointing) or activation_budget_gb is not None,
        activation_budget_gb=activation_budget_gb,
        embedding_storage=embedding_storage,
        backend=backend,
        plugins=None if plugins is None else (plugins,) if isinstance(plugins, str) else tuple(plugins),
        packed=packed,
        max_seq_length=max_seq_length,
        attention=given.get("attn_implementation"),
        task=task,
    )
    processor = one_of("processor_kwargs", processor_kwargs, "tokenizer_kwargs", tokenizer_kwargs)
    with torch.random.fork_rng(), _plain_errors(os.fspath(model_name)):
        torch.manual_seed(random_state)
        return kind(
            os.fspath(model_name),
            options=options,
            device=device,
            cache_folder=one_of("cache_folder", cache_folder, "cache_dir", cache_dir),
            prompts=None if prompts is None else dict(prompts),
            model_kwargs=given,
            processor_kwargs=dict(processor or {}),
            config_kwargs=dict(config_kwargs or {}),
            **keywords,
        )


def in_float32(kind: type[Any], names: Sequence[str] | None) -> dict[str, Any]:
    """`keep_in_fp32_modules` as an argument of a cross-encoder's class; nothing where it was left out.

    Raises:
        ConfigError: If the installed Sentence Transformers has no such thing.
    """
    if names is None:
        return {}
    if not hasattr(kind, "set_keep_in_fp32_modules"):
        fix = "Install sentence-transformers 6.2 or newer, or drop it"
        raise ConfigError("this Sentence Transformers has no such thing", where="keep_in_fp32_modules", fix=fix)
    return {"keep_in_fp32_modules": list(names)}


def adapt(
    model: Model,
    *,
    target_modules: Sequence[str] | str | None,
    modules_to_save: Sequence[str] | None,
    max_seq_length: int | None,
    use_gradient_checkpointing: bool | str,
    random_state: int,
    loftq_config: Mapping[str, Any] | None,
    **lora: Any,
) -> Model:
    """Put a LoRA adapter on a model, in place, and say on stderr what trains; returns the same model.

    Args:
        model: From `load`, loaded neither for full fine-tuning nor for inference.
        target_modules: The layers to adapt; None is the family's list.
        modules_to_save: Modules that train in full; None is what this kind of model needs.
        max_seq_length: Longest text in tokens; None keeps it.
        use_gradient_checkpointing: As in `from_pretrained`; `KEEP` leaves it.
        random_state: Seed of the adapter's first weights.
        loftq_config: For `init_lora_weights="loftq"`.
        **lora: What goes to PEFT as it is; None leaves it to PEFT.

    Raises:
        ConfigError: If a target names no module, or PEFT refuses a setting.
        ModelError: If the model cannot take an adapter.
    """
    option = None if use_gradient_checkpointing is KEEP else checkpointing_option(use_gradient_checkpointing)
    transformer = check_adaptable(model)
    assert model.burnish is not None
    if max_seq_length is not None:
        model.check_max_seq_length(max_seq_length)
    if option is not None:
        set_checkpointing(model.burnish, transformer, option, "use_gradient_checkpointing")
    inside, kept = model.saved_modules(modules_to_save)
    check_untouched(transformer, inside, "modules_to_save")
    check_untouched(transformer, target_modules or (), "target_modules")
    lora |= {"loftq_config": dict(loftq_config) if loftq_config else None}
    lora = {"task_type": model.peft_task, **{key: value for key, value in lora.items() if value is not None}}
    lora["modules_to_save"] = inside or None
    family = model.burnish.decision.family.family
    notes = add_lora(transformer, family, random_state=random_state, target_modules=target_modules, lora=lora)
    if inside:
        notes.insert(0, f"trained and saved in full: {', '.join(inside)}")
    notes += freeze_after_pooling(model, kept)
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(size(parameter) for parameter in model.parameters()) + hidden_size(transformer)
    lines = [f"adapter on {total / 1e6:.1f}M weights: {trained / 1e6:.2f}M to train ({trained / total:.2%})", *notes]
    if not model.burnish.decision.options.quiet:
        print("\n".join(f"burnish: {line}" for line in lines), file=sys.stderr)
    return model


@contextmanager
def _plain_errors(model_name: str) -> Iterator[None]:
    """Say in one line what the Hub, the disk or Sentence Transformers could not find."""
    try:
        yield
    except OSError as error:
        fix = "Check the name or path, and the connection and token if it is on the Hub"
        raise ModelError(f"cannot be loaded ({first_line(error)})", where=f"model {model_name}", fix=fix) from error
