"""One bar for a training run: how far, how fast, the loss and the time left; plain lines where there is no terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sized
from contextlib import ExitStack
from math import ceil
from typing import Any, TextIO, TypedDict

from tqdm import tqdm  # type: ignore[import-untyped]
from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils.import_utils import is_in_notebook

# Without a terminal: a line each tenth of the run, 2 s apart at least, and one each 30 s in a long run.
TENTH, LEAST, MOST = 0.1, 2.0, 30.0
LAYOUT = "{desc} {percentage:3.0f}%|{bar}| {pairs} pairs, {speed} pairs/s, {remaining} left{postfix}"
# What an evaluation logs about itself rather than about the model.
HOUSEKEEPING = ("_runtime", "_per_second", "_preparation_time")


class HistoryRow(TypedDict):
    """One logged point. Speed and time are None for points that a resumed run took over from its checkpoint."""

    step: int
    loss: float
    learning_rate: float | None
    pairs_per_second: float | None
    seconds: float | None


class _Bar(tqdm):  # type: ignore[misc]
    """A tqdm bar that writes its counts as the lines do: 1,024/1,401 rather than 1.02k/1.40k."""

    @property
    def format_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().format_dict
        rate = values["rate"] or (self.n - self.initial) / max(values["elapsed"], 1e-9)
        return {**values, "pairs": f"{self.n:,}/{self.total:,}", "speed": f"{rate:,.1f}"}


def _console_loggers() -> list[logging.Logger]:
    """The loggers that write to the terminal themselves, transformers' own and the root among them."""
    known = [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]
    return [
        logger
        for logger in known
        if isinstance(logger, logging.Logger)
        and any(
            isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
            for handler in logger.handlers
        )
    ]


def _pairs_in_run(args: TrainingArguments, state: TrainerState, data: object) -> int:
    """Rows the run will train on: steps x batch x accumulation x processes, less what a last short batch lacks."""
    # With auto_find_batch_size the state holds the size in use; otherwise a checkpoint's may be an older one.
    batch = (args.auto_find_batch_size and state.train_batch_size) or args.train_batch_size
    most: int = state.max_steps * batch * args.gradient_accumulation_steps * args.world_size
    if args.max_steps <= 0 and isinstance(data, Sized):
        return min(most, ceil(args.num_train_epochs * len(data)))
    return most


def _taken_over(state: TrainerState) -> list[HistoryRow]:
    """What a checkpoint's state tells of the run so far; empty for a fresh run."""
    return [
        HistoryRow(
            step=int(row["step"]),
            loss=row["loss"],
            learning_rate=row.get("learning_rate"),
            pairs_per_second=None,
            seconds=None,
        )
        for row in state.log_history
        if "loss" in row
    ]


