"""Rerankers and classifiers of several families as they are saved, for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import FastClassifier, FastCrossEncoder
from burnish.core.layout import make_compatible
from burnish.core.registry import registry
from burnish.core.selection import choose_family
from burnish.core.testing.find import sample_config
from burnish.core.testing.subject import quietly

from .random_models import SPECIAL, random_model

# Name: (model type, settings of the classifier or None for a reranker). Every base but the last is an encoder without
# a head, which is drawn at random: its adapter alone has it.
HEADS: Mapping[str, tuple[str, Mapping[str, Any] | None]] = {
    "bert ranker": ("bert", None),
    "xlm_roberta ranker": ("xlm-roberta", None),
    "modernbert ranker": ("modernbert", None),
    "distilbert ranker": ("distilbert", None),
    "mpnet ranker": ("mpnet", None),
    "qwen3 ranker": ("qwen3", None),
    "gemma ranker": ("gemma3_text", None),
    "bert classes": ("bert", {"labels": ["no", "may be", "yes"]}),
    "modernbert several": (
        "modernbert",
        {"labels": ["a", "b", "c", "d"], "problem_type": "multi_label_classification"},
    ),
    "qwen3 classes": ("qwen3", {"labels": ["no", "yes"]}),
    "xlm_roberta number": ("xlm-roberta", {"problem_type": "regression", "num_labels": 1}),
    "qwen3 yes or no": ("qwen3", None),
}
_TEMPLATE = (
    "judge {% for message in messages %}{% if message.role == 'query' %}query {% else %}document {% endif %}"
    "{{ message.content }} {% endfor %}answer is"
)


def bare(name: str, minilm: Path, folder: Path) -> str:
    """A transformers folder with random weights and MiniLM's tokenizer, cut at 64 tokens."""
    from transformers import AutoTokenizer

    answers = name.endswith("yes or no")
    # XLM-R's own tokenizers tell no types, for there is one.
    told = ["input_ids", "attention_mask", *(["token_type_ids"] if HEADS[name][0] != "xlm-roberta" else [])]
    tokenizer = AutoTokenizer.from_pretrained(str(minilm), model_max_length=64, model_input_names=told)
    if answers:
        tokenizer.chat_template = _TEMPLATE
    config = sample_config(HEADS[name][0])
    random_model(folder, config, tokenizer, SPECIAL, causal=answers)
    # As transformers 5 writes it, releases of before take a base for another model, whatever lies over it.
    make_compatible(folder, choose_family(registry(None), config).family)
    return str(folder)


def _loaded(name: str, base: str, **options: Any) -> Any:
    settings = HEADS[name][1]
    if settings is not None:
        return FastClassifier.from_pretrained(base, device="cpu", **settings, **options)
    labels: dict[str, Any] = {} if name.endswith("yes or no") else {"num_labels": 1}
    return FastCrossEncoder.from_pretrained(base, device="cpu", **labels, **options)


def move(model: Any, trained: str) -> None:
    """Give trained weights values of which a reader that drops them has none."""
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if trained in key and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05 if "lora" in trained else 0.3)


def save(name: str, minilm: Path, place: Path) -> dict[str, Path]:
    """ "NAME full", "NAME adapter" and "NAME merged" folders of one of `HEADS`."""
    base = bare(name, minilm, place / "base")
    with quietly():
        full = _loaded(name, base, full_finetuning=True)
        adapted = FastCrossEncoder.get_peft_model(_loaded(name, base), r=4)
    move(adapted, "lora_B")
    move(adapted, "modules_to_save")
    full.save_pretrained(str(place / "full"))
    adapted.save_pretrained(str(place / "adapter"))
    adapted.save_pretrained_merged(place / "merged")
    return {f"{name} {kind}": place / kind for kind in ("full", "adapter", "merged")}


def save_all(names: Iterable[str], minilm: Path, made: pytest.TempPathFactory) -> dict[str, Path]:
    """Those of several of `HEADS`; no folder is called after an architecture."""
    found: dict[str, Path] = {}
    for name in names:
        found |= save(name, minilm, made.mktemp("saved") / "model")
    return found
