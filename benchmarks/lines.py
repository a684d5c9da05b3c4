"""Lines of results: read, and compared. A ratio stands only between lines of one run on one device.

Loads neither torch nor matplotlib.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]

PART = ("model", "mode", "seq", "batch", "lengths", "dropout", "task")
"""What two lines must agree in to be compared, beside run and device."""
SETTINGS: dict[str, Any] = {"checkpointing": False, "activation_budget_gb": None, "embedding_storage": None}
"""What each system may set as serves it best, and its plain value, which lines have that were written before."""
BEFORE: dict[str, Any] = {**SETTINGS, "task": "embedding"}
"""What lines say that were written before a part of the key existed."""
KEY = ("system", *PART, *SETTINGS)
"""What says which cell a line is of."""
MORE_IS_BETTER = {
    "pairs_per_s": True,
    "pairs_per_s_warm_store": True,
    "steady_ms_mean": False,
    "step_ms_median": False,
    "first_step_s": False,
    "peak_gib": False,
    "process_gib": False,
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
        lines: The two lines; None for one that lacks.
    """

    cell: tuple[Any, ...]
    run: str
    device: str
    ratio: float | None
    lacking: str | None = None
    lines: tuple[Line, Line] | None = field(default=None, compare=False)

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


def value(line: Line, name: str) -> Any:
    """What a line says of a part of its `KEY`; lines written before a setting existed have its plain value."""
    return line.get(name, BEFORE[name]) if name in BEFORE else line[name]


def is_plain(line: Line) -> bool:
    """Whether a line is of the plain settings: nothing recomputed, moved or stored in fewer bits than the mode says."""
    return all(value(line, name) == plain for name, plain in SETTINGS.items())


def setting(line: Line) -> str:
    """A line's settings in words: "plain", or what is not plain."""
    checkpointing = {False: "", True: "checkpointing"}.get(line.get("checkpointing", False))
    parts = [f"checkpointing {line['checkpointing']}" if checkpointing is None else checkpointing]
    if (budget := value(line, "activation_budget_gb")) is not None:
        parts.append(f"activations in {budget:g} GB")
    if (storage := value(line, "embedding_storage")) is not None:
        parts.append(f"embeddings {'on the host' if storage == 'host' else f'in {storage}'}")
    return ", ".join(filter(None, parts)) or "plain"


def best(lines: Sequence[Line], figure: str) -> Line | None:
    """The line that is best in a figure, whatever its settings; one that failed if none has it, None of nothing."""
    known = [line for line in lines if "error" not in line and line.get(figure) is not None]
    if not known:
        return lines[-1] if lines else None
    return (max if MORE_IS_BETTER[figure] else min)(known, key=lambda line: float(line[figure]))


def compare(
    lines: Sequence[Line],
    system: str,
    peer: str,
    figure: str,
    *,
    settings: str = "plain",
    peer_mode: str | None = None,
) -> list[Comparison]:
    """How `system` does against `peer` in every cell that one run has of both; of several runs, the last.

    Args:
        lines: Lines, the older first.
        system: The first system.
        peer: The second, or a key of `BEST` for whichever of its systems a run has, the first named first.
        figure: A key of `MORE_IS_BETTER`.
        settings: "plain" takes lines of plain settings only. "best" takes each system's best line over its settings;
            where a run tried nothing but plain settings of the peer, ours are plain too.
        peer_mode: The mode of the peer's lines where it is another than the first system's.
    """
    found: dict[tuple[Any, ...], dict[str, dict[tuple[Any, ...], Line]]] = {}  # of one setting, the last line
    for line in lines:
        if settings == "best" or is_plain(line):
            cell = tuple(value(line, name) for name in PART)
            of_system = found.setdefault((line["device"], cell, line["run"]), {}).setdefault(line["system"], {})
            of_system[tuple(value(line, name) for name in SETTINGS)] = line
    last: dict[tuple[Any, ...], Comparison] = {}
    tried: dict[tuple[Any, ...], int] = {}
    for (device, cell, run), systems in found.items():
        other = systems if peer_mode is None else found.get((device, _in_mode(cell, peer_mode), run), {})
        theirs = list(next((other[name] for name in systems_of(peer) if name in other), {}).values())
        ours = list(systems.get(system, {}).values())
        if all(map(is_plain, theirs)):
            ours = [line for line in ours if is_plain(line)]
        first, second = best(ours, figure), best(theirs, figure)
        if first is not None and second is not None and first is not second:
            # A later run takes the place of an earlier one, unless it failed where that one had a result, or tried
            # fewer of the peer's settings.
            made = _compared(cell, run, device, first, second, figure)
            before = last.get((device, cell))
            as_good = made.ratio is not None and len(theirs) >= tried.get((device, cell), 0)
            if as_good or before is None or before.ratio is None:
                last[device, cell], tried[device, cell] = made, len(theirs)
    return list(last.values())


def _in_mode(cell: tuple[Any, ...], mode: str) -> tuple[Any, ...]:
    return tuple(mode if name == "mode" else part for name, part in zip(PART, cell, strict=True))


def _compared(cell: tuple[Any, ...], run: str, device: str, first: Line, second: Line, figure: str) -> Comparison:
    same = first["system"] == second["system"]
    for line, name in ((first, first["system"]), (second, second["system"] + f", {second['mode']}" * same)):
        if "error" in line or line.get(figure) is None:
            return Comparison(cell, run, device, None, name)
    ratio = float(first[figure]) / float(second[figure])
    return Comparison(cell, run, device, ratio if MORE_IS_BETTER[figure] else 1 / ratio, None, (first, second))


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """The geometric mean; None of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
