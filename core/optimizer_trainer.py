"""Sentence Transformers' trainers with the optimizers that `burnish.TrainingArguments` chooses."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.base.trainer import BaseTrainer
from torch import Tensor, nn

from .errors import PluginError
from .optimizer_checks import check_arguments, check_model, is_bitsandbytes, wants
from .optimizers import AdamW, InBackward, Rounding, clip, tables_of
from .selection import choose_kernel


class OptimizingTrainer(BaseTrainer):
    """A mixin over one of Sentence Transformers' trainers that steps weights as the arguments say: docs/optimizers.md.

    Raises:
        ConfigError: If they cannot be honoured for this model, loss or device.
    """

    def __init__(self, model: Any = None, *args: Any, **keywords: Any) -> None:
        super().__init__(model, *args, **keywords)
        self._in_backward: InBackward | None = None
        self._tables: list[nn.Embedding] = []
        check_arguments(self.args)
        losses = self.loss.values() if isinstance(self.loss, dict) else [self.loss]
        given = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        check_model(self.args, self.model, losses, given, len(tables_of(self.model)))

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        """As Sentence Transformers', with AdamW of ours where a flag needs it."""
        kind, keywords = super().get_optimizer_cls_and_kwargs(args, model)
        if wants(args, "stochastic_rounding") or wants(args, "sparse_embeddings"):
            kind = AdamW
            if wants(args, "stochastic_rounding"):
                keywords["rounding"] = Rounding(_rounded_adamw(self.model), args.seed)
        return kind, keywords

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As transformers', and what is to be different in training for as long as `train` runs."""
        fresh = self.optimizer is None
        theirs = is_bitsandbytes(self.args)
        before = _overrides() if theirs and fresh else 0
        optimizer: Any = super().create_optimizer(model)
        bare = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if theirs and fresh:
            _keep_overrides(bare, before)
        if wants(self.args, "sparse_embeddings") and not self._tables:
            self._tables = [table for table in tables_of(self.model) if not table.sparse]
            for table in self._tables:
                table.sparse = True
            accelerator: Any = self.accelerator
            accelerator.clip_grad_norm_ = _clip
        if wants(self.args, "optimizer_in_backward") and self._in_backward is None:
            names = {weight: name for name, weight in self.model.named_parameters()}
            stepping = self._in_backward = InBackward(bare, names)
            accelerator = self.accelerator
            # Nothing is clipped, which `max_grad_norm=0` says; the norm is asked for to be logged.
            accelerator.clip_grad_norm_ = lambda parameters, limit, norm_type=2: stepping.norm()
        return optimizer  # type: ignore[no-any-return]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As Sentence Transformers'."""
        if self._in_backward is not None:
            self._in_backward.begin()
        return super().training_step(model, inputs, num_items_in_batch)

    def train(self, *args: Any, **keywords: Any) -> Any:
        """As Sentence Transformers'; nothing is left on the model."""
        try:
            return super().train(*args, **keywords)
        finally:
            if self._in_backward is not None:
                self._in_backward.remove()
                self._in_backward = None
            for table in self._tables:
                table.sparse = False
            self._tables = []
            vars(self.accelerator).pop("clip_grad_norm_", None)


def _clip(parameters: Any, limit: float, norm_type: int = 2) -> Tensor:
    """accelerate's `clip_grad_norm_`, in one process, where torch's cannot take a sparse gradient's norm."""
    assert norm_type == 2, "the trainer asks for the 2-norm"
    return clip(parameters, float(limit))


def _rounded_adamw(model: Any) -> Any:
    decision = model.burnish.decision
    choice = choose_kernel(decision.registry, decision.machine, "rounded_adamw")
    if choice is None:
        fix = "Enable the reference backend: burnish plugins enable reference"
        raise PluginError("no enabled plugin has the operation rounded_adamw", where="stochastic_rounding", fix=fix)
    return choice.load()


def _overrides() -> int:
    """How many weights of whichever optimizers bitsandbytes' one manager has been told to keep in 32 bits."""
    from bitsandbytes import optim

    manager: Any = optim.GlobalOptimManager  # type: ignore[attr-defined]
    return len(manager.get_instance().module_weight_config_triple)


def _keep_overrides(optimizer: Any, before: int) -> None:
    """Give an optimizer of bitsandbytes what it was told of its own weights, and its manager back what it had.

    transformers tells the manager, one for the process, to keep embeddings in 32 bits. It remembers them by their place
    in the optimizer and by `id`, for ever: the next model's weights in the same places would get 32 bits too, and this
    model would never be freed.
    """
    shared = optimizer.mng
    own = object.__new__(type(shared))  # its constructor refuses
    own.initialize()
    own.module_weight_config_triple = shared.module_weight_config_triple
    weights = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    own.pid2config = {one: config for one, config in shared.pid2config.items() if one in weights}
    optimizer.mng = own
    optimizer.check_overrides()
    own.index2config, own.module_weight_config_triple = {}, []
    del shared.module_weight_config_triple[before:]
