"""Saved folders for servers that compute no attention heads narrower than 32: one head a layer where the tiny ones have
four. Real MiniLM, whose heads are 32 wide, is as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from burnish import FastClassifier, FastCrossEncoder, FastSentenceTransformer
from burnish.core.testing.find import sample_config
from burnish.core.testing.subject import quietly

from .random_models import SPECIAL, random_model

PROMPTS = {"query": "find this: ", "document": ""}
# Name: (model type, or None for MiniLM; what of its tiny sample is another).
_ONE = {"num_attention_heads": 1}
_ROPE = {"rope_type": "default", "rope_theta": 70.0}
MODELS: Mapping[str, tuple[str | None, Mapping[str, Any]]] = {
    "minilm": (None, {}),
    "distilbert": ("distilbert", {"n_heads": 1}),
    "gemma": ("gemma3_text", {
        **_ONE, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0}, "sliding_attention": _ROPE,
        },
    }),
    "modernbert": ("modernbert", {
        **_ONE, "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 900.0}, "sliding_attention": _ROPE,
        },
    }),
    "mpnet": ("mpnet", _ONE),
    "qwen3": ("qwen3", {
        **_ONE, "num_key_value_heads": 1, "head_dim": 32,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0},
    }),
    "xlm_roberta": ("xlm-roberta", _ONE),
}  # fmt: skip


def _without_types(tokenizer: Any) -> Any:
    """The same words, put together as XLM-R's own tokenizer does it: two separators, and one type for all tokens."""
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast

    words, special = tokenizer.backend_tokenizer, ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    words.post_processor = RobertaProcessing(("[SEP]", 102), ("[CLS]", 101), trim_offsets=True, add_prefix_space=False)
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=words, model_max_length=64, model_input_names=["input_ids", "attention_mask"],
        **{name: getattr(tokenizer, name) for name in special},
    )  # fmt: skip


def wide(name: str, minilm: Path, folder: Path) -> Path:
    """A bare transformers folder of one of `MODELS`, with MiniLM's tokenizer cut at 64 tokens."""
    from transformers import AutoTokenizer

    kind, changes = MODELS[name]
    if kind is None:
        return minilm
    tokenizer = AutoTokenizer.from_pretrained(str(minilm), model_max_length=64)
    if kind == "xlm-roberta":
        tokenizer = _without_types(tokenizer)
    return random_model(folder, sample_config(kind), tokenizer, {**SPECIAL, **changes})


def save(name: str, minilm: Path, place: Path, *, kind: str = "embeddings") -> Path:
    """The folder of a full model: of "embeddings", a "ranker" or one of three "classes", whose heads are random."""
    base = str(wide(name, minilm, place / "base"))
    torch.manual_seed(1)
    with quietly():
        if kind == "ranker":
            model: Any = FastCrossEncoder.from_pretrained(base, device="cpu", num_labels=1, full_finetuning=True)
        elif kind == "classes":
            labels = ["no", "may be", "yes"]
            model = FastClassifier.from_pretrained(base, device="cpu", labels=labels, full_finetuning=True)
        else:
            model = FastSentenceTransformer.from_pretrained(base, device="cpu", prompts=PROMPTS, full_finetuning=True)
        model.save_pretrained(str(place / "model"))
    return place / "model"
