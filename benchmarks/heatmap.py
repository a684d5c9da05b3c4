"""Heatmaps of the benchmarks: sequence length by model, a ratio in each cell.

    python benchmarks/heatmap.py benchmarks/results/grid-*.jsonl --into docs/assets/benchmarks

One figure for each device, mode, peer and kind of lengths, as PNG and SVG. A cell without a figure says why. Lines of
plain settings only, unless `--settings best` takes each system's best over its settings.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks.lines import MORE_IS_BETTER, Comparison, compare, geometric_mean, read, systems_of
    from benchmarks.shapes import SHAPES
else:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from lines import MORE_IS_BETTER, Comparison, compare, geometric_mean, read, systems_of
    from shapes import SHAPES

FIGURES = {
    "pairs_per_s": "Pairs a second",
    "pairs_per_s_warm_store": "Pairs a second, texts tokenised before",
    "peak_gib": "Peak memory, times less",
    "process_gib": "Memory on the device, times less",
    "steady_ms_mean": "Step time after compiling",
}
MODES = {
    "lora16": "16-bit LoRA",
    "qlora4": "4-bit LoRA",
    "full": "full fine-tuning",
    "full-bf16": "full, pure bfloat16",
}
NAMES = {
    "st": "Sentence Transformers + FA2 (MPNet: eager)",
    "st-eager": "Sentence Transformers (eager attention)",
    "st-sdpa": "Sentence Transformers (SDPA)",
    "st-fa2": "Sentence Transformers + FA2",
    "st-fa2-compile": "Sentence Transformers + FA2 + compile",
    "unsloth": "Unsloth",
    "burnish": "Burnish",
    "burnish-reference": "Burnish's reference backend",
    "burnish-compiled": "Burnish's compiled backend",
}
SPAN = 3.0
"""Powers of two from the middle of the colours to either end: a ratio of 8 or more has the deepest violet."""
STYLE: Any = {"font.size": 10, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}


def draw(found: Sequence[Comparison], system: str, peer: str, figure: str) -> Any:
    """A figure of comparisons that share device, mode and lengths. Rows are models, columns lengths and batches."""
    import matplotlib
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    rows = [name for name in SHAPES if any(one["model"] == name for one in found)]
    columns = sorted({(one["seq"], one["batch"]) for one in found})
    width, height = 2.6 + max(4.4, 0.92 * len(columns)), 1.75 + 0.46 * len(rows)
    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = made.subplots()
    colours, norm = matplotlib.colormaps["PuOr"], Normalize(-SPAN, SPAN)  # orange below 1, violet above; both print
    at = {(one["model"], one["seq"], one["batch"]): one for one in found}
    for y, row in enumerate(rows):
        for x, (seq, batch) in enumerate(columns):
            _cell(axes, x, y, at.get((row, seq, batch)), peer, colours, norm)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), [f"{seq}\n×{batch}" for seq, batch in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("longest text in tokens × pairs a step")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(_title(found, system, peer, figure), loc="left", fontsize=10.5)
    return made


def _title(found: Sequence[Comparison], system: str, peer: str, figure: str) -> str:
    ratios = [one.ratio for one in found if one.ratio is not None]
    mean, mode = geometric_mean(ratios), found[0]["mode"]
    lengths = "all texts fill the window" if found[0]["lengths"] == "fixed" else "lengths as in real text"
    said = "no ratio" if mean is None else f"geometric mean {mean:.2f}× of {len(ratios)} cells"
    return (
        f"{NAMES.get(system, system)} against {NAMES.get(peer, peer)}\n"
        f"{FIGURES.get(figure, figure)}, {MODES.get(mode, mode)}, {lengths}\n{found[0].device}: {said}"
    )


def _cell(axes: Any, x: int, y: int, one: Comparison | None, peer: str, colours: Any, norm: Any) -> None:
    from matplotlib.patches import Rectangle

    settings: dict[str, Any] = {"facecolor": "#f4f4f4", "hatch": "////", "edgecolor": "white"}
    words, ink, size, weight = "not run", "#666666", 7.5, "normal"
    if one is not None and one.ratio is not None:
        colour = colours(norm(math.log2(one.ratio)))
        settings = {"facecolor": colour, "edgecolor": "white"}
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.55
        words, ink, size = f"{one.ratio:.2f}×", "white" if dark else "#111111", 10.0
    elif one is not None:
        theirs = one.lacking in systems_of(peer)
        words = "peer gave\nno result" if theirs else "FAILED"
        ink, weight = ("#666666", "normal") if theirs else ("#b00020", "bold")
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, linewidth=1.5, **settings))
    box = None if one is not None and one.ratio is not None else {"facecolor": "#f4f4f4", "edgecolor": "none", "pad": 1}
    axes.text(x, y, words, ha="center", va="center", color=ink, fontsize=size, fontweight=weight, bbox=box)


def write(made: Any, place: Path) -> None:
    """The figure as PNG and SVG, the same bytes whenever it is drawn from the same lines."""
    place.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(place.with_suffix(".png"), dpi=160, metadata={"Software": None})
    made.savefig(place.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def draw_all(
    lines: Sequence[dict[str, Any]], into: Path, system: str, peers: Sequence[str], figure: str, settings: str = "plain"
) -> list[Path]:
    """Every figure that the lines give, with the config's own dropout; returns their paths. For `settings` see
    `lines.compare`."""
    import matplotlib
    from matplotlib import style

    groups: dict[tuple[str, ...], list[Comparison]] = {}
    for peer in peers:
        for one in compare(lines, system, peer, figure, settings=settings):
            if one["dropout"] == "config":
                groups.setdefault((one.device, one["mode"], peer, one["lengths"]), []).append(one)
    drawn = []
    for (device, mode, peer, lengths), found in sorted(groups.items()):
        name = "-".join((_slug(device), mode, peer, lengths, figure.replace("_", "-")))
        name += "-best" * (settings == "best")
        with style.context("default"), matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
            write(draw(found, system, peer, figure), into / name)
        drawn.append(into / f"{name}.svg")
    return drawn


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, default=Path("docs/assets/benchmarks"))
    parser.add_argument("--system", default="burnish")
    parser.add_argument("--peers", default="st,unsloth")
    parser.add_argument("--figure", default="pairs_per_s", choices=MORE_IS_BETTER)
    parser.add_argument("--settings", default="plain", choices=("plain", "best"))
    given = parser.parse_args(arguments)
    peers = given.peers.split(",")
    drawn = draw_all(read(given.results), given.into, given.system, peers, given.figure, given.settings)
    print("\n".join(map(str, drawn)) or "no run has lines of both systems")


if __name__ == "__main__":
    main()
