"""What the program prints: tables and the outcome of a run, on standard output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pathlib import Path

    from ..evaluate import RetrievalResult
    from ..reranking import RerankingResult
    from ..runs import RunResult
    from ..tei import StaticCheck
    from ..verifying import Verdict


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a pipe or a log has no width; 80 would break every path
    return console


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table under a title."""
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        grid.add_column(heading, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    console = _console()
    console.print(Text(title, style="bold"))  # a title of the table itself would be broken at the table's width
    console.print(grid)


def sections(parts: Iterable[tuple[str, Sequence[tuple[str, str]]]]) -> None:
    """Print titled lists of (what, value)."""
    console = _console()
    for title, rows in parts:
        console.print(Text(title, style="bold"))
        grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for what, value in rows:
            grid.add_row(Text(f"  {what}"), Text(value))
        console.print(grid)
        console.print()


def scores(title: str, result: RetrievalResult | RerankingResult) -> None:
    """Print one measurement: each metric with its interval."""
    values = result.as_json()
    rows = [
        (name, f"{values[name]:.4f}", "{:.4f} to {:.4f}".format(*values["intervals"][name]))
        for name in result.metrics()
    ]
    table(title, ("metric", "value", "95% interval"), rows)


def verdicts(folder: Path, found: Sequence[Verdict]) -> None:
    """Print how runtimes compare with a folder's golden vectors, and what is wrong."""
    rows = [
        (
            verdict.runtime,
            ", ".join(f"{name} {version}" for name, version in verdict.versions.items()) or "not told",
            "-" if verdict.cosine is None else f"{verdict.cosine:.6f}",
            f"{verdict.difference:.1e}",
            f"{verdict.rank:.1%}",
            {True: "same", False: "other", None: "not told"}[verdict.tokens],
            "yes" if verdict.good else "no",
        )
        for verdict in found
    ]
    headings = ("runtime", "versions", "smallest cosine", "largest difference", "same order", "tokens", "right")
    table(f"{folder}, {found[0].inputs} golden inputs", headings, rows)
    for verdict in found:
        for line in (*verdict.faults, *verdict.notes):
            _console().print(Text(f"{verdict.runtime}: {line}"))


def checks(folder: Path, found: Sequence[StaticCheck]) -> None:
    """Print what is known of runtimes that were not run, and what is wrong."""
    rows = [(one.runtime, f"{one.version}, read {one.read}", one.state) for one in found]
    table(f"{folder}, by its files alone: nothing was run", ("runtime", "rules", "state"), rows)
    for one in found:
        for line in (*one.faults, *one.notes):
            _console().print(Text(f"{one.runtime}: {line}"))


def outcome(result: RunResult) -> None:
    """Print a finished run: the scores before and after, and where everything is."""
    metrics = result.metrics
    if "before" in metrics:
        table(
            f"Held-out retrieval, {metrics['after']['queries']} queries",
            ("metric", "before", "after", "gain (95% interval)"),
            [_gained(metrics, name) for name in metrics["after"] if "@" in name],
        )
    console = _console()
    training, seconds = metrics["training"], metrics["seconds"]
    skipped = f" ({training['skipped_rows']:,} bad rows skipped)" if training["skipped_rows"] else ""
    pairs = f"{training['pairs']:,} pairs{skipped}"
    console.print(f"\ntrained {pairs} in {seconds['train']:.0f} s; all together {sum(seconds.values()):.0f} s")
    kept = "merged" if (result.folder / "merged").exists() else "model"
    model = result.folder / kept
    if (result.folder / "report.html").exists():
        console.print(Text(f"report   {result.folder / 'report.html'}"))
    console.print(Text(f"model    {model}   (load it with SentenceTransformer({str(model)!r}))"))
    if kept == "merged":
        console.print(Text(f"adapter  {result.folder / 'adapter'}"))


def _gained(metrics: dict[str, Any], name: str) -> tuple[str, str, str, str]:
    low, high = metrics["gain"]["intervals"][name]
    gain = f"{metrics['gain'][name]:+.4f} ({low:+.4f} to {high:+.4f})"
    return name, f"{metrics['before'][name]:.4f}", f"{metrics['after'][name]:.4f}", gain
