"""Lines of results: read, and compared. A ratio stands only between lines of one run on one device.

Loads neither torch nor matplotlib.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]

PART = ("model", "mode", "seq", "batch", "lengths", "checkpointing", "dropout")
"""What two lines must agree in to be compared, beside run and device."""
MORE_IS_BETTER = {
    "pairs_per_s": True,
    "pairs_per_s_warm_store": True,
    "steady_ms_mean": False,
    "step_ms_median": False,
    "first_step_s": False,
    "peak_gib": False,
    "reserved_gib": False,
    "rss_gib": False,
}
"""The figures that can be compared; a ratio above 1 is always in favour of the first system."""

BEST = {"st": ("st-fa2", "st-eager")}
"""A peer with the best attention that transformers has for a model: FlashAttention-2, for MPNet only the eager one."""


def systems_of(peer: str) -> tuple[str, ...]:
    """The systems that stand for a peer, the preferred first: those of `BEST`, or itself."""
    return BEST.get(peer, (peer,))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One cell of one run: the ratio between two systems, or why there is none.

    Args:
        cell: The cell's values, in the order of `PART`.
        run: The run.
        device: The device.
        ratio: Above 1 where the first system is better.
        lacking: The system that gave no result; None where both did.
    """

    cell: tuple[Any, ...]
    run: str
    device: str
    ratio: float | None
    lacking: str | None = None

    def __getitem__(self, name: str) -> Any:
        return self.cell[PART.index(name)]


def read(paths: Iterable[Path]) -> list[Line]:
    """The lines of files.

    Raises:
        ValueError: If a line is not JSON; it names file and line.
    """
    found = []
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not text.strip():
                continue
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return [line for line in found if "system" in line and "run" in line]


def compare(lines: Sequence[Line], system: str, peer: str, figure: str) -> list[Comparison]:
    """How `system` does against `peer` in every cell that one run has of both; of several runs, the last.

    Args:
        lines: Lines, the older first.
        system: The first system.
        peer: The second, or a key of `BEST` for whichever of its systems a run has, the first named first.
        figure: A key of `MORE_IS_BETTER`.
    """
    found: dict[tuple[Any, ...], dict[str, Line]] = {}
    for line in lines:
        cell = tuple(line[name] for name in PART)
        found.setdefault((line["device"], cell, line["run"]), {})[line["system"]] = line
    last: dict[tuple[Any, ...], Comparison] = {}
    for (device, cell, run), systems in found.items():
        other = next((systems[name] for name in systems_of(peer) if name in systems), None)
        if system in systems and other is not None:
            # A later run takes the place of an earlier one, unless it failed where that one had a result.
            made = _compared(cell, run, device, systems[system], other, figure)
            before = last.get((device, cell))
            if made.ratio is not None or before is None or before.ratio is None:
                last[device, cell] = made
    return list(last.values())


def _compared(cell: tuple[Any, ...], run: str, device: str, first: Line, second: Line, figure: str) -> Comparison:
    for line in (first, second):
        if "error" in line or line.get(figure) is None:
            return Comparison(cell, run, device, None, line["system"])
    ratio = float(first[figure]) / float(second[figure])
    return Comparison(cell, run, device, ratio if MORE_IS_BETTER[figure] else 1 / ratio)


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """The geometric mean; None of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
