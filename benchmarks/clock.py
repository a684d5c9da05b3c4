"""The steps' clock of one cell: when each step ended, and which steps compiled or captured something new."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any


class Clock:
    """Marks the end of each step, and stops the training after the last timed one.

    Args:
        trainer: A function to the trainer; it is made after the clock.
        warmup: Steps before the first timed one.
        steps: Timed steps.
        cuda: Whether marks are CUDA events, on the device's own clock.
    """

    def __init__(self, trainer: Callable[[], Any], warmup: int, steps: int, cuda: bool) -> None:
        self.trainer, self.warmup, self.stop, self.cuda = trainer, warmup, warmup + steps, cuda
        self.marks: list[Any] = []
        self.shapes: list[int] = []  # how many shapes were compiled or captured by the end of each step
        self.losses: list[float] = []
        self.first = 0.0

    def callback(self) -> Any:
        """The clock as a callback of transformers' trainer, which is imported only now."""
        from transformers import TrainerCallback

        clock = self

        class Marks(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
                clock.mark()
                control.should_training_stop = state.global_step >= clock.stop

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
                if logs and "loss" in logs:
                    clock.losses.append(round(float(logs["loss"]), 4))

        return Marks()

    def mark(self) -> None:
        """The end of a step. The first is waited for, once: when it is done is a figure of its own."""
        if self.cuda:
            import torch

            events: Any = torch.cuda.Event
            event = events(enable_timing=True)
            event.record()
            if not self.marks:
                event.synchronize()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
        self.first = self.first or time.perf_counter()
        self.shapes.append(shapes_so_far(self.trainer()))

    def gaps(self) -> list[float]:
        """Milliseconds of each timed step.

        Raises:
            SystemExit: If training ended before the last of them.
        """
        if len(self.marks) < self.stop:
            raise SystemExit(f"training ended after {len(self.marks)} steps, before the timed ones were done")
        marks = self.marks[self.warmup - 1 : self.stop]
        if not self.cuda:
            return [(after - before) * 1e3 for before, after in pairwise(marks)]
        marks[-1].synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(marks)]

    def steady(self) -> int:
        """How many of the timed steps, the first ones, must be left out so that none of the rest met a new shape."""
        return last_change(self.shapes[self.warmup - 1 : self.stop])


def last_change(counts: list[int]) -> int:
    """The place of the last value that differs from the one before it; 0 if none does."""
    return max((place for place, (before, after) in enumerate(pairwise(counts), start=1) if after != before), default=0)


def shapes_so_far(trainer: Any) -> int:
    """Graphs that torch.compile made in this process, and steps that Burnish's engine warmed up or captured."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    compiled = int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0
    counts = getattr(getattr(trainer, "engine", None), "counts", {})
    return compiled + sum(int(counts.get(name, 0)) for name in ("warm-up", "captured"))


def step_times(gaps: list[float], steady: int) -> dict[str, Any]:
    """Figures of the timed steps, and of those after the last that compiled or captured; None where none is left."""
    rest = gaps[steady:]
    return {
        "step_ms_median": round(statistics.median(gaps), 3),
        "step_ms_mean": round(statistics.fmean(gaps), 3),
        "step_ms_max": round(max(gaps), 3),
        "steady_steps": len(rest),
        "steady_ms_median": round(statistics.median(rest), 3) if rest else None,
        "steady_ms_mean": round(statistics.fmean(rest), 3) if rest else None,
    }
