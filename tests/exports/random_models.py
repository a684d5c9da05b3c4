"""Transformers folders with random weights, for models that no package ships."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from burnish.core.testing.subject import enliven

# Of MiniLM's tokenizer.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102, "cls_token_id": 101, "sep_token_id": 102}


def random_model(
    folder: Path, config: Any, tokenizer: Any, changes: Mapping[str, Any], *, causal: bool = False
) -> Path:
    """Save a model of a config, and its tokenizer; of `changes` the config takes what it knows."""
    from transformers import AutoModel, AutoModelForCausalLM

    for key, value in {"vocab_size": len(tokenizer), **changes}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    torch.manual_seed(0)
    kind: Any = AutoModelForCausalLM if causal else AutoModel
    model = kind.from_config(config).float()
    enliven(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
