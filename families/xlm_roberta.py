"""XLM-RoBERTa (Conneau et al. 2020): bge-m3, multilingual-e5, arctic-embed-l-v2.0, the reranker bge-reranker-v2-m3."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor
from transformers import XLMRobertaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaModel,
    XLMRobertaPooler,
    XLMRobertaSelfAttention,
    eager_attention_forward,
)

from ..core.contracts import Exports, Family, FamilySpec, Head, LoraTargets, Machine, Packing, Patch, Pooling, patch_all
from ..core.hookspecs import hookimpl
from ..kernels.linear import joined_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class UnreadXLMRobertaPooler(XLMRobertaPooler):
    """A pooler whose output nothing reads: it keeps its weights, so that they are saved, and computes nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """None in place of the (batch, hidden) vector that `XLMRobertaModel` would return as `pooler_output`."""
        return cast(Tensor, None)


class JoinedXLMRobertaSelfAttention(XLMRobertaSelfAttention):
    """Query, key and value of an encoder as one product."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        """(batch, tokens, hidden) to the same shape, and the attention weights where the attention returns them."""
        if past_key_values is not None:
            return super().forward(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        layers = (self.query, self.key, self.value)
        return joined_attention(self, hidden_states, layers, attend, attention_mask, **kwargs)


def build(config: PretrainedConfig) -> Family:
    """What holds for every XLM-RoBERTa encoder."""
    return Family(
        name="xlm_roberta",
        pooling=Pooling(mode="mean", normalize=False),
        lora=LoraTargets(names=("query", "key", "value", "dense"), exclude=("pooler.dense",)),
        # Positions start after the padding token's index: 2 where padding is 1, as in every published checkpoint.
        packing=Packing(position_offset=int(config.pad_token_id or 0) + 1),
        patches=patches,
        heads={"sequence-classification": Head(reads="first", logits=classify)},
        exports=Exports(gguf="bert", onnx=True, legacy_config=older),
        leaves=(
            "the 250,002-row embedding table trains dense: 16 bytes a weight in full fine-tuning, 4.1 GB for bge-m3",
            "under an adapter, query, key and value stay three GEMMs each layer",
            "norms, dropout and activations are transformers' own, each a pass over memory",
        ),
    )


def patches(model: PreTrainedModel, machine: Machine) -> Sequence[Patch]:
    """Leave out a pooler that nothing reads; on a GPU, join query, key and value."""
    found: list[Patch] = []
    if isinstance(model, XLMRobertaModel) and model.pooler is not None:
        why = "nothing reads its output in an embedding model"
        found.append(Patch(path="pooler", old=XLMRobertaPooler, new=UnreadXLMRobertaPooler, why=why))
    if machine.device != "cpu":  # on a CPU one product is no faster than three (decision 0005)
        why = "query, key and value in one GEMM (three under an adapter)"
        found += patch_all(model, XLMRobertaSelfAttention, JoinedXLMRobertaSelfAttention, why)
    return found


def classify(model: Any, vectors: Tensor) -> Tensor:
    """(N, hidden) first tokens to (N, labels), by `XLMRobertaForSequenceClassification`'s dense and tanh head."""
    return cast(Tensor, model.classifier(vectors[:, None]))


def older(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What transformers 4 wrote of positions, and vLLM reads: each has a learned vector, the only kind that is left."""
    return {"position_embedding_type": "absolute"}


def sample(size: Literal["tiny", "base"]) -> PretrainedConfig:
    """Random weights of two layers, or of xlm-roberta-base."""
    if size == "base":
        return XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1)
    return XLMRobertaConfig(
        vocab_size=250, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=98, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip


@hookimpl
def burnish_register_families() -> Iterable[FamilySpec]:
    return [FamilySpec(name="xlm_roberta", model_types=("xlm-roberta",), build=build, sample=sample)]
