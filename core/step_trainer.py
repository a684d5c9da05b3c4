"""What every trainer of Burnish does beside computing a loss: the step goes to a backend, and the run is checked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from sentence_transformers.base.sampler import BatchSamplers
from torch import Tensor, nn
from transformers import TrainerCallback

from . import batching, stream
from .contracts import StepContext
from .deploy import checkpoint
from .errors import ModelError, PluginError
from .logged_loss import LoggedLoss
from .optimizer_trainer import OptimizingTrainer
from .out_of_memory import OutOfMemory, Room, is_out_of_memory
from .preparation import Preparation
from .training_cost import TrainingCost

if TYPE_CHECKING:
    from .choices import BackendChoice
    from .contracts import Step
    from .prepared import Prepared

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


class SteppingTrainer(OptimizingTrainer):
    """A mixin over one of Sentence Transformers' trainers, for models that Burnish loaded; others train as they would.

    The step is executed by the backend that was chosen at load time.

    Raises:
        ConfigError: If the optimizer that the arguments choose cannot be had here.
        ModelError: If the model cannot be trained as it is: stock for inference, nothing trainable, or a half-precision
            base that was meant for an adapter it never got.
    """

    loaded_by: ClassVar[str] = "FastSentenceTransformer"
    """The class that a message tells the user to load the model with."""

    def __init__(self, model: Any = None, *args: Any, **keywords: Any) -> None:
        if model is not None:
            _check_trainable(model, self.loaded_by)
        super().__init__(model, *args, **keywords)
        self._step: Step | None = None
        self.engine: Step | None = None  # what the backend built, before its results are checked
        self._said: set[str] = set()
        self._logged = LoggedLoss()
        self.room = Room(self.model, self.args, self._say)
        self.tokenise_seconds = 0.0  # spent before the first step on texts that were not in the token store
        preparation = self._preparation
        if preparation is None:
            return
        self._fit_input(preparation)
        self.add_callback(TrainingCost(cast("Prepared", self.model)))
        if preparation.decision.registry.claimants("observer", "step_finished"):
            self.add_callback(_Observers(preparation))

    @property
    def _preparation(self) -> Preparation | None:
        """What Burnish did to the model; None where it did nothing."""
        found: Preparation | None = getattr(self.model, "burnish", None)
        return found

    def _fit_input(self, preparation: Preparation) -> None:
        """Pad the input where packed input would be wrong, or refuse where it was asked for by name."""
        if preparation.packed is None:
            return
        reason = self._needs_padding()
        if self.args.n_gpu > 1:
            reason = "DataParallel cuts a batch into rows; start one process a GPU with torchrun"
        if reason is None:
            return
        if preparation.decision.options.packed:
            raise ModelError(
                f"packed input cannot be used: {reason}",
                where=type(self).__name__,
                fix="Load the model with packed=None or packed=False",
            )
        model: Any = self.model
        model.pad_inputs(reason)
        self._say(f"input is padded for this run ({reason})")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The model saves its tokenizer itself, in the layout of the rest; Sentence Transformers' trainer would write it
        # once more over that.
        tokenizer, self.processing_class = self.processing_class, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = tokenizer

    def _save_checkpoint(self, *args: Any, **keywords: Any) -> None:
        with checkpoint():
            super()._save_checkpoint(*args, **keywords)

    def _needs_padding(self) -> str | None:
        """Why the run's losses must be given padded input; None if they take packed input."""
        return None

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

    def _shapes(self) -> tuple[stream.Fit | None, stream.Fit | None]:
        """`fit` and `fit_longest` of `stream.flatten` for the run's streams; None where they may have any shape."""
        model: Any = self.model
        if not model.burnish.decision.backend.spec.few_shapes:
            return None, None
        limit = model.max_seq_length
        if limit is None:
            return stream.fit_eighths, stream.fit_octave
        if limit <= LONG:
            return stream.fit_eighths, partial(max, -(-limit // 64) * 64)
        return stream.fit_eighths, partial(stream.fit_within, limit)

    def _losses(self) -> list[nn.Module]:
        return list(self.loss.values()) if isinstance(self.loss, dict) else [self.loss]

    def _loss_of(self, inputs: Mapping[str, Any]) -> Any:
        return self.loss[inputs["dataset_name"]] if isinstance(self.loss, dict) else self.loss

    def _maybe_log_save_evaluate(self, *args: Any, **keywords: Any) -> Any:
        self._logged.restore(self.args, logging=self.control.should_log)
        return super()._maybe_log_save_evaluate(*args, **keywords)

    def train(self, *args: Any, **keywords: Any) -> Any:
        """Train, as Sentence Transformers' trainer does."""
        try:
            return super().train(*args, **keywords)
        except RuntimeError as error:
            if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
                raise
            raise self.room.advice() from error  # outside of a step: the optimizer's states, or an evaluation
        finally:
            self._logged.restore(self.args, logging=True)
            self.room.forget()  # graphs of a run that is over: gigabytes, for as long as something holds the trainer

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            print(f"burnish: {line}", file=sys.stderr)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:  # type: ignore[override]
        """Take the trained weights out of a checkpoint; frozen ones, perhaps quantised, are what they were.

        Raises:
            ModelError: If the checkpoint lacks one of them.
        """
        model: Any = getattr(self.model, "_orig_mod", self.model)
        if getattr(model, "burnish", None) is None:
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
            card: Any = self.model.model_card_data
            card.set_best_model_step(int(step))
        self._load_from_checkpoint(best)

    def _build_step(self) -> Step:
        stock: Any = super().training_step
        eager: Step = stock
        preparation = self._preparation
        if preparation is None:  # a plain model trains as Sentence Transformers would train it
            return eager
        decision = preparation.decision
        budget = decision.options.activation_budget_gb
        context = StepContext(
            model=self.model, family=decision.family.family, machine=decision.machine, arguments=self.args,
            loss=self.loss, eager=eager, constants=lambda: (self.current_gradient_accumulation_steps,), say=self._say,
            checkpointing=preparation.recompute, activation_budget=None if budget is None else budget * 1e9,
            **self._step_settings(),
        )  # fmt: skip
        built = self.engine = decision.backend.build_step(context)
        return built if built is eager else _checked(built, decision.backend)

    def _step_settings(self) -> dict[str, Any]:
        """What the backend is told beside what every trainer tells it: more of `StepContext`."""
        return {}


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


def _check_trainable(model: nn.Module, loaded_by: str) -> None:
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
            fix=f"Call {loaded_by}.get_peft_model, or load with full_finetuning=True",
        )
    if preparation is None or preparation.decision.options.purpose != "adapters":
        return
    halves = [name for name, parameter in trained if parameter.dtype in (torch.float16, torch.bfloat16)]
    if halves:
        what = f"{len(halves)} weights would train in half precision (the first is {halves[0]})"
        raise ModelError(
            what,
            where="Trainer",
            fix=f"Call {loaded_by}.get_peft_model, or load with full_finetuning=True for float32 masters",
        )
