"""Qwen3 (Qwen Team 2025): Qwen3-Embedding and Qwen3-Reranker, causal decoders read at the last token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3Config

from ..core.contracts import Exports, Family, FamilySpec, Head, LoraTargets, Packing, Pooling
from ..core.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The instruction of Qwen3-Embedding's model card for retrieval; documents take none.
PROMPTS = {
    "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
    "document": "",
}


def build(config: PretrainedConfig) -> Family:
    """What holds for every Qwen3 decoder that is used as an encoder."""
    return Family(
        name="qwen3",
        pooling=Pooling(mode="lasttoken", normalize=True),
        lora=LoraTargets(
            names=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            exclude=("lm_head", "score"),
        ),
        packing=Packing(position_offset=0, causal=True, sliding_window=bool(getattr(config, "use_sliding_window", 0))),
        prompts=PROMPTS,
        heads={
            "sequence-classification": Head(reads="last", logits=classify),
            "text-generation": Head(reads="last", logits=predict, columns=predict_some),
        },
        exports=Exports(gguf="qwen3", onnx=True),
        leaves=(
            "RMSNorm is transformers' own, written as float32 operations: a third of the activations that are kept",
            "SwiGLU and rotary embedding are transformers' own, each a pass over memory",
        ),
    )


def classify(model: Any, vectors: Tensor) -> Tensor:
    """(N, hidden) last tokens to (N, labels), by `Qwen3ForSequenceClassification`'s linear layer."""
    return cast(Tensor, model.score(vectors))


def predict(model: Any, vectors: Tensor) -> Tensor:
    """(N, hidden) last tokens to (N, vocabulary): a reranker's score is the "yes" column minus the "no" column."""
    return cast(Tensor, model.lm_head(vectors))


def predict_some(model: Any, vectors: Tensor, columns: Tensor) -> Tensor:
    """(N, hidden) last tokens and (K,) words to their (N, K) logits: two rows of 151,669 where a reranker asks."""
    head = model.lm_head
    if type(head) is not nn.Linear:  # adapted, quantised or held in float32: its own forward knows how
        return predict(model, vectors).index_select(-1, columns)
    return functional.linear(vectors, head.weight.index_select(0, columns))


def sample(size: Literal["tiny", "base"]) -> PretrainedConfig:
    """Random weights of two layers, or of Qwen3-Embedding-0.6B."""
    if size == "base":
        return Qwen3Config(
            vocab_size=151669, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
            head_dim=128, intermediate_size=3072, max_position_embeddings=32768, tie_word_embeddings=True,
            pad_token_id=0,
        )  # fmt: skip
    return Qwen3Config(
        vocab_size=250, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, max_position_embeddings=96, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip


@hookimpl
def burnish_register_families() -> Iterable[FamilySpec]:
    return [FamilySpec(name="qwen3", model_types=("qwen3",), build=build, sample=sample)]