class ProgressCallback(TrainerCallback):
    """Shows a training run and keeps its `history`, without ever waiting for the device.

    The loss is what the trainer logs each `logging_steps`: nothing here reads a tensor. Time spent in evaluations
    and saves counts neither for the speed nor for the time left. Only the first process of a run shows anything.

    Args:
        file: Where to write; standard error if not given. A terminal or notebook gets a bar, anything else, or a
            run with `disable_tqdm`, a line now and then.
        clock: Seconds from any origin, for tests.

    Attributes:
        history: One `HistoryRow` for each logged loss, earlier ones included when a run is resumed.
    """

    def __init__(self, file: TextIO | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.history: list[HistoryRow] = []
        self._given_file, self._clock = file, clock
        self._bar: Any = None
        self._evaluation_bar: Any = None
        self._live = self._shown = False
        self._redirection = ExitStack()
        self._loss: float | None = None
        self._total = self._pairs = 0
        # Seconds of the clock: the start, the last event, and what was spent on other things than training.
        self._began = self._last = self._idle = 0.0
        # Pairs done before this run, and (pairs, seconds of training) at the last logged loss and at the last line.
        self._start = 0
        self._logged = self._told = (0, 0.0)

    @property
    def _file(self) -> TextIO:
        return self._given_file or sys.stderr

    def _is_live(self, args: TrainingArguments) -> bool:
        return not args.disable_tqdm and (self._file.isatty() or is_in_notebook())

    def _training_seconds(self) -> float:
        return self._clock() - self._began - self._idle

    def _pause(self) -> None:
        """Take the time since the last step, log or pause out of the account."""
        now = self._clock()
        self._idle += now - self._last
        self._last = now
        if self._bar is not None:
            self._bar.unpause()

    def _say(self, line: str) -> None:
        if not self._shown:
            return
        if self._live:
            tqdm.write(line, file=self._file)
        else:
            print(line, file=self._file, flush=True)

    def _say_where(self) -> None:
        """One line, with the mean speed so far: that of the last few seconds makes the time left jump about."""
        now = self._training_seconds()
        rate = (self._pairs - self._start) / max(now, 1e-9)
        left = tqdm.format_interval((self._total - self._pairs) / rate) if rate else "?"
        loss = "" if self._loss is None else f", loss {self._loss:.4f}"
        done = f"{100 * self._pairs // max(self._total, 1):3d}%  {self._pairs:,}/{self._total:,} pairs"
        self._say(f"{done}, {rate:,.1f} pairs/s, {left} left{loss}")
        self._told = (self._pairs, now)

    def close(self) -> None:
        """Take the bars down and give the loggers their handlers back; for a run that ended in an exception, too."""
        self._close_evaluation_bar()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._redirection.close()

    def _close_evaluation_bar(self) -> None:
        if self._evaluation_bar is not None:
            self._evaluation_bar.close()
            self._evaluation_bar = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        self._shown, self._live = state.is_world_process_zero, self._is_live(args)
        self._total = _pairs_in_run(args, state, getattr(kwargs.get("train_dataloader"), "dataset", None))
        self._pairs = self._pairs_at(state)
        self._start = self._pairs
        self._logged = self._told = (self._pairs, 0.0)
        self._began = self._last = self._clock()
        self._idle, self._loss = 0.0, None
        self.history = _taken_over(state)
        if self._shown and self._live:
            self._redirection.enter_context(logging_redirect_tqdm(_console_loggers()))
            self._bar = _Bar(
                desc="Training",
                total=self._total,
                initial=self._pairs,
                smoothing=0.1,
                dynamic_ncols=True,
                bar_format=LAYOUT,
                file=self._file,
            )
        else:
            begun = f", from step {state.global_step:,}" if state.global_step else ""
            self._say(f"Training on {self._total:,} pairs in {state.max_steps:,} steps{begun}")

    def _pairs_at(self, state: TrainerState) -> int:
        """In proportion, so that the last step always ends on the total, short last batches or not."""
        return round(self._total * state.global_step / max(state.max_steps, 1))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last = self._clock()
        self._pairs = self._pairs_at(state)
        if self._bar is not None:
            self._bar.update(self._pairs - self._bar.n)
        elif self._pairs < self._total:
            pairs, seconds = self._told
            waited = self._training_seconds() - seconds
            if waited >= MOST or (waited >= LEAST and self._pairs - pairs >= TENTH * self._total):
                self._say_where()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._record(state.global_step, logs)
        results = {
            name: value
            for name, value in logs.items()
            if name.startswith("eval_") and not name.endswith(HOUSEKEEPING) and isinstance(value, (int, float))
        }
        if results:
            self._say(
                f"step {state.global_step:,}: " + ", ".join(f"{name} {value:.4g}" for name, value in results.items())
            )

    def _record(self, step: int, logs: dict[str, Any]) -> None:
        self._last, seconds = self._clock(), self._training_seconds()
        pairs, before = self._logged
        self._loss = float(logs["loss"])
        self.history.append(
            HistoryRow(
                step=step,
                loss=self._loss,
                learning_rate=logs.get("learning_rate"),
                pairs_per_second=(self._pairs - pairs) / max(seconds - before, 1e-9),
                seconds=seconds,
            )
        )
        self._logged = (self._pairs, seconds)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {self._loss:.4f}", refresh=False)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loader = kwargs.get("eval_dataloader")
        if not (state.is_world_process_zero and self._is_live(args) and isinstance(loader, Sized)):
            return
        if self._evaluation_bar is None:
            self._evaluation_bar = tqdm(
                desc="Evaluating", total=len(loader), leave=False, dynamic_ncols=True, file=self._file
            )
        self._evaluation_bar.update(1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._close_evaluation_bar()
        self._pause()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        self.on_evaluate(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._pause()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        if not self._live:
            pairs, seconds = self._pairs - self._start, self._training_seconds()
            loss = "" if self._loss is None else f", last loss {self._loss:.4f}"
            rate = f"{pairs / max(seconds, 1e-9):,.1f} pairs/s"
            self._say(f"Trained on {pairs:,} pairs in {tqdm.format_interval(seconds)}, {rate}{loss}")


def install_progress(trainer: Trainer) -> ProgressCallback:
    """Give `trainer` this progress bar in place of transformers' bar and printed dictionaries, and return it.

    A trainer that has one already keeps it. Call `close()` on what is returned if `train()` raises.
    """
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_callback import ProgressCallback as StockProgressCallback

    callbacks = trainer.callback_handler.callbacks
    stock = (StockProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK)
    for callback in [one for one in callbacks if isinstance(one, stock)]:
        trainer.remove_callback(callback)
    for callback in callbacks:
        if isinstance(callback, ProgressCallback):
            return callback
    progress = ProgressCallback()
    trainer.add_callback(progress)
    return progress
