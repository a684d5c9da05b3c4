"""MPNet (Song et al. 2020): all-mpnet-base-v2, multi-qa-mpnet.

transformers computes its attention in plain operations, with the relative-position bias as a (tokens, tokens) table,
takes no packed input, ignores an attention named in its config without a word, and has no gradient checkpointing. The
patches below supply all of it; the bias is kept by distance, 2 L - 1 values a head for texts of L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import MPNetConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mpnet.modeling_mpnet import (
    MPNetEncoder,
    MPNetLayer,
    MPNetModel,
    MPNetPooler,
    MPNetSelfAttention,
)

from ..core.contracts import Exports, Family, FamilySpec, Head, LoraTargets, Machine, Packing, Patch, Pooling, patch_all
from ..core.hookspecs import hookimpl
from ..kernels.attention import by_distance
from ..kernels.linear import joined_linears, linears

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# What a score of a hidden key becomes: no weight in any dtype, and finite, so that a text of nothing but padding has an
# even average instead of a NaN.
HIDDEN = -6e4


@dataclass(frozen=True, slots=True, kw_only=True)
class Relative:
    """What every layer's attention needs to know of positions; it travels where transformers passes the bias.

    Args:
        bias: (heads, 2 L - 1), by distance, for texts of at most L tokens.
        mask: (1 or batch, heads, L, L), the bias of padded input with what padding hides; None for packed input.
        attention: Name of the attention for packed input.
        packed: `cu_seq_lens_q` and `max_length_q` of a packed batch; empty for padded input.
    """

    bias: Tensor
    mask: Tensor | None
    attention: str
    packed: dict[str, Any]


class PackedMPNetModel(MPNetModel):  # type: ignore[no-untyped-call]
    """An MPNet that hands on what a packed batch carries; stock, it drops every further argument."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `MPNetModel.forward`: (batch, tokens) ids to (batch, tokens, hidden); packed input has a batch of one."""
        if kwargs.get("cu_seq_lens_q") is None:
            return super().forward(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        embedded = self.embeddings(input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=embedded, attention_mask=attention_mask)
        encoded = self.encoder(embedded, attention_mask=mask, **{**kwargs, "return_dict": True})
        pooled = None if self.pooler is None else self.pooler(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state, pooler_output=pooled, hidden_states=encoded.hidden_states
        )


# A saved config names the model's class.
PackedMPNetModel.__name__ = MPNetModel.__name__


class RelativeMPNetEncoder(MPNetEncoder):
    """Makes the bias once for each distance, where stock it is made for each pair of places."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `MPNetEncoder.forward`; with `output_attentions`, which no training asks for, it is that."""
        if output_attentions:
            return super().forward(hidden_states, attention_mask, True, output_hidden_states, return_dict, **kwargs)
        packed = {key: kwargs[key] for key in ("cu_seq_lens_q", "max_length_q") if kwargs.get(key) is not None}
        relative = self.relative(int(packed.get("max_length_q", hidden_states.shape[1])), attention_mask, packed)
        seen: tuple[Tensor, ...] = (hidden_states,)
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, relative)[0]
            seen = (*seen, hidden_states) if output_hidden_states else ()
        found = BaseModelOutput(last_hidden_state=hidden_states, hidden_states=seen or None)
        return found if return_dict else found.to_tuple()

    def relative(self, length: int, mask: Tensor | None, packed: dict[str, Any]) -> Relative:
        """The bias by distance of texts of `length` tokens, and the mask of padded ones."""
        distance = torch.arange(1 - length, length, device=self.relative_attention_bias.weight.device)
        bias = self.relative_attention_bias(self.relative_position_bucket(distance)).transpose(0, 1)  # type: ignore[no-untyped-call]
        return Relative(
            bias=bias, mask=None if packed else _padded_mask(by_distance(bias, length), mask),
            attention=self.config._attn_implementation, packed=packed,
        )  # fmt: skip


