"""An adapter folded into its base, exactly, without touching the model in training."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import deploy
from .errors import ConfigError, ModelError
from .files import atomic_folder
from .hub import push_model
from .layout import check_layout, make_compatible, tokenizer_inputs
from .model_card import complete
from .provenance import trainings_of, write
from .quantised import dequantised, is_quantised, transposed
from .stored_table import StoredTable
from .tables import merged_table

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from transformers import PreTrainedModel

    from .prepared import Prepared

METHODS = ("merged_16bit", "merged_32bit", "lora")


def _target_dtype(model: Prepared, save_method: str | None) -> torch.dtype:
    transformer = model.transformers_model
    assert transformer is not None
    loaded: torch.dtype = transformer.dtype
    if save_method is None:
        return loaded
    if save_method == "merged_32bit":
        return torch.float32
    if save_method == "merged_16bit":
        refused = model.burnish.decision.family.family.precision.refused if model.burnish else {}
        return torch.bfloat16 if loaded == torch.bfloat16 or "float16" in refused else torch.float16
    raise ConfigError(
        f"{save_method!r} is unknown", where="save_method", fix=f"Pass None or one of {', '.join(METHODS)}"
    )


def _merged_layer(layer: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stock parameters of one adapted layer: base + adapter, added in float32, then cast."""
    from peft.tuners.lora import Linear

    # PEFT's own merge knows every variant (rank-stabilised, DoRA, bias); it works on a float32 copy of this one layer,
    # so the live model is untouched and the peak is one layer. A quantised layer is copied over what it stores, since
    # PEFT would quantise the sum again.
    base = layer.get_base_layer()
    quantised = is_quantised(base)
    spare = copy.deepcopy(layer, {id(base): _dense(base)} if quantised else None).float()
    if quantised:
        spare.__class__ = Linear
    spare.merge(safe_merge=True)
    merged = spare.get_base_layer().state_dict()
    if quantised and transposed(base):
        merged["weight"] = merged["weight"].T.contiguous()
    return {name: value.detach().to(dtype) for name, value in merged.items()}


def _dense(layer: Any) -> nn.Linear:
    """A float32 layer that holds what a quantised one stores."""
    weight = dequantised(layer)
    with torch.device("meta"):
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().float().clone(), requires_grad=False)
    return dense


def merged_state_dict(transformer: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The transformer's state dict under its stock keys, adapters folded in, floating tensors cast to `dtype`."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    state: dict[str, Tensor] = {}
    inside: list[str] = []
    for path, module in transformer.named_modules():
        if any(path.startswith(prefix) for prefix in inside):
            continue
        prefix = f"{path}." if path else ""
        if isinstance(module, BaseTunerLayer):
            inside.append(prefix)
            state |= {prefix + name: value for name, value in _merged_layer(module, dtype).items()}
        elif isinstance(module, ModulesToSaveWrapper):
            inside.append(prefix)
            trained = module.modules_to_save[module.active_adapters[0]]
            state |= {prefix + name: _cast(value, dtype) for name, value in trained.state_dict().items()}
        elif isinstance(module, StoredTable):
            state[f"{prefix}weight"] = merged_table(path, module).to(dtype)
        elif is_quantised(module):
            inside.append(prefix)
            weight = dequantised(module)
            bias = {} if module.bias is None else {f"{prefix}bias": _cast(module.bias, dtype)}
            state |= {f"{prefix}weight": (weight.T.contiguous() if transposed(module) else weight).to(dtype)} | bias
        else:
            own = {**module._parameters, **module._buffers}
            kept = {name: value for name, value in own.items() if name not in module._non_persistent_buffers_set}
            state |= {prefix + name: _cast(value, dtype) for name, value in kept.items() if value is not None}
    return state


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype) if value.is_floating_point() else value.detach()


def merged_model(model: Prepared, save_method: str | None = None) -> BaseModel:
    """Sentence Transformers' own model, of stock modules with the adapter folded in.

    Raises:
        ConfigError: For an unknown `save_method`.
        ModelError: If something in the merged weights does not fit the stock model.
    """
    if save_method == "lora":
        raise ConfigError("'lora' is an adapter, not a merged model", where="save_method", fix="Call save_pretrained")
    transformer = model.transformers_model
    assert transformer is not None
    dtype = _target_dtype(model, save_method)
    stock = _stock_transformer(transformer, merged_state_dict(transformer, dtype), dtype)
    first = copy.copy(model[0])
    first._modules = dict(first._modules)
    first.model = stock
    first.unpad_inputs = first.unpad_inputs  # its setter works out again, for stock attention, whether input is packed
    rest = [copy.deepcopy(module).to(dtype) for module in list(model.children())[1:]]
    modules: Any = OrderedDict(zip(model._modules, [first, *rest], strict=True))
    return model.plain(modules)


