"""ModernBERT (Warner et al. 2024): ModernBERT-base and -large, gte-modernbert-base.

Every third layer attends to the whole text (rotary base 160,000), the others to a window of 128 tokens around each
(base 10,000). The window reaches the attention as `sliding_window`: there it is a band, never a mask of all pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor
from transformers import ModernBertConfig

from ..core.contracts import Exports, Family, FamilySpec, Head, LoraTargets, Packing, Pooling
from ..core.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def build(config: PretrainedConfig) -> Family:
    """What holds for every ModernBERT encoder."""
    reads: Literal["first", "mean"] = "mean" if getattr(config, "classifier_pooling", "cls") == "mean" else "first"
    return Family(
        name="modernbert",
        pooling=Pooling(mode="mean", normalize=False),
        # "dense" belongs to the prediction head of the masked-language and classification models.
        lora=LoraTargets(names=("Wqkv", "Wo", "Wi"), exclude=("head.dense",)),
        packing=Packing(position_offset=0, sliding_window=True),
        heads={"sequence-classification": Head(reads=reads, logits=classify)},
        exports=Exports(gguf="modern-bert", onnx=True, legacy_config=older),
        leaves=(
            "GeGLU, norms and rotary embedding are transformers' own: float32 copies of query and key each layer",
            "no dropout by default, and none is added",
        ),
    )


def classify(model: Any, vectors: Tensor) -> Tensor:
    """(N, hidden) pooled tokens to (N, labels), by `ModernBertForSequenceClassification`'s head."""
    return cast(Tensor, model.classifier(model.drop(model.head(vectors))))


def older(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of transformers 4.48 to 4.57 and TEI; `layer_norm_eps` is what llama.cpp's converter wants.

    TEI counts this family's labels by `num_labels`, which transformers reads and does not write: without it, as one.
    """
    rotary = config["rope_parameters"]
    labels = config.get("id2label")
    return {
        "global_rope_theta": rotary["full_attention"]["rope_theta"],
        "local_rope_theta": rotary["sliding_attention"]["rope_theta"],
        "global_attn_every_n_layers": every(config["layer_types"]),
        "layer_norm_eps": config["norm_eps"],
        "position_embedding_type": "absolute",  # as in the published config.json; nothing computes it
        **({"num_labels": len(labels)} if labels else {}),
    }


def every(layer_types: Sequence[str]) -> int | None:
    """n where just the layers 0, n, 2n, … attend to the whole text; None where it is others, which the older key cannot
    say."""
    whole = [place for place, kind in enumerate(layer_types) if kind == "full_attention"]
    step = whole[1] if len(whole) > 1 else len(layer_types)
    return step if whole == list(range(0, len(layer_types), step)) else None


def sample(size: Literal["tiny", "base"]) -> PretrainedConfig:
    """Random weights of three layers (the middle one local, 4 tokens to either side), or of ModernBERT-base."""
    if size == "base":
        return ModernBertConfig(pad_token_id=0)
    return ModernBertConfig(
        vocab_size=250, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        layer_types=["full_attention", "sliding_attention", "full_attention"], local_attention=8,
        max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip


@hookimpl
def burnish_register_families() -> Iterable[FamilySpec]:
    return [FamilySpec(name="modernbert", model_types=("modernbert",), build=build, sample=sample)]
