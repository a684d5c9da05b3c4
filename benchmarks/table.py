"""How often each goal of goals.toml is reached, as a Markdown table.

python benchmarks/table.py [RESULTS.jsonl …]     without files: those in benchmarks/results
python benchmarks/table.py --part memory         GB against the limits of goals.toml
python benchmarks/table.py --part heads          rerankers and classifiers, cell by cell
python benchmarks/table.py --part context        the longest text in so many GB (context.py)
python benchmarks/table.py --part kept           what a layer keeps (memory_saved.py)
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks.lines import (
        BEFORE,
        MORE_IS_BETTER,
        PART,
        Comparison,
        Line,
        best,
        compare,
        geometric_mean,
        is_plain,
        read,
        setting,
    )  # fmt: skip
else:
    sys.path.insert(0, str(HERE))
    from lines import (
        BEFORE,
        MORE_IS_BETTER,
        PART,
        Comparison,
        Line,
        best,
        compare,
        geometric_mean,
        is_plain,
        read,
        setting,
    )  # fmt: skip

HEADINGS = ("Goal", "Device", "Against", "Figure", "At least", "Reached", "Worst cell", "Geometric mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One goal; the fields are explained in goals.toml."""

    goal: str
    system: str
    peer: str
    figure: str
    at_least: float | None = None
    settings: str = "plain"
    peer_mode: str | None = None
    where: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.figure not in MORE_IS_BETTER:
            raise ValueError(f"{self.goal}: no figure {self.figure!r}; there are {', '.join(MORE_IS_BETTER)}")
        if self.settings not in ("plain", "best"):
            raise ValueError(f"{self.goal}: settings are plain or best, not {self.settings!r}")
        _check_where(self.goal, self.where)

    def compared(self, lines: Sequence[Line]) -> list[Comparison]:
        """The comparisons of all cells that the goal speaks of."""
        found = compare(
            lines, self.system, self.peer, self.figure, settings=self.settings, peer_mode=self.peer_mode
        )  # fmt: skip
        return [one for one in found if speaks_of(self.where, one.device, dict(zip(PART, one.cell, strict=True)))]


def speaks_of(where: dict[str, Any], device: str, cell: Mapping[str, Any]) -> bool:
    """Whether a goal speaks of a cell: each value is the cell's, or a list that has it. Unless the goal says otherwise,
    the dropout is the config's own and the task embedding."""
    wanted = {"dropout": "config", "task": "embedding", **where}
    if not device.startswith(str(wanted.pop("device", ""))):
        return False
    return all(
        cell.get(name, BEFORE.get(name)) in (value if isinstance(value, list) else [value])
        for name, value in wanted.items()
    )


def _check_where(goal: str, where: dict[str, Any]) -> None:
    if odd := sorted(set(where) - {*PART, "device"}):
        raise ValueError(f"{goal}: a cell says nothing of {odd[0]!r}")


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
        taken = goal.compared(lines)
        devices = sorted({one.device for one in taken})
        found += [_row(goal, device, [one for one in taken if one.device == device]) for device in devices or [""]]
    return found


def _row(goal: Goal, device: str, taken: Sequence[Comparison]) -> tuple[str, ...]:
    least = "–" if goal.at_least is None else f"{goal.at_least:g}×"
    figure = goal.figure.replace("_", " ")
    peer = goal.peer + f", {goal.peer_mode}" * (goal.peer_mode is not None)
    known = sorted(((one.ratio, one) for one in taken if one.ratio is not None), key=lambda pair: pair[0])
    if not taken:
        return (goal.goal, "–", peer, figure, least, "not measured", "–", "–")
    ours = sum(one.lacking == goal.system for one in taken)
    theirs = sum(one.lacking not in (None, goal.system) for one in taken)
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
        goal.goal, device, peer, figure, least, reached, worst, "–" if mean is None else f"{mean:.2f}×"
    )  # fmt: skip


def markdown(found: Sequence[Sequence[str]], headings: Sequence[str] = HEADINGS) -> str:
    """The rows as a table."""
    lines = [headings, ["---"] * len(headings), *found]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """So many GB, of 1e9 bytes, that training on one cell may take; the fields are explained in goals.toml."""

    goal: str
    system: str
    at_most: float
    moonshot: float
    where: dict[str, Any]

    def __post_init__(self) -> None:
        _check_where(self.goal, self.where)


