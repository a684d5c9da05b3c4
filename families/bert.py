"""BERT (Devlin et al. 2019): MiniLM, bge, e5, mxbai and their kin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor
from transformers import BertConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertModel, BertPooler, BertSelfAttention, eager_attention_forward

from ..core.contracts import Exports, Family, FamilySpec, Head, LoraTargets, Machine, Packing, Patch, Pooling, patch_all
from ..core.hookspecs import hookimpl
from ..kernels.linear import joined_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class UnreadBertPooler(BertPooler):
    """A pooler whose output nothing reads: it keeps its weights, so that they are saved, and computes nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """None in place of the (batch, hidden) vector that `BertModel` would return as `pooler_output`."""
        return cast(Tensor, None)


class JoinedBertSelfAttention(BertSelfAttention):
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
    """What holds for every BERT encoder."""
    return Family(
        name="bert",
        pooling=Pooling(mode="mean", normalize=False),
        # "dense" is also the name of the pooler's layer, whose output no embedding reads: an adapter there is dead.
        lora=LoraTargets(names=("query", "key", "value", "dense"), exclude=("pooler.dense",)),
        packing=Packing(position_offset=0),
        patches=patches,
        heads={"sequence-classification": Head(reads="first", logits=classify, inside=("pooler",))},
        exports=Exports(
            gguf="bert",
            onnx=True,
            refused={"gguf-reranker": "the converter drops the pooler before the classifier"},
            legacy_config=older,
        ),
        leaves=(
            "under an adapter, query, key and value stay three GEMMs each layer",
            "norms, dropout and activations are transformers' own, each a pass over memory",
        ),
    )


def patches(model: PreTrainedModel, machine: Machine) -> Sequence[Patch]:
    """Leave out a pooler that nothing reads; on a GPU, join query, key and value."""
    found: list[Patch] = []
    if isinstance(model, BertModel) and model.pooler is not None:
        # It costs a GEMM a step, and on packed input it would read the first token of the first text only.
        why = "nothing reads its output in an embedding model"
        found.append(Patch(path="pooler", old=BertPooler, new=UnreadBertPooler, why=why))
    if machine.device != "cpu":  # on a CPU one product is no faster than three (decision 0005)
        why = "query, key and value in one GEMM (three under an adapter)"
        found += patch_all(model, BertSelfAttention, JoinedBertSelfAttention, why)
    return found


def classify(model: Any, vectors: Tensor) -> Tensor:
    """(N, hidden) first tokens to (N, labels), by `BertForSequenceClassification`'s pooler and classifier."""
    return cast(Tensor, model.classifier(model.dropout(model.bert.pooler(vectors[:, None]))))


def older(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What transformers 4 wrote of positions, and vLLM reads: each has a learned vector, the only kind that is left."""
    return {"position_embedding_type": "absolute"}


def sample(size: Literal["tiny", "base"]) -> PretrainedConfig:
    """Random weights of two layers, or of bert-base."""
    if size == "base":
        return BertConfig()
    return BertConfig(
        vocab_size=250, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=96,
    )  # fmt: skip


@hookimpl
def burnish_register_families() -> Iterable[FamilySpec]:
    return [FamilySpec(name="bert", model_types=("bert",), build=build, sample=sample)]
