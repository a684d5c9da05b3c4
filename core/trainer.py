"""The trainer: Sentence Transformers' own, with the step handed to a backend and the run checked before it starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformerTrainingArguments as StockArguments
from sentence_transformers.base.sampler import BatchSamplers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from . import batching, stream
from .arguments import TrainingArguments as TrainingArguments
from .cached import PARKED, cached_step, in_parts, loss_of
from .contracts import StepContext
from .errors import ConfigError, ModelError, PluginError
from .feeding import feed, refusal
from .inputs import said_of_prompts
from .logged_loss import LoggedLoss
from .model import Preparation, SentenceTransformer
from .optimizer_trainer import OptimizingTrainer
from .out_of_memory import OutOfMemory, Room, is_out_of_memory
from .packing import needs_padding
from .selection import choose_kernel
from .tiled_loss import Undo, tile

if TYPE_CHECKING:
    from .choices import BackendChoice
    from .contracts import Step

# Up to this limit of a model all batches get one bound on their texts, so that a length more is no shape more. Blocks
# past a text's end cost nothing until they are tens of thousands.
LONG = 4096


class _Observers(TrainerCallback):
    """Hands what is logged to the plugins that observe steps."""

    def __init__(self, preparation: Preparation) -> None:
        self._hook = preparation.decision.registry.observers("step_finished")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **keywords: Any
    ) -> None:
        self._hook(step=state.global_step, logs=dict(logs or {}))


class Trainer(OptimizingTrainer):
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
        if model is not None:
            _check_trainable(model)
        super().__init__(model, *args, **keywords)
        self._step: Step | None = None
        self.engine: Step | None = None  # what the backend built, before its results are checked
        self._said: set[str] = set()
        self._logged = LoggedLoss()
        self.room = Room(self.model, self.args, self._say)
        self._chunks: dict[str, Any] = {}  # how a cached loss's chunks are filled up
        self.tokenise_seconds = 0.0  # spent before the first step on texts that were not in the token store
        preparation = getattr(self.model, "burnish", None)
        if preparation is None:
            return
        self._fit_input(preparation)
        if note := said_of_prompts(self.model, self.args):
            self._say(note)
        if preparation.decision.registry.claimants("observer", "step_finished"):
            self.add_callback(_Observers(preparation))

    def _fit_input(self, preparation: Preparation) -> None:
        """Pad the input where packed input would be wrong, or refuse where it was asked for by name."""
        if preparation.packed is None:
            return
        losses = [loss for loss in self._losses() if isinstance(loss, nn.Module)]
        reason = next((why for loss in losses if (why := needs_padding(loss))), None)
        if self.args.n_gpu > 1:
            reason = "DataParallel cuts a batch into rows; start one process a GPU with torchrun"
        if reason is None:
            return
        if preparation.decision.options.packed:
            raise ModelError(
                f"packed input cannot be used: {reason}",
                where="Trainer",
                fix="Load the model with packed=None or packed=False",
            )
        model: Any = self.model
        model.pad_inputs(reason)
        self._say(f"input is padded for this run ({reason})")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch through the backend; returns the detached loss, a scalar."""
        if self._step is None:
            self._step = self._build_step()
            self.room.forget = getattr(self.engine, "forget", self.room.forget)
        loss = self.room.run(self._step, model, inputs, num_items_in_batch, self._loss_of(inputs))
        return self._logged.filtered(loss, self.args) if loss.is_cuda else loss

    def get_batch_sampler(self, dataset: Any, *args: Any, **keywords: Any) -> Any:
        """As Sentence Transformers', with the same batches without duplicates found 30 times as fast."""
        wanted = (BatchSamplers.NO_DUPLICATES, BatchSamplers.NO_DUPLICATES_HASHED)
        labels = keywords.get("valid_label_columns")
        if self.args.batch_sampler in wanted and batching.fits(dataset, labels):
            return batching.NoDuplicates(dataset, *args, **keywords)
        return super().get_batch_sampler(dataset, *args, **keywords)

    def _build_dataloader(self, dataset: Any, batch_size: int, dataset_kind: str) -> DataLoader[Any]:
        loader: DataLoader[Any] = super()._build_dataloader(dataset, batch_size, dataset_kind)
        store = getattr(self.args, "token_store", True)
        if dataset_kind != "train" or store is False or getattr(self.model, "burnish", None) is None:
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
        model: Any = self.model
        if model.burnish.decision.backend.spec.few_shapes:
            limit = model.max_seq_length
            steady = limit is not None and limit <= LONG
            found.collator.fit = stream.fit_eighths
            found.collator.fit_longest = stream.fit_octave if limit is None else partial(stream.fit_within, limit)
            if steady:
                found.collator.fit_longest = partial(max, -(-limit // 64) * 64)
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
        preparation = getattr(self.model, "burnish", None)
        if preparation is None or preparation.recompute != "offload":
            return False
        return preparation.decision.options.activation_budget_gb is None

    def _loss_of(self, inputs: Mapping[str, Any]) -> Any:
        return self.loss[inputs["dataset_name"]] if isinstance(self.loss, dict) else self.loss

    def _maybe_log_save_evaluate(self, *args: Any, **keywords: Any) -> Any:
        self._logged.restore(self.args, logging=self.control.should_log)
        return super()._maybe_log_save_evaluate(*args, **keywords)

    def train(self, *args: Any, **keywords: Any) -> Any:
        """Train, as `SentenceTransformerTrainer.train`."""
        undo = self._tile_losses()
        try:
            return super().train(*args, **keywords)
        except RuntimeError as error:
            if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
                raise
            raise self.room.advice() from error  # outside of a step: the optimizer's states, or an evaluation
        finally:
            self._logged.restore(self.args, logging=True)
            self.room.forget()  # graphs of a run that is over: gigabytes, for as long as something holds the trainer
            for one in undo:
                one()

    def _losses(self) -> list[nn.Module]:
        return list(self.loss.values()) if isinstance(self.loss, dict) else [self.loss]

    def _tile_losses(self) -> list[Undo]:
        """Have losses with in-batch negatives do without a matrix of scores where a batch is large."""
        preparation = getattr(self.model, "burnish", None)
        if preparation is None:
            return []
        decision = preparation.decision
        choice = choose_kernel(decision.registry, decision.machine, "tiled_infonce")
        losses = [loss for loss in self._losses() if isinstance(loss, nn.Module)]
        return [] if choice is None else [tile(loss, choice.load()) for loss in losses]

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            print(f"burnish: {line}", file=sys.stderr)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:  # type: ignore[override]
        """Take the trained weights out of a checkpoint; frozen ones, perhaps quantised, are what they were.

        Raises:
            ModelError: If the checkpoint lacks one of them.
        """
        model = getattr(self.model, "_orig_mod", self.model)
        if not isinstance(model, SentenceTransformer) or model.burnish is None:
            super()._load_from_checkpoint(checkpoint_path)
            return
        saved = model.read_checkpoint(checkpoint_path)
        wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if lacking := [name for name in wanted if name not in saved]:
            fix = "Resume with the adapter or model that the checkpoint was saved from"
            raise ModelError(f"it has no {lacking[0]}", where=f"checkpoint {checkpoint_path}", fix=fix)
        model.load_state_dict({name: saved[name] for name in wanted}, strict=False)

    def _load_best_model(self) -> None:
        # Sentence Transformers logs whatever goes wrong here and goes on with the last weights instead of the best.
        best = str(self.state.best_model_checkpoint)
        step = best.rpartition("-")[2]
        if step.isdigit():
            self.model.model_card_data.set_best_model_step(int(step))
        self._load_from_checkpoint(best)

    def _build_step(self) -> Step:
        stock: Any = super().training_step
        eager: Step = stock
        preparation = getattr(self.model, "burnish", None)
        if preparation is None:  # a plain SentenceTransformer trains as Sentence Transformers would train it
            return eager
        decision = preparation.decision
        budget = decision.options.activation_budget_gb
        context = StepContext(
            model=self.model, family=decision.family.family, machine=decision.machine, arguments=self.args,
            loss=self.loss, eager=eager, constants=lambda: (self.current_gradient_accumulation_steps,), say=self._say,
            checkpointing=preparation.recompute, activation_budget=None if budget is None else budget * 1e9,
            host_work=lambda batch: self.room.host_work(batch, self._loss_of(batch)),
        )  # fmt: skip
        built = self.engine = decision.backend.build_step(context)
        return built if built is eager else _checked(built, decision.backend)


def _checked(step: Step, choice: BackendChoice) -> Step:
    """A backend's step, with what it returns looked at: the loop adds losses up, whatever they are."""

    def checked(model: nn.Module, batch: Mapping[str, Any], items: Any) -> Tensor:
        loss: object = step(model, batch, items)
        if isinstance(loss, Tensor) and loss.dim() == 0 and not loss.requires_grad:
            return loss
        found = f"a {type(loss).__name__}"
        if isinstance(loss, Tensor):
            found = f"a tensor of the shape {tuple(loss.shape)}{' with a graph' if loss.requires_grad else ''}"
        what = f"its step returned {found}, not the loss, detached, as a tensor of the shape ()"
        where = f"backend {choice.spec.name} of {choice.plugin.label}"
        raise PluginError(what, where=where, fix="Mend it, or choose another backend")

    return checked


def _check_trainable(model: nn.Module) -> None:
    preparation = getattr(model, "burnish", None)
    if preparation is not None and preparation.decision.options.purpose == "inference":
        raise ModelError(
            "this model was loaded with for_inference=True", where="Trainer", fix="Load it without for_inference"
        )
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError(
            "no weight of this model is trainable",
            where="Trainer",
            fix="Call FastSentenceTransformer.get_peft_model, or load with full_finetuning=True",
        )
    if preparation is None or preparation.decision.options.purpose != "adapters":
        return
    halves = [name for name, parameter in trained if parameter.dtype in (torch.float16, torch.bfloat16)]
    if halves:
        what = f"{len(halves)} weights would train in half precision (the first is {halves[0]})"
        raise ModelError(
            what,
            where="Trainer",
            fix="Call FastSentenceTransformer.get_peft_model, or load with full_finetuning=True for float32 masters",
        )


SentenceTransformerTrainer = Trainer
SentenceTransformerTrainingArguments = TrainingArguments

__all__ = [
    "SentenceTransformer",
    "SentenceTransformerTrainer",
    "SentenceTransformerTrainingArguments",
    "Trainer",
    "TrainingArguments",
]