LIMIT_HEADINGS = (
    "Goal", "Device", "System", "Allocated, GB", "On the device, GB", "Least with", "ms a step", "Plain, GB", "At most",
    "Reached",
)  # fmt: skip


def limits(path: Path = HERE / "goals.toml") -> list[Limit]:
    """The limits of a file; for what is raised see `goals`."""
    return [Limit(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["limits"]]


def limit_rows(lines: Sequence[Line], wanted: Sequence[Limit]) -> list[tuple[str, ...]]:
    """A row for each limit, device and system: the setting of the least memory with its step's median, and what the
    plain one takes; and one that says so for a limit that has not been measured. Of each setting the last line counts,
    unless it failed where an earlier one had a result."""
    found: list[tuple[str, ...]] = []
    for limit in wanted:
        taken = [line for line in lines if speaks_of(limit.where, line["device"], line)]
        devices = sorted({line["device"] for line in taken})
        for device in devices:
            last: dict[tuple[str, str], Line] = {}
            for line in taken:
                key = (line["system"], setting(line))
                if line["device"] == device and ("error" not in line or "error" in last.get(key, line)):
                    last[key] = line
            for name in sorted({name for name, _ in last}, key=lambda name: (name == limit.system, name)):
                found.append(_limit_row(limit, device, name, [one for key, one in last.items() if key[0] == name]))
        if not devices:
            found.append((limit.goal, "–", "–", "–", "–", "–", "–", "–", _most(limit), "not measured"))
    return found


def _most(limit: Limit) -> str:
    return f"{limit.at_most:g}, moonshot {limit.moonshot:g}"


def _limit_row(limit: Limit, device: str, name: str, lines: Sequence[Line]) -> tuple[str, ...]:
    one, plain = best(lines, "peak_gib"), best([line for line in lines if is_plain(line)], "peak_gib")
    assert one is not None
    peak, step = gigabytes(one.get("peak_gib")), one.get("step_ms_median")
    judged = "" if name != limit.system else "no"
    if name == limit.system and peak is not None and peak <= limit.at_most:
        judged = "the moonshot" if peak <= limit.moonshot else "yes"
    return (
        limit.goal, device, name, _gb(peak), _gb(gigabytes(one.get("process_gib"))),
        "no result" if peak is None else setting(one), "–" if step is None else f"{step:,.0f}",
        _gb(None if plain is None else gigabytes(plain.get("peak_gib"))), _most(limit) if judged else "", judged,
    )  # fmt: skip


def gigabytes(gib: float | None) -> float | None:
    """GB of 1e9 bytes in so many GiB."""
    return None if gib is None else gib * 2**30 / 1e9


def _gb(size: float | None) -> str:
    return "–" if size is None else f"{size:.2f}"


HEAD_HEADINGS = (
    "Model", "Trained", "Tokens", "Device", "Against", "ms a step", "Pairs or texts a second", "Times",
    "Allocated, GB", "Share", "On the device, GB", "Floor, GB",
)  # fmt: skip


def head_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """A row for each cell with a head and each peer that the last run of both has: the peer's figure, then ours."""
    taken = [line for line in lines if line.get("task", "embedding") != "embedding"]
    peers = ("st", "transformers", "unsloth")
    found = [one for peer in peers for one in compare(taken, "burnish", peer, "pairs_per_s") if one.lines is not None]
    places = {name: place for place, name in enumerate(dict.fromkeys(line["model"] for line in taken))}
    found.sort(key=lambda one: (one["task"] == "classify", places[one["model"]], one["mode"], one["seq"], one.device))
    return [_head_row(one) for one in found]


def _head_row(one: Comparison) -> tuple[str, ...]:
    assert one.lines is not None and one.ratio is not None
    ours, theirs = one.lines

    def both(figure: str, digits: int, *, gib: bool = False) -> str:
        values = [line[figure] * (2**30 / 1e9 if gib else 1) for line in (theirs, ours)]
        return " → ".join(f"{value:,.{digits}f}" for value in values)

    # An adapter's or model's trained weights have float32 gradients and two of AdamW's states beside what was loaded.
    floor = (ours["load_peak_gib"] * 2**30 + 12 * ours["trained_parameters"]) / 1e9
    return (
        one["model"].removesuffix("-classifier"), {"lora16": "LoRA", "full": "all"}.get(one["mode"], one["mode"]),
        str(one["seq"]), one.device, theirs["system"], both("step_ms_median", 1), both("pairs_per_s", 0),
        f"{one.ratio:.2f}×", both("peak_gib", 2, gib=True), f"{ours['peak_gib'] / theirs['peak_gib']:.2f}",
        both("process_gib", 2, gib=True), _gb(floor),
    )  # fmt: skip


CONTEXT_HEADINGS = (
    "Model",
    "Device",
    "System",
    "Longest text, tokens",
    "Foreseen",
    "With",
    "Peak, GB",
    "s a step",
    "Times",
)


def context_rows(lines: Sequence[Line], ours: str = "burnish") -> list[tuple[str, ...]]:
    """A row for each model, device, system and setting of the last run that has it (context.py), where that run has us
    and another; `Times` compares our longest text with the longest of all others', whatever their settings. Where the
    time of a search was over, that is the length foreseen from the memory of its longest steps."""
    found: list[tuple[str, ...]] = []
    last = {(line["model"], line["device"]): line["run"] for line in lines}
    for (model, device), run in sorted(last.items()):
        here = [line for line in lines if (line["model"], line["device"], line["run"]) == (model, device, run)]
        if len({line["system"].startswith(ours) for line in here}) < 2:
            continue
        known = [line for line in here if line.get("longest_tokens")]
        peers = [_reach(line) for line in known if not line["system"].startswith(ours)]
        for line in sorted(here, key=lambda line: (line["system"].startswith(ours), line.get("longest_tokens") or 0)):
            longest, times = line.get("longest_tokens"), ""
            if line["system"].startswith(ours) and longest and peers:
                times = f"{_reach(line) / max(peers):.2f}×"
            shown = f"{longest:,}" if longest else "no result"
            shown += " or more" * bool(longest and not line.get("complete", True))
            step = line.get("step_s")
            found.append((
                model, device, line["system"], shown, f"{_reach(line):,}" if line.get("foreseen_tokens") else "",
                setting(line), _gb(gigabytes(line.get("peak_gib"))), "–" if step is None else f"{step:.1f}",
                times,
            ))  # fmt: skip
    return found


def _reach(line: Line) -> int:
    """The longest text of a search, foreseen where its time was over."""
    return int(line.get("foreseen_tokens") or line["longest_tokens"])


KEPT_HEADINGS = ("Model", "Device", "System", "Plain", "Selective", "Every layer computed again", "Offload")


def kept_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """A row for each model, device and system (memory_saved.py): bytes for each token, hidden unit and layer."""
    found: dict[tuple[str, ...], dict[Any, str]] = {}
    for line in lines:
        row = found.setdefault((line["model"], line["device"], line["system"]), {})
        row[line["checkpointing"]] = "no result" if line.get("bytes") is None else f"{line['bytes']:.1f}"
    options = (False, "selective", True, "offload")
    return [(*names, *(row.get(option, "") for option in options)) for names, row in found.items()]


def committed(*kinds: str) -> list[Path]:
    """Results that are in the repository, the older first: those whose names begin so. A second file of a day has a
    longer name, and comes after the first."""
    found = (path for kind in kinds for path in (HERE / "results").glob(f"{kind}-*.jsonl"))
    return sorted(found, key=lambda path: path.stem)


def results_table(part: str = "goals", results: Sequence[Path] = ()) -> str:
    """A table of results, by default of the committed ones, as docs/benchmarks.md shows it."""
    if part == "context":
        return markdown(context_rows(read(results or committed("context"))), CONTEXT_HEADINGS)
    if part == "kept":
        return markdown(kept_rows(read(results or committed("saved"))), KEPT_HEADINGS)
    if part == "heads":
        return markdown(head_rows(read(results or committed("heads"))), HEAD_HEADINGS)
    if part == "memory":
        return markdown(limit_rows(read(results or committed("grid", "memory")), limits()), LIMIT_HEADINGS)
    return markdown(rows(read(results or committed("grid", "cpu", "memory", "heads")), goals()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--part", default="goals", choices=("goals", "memory", "heads", "context", "kept"))
    given = parser.parse_args(arguments)
    print(results_table(given.part, given.results))


if __name__ == "__main__":
    main()
