"""Gemma 3 text models (Gemma Team 2025): EmbeddingGemma, which attends both ways, and causal Gemma 3 as an encoder.

Five layers of six attend to a window. EmbeddingGemma's two Dense layers after the pooling are modules of Sentence
Transformers and come with its `modules.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor
from transformers import Gemma3TextConfig

from ..core.contracts import Exports, Family, FamilySpec, Head, LoraTargets, Packing, Pooling, Precision
from ..core.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The prompts of EmbeddingGemma's model card; "query" and "document" are what `encode_query` and `encode_document` use.
PROMPTS = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "Clustering": "task: clustering | query: ",
    "Classification": "task: classification | query: ",
    "STS": "task: sentence similarity | query: ",
}


def build(config: PretrainedConfig) -> Family:
    """What holds for a Gemma 3 text model: bidirectional (EmbeddingGemma) or causal, as its config says."""
    both_ways = bool(getattr(config, "use_bidirectional_attention", False))
    return Family(
        name="gemma",
        pooling=Pooling(mode="mean" if both_ways else "lasttoken", normalize=True),
        lora=LoraTargets(
            names=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            exclude=("lm_head", "score"),
        ),
        packing=Packing(position_offset=0, causal=not both_ways, sliding_window=True),
        precision=Precision(
            refused={"float16": "its activations reach 8e5, beyond the 65,504 of float16, and become infinite"}
        ),
        prompts=PROMPTS if both_ways else {},
        heads={"sequence-classification": Head(reads="last", logits=classify)},
        exports=Exports(gguf="gemma-embedding" if both_ways else "gemma3", onnx=True, legacy_config=older),
        leaves=(
            "RMSNorm is transformers' own, written as float32 operations: two thirds of the activations that are kept",
            "the 262,144-row embedding table trains dense: 16 bytes a weight in full fine-tuning, 3.2 GB",
        ),
    )


def classify(model: Any, vectors: Tensor) -> Tensor:
    """(N, hidden) last tokens to (N, labels), by `Gemma3TextForSequenceClassification`'s linear layer."""
    return cast(Tensor, model.score(vectors))


def older(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary bases as transformers 4 and TEI read them. Only the layers that see the whole text may be scaled."""
    rotary = config["rope_parameters"]
    scaling = {key: value for key, value in rotary["full_attention"].items() if key != "rope_theta"}
    return {
        "rope_theta": rotary["full_attention"]["rope_theta"],
        "rope_local_base_freq": rotary["sliding_attention"]["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }


def sample(size: Literal["tiny", "base"]) -> PretrainedConfig:
    """Random weights of two layers (a window of 9 and the whole text), or of embeddinggemma-300m."""
    if size == "base":
        return Gemma3TextConfig(
            vocab_size=262144, hidden_size=768, num_hidden_layers=24, num_attention_heads=3, num_key_value_heads=1,
            head_dim=256, intermediate_size=1152, sliding_window=512, use_bidirectional_attention=True,
            max_position_embeddings=2048, query_pre_attn_scalar=256, pad_token_id=0,
        )  # fmt: skip
    return Gemma3TextConfig(
        vocab_size=250, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True, max_position_embeddings=96, query_pre_attn_scalar=8, pad_token_id=0,
    )  # fmt: skip


@hookimpl
def burnish_register_families() -> Iterable[FamilySpec]:
    return [FamilySpec(name="gemma", model_types=("gemma3_text",), build=build, sample=sample)]
