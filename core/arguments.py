"""The training arguments: Sentence Transformers' own, and what Burnish's trainer takes beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from sentence_transformers import SentenceTransformerTrainingArguments as StockArguments

from .errors import ConfigError


@dataclass
class TrainingArguments(StockArguments):
    """Sentence Transformers' training arguments, and one more.

    On a CPU nothing is pinned: there is no device to copy to. On a GPU pinned batches are copied while it computes.

    Args:
        token_store: Whether texts are tokenised once, before the first step, and kept for other epochs and runs: True
            (in the user's cache, or `BURNISH_CACHE`), a folder, or False.
    """

    token_store: bool | str = field(default=True, metadata={"help": "Tokenise once: True, False or a folder."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if not isinstance(self.token_store, bool | str | os.PathLike) or self.token_store == "":
            what = f"{self.token_store!r} is neither True, False nor a folder"
            raise ConfigError(what, where="token_store", fix="Leave it out for the user's cache")
        if not isinstance(self.token_store, bool):
            self.token_store = os.fspath(self.token_store)  # arguments are written down as JSON
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        elif self.dataloader_pin_memory:
            settings: Any = self.accelerator_config
            settings.non_blocking = True
