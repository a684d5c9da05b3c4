"""The trainer: Sentence Transformers' own, with the step handed to a backend and the run checked before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from sentence_transformers import SentenceTransformerTrainer as StockTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as StockArguments
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import dimensions, stream
from .arguments import TrainingArguments as TrainingArguments
from .cached import PARKED, cached_step, in_parts, loss_of
from .errors import ConfigError
from .feeding import feed, refusal
from .inputs import said_of_prompts
from .model import SentenceTransformer
from .packing import needs_padding
from .selection import choose_kernel
from .step_trainer import SteppingTrainer
from .tiled_loss import Undo, tile


class Trainer(SteppingTrainer, StockTrainer):
    """`SentenceTransformerTrainer` for models that Burnish loaded.

    Takes the same parameters; `args` may be `burnish.TrainingArguments` or Sentence Transformers' own, losses and
    evaluators are Sentence Transformers'. The step is executed by the backend that was chosen at load time.

    Raises:
        ConfigError: If the optimizer that the arguments choose cannot be had here.
        ModelError: If the model cannot be trained as it is: stock for inference, nothing trainable, or a half-precision
            base that was meant for an adapter it never got.
    """

    training_args_class = StockArguments

    def __init__(self, model: Any = None, *args: Any, **keywords: Any) -> None:
        super().__init__(model, *args, **keywords)
        self._chunks: dict[str, Any] = {}  # how a cached loss's chunks are filled up
        if self._preparation is not None and (note := said_of_prompts(self.model, self.args)):
            self._say(note)

    def _needs_padding(self) -> str | None:
        losses = [loss for loss in self._losses() if isinstance(loss, nn.Module)]
        return next((why for loss in losses if (why := needs_padding(loss))), None)

    def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> DataLoader[Any]:
        loader: DataLoader[Any] = super()._build_dataloader(dataset, batch_size, dataset_kind)
        store = getattr(self.args, "token_store", True)
        if dataset_kind != "train" or store is False or self._preparation is None:
            return loader
        if reason := refusal(self.model, dataset, self.data_collator):
            self._say(f"texts are tokenised batch by batch: {reason}")
            return loader
        unsure = [loss for loss in self._losses() if loss_of(loss) is None]
        alone = next((why for loss in unsure if (why := stream.needs_columns(loss))), None)
        if type(self).compute_loss is not Trainer.compute_loss:
            alone = f"{type(self).__name__} has a compute_loss of its own"
        folder = store if isinstance(store, str) else None
        try:
            found = feed(self.model, dataset, self.data_collator, folder=folder, joint=alone is None, say=self._say)
        except ConfigError as error:
            if folder is not None:
                raise
            self._say(f"texts are tokenised batch by batch: {error}")
            return loader
        if alone or found.prompts:
            self._say(f"each column is embedded by itself: {alone or found.prompts}")
        self.tokenise_seconds += found.seconds
        self._say(found.said())
        if found.is_streamed:  # else accelerate would cut one row, which a stream is, into rows for each process
            self.accelerator.dataloader_config.dispatch_batches = False
        found.collator.fit, found.collator.fit_longest = self._shapes()
        self._chunks = {name: getattr(found.collator, name) for name in ("filler", "fit", "fit_longest")}
        return found.loader(loader)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch, a scalar; of a stream, on the embeddings of one forward for all its columns.

        A cached loss embeds a stream in chunks of tokens (`core.cached`), twice where it is more than one.
        """
        if stream.IDS in inputs:

            def embed(batch: Mapping[str, Any]) -> Tensor:
                embeddings: Tensor = model(stream.model_inputs(batch))["sentence_embedding"]
                return embeddings

            loss = self._loss_of(inputs)
            if (of_embeddings := self.room.of_embeddings(loss)) is not None:
                budget = self.room.limit(loss)
                alone = getattr(model, "no_sync", nullcontext)
                value = cached_step(embed, inputs, of_embeddings, budget, no_sync=alone, **self._chunks)
                return (value, {}) if return_outputs else value
            embeddings = in_parts(embed, inputs, PARKED, **self._chunks) if self._parks() else embed(inputs)
            finished = stream.columns_of(embeddings, inputs[stream.COLUMNS])
            inputs = {name: inputs[name] for name in ("label", "dataset_name") if name in inputs}
            for place, column in enumerate(finished):
                inputs |= {f"column{place}_{name}": value for name, value in column.items()}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _parks(self) -> bool:
        """Whether layers keep nothing but inputs on the host, so that a batch may go through piece by piece."""
        preparation = self._preparation
        if preparation is None or preparation.recompute != "offload":
            return False
        return preparation.decision.options.activation_budget_gb is None

    def train(self, *args: Any, **keywords: Any) -> Any:
        """Train, as `SentenceTransformerTrainer.train`. The widths of a MatryoshkaLoss are saved with the model."""
        if (widths := dimensions.trained_for(self._losses())) and self.model.config is not None:
            dimensions.set_on(self.model.config, widths)
        undo = self._tile_losses()
        try:
            return super().train(*args, **keywords)
        finally:
            for one in undo:
                one()

    def _tile_losses(self) -> list[Undo]:
        """Have losses with in-batch negatives do without a matrix of scores where a batch is large."""
        preparation = self._preparation
        if preparation is None:
            return []
        decision = preparation.decision
        choice = choose_kernel(decision.registry, decision.machine, "tiled_infonce")
        losses = [loss for loss in self._losses() if isinstance(loss, nn.Module)]
        return [] if choice is None else [tile(loss, choice.load()) for loss in losses]

    def _step_settings(self) -> dict[str, Any]:
        return {"host_work": lambda batch: self.room.host_work(batch, self._loss_of(batch))}


SentenceTransformerTrainer = Trainer
SentenceTransformerTrainingArguments = TrainingArguments

__all__ = [
    "SentenceTransformer",
    "SentenceTransformerTrainer",
    "SentenceTransformerTrainingArguments",
    "Trainer",
    "TrainingArguments",
]
