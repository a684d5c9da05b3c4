"""Activations of a transformer's feed-forward layer in one pass: GELU, SiLU, and both as gates (GeGLU, SwiGLU; Shazeer
2020, equations 6 and 7).

Only the input is kept for the backward, which computes the activation again; a gate's two halves stay side by side, as
the product before them made them, and so does their gradient.

T: rows (tokens), D: features of the result.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of kernels are Triton's pointers, numbers and tiles, which Python has no types for.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional

jit: Callable[[Any], Any] = triton.jit
kernel: Callable[[Any], Any] = triton.jit(do_not_specialize=["numbers"])

Name = Literal["gelu", "gelu_tanh", "silu"]
KINDS = ("gelu", "gelu_tanh", "silu")
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}
BLOCK = 1024


def plain_activation(states: Tensor, name: Name) -> Tensor:
    """`activation` in plain PyTorch: the definition."""
    return PLAIN[name](states)


def plain_gated_activation(states: Tensor, name: Name) -> Tensor:
    """`gated_activation` in plain PyTorch: the definition."""
    gate, up = states.chunk(2, dim=-1)
    return PLAIN[name](gate) * up


def activation(states: Tensor, name: Name) -> Tensor:
    """GELU (Hendrycks and Gimpel 2016; "gelu_tanh" is its approximation by tanh) or SiLU of every number.

    Args:
        states: (…, D), any floating dtype up to float32; computed in float32.
        name: "gelu", "gelu_tanh" or "silu".

    Returns:
        As `states`.

    Raises:
        ValueError: If the name or the dtype is none of these.
    """
    _check(states, name)
    out: Tensor = _activate(states.reshape(-1, states.shape[-1]), KINDS.index(name), False)
    return out.view(states.shape)


def gated_activation(states: Tensor, name: Name) -> Tensor:
    """The first half of the features, activated, times the second.

    Args:
        states: (…, 2 D), any floating dtype up to float32; computed in float32.
        name: As for `activation`.

    Returns:
        (…, D).

    Raises:
        ValueError: If the name, the dtype or the number of features is none of these.
    """
    _check(states, name)
    if states.shape[-1] % 2:
        raise ValueError(f"gated_activation: {states.shape[-1]} features have no two halves")
    out: Tensor = _activate(states.reshape(-1, states.shape[-1]), KINDS.index(name), True)
    return out.view(*states.shape[:-1], states.shape[-1] // 2)


def _check(states: Tensor, name: str) -> None:
    if name not in KINDS:
        raise ValueError(f"activation: {name!r} is none of {', '.join(KINDS)}")
    if states.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"activation: {states.dtype} is not float16, bfloat16 or float32")


@jit
def value_and_slope(x, KIND: tl.constexpr):
    """f(x) and f'(x) in float32."""
    if KIND == 0:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == 1:
        # 0.5 (1 + tanh z) is the logistic function of 2 z.
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        share = tl.sigmoid(x)
        slope = share + x * share * (1.0 - share)
    return x * share, slope


@kernel
def activate(states, out, numbers, width, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of the result."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    source = place + place // width * width if GATED else place
    found, _ = value_and_slope(tl.load(states + source, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        found *= tl.load(states + source + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, found.to(out.dtype.element_ty), mask=inside)


@kernel
def activate_gradient(
    grad, states, grad_states, numbers, width, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK numbers of the result's gradient, to one or two of the input's."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    source = place + place // width * width if GATED else place
    dout = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    found, slope = value_and_slope(tl.load(states + source, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        up = tl.load(states + source + width, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_states + source + width, (dout * found).to(grad_states.dtype.element_ty), mask=inside)
        dout *= up
    tl.store(grad_states + source, (dout * slope).to(grad_states.dtype.element_ty), mask=inside)


@torch.library.custom_op("burnish::activate", mutates_args=(), schema="(Tensor states, int kind, bool gated) -> Tensor")
def _activate(states: Tensor, kind: int, gated: bool) -> Tensor:
    """(T, D) of (T, D) or (T, 2 D)."""
    states = states.contiguous()
    width = states.shape[1] // (2 if gated else 1)
    out = states.new_empty(states.shape[0], width)
    if out.numel():
        grid = (triton.cdiv(out.numel(), BLOCK),)
        activate[grid](states, out, out.numel(), width, KIND=kind, GATED=gated, BLOCK=BLOCK)
    return out


@_activate.register_fake
def _(states: Tensor, kind: int, gated: bool) -> Tensor:
    return states.new_empty(states.shape[0], states.shape[1] // (2 if gated else 1))


@torch.library.custom_op(
    "burnish::activate_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor states, int kind, bool gated) -> Tensor",
)
def _activate_backward(grad: Tensor, states: Tensor, kind: int, gated: bool) -> Tensor:
    """The gradient of `states`."""
    grad, states = grad.contiguous(), states.contiguous()
    found = torch.empty_like(states)
    if grad.numel():
        grid = (triton.cdiv(grad.numel(), BLOCK),)
        activate_gradient[grid](
            grad, states, found, grad.numel(), grad.shape[1], KIND=kind, GATED=gated, BLOCK=BLOCK
        )  # fmt: skip
    return found


@_activate_backward.register_fake
def _(grad: Tensor, states: Tensor, kind: int, gated: bool) -> Tensor:
    return states.new_empty(states.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    states, *ctx.options = inputs
    ctx.save_for_backward(states)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _activate_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


_activate.register_autograd(_backward, setup_context=_keep)
