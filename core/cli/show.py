"""What the program prints: tables and the outcome of a run, on standard output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..runs import RunResult


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a pipe or a log has no width; 80 would break every path
    return console


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table with a title."""
    grid = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        grid.add_column(heading, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    _console().print(grid)


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


def outcome(result: RunResult) -> None:
    """Print a finished run: the scores before and after, and where everything is."""
    metrics = result.metrics
    if "before" in metrics:
        rows = []
        for name in (name for name in metrics["after"] if "@" in name):
            low, high = metrics["gain"]["intervals"][name]
            gain = f"{metrics['gain'][name]:+.4f} ({low:+.4f} to {high:+.4f})"
            rows.append((name, f"{metrics['before'][name]:.4f}", f"{metrics['after'][name]:.4f}", gain))
        table(f"Held-out retrieval, {metrics['after']['queries']} queries", ("metric", "before", "after", "gain (95% interval)"), rows)
    console = _console()
    seconds = metrics["seconds"]
    console.print(f"\ntrained {metrics['training']['pairs']:,} pairs in {seconds['train']:.0f} s; all together {sum(seconds.values()):.0f} s")
    kept = "merged" if (result.folder / "merged").exists() else "model"
    console.print(Text(f"report   {result.folder / 'report.html'}"))
    console.print(Text(f"model    {result.folder / kept}   (load it with SentenceTransformer({str(result.folder / kept)!r}))"))
    if kept == "merged":
        console.print(Text(f"adapter  {result.folder / 'adapter'}"))
