"""LoRA layers on one input without the adapter's traffic: plain matrix products with effective weights.

PEFT adds an adapter's output to the layer's: y = x W^T + s (x A^T) B^T (Hu et al. 2021, equation 3), which reads and
writes y and the gradient of x once more for each layer, in float32. Here the weight W + s B A is made anew each step
and the layer is one product (design: "LoRA without its traffic").

T: rows of the input, I: input features, O: output features of a layer, R: its rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import nf4
from .nf4 import Stored

# Columns that ride along are filled up to so many, 16 bytes of a 16-bit row: FlashAttention loads as much at once, and
# reads the rows of a joint product where they lie.
ALIGNED = 8


@dataclass(frozen=True, slots=True)
class Adapter:
    """A layer and its one adapter: (O, I) `weight`, (O,) `bias`, (R, I) `down`, (O, R) `up`, factor `scale`."""

    weight: Tensor | Stored
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scale: float


def adapter_of(layer: Any) -> Adapter | None:
    """What a PEFT LoRA layer adds up, if it is nothing more than that; None if it is.

    More than that is: dropout on the adapter's input, a variant such as DoRA, two adapters, none (switched off or
    merged), another layer below than `nn.Linear` or one in 4 or 8 bits (whose weight is in `FusedLora.stored`), a hook
    that somebody set.
    """
    base, stored = getattr(layer, "base_layer", None), getattr(layer, "stored", None)
    if stored is None and type(base) is not nn.Linear:
        return None
    if not isinstance(base, nn.Linear) or not hasattr(layer, "lora_A") or hooked(base) or hooked(layer):
        return None
    if layer.disable_adapters or layer.merged or layer.fan_in_fan_out or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant:
        return None
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    plain = type(dropout) is nn.Identity and up.bias is None and not hooked(down) and not hooked(up)
    if not plain or (base.bias is not None and base.bias.requires_grad):
        return None
    if stored is None and base.weight.requires_grad:
        return None
    weight = base.weight if stored is None else stored
    return Adapter(weight, base.bias, down.weight, up.weight, float(layer.scaling[name]))


def hooked(layer: nn.Module) -> bool:
    """Whether somebody watches or changes calls of this layer, which a joint product would not make."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(layer) or any(getattr(layer, name) for name in hooks)


def compute_dtype(inputs: Tensor) -> torch.dtype:
    """The dtype that a product with `inputs` is made in: autocast's where it is on, else their own."""
    device = inputs.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return inputs.dtype


def add_lora(inputs: Tensor, adapter: Adapter) -> Tensor:
    """y = x W^T + b + s (x A^T) B^T, as PEFT adds it up: the plain version of one layer. (…, I) to (…, O)."""
    weight = adapter.weight
    if isinstance(weight, Stored):
        weight = nf4.dense(weight).to(inputs.dtype)
    out = functional.linear(inputs, weight, adapter.bias)
    wide = inputs.to(adapter.down.dtype)
    added = functional.linear(functional.linear(wide, adapter.down), adapter.up) * adapter.scale
    return (out + added).to(out.dtype)


def lora_linears(inputs: Tensor, adapters: list[Adapter]) -> list[Tensor]:
    """`add_lora` of each adapter on one input, as one product with the effective weights side by side.

    A 16-bit weight is rounded to the compute dtype with a fixed dither (`effective_weight`), so that an adapter's
    update is not lost where it is smaller than half a step of that dtype; with B = 0 it is W, bit for bit. Gradients of
    A and B are those of `add_lora`, with x and dy read twice each, whatever the number of layers. Of weights in 4 or 8
    bits those bits are kept for the backward, of others the effective weights.

    Args:
        inputs: (…, I).
        adapters: Layers of the same I, all of them in few bits or none.

    Returns:
        A (…, O) for each, in the compute dtype: views of one tensor.
    """
    dtype = compute_dtype(inputs)
    heights = [adapter.up.shape[0] for adapter in adapters]
    bias = None
    if any(adapter.bias is not None for adapter in adapters):
        bias = torch.cat([
            (inputs.new_zeros(height) if adapter.bias is None else adapter.bias).to(dtype)
            for adapter, height in zip(adapters, heights, strict=True)
        ])  # fmt: skip
    scales = [adapter.scale for adapter in adapters]
    pairs = [matrix for adapter in adapters for matrix in (adapter.down, adapter.up)]
    flat = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
    few_bits = [adapter.weight for adapter in adapters if isinstance(adapter.weight, Stored)]
    weights = [adapter.weight for adapter in adapters if isinstance(adapter.weight, Tensor)]
    if few_bits and weights:
        raise ValueError("lora_linears: some of the weights are in few bits and some are not")
    tensors, sizes = nf4.flatten(few_bits)
    product: Any = _LoraProduct.apply
    out: Tensor = product(flat, bias, scales, sizes, len(adapters), *pairs, *weights, *tensors)
    parts = torch.split(out, heights, dim=-1)
    return [part.reshape(*inputs.shape[:-1], part.shape[-1]) for part in parts]


class FusedLora:
    """Mixed into a PEFT layer's class for the length of a step (`fused_class`): one product with effective weights."""

    stored: Stored | None = None
    """The layer's weight in 4 or 8 bits, where it is: set for the length of a step."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, I) to (…, O)."""
        adapter = None if args or kwargs else adapter_of(self)
        if adapter is None:  # adapters switched off, merged or told apart in this call: PEFT's own way
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        return lora_linears(x, [adapter])[0]


@cache
def fused_class(kind: Any) -> Any:
    """`kind`, a class of PEFT's LoRA layers, with `FusedLora` in front."""
    return type(f"Fused{kind.__name__}", (FusedLora, kind), {"__module__": __name__})


