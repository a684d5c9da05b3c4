"""4-bit linear layers whose rows are no whole number of blocks, on a CPU, where bitsandbytes reads them wrong.

Blocks of 64 weights run on from row to row. bitsandbytes' CPU kernel (seen in 0.49.0 and 0.50.2, with AVX-512) begins
anew at every row, so that a layer with 32 or 96 inputs computes with scales of other blocks: weights are off by up to
0.44 of the largest. Read as one row, the same bits come out as they went in.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor
from torch.nn import functional as F


def read(weight: Any, dtype: torch.dtype) -> Tensor:
    """(out, in) in `dtype`: what a 4-bit weight stores, whatever its shape; neither it nor its state is touched."""
    state = copy.copy(weight.quant_state)
    state.dtype, state.shape = dtype, torch.Size((weight.quant_state.shape.numel(),))
    values: Tensor = dequantize_4bit(weight.data.detach(), state)
    return values.reshape(weight.quant_state.shape)


class ShortRows(Linear4bit):
    """bitsandbytes' layer, reading its weight by `read`; the dense weight lives until the backward has passed."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out) in the dtype of `x`, computed in the layer's `compute_dtype`."""
        with torch.no_grad():
            weight = read(self.weight, self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return F.linear(x.to(self.compute_dtype), weight, bias).to(x.dtype)


# PEFT knows the layer by its class's name.
ShortRows.__name__ = "Linear4bit"
