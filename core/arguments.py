"""The training arguments: Sentence Transformers' own, and what Burnish's trainer takes beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from sentence_transformers import SentenceTransformerTrainingArguments as StockArguments

from .errors import ConfigError
from .optimizer_checks import check_arguments


@dataclass
class TrainingArguments(StockArguments):
    """Sentence Transformers' training arguments, and four more.

    On a CPU nothing is pinned: there is no device to copy to. On a GPU pinned batches are copied while it computes.

    Args:
        token_store: Whether texts are tokenised once, before the first step, and kept for other epochs and runs: True
            (in the user's cache, or `BURNISH_CACHE`), a folder, or False.
        optimizer_in_backward: Step each weight as soon as its gradient is there, and free it, so that those of all
            weights are never held together. Needs `max_grad_norm=0`.
        stochastic_rounding: Round the new bfloat16 weights of full fine-tuning with `dtype="bfloat16"` stochastically,
            so that small updates count on average.
        sparse_embeddings: Give trained embedding tables of 2^20 weights or more row-sparse gradients, and step only the
            rows that a batch has.

    Raises:
        ConfigError: For a value that is none of these, settings that contradict each other, or an optimizer that cannot
            run on the device.
    """

    token_store: bool | str = field(default=True, metadata={"help": "Tokenise once: True, False or a folder."})
    optimizer_in_backward: bool = field(default=False, metadata={"help": "Step each weight inside the backward."})
    stochastic_rounding: bool = field(default=False, metadata={"help": "Round bfloat16 weights stochastically."})
    sparse_embeddings: bool = field(default=False, metadata={"help": "Step only the rows of embeddings in a batch."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if not isinstance(self.token_store, bool | str | os.PathLike) or self.token_store == "":
            what = f"{self.token_store!r} is neither True, False nor a folder"
            raise ConfigError(what, where="token_store", fix="Leave it out for the user's cache")
        if not isinstance(self.token_store, bool):
            self.token_store = os.fspath(self.token_store)  # arguments are written down as JSON
        check_arguments(self)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        elif self.dataloader_pin_memory:
            settings: Any = self.accelerator_config
            settings.non_blocking = True
