"""What a training takes, written on the model's card."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .card_facts import Cost, power_limit
from .environment import describe_environment

if TYPE_CHECKING:
    from .prepared import Prepared


class TrainingCost(TrainerCallback):
    """Writes what a training takes on the card of the model that is trained."""

    def __init__(self, model: Prepared) -> None:
        self._model, self._began, self._first = model, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self._began, self._first = time.perf_counter(), state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if not state.is_world_process_zero:
            return
        device = str(self._model.device)
        data: Any = self._model.model_card_data
        self._model.card.cost = Cost(
            seconds=time.perf_counter() - self._began,
            first=self._first,
            last=state.global_step,
            hardware=describe_environment(device)["device"],
            devices=args.world_size,
            watts=power_limit(device),
            measured=data.code_carbon_callback is not None,
        )