def _stock_transformer(transformer: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    config = copy.deepcopy(transformer.config)
    for name in ("quantization_config", "_is_quantized"):
        if hasattr(config, name):
            delattr(config, name)
    config._attn_implementation = "sdpa" if transformer._supports_sdpa else "eager"
    cls = _stock_class(type(transformer))
    with torch.device("meta"):
        stock: PreTrainedModel = cls(config)
    wanted = set(stock.state_dict())
    odd = sorted(wanted ^ set(state))
    if odd:
        raise ModelError(
            f"merged weights and the stock {cls.__name__} differ in {odd[0]} (and {len(odd) - 1} more)",
            where="save_pretrained_merged",
            fix="Please report this with the model's name",
        )
    stock.load_state_dict(state, assign=True)
    _restore_buffers(stock, transformer)
    stock.tie_weights()
    stock.config.dtype = dtype
    stock.config.name_or_path = transformer.config.name_or_path
    stock.train(False)
    return stock


def _stock_class(cls: type[nn.Module]) -> Any:
    """The transformers class behind a patched one."""
    return next(base for base in cls.__mro__ if base.__module__.startswith(("transformers.", "transformers_modules.")))


def _restore_buffers(stock: nn.Module, source: nn.Module) -> None:
    """Buffers that are not saved (position ids, rotary tables) were made on no device; take the live model's."""
    live = dict(source.named_buffers())
    for name, buffer in list(stock.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            stock.get_submodule(owner).register_buffer(leaf, live[name].detach().clone(), persistent=False)


def save_merged(model: Prepared, path: Path, tokenizer: Any, save_method: str | None, layout: str) -> None:
    """Write the merged model to `path`, whole or not at all; with "lora", the adapter."""
    if save_method == "lora":
        model.save(path, layout=layout)
        return
    check_layout(layout)
    write_merged(model, with_tokenizer(merged_model(model, save_method), tokenizer), path, layout)
    if model.burnish is not None:
        model.burnish.decision.registry.observers("model_saved")(model=model, folder=path)


def push_merged(model: Prepared, repo_id: str, tokenizer: Any, save_method: str | None, layout: str, **hub: Any) -> str:
    """Push the merged model; `hub` is what `hub.Push` takes."""
    if save_method == "lora":
        hub["replace_model_card"] = hub.pop("replace_card", False)
        return str(model.push_to_hub(repo_id, **hub, layout=layout))  # type: ignore[call-arg]
    check_layout(layout)
    plain = with_tokenizer(merged_model(model, save_method), tokenizer)
    hub["commit_message"] = hub.get("commit_message") or f"Add new {type(plain).__name__} model"
    return push_model(plain, lambda folder: write_merged(model, plain, folder, layout), repo_id, **hub)


def write_merged(model: Prepared, plain: BaseModel, path: Path, layout: str) -> None:
    """Write a merged model that was made of `model`, whole or not at all; nobody is told of it."""
    with atomic_folder(path) as staging:
        plain.save(str(staging))
        finish(model, plain, staging, layout, merged=True)


def with_tokenizer(plain: BaseModel, tokenizer: Any) -> BaseModel:
    """A merged model with another tokenizer, if one is given; the first module is the merged model's own copy."""
    if tokenizer is not None:
        first: Any = plain[0]
        first.processor = tokenizer
    return plain


def finish(model: Prepared, served: BaseModel, folder: Path, layout: str, *, merged: bool = False) -> None:
    """Bring a folder that Sentence Transformers has just saved into its layout, and say in it what it is.

    Args:
        model: The model that the user holds.
        served: The model that was saved: the same, or the one with its adapter folded in.
        folder: Where, still staging.
        layout: From `layout.LAYOUTS`.
        merged: Whether the adapter was folded in.
    """
    if layout == "compatible":
        family = model.burnish.decision.family.family if model.burnish is not None else None
        make_compatible(folder, family, tokenizer_inputs(served))
    record = write(model, folder, merged=merged)
    deploy.write(served, folder)
    if record is not None:
        complete(model, served, folder, record, trainings_of(record))
