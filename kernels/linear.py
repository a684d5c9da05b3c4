"""Several linear layers on one input, as one matrix product.

T: rows of the input, I: input features, O: output features of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .lora import FusedLora, adapter_of, hooked, lora_linears


def linears(inputs: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Each layer on `inputs`, one after the other: the plain version of `joined_linears`."""
    return [layer(inputs) for layer in layers]


def joined_linears(inputs: Tensor, *layers: nn.Module) -> list[Tensor]:
    """`linears` as one product with the weights side by side: y_i = x W_i^T + b_i.

    One launch in place of three, and in the backward one product for the input's gradient in place of three and two
    sums of (T, I). The parameters stay the layers' own, so gradients land where they would, and the weights are put
    side by side anew each time: 3 x I x O elements of traffic against T x I of input.

    Layers under LoRA are joined too where a product with their effective weights is wanted (`lora_linears`): that is
    where each of them is a `FusedLora`. Others that are more than a plain `nn.Linear` (an adapter, 4-bit storage, a
    hook somebody set) are called as they are, one after the other.

    Args:
        inputs: (…, I).
        layers: Linear layers of the same I; all with a bias or none.

    Returns:
        A (…, O) for each layer: views of one tensor.
    """
    if all(isinstance(layer, FusedLora) for layer in layers):
        adapters = [adapter for layer in layers if (adapter := adapter_of(layer)) is not None]
        kinds = {isinstance(adapter.weight, Tensor) for adapter in adapters}
        if len(adapters) == len(layers) and len(kinds) == 1:
            return lora_linears(inputs, adapters)
    if not all(type(layer) is nn.Linear and not hooked(layer) for layer in layers):
        return linears(inputs, *layers)
    plain = [layer for layer in layers if isinstance(layer, nn.Linear)]
    weights: list[Tensor] = [layer.weight for layer in plain]
    biases: list[Tensor] = [layer.bias for layer in plain if layer.bias is not None]
    out = functional.linear(inputs, torch.cat(weights), torch.cat(biases) if biases else None)
    return list(torch.split(out, [layer.out_features for layer in plain], dim=-1))


def joined_attention(
    module: Any,
    inputs: Tensor,
    layers: Sequence[nn.Module],
    attend: Callable[..., Any],
    mask: Tensor | None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2) up to its output layer, projections joined.

    Args:
        module: The attention module: its `attention_head_size`, `scaling`, `dropout.p` and `training` are read, and it
            is handed to `attend`.
        inputs: (batch, tokens, I).
        layers: Its query, key and value layers.
        attend: An attention function of transformers, which takes (batch, heads, tokens, size).
        mask: Whatever `attend` takes as its mask.
        rest: Handed to `attend`.

    Returns:
        (batch, tokens, O), and the attention weights where `attend` returns them.
    """
    shape = (*inputs.shape[:-1], -1, module.attention_head_size)
    query, key, value = (states.view(shape).transpose(1, 2) for states in joined_linears(inputs, *layers))
    dropout = module.dropout.p if module.training else 0.0
    out, weights = attend(module, query, key, value, mask, dropout=dropout, scaling=module.scaling, **rest)
    return out.reshape(*inputs.shape[:-1], -1).contiguous(), weights
