"""The last linear layer of a classification head, found by what it does and not by what it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import ModelError

if TYPE_CHECKING:
    from .cross_encoder import CrossEncoder

# The change is undone where logits are further than this, relative to the largest, from what was asked for.
TOLERANCE = 1e-2  # weights in bfloat16 are rounded by 2^-9


def scale_head(model: CrossEncoder, factor: float) -> None:
    """Multiply a model's logits by `factor`, in the weights of its head's last linear layer.

    Raises:
        ModelError: If the head has no such layer, or logits do not come out as they should; nothing is changed then.
    """
    transformer = model.transformers_model
    assert transformer is not None
    layers = _outputs(transformer, model.num_labels)
    fix = "Leave the temperature where it is: predict_proba uses it"
    if len(layers) != 1:
        found = "no linear layer" if not layers else f"{len(layers)} linear layers"
        what = f"its head has {found} with {model.num_labels} outputs in full precision"
        raise ModelError(what, where="fold_temperature", fix=fix)
    (layer,) = layers
    kept = [one.detach().clone() for one in _tensors(layer)]
    before = _logits(model)
    _scale(layer, factor)
    distance = (_logits(model) - before * factor).abs().max()
    if not distance <= TOLERANCE * (before * factor).abs().max().clamp(min=1e-6):
        with torch.no_grad():
            for one, old in zip(_tensors(layer), kept, strict=True):
                one.copy_(old)
        raise ModelError("its logits are not the outputs of one linear layer", where="fold_temperature", fix=fix)


def _outputs(transformer: nn.Module, labels: int) -> list[nn.Linear]:
    """Linear layers outside of the base model with one output a label; of those with a trained copy, the copy."""
    base: Any = getattr(transformer, "base_model", transformer)
    inside = {id(module) for module in base.modules()} if base is not transformer else set()
    return [
        module
        for name, module in transformer.named_modules()
        if id(module) not in inside
        and isinstance(module, nn.Linear)
        and module.out_features == labels
        and module.weight.is_floating_point()
        and "original_module" not in name.split(".")  # PEFT's untrained one, which an active copy stands before
    ]


def _tensors(layer: nn.Linear) -> list[Tensor]:
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


@torch.no_grad()
def _scale(layer: nn.Linear, factor: float) -> None:
    for one in _tensors(layer):
        one.mul_(factor)


@torch.inference_mode()
def _logits(model: CrossEncoder) -> Tensor:
    training = model.training
    model.eval()
    features = model.preprocess(["a text", "another, longer text"])
    scores = model({name: one.to(model.device) if isinstance(one, Tensor) else one for name, one in features.items()})
    model.train(training)
    logits: Tensor = scores["scores"].double()
    return logits
