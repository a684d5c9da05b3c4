"""NomicBERT (Nussbaum et al. 2024) for Burnish: nomic-embed-text-v1 and -v1.5."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from burnish.core.contracts import (
    Exports,
    Family,
    FamilySpec,
    Head,
    LoraTargets,
    Machine,
    Packing,
    Patch,
    Pooling,
    patch_all,
)
from burnish.core.hookspecs import hookimpl
from burnish.kernels.linear import joined_linears, linears
from torch import Tensor
from torch.nn import functional
from transformers import NomicBertConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.nomic_bert.modeling_nomic_bert import (
    NomicBertAttention,
    NomicBertMLP,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What the published models were trained with; the task stands in front of every text.
PROMPTS = {
    "query": "search_query: ",
    "document": "search_document: ",
    "clustering": "clustering: ",
    "classification": "classification: ",
}


class SwiGLU(torch.autograd.Function):
    """silu(g) * u (Shazeer 2020, equation 5), with silu(g) computed again in the backward instead of kept.

    d/dg = u * sigmoid(g) * (1 + g * (1 - sigmoid(g))), d/du = silu(g). At 2,048 tokens of the base size in float32 a
    layer keeps 120 MiB for its backward in place of 144, in full fine-tuning and under an adapter.
    """

    @staticmethod
    def forward(context: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Two tensors of one shape to a third, bit for bit what the two operations give."""
        context.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up."""
        gate, up = context.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)


class FrugalNomicBertMLP(NomicBertMLP):
    """The gated MLP by `SwiGLU`."""

    join = staticmethod(linears)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, hidden) to the same shape."""
        gate, up = self.join(x, self.gate_proj, self.up_proj)
        return cast(Tensor, self.down_proj(SwiGLU.apply(gate, up)))  # type: ignore[no-untyped-call]


class JoinedNomicBertMLP(FrugalNomicBertMLP):
    """The same with gate and up as one product."""

    join = staticmethod(joined_linears)


class JoinedNomicBertAttention(NomicBertAttention):
    """Query, key and value as one product."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """(batch, tokens, hidden) to the same shape, and the attention weights where the attention returns them."""
        assert position_embeddings is not None
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projected = joined_linears(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (states.view(shape).transpose(1, 2) for states in projected)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        rest = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling, **kwargs}
        out, weights = attend(self, query, key, value, attention_mask, **rest)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def build(config: PretrainedConfig) -> Family:
    """What holds for every NomicBERT encoder."""
    return Family(
        name="nomic_bert",
        pooling=Pooling(mode="mean", normalize=True),
        lora=LoraTargets(names=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        packing=Packing(position_offset=0),
        prompts=PROMPTS,
        patches=patches,
        heads={
            "sequence-classification": Head(reads="first", logits=classify),
            "token-classification": Head(reads="every", logits=tag),
        },
        exports=Exports(gguf="nomic-bert", onnx=True),
        leaves=(
            "under an adapter, query, key and value stay three GEMMs each layer, gate and up two",
            "norms and rotary embedding are transformers' own, each a pass over memory",
        ),
    )


def patches(model: PreTrainedModel, machine: Machine) -> Sequence[Patch]:
    """A gated MLP that keeps less; on a GPU, products on one input joined."""
    on_cpu = machine.device == "cpu"  # there one product is no faster than three
    found: list[Patch] = []
    if model.config.hidden_act == "silu":
        kind = FrugalNomicBertMLP if on_cpu else JoinedNomicBertMLP
        found += patch_all(model, NomicBertMLP, kind, "keeps one tensor less of each MLP for the backward")
    if not on_cpu:
        why = "query, key and value in one GEMM (three under an adapter)"
        found += patch_all(model, NomicBertAttention, JoinedNomicBertAttention, why)
    return found


def classify(model: Any, vectors: Tensor) -> Tensor:
    """(N, hidden) first tokens to (N, labels), by `NomicBertForSequenceClassification`'s pooler and classifier."""
    return cast(Tensor, model.classifier(model.dropout(model.nomic_bert.pooler(vectors[:, None]))))


def tag(model: Any, vectors: Tensor) -> Tensor:
    """(T, hidden) tokens to (T, labels), by `NomicBertForTokenClassification`'s classifier."""
    return cast(Tensor, model.classifier(model.dropout(vectors)))


def takes(config: PretrainedConfig) -> int:
    """Any NomicBERT but the mixture of experts: nomic-embed-text-v2-moe says the same type and has other layers."""
    return 0 if getattr(config, "moe_every_n_layers", 0) else 1


def sample(size: Literal["tiny", "base"]) -> PretrainedConfig:
    """Random weights of two layers, or of nomic-embed-text-v1.5."""
    if size == "base":
        return NomicBertConfig()
    return NomicBertConfig(
        vocab_size=250,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=96,
    )


@hookimpl
def burnish_register_families() -> Iterable[FamilySpec]:
    """One family, for one model type; pyproject.toml claims the same."""
    spec = FamilySpec(name="nomic_bert", model_types=("nomic_bert",), build=build, specificity=takes, sample=sample)
    return [spec]