class _LoraProduct(torch.autograd.Function):
    """(T, I) by the effective weights of several layers to (T, sum of O).

    Each product carries the adapters along as a few more columns, so that x and dy are read once more each for the
    gradients of A and B and not twice: x [W' | A]^T gives x A^T too, dy [W' | s B] gives dy B too.
    """

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, bias: Tensor | None, scales: list[float], sizes: list[int], count: int, *rest: Tensor
    ) -> Any:
        pairs, weights = rest[: 2 * count], rest[2 * count :]
        downs, ups = pairs[0::2], pairs[1::2]
        rows, ranks = sum(up.shape[0] for up in ups), sum(down.shape[0] for down in downs)
        if sizes:
            joined = nf4.stored_rows(list(weights), sizes, list(downs), list(ups), scales, -ranks % ALIGNED, flat)
        else:
            made = [
                effective_weight(weight, down, up, scale, flat.dtype)
                for weight, down, up, scale in zip(weights, downs, ups, scales, strict=True)
            ]
            spare = flat.new_zeros(-ranks % ALIGNED, flat.shape[1])
            joined = torch.cat([*made, *(down.to(flat.dtype) for down in downs), spare])
        if bias is not None:
            bias = torch.cat([bias, bias.new_zeros(joined.shape[0] - rows)])
        with torch.autocast(flat.device.type, enabled=False):
            out = functional.linear(flat, joined, bias)
        # A copy, small: a view would keep all of `out` until the backward.
        seen = out[:, rows : rows + ranks].clone()
        ctx.save_for_backward(flat, seen, *pairs, *(weights if sizes else (joined,)))
        ctx.scales, ctx.sizes = scales, sizes
        return out[:, :rows]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        scales, sizes, count = ctx.scales, ctx.sizes, len(ctx.scales)
        flat, seen, *rest = ctx.saved_tensors
        pairs, weights = rest[: 2 * count], rest[2 * count :]
        downs, ups = pairs[0::2], pairs[1::2]
        ranks, heights = [down.shape[0] for down in downs], [up.shape[0] for up in ups]
        with torch.autocast(flat.device.type, enabled=False):
            scaled = [(up * scale).to(flat.dtype) for up, scale in zip(ups, scales, strict=True)]
            if ctx.needs_input_grad[0]:
                spare = -sum(ranks) % ALIGNED
                if sizes:
                    matrix = nf4.stored_columns(weights, sizes, downs, ups, scales, spare, grad)
                else:
                    beside = _diagonal(scaled)
                    zeros = beside.new_zeros(beside.shape[0], spare)
                    matrix = torch.cat([weights[0][: sum(heights)], beside, zeros], dim=1)
                both = grad @ matrix
                inputs, back = both[:, : flat.shape[1]], both[:, flat.shape[1] : flat.shape[1] + sum(ranks)]
            else:
                inputs, back = None, grad @ _diagonal(scaled)
            down_grads = torch.split(back.t() @ flat, ranks)
            parts, rows = torch.split(grad, heights, dim=1), torch.split(seen, ranks, dim=1)
            found: list[Tensor] = []
            for part, row, down_grad, down, up, scale in zip(parts, rows, down_grads, downs, ups, scales, strict=True):
                found += [down_grad.to(down.dtype), (part.t() @ row).to(up.dtype) * scale]
        # The matrices after the pairs are frozen: as many as went in.
        frozen = nf4.TENSORS * count if sizes else count
        return inputs, None, None, None, None, *found, *(None for _ in range(frozen))


def _diagonal(blocks: list[Tensor]) -> Tensor:
    """The blocks along the diagonal of a matrix of zeros."""
    if len(blocks) == 1:
        return blocks[0]
    place: Any = torch.block_diag
    out: Tensor = place(*blocks)
    return out


def effective_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W + s B A in `dtype`.

    Where W is held in 16 bits it stands on that dtype's grid, and rounding to the nearest would drop every update
    smaller than half a step. So the sum, in float32, is rounded up where its remainder is larger than a fixed
    pseudo-random fraction of a step, else down (dithered quantisation; Connolly et al. 2021 on stochastic rounding):
    right on average over the elements of a row, the same in every step, and W itself where the update is zero.

    Args:
        weight: (O, I), float32 or 16 bits.
        down, up, scale: A (R, I), B (O, R) and s.
        dtype: Of the result.
    """
    with torch.autocast(weight.device.type, enabled=False):
        if dtype not in (torch.bfloat16, torch.float16):
            return torch.addmm(weight.to(dtype), up.to(dtype), down.to(dtype), alpha=scale)
        update = (up * scale).to(dtype) @ down.to(dtype)
        total = weight.float() + update.float()
        if weight.dtype == torch.float32:
            return total.to(dtype)
        lost = 16 if dtype == torch.bfloat16 else 13  # bits of float32's mantissa that the dtype lacks
        bits = total.view(torch.int32) + _dither(weight, lost)
        return (bits & -(1 << lost)).view(torch.float32).to(dtype)


def _dither(weight: Tensor, bits: int) -> Tensor:
    """(O, I) int32 below 2^bits: a hash of each element's place (Murmur's finaliser, constants of Appleby 2011)."""
    rows, columns = weight.shape
    place = torch.arange(rows, device=weight.device, dtype=torch.int32)[:, None] * columns
    mixed = place + torch.arange(columns, device=weight.device, dtype=torch.int32)
    # 32-bit products wrap around; the constants are the signed readings of 0x85EBCA6B and 0xC2B2AE35.
    mixed = (mixed ^ (mixed >> 16)) * -2048144789
    mixed = (mixed ^ (mixed >> 13)) * -1028477387
    return (mixed ^ (mixed >> 16)) & ((1 << bits) - 1)
