"""Burnish fine-tunes embedding models, rerankers and encoder classifiers. Names load on first use: importing costs nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.errors import BurnishError as BurnishError
    from .core.fast import FastSentenceTransformer as FastSentenceTransformer
    from .core.model import SentenceTransformer as SentenceTransformer
    from .core.trainer import SentenceTransformerTrainer as SentenceTransformerTrainer
    from .core.trainer import SentenceTransformerTrainingArguments as SentenceTransformerTrainingArguments
    from .core.trainer import Trainer as Trainer
    from .core.trainer import TrainingArguments as TrainingArguments

_FACE = {
    "BurnishError": ".core.errors",
    "FastSentenceTransformer": ".core.fast",
    "SentenceTransformer": ".core.model",
    "SentenceTransformerTrainer": ".core.trainer",
    "SentenceTransformerTrainingArguments": ".core.trainer",
    "Trainer": ".core.trainer",
    "TrainingArguments": ".core.trainer",
}

__all__ = [  # noqa: RUF022 - in the order a reader meets them
    "FastSentenceTransformer",
    "Trainer",
    "TrainingArguments",
    "SentenceTransformer",
    "SentenceTransformerTrainer",
    "SentenceTransformerTrainingArguments",
    "BurnishError",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("burnish")
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FACE[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
