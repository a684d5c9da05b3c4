"""One step of a trainer of cross-encoders, ours or Sentence Transformers', with the gradients that it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder as StockEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as StockArguments
from torch import Tensor, nn
from transformers import TrainerCallback

from burnish.core.arguments import CrossEncoderTrainingArguments
from burnish.core.cross_encoder import CrossEncoder
from burnish.core.cross_encoder_trainer import CrossEncoderTrainer

Make = Callable[[Any], Any]


class Seen(TrainerCallback):
    """The gradients of a step, before the optimizer uses them."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.gradients = model, dict[str, Tensor]()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.gradients = {
            name: weight.grad.clone() for name, weight in self.model.named_parameters() if weight.grad is not None
        }


def step(
    kind: Any, folder: Path, make: Make, data: Any, output: Path, arguments: dict[str, Any] | None = None
) -> tuple[float, dict[str, Tensor], Any]:
    """One step of a trainer in float64: its loss, its gradients and the trainer."""
    ours = issubclass(kind, CrossEncoderTrainer)
    model: Any = (CrossEncoder if ours else StockEncoder)(str(folder), device="cpu").double()
    how = CrossEncoderTrainingArguments if ours else StockArguments
    settings: dict[str, Any] = {
        "max_steps": 1, "per_device_train_batch_size": 6, "report_to": "none", "use_cpu": True, "max_grad_norm": 0.0,
        "save_strategy": "no", "disable_tqdm": True, **(arguments or {}),
    }  # fmt: skip
    found: list[float] = []

    class Measured(kind):  # type: ignore[misc]
        def training_step(self, *given: Any, **keywords: Any) -> Tensor:
            torch.manual_seed(7)  # losses draw negatives
            loss: Tensor = super().training_step(*given, **keywords)
            found.append(loss.item())
            return loss

    seen = Seen(model)
    trainer = Measured(model, how(str(output), **settings), train_dataset=data, loss=make(model), callbacks=[seen])
    trainer.train()
    return found[0], seen.gradients, trainer


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float, *parts: str) -> None:
    """Gradients are equal up to a share of the largest, and not zero in the weights that `parts` name."""
    assert ours.keys() == theirs.keys() and len(ours) > 10
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    assert largest > 1e-4, "a gradient of zero proves nothing"
    alive = [name for name, gradient in theirs.items() if gradient.abs().max() > 1e-6 * largest]
    assert all(any(part in name for name in alive) for part in parts), alive
    for name, gradient in theirs.items():
        apart = (ours[name] - gradient).abs().max().item()
        assert apart <= tolerance * largest, (name, apart / largest)