class MPNetFlexibleAttention(MPNetSelfAttention):
    """Attention by PyTorch's fused kernels with the bias as their mask, or by the packed attention of the registry."""

    join = staticmethod(linears)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """(batch, tokens, hidden) to a tuple of the same shape."""
        if not isinstance(position_bias, Relative):
            return super().forward(  # type: ignore[no-untyped-call]
                hidden_states, attention_mask, position_bias, output_attentions, **kwargs
            )
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        projected = self.join(hidden_states, self.q, self.k, self.v)
        query, key, value = (part.view(shape).transpose(1, 2) for part in projected)
        dropout = self.dropout.p if self.training else 0.0
        if position_bias.mask is None:
            attend = ALL_ATTENTION_FUNCTIONS[position_bias.attention]
            rest = {"scaling": self.attention_head_size**-0.5, "relative_bias": position_bias.bias}
            out = attend(self, query, key, value, None, dropout=dropout, **rest, **position_bias.packed)[0]
        else:
            mask = position_bias.mask.to(query.dtype)
            out = functional.scaled_dot_product_attention(query, key, value, mask, dropout).transpose(1, 2)
        return (self.o(out.reshape(*hidden_states.shape[:-1], -1)),)


class JoinedMPNetAttention(MPNetFlexibleAttention):
    """The same with query, key and value as one product."""

    join = staticmethod(joined_linears)


class UnreadMPNetPooler(MPNetPooler):
    """A pooler whose output nothing reads: it keeps its weights, so that they are saved, and computes nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """None in place of the (batch, hidden) vector that `MPNetModel` would return as `pooler_output`."""
        return cast(Tensor, None)


class CheckpointedMPNetLayer(GradientCheckpointingLayer, MPNetLayer):  # type: ignore[no-untyped-call]
    """A layer that transformers' own gradient checkpointing takes."""


def _padded_mask(table: Tensor, mask: Tensor | None) -> Tensor:
    """The (1, heads, L, L) bias with a boolean or additive mask of padding in it, for each text."""
    if mask is None:
        return table
    return table.masked_fill(~mask, HIDDEN) if mask.dtype == torch.bool else (table + mask).clamp(min=HIDDEN)


def build(config: PretrainedConfig) -> Family:
    """What holds for every MPNet encoder."""
    return Family(
        name="mpnet",
        pooling=Pooling(mode="mean", normalize=False),
        lora=LoraTargets(names=("q", "k", "v", "o", "dense"), exclude=("pooler.dense",)),
        # Positions start after the padding token's index, which MPNet fixes at 1 whatever the config says.
        packing=Packing(position_offset=2, attention="patch"),
        patches=patches,
        checkpointing=checkpointing,
        heads={"sequence-classification": Head(reads="first", logits=classify)},
        exports=Exports(
            gguf=None,
            onnx=True,
            refused={"gguf": "llama.cpp has no MPNet, whose bias by distance nothing there computes"},
        ),
        leaves=("norms, dropout and activations are transformers' own, each a pass over memory",),
    )


def patches(model: PreTrainedModel, machine: Machine) -> Sequence[Patch]:
    """Packed input, fused attention, no unread pooler; on a GPU, query, key and value joined."""
    why = "hands packed batches on to the layers"
    found = [*patch_all(model, MPNetModel, PackedMPNetModel, why)]
    why = "the relative-position bias by distance, once for all layers"
    found += patch_all(model, MPNetEncoder, RelativeMPNetEncoder, why)
    # On a CPU one product is no faster than three (decision 0005).
    attention = MPNetFlexibleAttention if machine.device == "cpu" else JoinedMPNetAttention
    found += patch_all(model, MPNetSelfAttention, attention, "attention by fused kernels, padded or packed")
    if isinstance(model, MPNetModel) and model.pooler is not None:
        why = "nothing reads its output in an embedding model"
        found.append(Patch(path="pooler", old=MPNetPooler, new=UnreadMPNetPooler, why=why))
    return found


def checkpointing(model: PreTrainedModel, machine: Machine) -> Sequence[Patch]:
    """Layers that can be checkpointed: transformers has none for MPNet."""
    return patch_all(model, MPNetLayer, CheckpointedMPNetLayer, "gradient checkpointing, which transformers lacks here")


def classify(model: Any, vectors: Tensor) -> Tensor:
    """(N, hidden) first tokens to (N, labels), by `MPNetForSequenceClassification`'s dense and tanh head."""
    return cast(Tensor, model.classifier(vectors[:, None]))


def sample(size: Literal["tiny", "base"]) -> PretrainedConfig:
    """Random weights of two layers, or of mpnet-base."""
    if size == "base":
        return MPNetConfig(vocab_size=30527, max_position_embeddings=514)
    return MPNetConfig(
        vocab_size=250, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=98, pad_token_id=1,
    )  # fmt: skip


@hookimpl
def burnish_register_families() -> Iterable[FamilySpec]:
    return [FamilySpec(name="mpnet", model_types=("mpnet",), build=build, sample=sample)]
