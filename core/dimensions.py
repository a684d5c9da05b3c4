"""The widths that an embedding model was trained to be cut to.

They stand in `config.json` as `matryoshka_dimensions`, by which vLLM lets a request ask for `dimensions`, and beside an
adapter, which has no such file, in `config_sentence_transformers.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

KEY = "matryoshka_dimensions"


def trained_for(losses: Iterable[Any]) -> list[int]:
    """The widths, shortest first, that every one of Sentence Transformers' MatryoshkaLosses among `losses`, or inside
    of one, trains; nothing without such a loss."""
    modules = [module for loss in losses if hasattr(loss, "modules") for module in loss.modules()]
    told = [module.matryoshka_dims for module in modules if hasattr(module, "matryoshka_dims")]
    return sorted(set.intersection(*({int(width) for width in widths} for widths in told))) if told else []


def of_config(config: Any) -> list[int]:
    """What a transformer's config says; nothing where it says nothing, or there is none."""
    return [int(width) for width in getattr(config, KEY, None) or ()]


def set_on(config: Any, widths: Iterable[int]) -> None:
    """Say it in a transformer's config, or for no widths, nothing."""
    found = sorted(widths)
    if found:
        setattr(config, KEY, found)
    else:
        config.__dict__.pop(KEY, None)
