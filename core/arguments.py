"""The training arguments: Sentence Transformers' own, and what Burnish's trainer takes beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from sentence_transformers import SentenceTransformerTrainingArguments as StockArguments
from sentence_transformers.base.training_args import BaseTrainingArguments
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as StockCrossEncoderArguments

from .errors import ConfigError
from .optimizer_checks import check_arguments


@dataclass
class ExtraArguments(BaseTrainingArguments):
    """What Burnish's trainers take beside Sentence Transformers' arguments: a mixin over those of each trainer."""

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


@dataclass
class TrainingArguments(ExtraArguments, StockArguments):
    """Sentence Transformers' training arguments, and five more.

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
        auto_batch: Cut batches into forwards that fit the memory, with all negatives kept, where the loss lets it:
            True for as many tokens as the GPU's free memory is planned to hold (docs/memory.md), a number for so many.
            A step that runs out of memory all the same is run again in smaller parts.

    Raises:
        ConfigError: For a value that is none of these, settings that contradict each other, or an optimizer that cannot
            run on the device.
    """

    auto_batch: bool | int = field(default=False, metadata={"help": "Cut batches to fit: True, or a forward's tokens."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_auto_batch()

    def _check_auto_batch(self) -> None:
        if not isinstance(self.auto_batch, int) or self.auto_batch < 0 or str(self.auto_batch) == "0":
            what = f"{self.auto_batch!r} is neither True, False nor a number of tokens"
            raise ConfigError(what, where="auto_batch", fix="Pass True for what fits the GPU's memory")
        if self.auto_batch and self.auto_find_batch_size:
            fix = "Pass auto_batch alone: it leaves the batch as large as it is"
            raise ConfigError("both are set", where="auto_batch, auto_find_batch_size", fix=fix)
        if self.auto_batch and self.optimizer_in_backward:
            what = "a step that has stepped some weights already cannot be run again"
            raise ConfigError(what, where="auto_batch, optimizer_in_backward", fix="Pass one of them")


@dataclass
class CrossEncoderTrainingArguments(ExtraArguments, StockCrossEncoderArguments):
    """Sentence Transformers' training arguments for cross-encoders, and four more.

    Args:
        token_store, optimizer_in_backward, stochastic_rounding, sparse_embeddings: As in `TrainingArguments`.
        auto_batch: Refused: a cross-encoder's loss cuts its batch itself, by a `mini_batch_size` of its own.

    Raises:
        ConfigError: For a value that is none of these, settings that contradict each other, or an optimizer that cannot
            run on the device.
    """

    auto_batch: bool = field(default=False, metadata={"help": "Not for cross-encoders: their losses cut batches."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.auto_batch is not False:
            fix = "Use CachedMultipleNegativesRankingLoss, or a loss with a mini_batch_size"
            raise ConfigError(
                "is not for cross-encoders, whose losses cut batches themselves", where="auto_batch", fix=fix
            )
