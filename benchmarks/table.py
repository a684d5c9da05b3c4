"""How often each goal of goals.toml is reached, as a Markdown table.

python benchmarks/table.py [RESULTS.jsonl …]     without files: the grid's and the CPU's in benchmarks/results
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks.lines import MORE_IS_BETTER, PART, Comparison, Line, compare, geometric_mean, read, systems_of
else:
    sys.path.insert(0, str(HERE))
    from lines import MORE_IS_BETTER, PART, Comparison, Line, compare, geometric_mean, read, systems_of

HEADINGS = ("Goal", "Device", "Against", "Figure", "At least", "Reached", "Worst cell", "Geometric mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One goal; the fields are explained in goals.toml."""

    goal: str
    system: str
    peer: str
    figure: str
    at_least: float | None = None
    where: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.figure not in MORE_IS_BETTER:
            raise ValueError(f"{self.goal}: no figure {self.figure!r}; there are {', '.join(MORE_IS_BETTER)}")
        if odd := sorted(set(self.where) - {*PART, "device"}):
            raise ValueError(f"{self.goal}: a cell says nothing of {odd[0]!r}")

    def takes(self, one: Comparison) -> bool:
        """Whether a comparison is of a cell that the goal speaks of: no checkpointing, the config's own dropout,
        unless the goal says otherwise."""
        wanted = {"checkpointing": False, "dropout": "config", **self.where}
        device = str(wanted.pop("device", ""))
        return one.device.startswith(device) and all(one[name] == value for name, value in wanted.items())


def goals(path: Path = HERE / "goals.toml") -> list[Goal]:
    """The goals of a file.

    Raises:
        ValueError: If one names a figure or a field that there is not.
        TypeError: If one has a field that goals do not have, or lacks one.
    """
    return [Goal(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["goals"]]


def rows(lines: Sequence[Line], wanted: Sequence[Goal]) -> list[tuple[str, ...]]:
    """A row for each goal and device that has been measured, and one that says so for a goal that has not been."""
    found = []
    for goal in wanted:
        taken = [one for one in compare(lines, goal.system, goal.peer, goal.figure) if goal.takes(one)]
        devices = sorted({one.device for one in taken})
        found += [_row(goal, device, [one for one in taken if one.device == device]) for device in devices or [""]]
    return found


def _row(goal: Goal, device: str, taken: Sequence[Comparison]) -> tuple[str, ...]:
    least = "–" if goal.at_least is None else f"{goal.at_least:g}×"
    figure = goal.figure.replace("_", " ")
    known = sorted(((one.ratio, one) for one in taken if one.ratio is not None), key=lambda pair: pair[0])
    if not taken:
        return (goal.goal, "–", goal.peer, figure, least, "not measured", "–", "–")
    ours = sum(one.lacking == goal.system for one in taken)
    theirs = sum(one.lacking in systems_of(goal.peer) for one in taken)
    # A cell in which the peer gives no result is not a ratio and not counted; one in which we give none is missed.
    judged = len(known) + ours
    reached = f"{judged} cells"
    if goal.at_least is not None:
        reached = f"{sum(ratio >= goal.at_least for ratio, _ in known)} of {judged}"
    reached += f", {ours} failed" * bool(ours) + f", {theirs} without a result of the peer" * bool(theirs)
    mean = geometric_mean([ratio for ratio, _ in known])
    worst = "–"
    if known:
        ratio, one = known[0]
        worst = f"{ratio:.2f}× ({one['model']}, {one['seq']} × {one['batch']}, {one['lengths']})"
    return (
        goal.goal, device, goal.peer, figure, least, reached, worst, "–" if mean is None else f"{mean:.2f}×"
    )  # fmt: skip


def markdown(found: Sequence[Sequence[str]]) -> str:
    """The rows as a table."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *found]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def committed() -> list[Path]:
    """The grid's and the CPU's results that are in the repository, the older first."""
    return sorted([*(HERE / "results").glob("grid-*.jsonl"), *(HERE / "results").glob("cpu-*.jsonl")])


def results_table() -> str:
    """The table of the committed results, which docs/benchmarks.md shows."""
    return markdown(rows(read(committed()), goals()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    given = parser.parse_args(arguments)
    print(markdown(rows(read(given.results or committed()), goals())))


if __name__ == "__main__":
    main()
