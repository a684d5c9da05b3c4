"""The trainer of rerankers and classifiers: Sentence Transformers' own, with neither padding nor tokenising in a step.

A loss for cross-encoders makes its pairs itself and calls the model's `preprocess` and forward as often as it likes.
So both stay what it calls, and only what is behind them changes: `preprocess` finds tokens in place of making them and
puts the pairs into one stream, and the forward of that stream is the piece that a backend may replace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from sentence_transformers.cross_encoder import CrossEncoderTrainer as StockTrainer
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as StockArguments
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import stream
from .arguments import CrossEncoderTrainingArguments as CrossEncoderTrainingArguments
from .errors import ConfigError
from .pair_feeding import feed, refusal
from .pair_tokens import PairRecipe, TokenisedText
from .step_trainer import SteppingTrainer
from .whole_batches import join


class CrossEncoderTrainer(SteppingTrainer, StockTrainer):
    """`sentence_transformers.CrossEncoderTrainer` for models that Burnish loaded.

    Takes the same parameters; `args` may be `burnish.CrossEncoderTrainingArguments` or Sentence Transformers' own,
    losses and evaluators are Sentence Transformers'. The step is executed by the backend that was chosen at load time.

    Raises:
        ConfigError: If the optimizer that the arguments choose cannot be had here.
        ModelError: If the model cannot be trained as it is: stock for inference, nothing trainable, or a half-precision
            base that was meant for an adapter it never got.
    """

    training_args_class = StockArguments
    loaded_by: ClassVar[str] = "FastCrossEncoder"

    def __init__(self, model: Any = None, *args: Any, **keywords: Any) -> None:
        super().__init__(model, *args, **keywords)
        self._pairs: PairRecipe | None = None
        if self._preparation is not None and (note := self._prompts()):
            self._say(note)

    def _prompts(self) -> str | None:
        """Which prompt the run puts before its pairs, or that it puts none and the model has some."""
        if self.args.prompts:
            return f"prompts before the first text of pairs: {self.args.prompts!r}"
        names = [name for name, text in (self.model.prompts or {}).items() if text]
        if not names:
            return None
        fix = "CrossEncoderTrainingArguments(prompts=text) puts one before the first text of each pair"
        return f"the model's prompts ({', '.join(names)}) are not put before the training pairs; {fix}"

    def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> DataLoader[Any]:
        loader: DataLoader[Any] = super()._build_dataloader(dataset, batch_size, dataset_kind)
        store = getattr(self.args, "token_store", True)
        if dataset_kind != "train" or store is False or self._preparation is None:
            return loader
        self._pairs = None
        recipe = PairRecipe(self.model, *self._shapes())
        if reason := refusal(recipe, dataset, self.data_collator):
            self._say(f"pairs are tokenised batch by batch: {reason}")
            return loader
        folder = store if isinstance(store, str) else None
        try:
            found = feed(recipe, dataset, self.data_collator, folder=folder, say=self._say)
        except ConfigError as error:
            if folder is not None:
                raise
            self._say(f"pairs are tokenised batch by batch: {error}")
            return loader
        self.tokenise_seconds += found.seconds
        if found.unlike is not None:
            self._say(f"pairs are tokenised batch by batch: {found.unlike}")
            return loader
        self._say(found.said())
        self._pairs = recipe
        return found.loader(loader)

    def _shapes(self) -> tuple[stream.Fit | None, stream.Fit | None]:
        """As other trainers', with fewer shapes of small batches: a query and its candidates are a thousand tokens."""
        fit, fit_longest = super()._shapes()
        return None if fit is None else stream.fit_few, fit_longest

    def _step_settings(self) -> dict[str, Any]:
        return {"inner": getattr(self.model, "packed_scores", None)}

    def train(self, *args: Any, **keywords: Any) -> Any:
        """Train, as `sentence_transformers.CrossEncoderTrainer.train`."""
        model: Any = self.model
        if self._preparation is None:
            return super().train(*args, **keywords)
        packs = self._preparation.packed is not None
        losses = [loss for loss in self._losses() if isinstance(loss, nn.Module)]
        undo = [join(loss, self._say) for loss in losses] if packs else []
        model.preprocess = _Preprocess(self, model.preprocess)
        try:
            return super().train(*args, **keywords)
        finally:
            del model.preprocess
            for one in undo:
                one()


class _Preprocess:
    """A model's `preprocess` for as long as a run trains it: tokens that texts carry are found, others are made."""

    def __init__(self, trainer: CrossEncoderTrainer, own: Any) -> None:
        self._trainer, self._own = trainer, own

    def __call__(self, inputs: Sequence[Any], prompt: str | None = None, **keywords: Any) -> dict[str, Any]:
        recipe = self._trainer._pairs
        model: Any = self._trainer.model
        asked = [name for name, value in keywords.items() if value is not None]
        if recipe is not None and not asked and model.burnish.packed is not None:
            if (found := recipe.features(inputs, prompt)) is not None:
                return _on(model.device, found)
            if model.training and torch.is_grad_enabled() and len(inputs):
                self._trainer._say(f"some pairs are tokenised in the step: {_why(inputs)}")
        own: dict[str, Any] = self._own(inputs, prompt=prompt, **keywords)
        return own


def _why(inputs: Sequence[Any]) -> str:
    texts = [inputs[0]] if isinstance(inputs[0], str) else list(inputs[0])
    # Of a pair that is stored whole, the first text carries none.
    carrying = [text for text in texts if isinstance(text, TokenisedText)]
    if len(carrying) == len(texts) or any(text.partner is not None for text in carrying):
        return "the loss puts texts together otherwise than the columns stand"
    return "the loss makes texts of its own"


def _on(device: torch.device, features: dict[str, Any]) -> dict[str, Any]:
    """Features on the device, copied there while it computes."""
    if device.type != "cuda":
        return features
    return {
        name: value.pin_memory().to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in features.items()
    }


__all__ = ["CrossEncoderTrainer", "CrossEncoderTrainingArguments"]
