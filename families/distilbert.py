"""DistilBERT (Sanh et al. 2019): six layers of BERT without token types and without a pooler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor
from torch.nn import functional
from transformers import DistilBertConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention, eager_attention_forward

from ..core.contracts import Exports, Family, FamilySpec, Head, LoraTargets, Machine, Packing, Patch, Pooling, patch_all
from ..core.hookspecs import hookimpl
from ..kernels.linear import joined_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class JoinedDistilBertSelfAttention(DistilBertSelfAttention):
    """Query, key and value as one product."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """(batch, tokens, dim) to the same shape, and the attention weights where the attention returns them."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        layers = (self.q_lin, self.k_lin, self.v_lin)
        out, weights = joined_attention(self, hidden_states, layers, attend, attention_mask, **kwargs)
        return self.out_lin(out), weights


def build(config: PretrainedConfig) -> Family:
    """What holds for every DistilBERT encoder."""
    return Family(
        name="distilbert",
        pooling=Pooling(mode="mean", normalize=False),
        lora=LoraTargets(names=("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"), exclude=("pre_classifier",)),
        packing=Packing(position_offset=0),
        patches=patches,
        heads={"sequence-classification": Head(reads="first", logits=classify)},
        exports=Exports(gguf="bert", onnx=True),
        leaves=(
            "under an adapter, query, key and value stay three GEMMs each layer",
            "norms, dropout and activations are transformers' own, each a pass over memory",
        ),
    )


def patches(model: PreTrainedModel, machine: Machine) -> Sequence[Patch]:
    """On a GPU, join query, key and value."""
    if machine.device == "cpu":  # there one product is no faster than three (decision 0005)
        return ()
    why = "query, key and value in one GEMM (three under an adapter)"
    return patch_all(model, DistilBertSelfAttention, JoinedDistilBertSelfAttention, why)


def classify(model: Any, vectors: Tensor) -> Tensor:
    """(N, dim) first tokens to (N, labels), by `DistilBertForSequenceClassification`'s two layers."""
    return cast(Tensor, model.classifier(model.dropout(functional.relu(model.pre_classifier(vectors)))))


def sample(size: Literal["tiny", "base"]) -> PretrainedConfig:
    """Random weights of two layers, or of distilbert-base."""
    if size == "base":
        return DistilBertConfig()
    return DistilBertConfig(vocab_size=250, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=96)


@hookimpl
def burnish_register_families() -> Iterable[FamilySpec]:
    return [FamilySpec(name="distilbert", model_types=("distilbert",), build=build, sample=sample)]
