"""Tiny cross-encoders with random weights for the tests: one of every family, and what plain ones make of texts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from burnish.core.testing.subject import enliven
from burnish.core.testing.tokenizer import save_tokenizer, words

CLASSIFY = "sequence-classification"
FAMILIES = ("bert", "distilbert", "gemma3_text", "modernbert", "mpnet", "qwen3", "xlm-roberta", "roberta")
"""Every built-in family's model type, and one that only the family generic takes."""

TEMPLATE = (
    "w30 {% for message in messages %}{% if message.role == 'query' %}w31 {% else %}w32 {% endif %}"
    "{{ message.content }} {% endfor %}w33 w34"
)
"""A chat template with a beginning, a word for each role, and an end that truncation has to leave."""

PAIRS = [
    (words(9, 1), words(17, 2)), (words(1, 3), words(1, 4)), ("", ""), (words(3, 5), ""), ("", words(4, 6)),
    (words(5, 7), words(120, 8)), (words(70, 9), words(80, 10)), (words(2, 11), words(30, 12)),
]  # fmt: skip
"""Pairs of unequal length: empty ones, and two that are cut to the model's limit from either side."""


def config_of(model_type: str) -> Any:
    """The family's tiny sample."""
    if model_type == "roberta":
        from transformers import RobertaConfig

        return RobertaConfig(
            vocab_size=250, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=98, type_vocab_size=1, pad_token_id=1,
        )  # fmt: skip
    from burnish.core.testing.find import sample_config

    return sample_config(model_type)


def make(
    model_type: str, folder: Path, labels: int = 1, *, task: str = "sequence-classification", **config: Any
) -> str:
    """A transformers folder of a model with a head; the tokenizer gives token types where the model has any."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    settings = copy.deepcopy(config_of(model_type))
    settings.num_labels = labels
    for name, value in config.items():
        setattr(settings, name, value)
    torch.manual_seed(7)
    kinds: dict[str, Any] = {
        CLASSIFY: AutoModelForSequenceClassification, "text-generation": AutoModelForCausalLM,
    }  # fmt: skip
    model = kinds[task].from_config(settings).float()
    enliven(model)
    model.save_pretrained(folder)
    decoder = model_type in ("qwen3", "gemma3_text")
    save_tokenizer(
        folder, settings, first=not decoder, max_length=64, token_types=model_type == "bert",
        more=("yes", "no"), chat_template=TEMPLATE if task == "text-generation" else None,
    )  # fmt: skip
    return str(folder)
