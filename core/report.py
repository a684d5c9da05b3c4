"""A training run on one page: a single HTML file that loads nothing from anywhere and needs no script."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .evaluate import NAMES, Metric, RetrievalResult
from .files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Drawn with, then replaced by the page's own variables, so that one drawing serves light, dark and paper.
INK, MUTED, RULE, BEFORE, AFTER = (f"#{shade:02x}{shade:02x}{shade:02x}" for shade in range(1, 6))
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", BEFORE: "--before", AFTER: "--accent"}
# 317 points: 1.4 times as wide on a desktop, 1.1 times on a phone, so 9 points of type stay between 10 and 13 px.
WIDTH, HEIGHT = 4.4, 2.5
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be searched
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.left": False,
}
TITLES = {"ndcg": "nDCG", "recall": "Recall", "mrr": "MRR"}
IMPROVED, WORSENED, SHOWN = 6, 3, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What the page tells, as plain values. What is empty or None gets no section.

    Args:
        title, run, model, family: Headings: of the page, the run's name, the model's, the plugin family's.
        summary: The outcome in one sentence.
        before, after: Held-out retrieval, as `evaluate_retrieval` returns it.
        gain: Their difference, as `paired_gain` returns it.
        history: Logged points with `step` and `loss`, perhaps `pairs_per_second`: `ProgressCallback.history`.
        queries, corpus, relevant: Texts and relevant ids behind `before` and `after`, for the examples.
        environment: Versions and hardware, as they should read.
        plugins: Rows of (name, distribution, version, role).
        patches: Rows of (module path, patch, state, reason).
        settings: Hyper-parameters.
        timings: Seconds by phase.
        files: Rows of (file name, what it is).
        how_to_use: A snippet of code.
        notes: Sentences a reader must not miss.
    """

    title: str
    run: str
    model: str
    summary: str
    family: str = ""
    before: RetrievalResult | None = None
    after: RetrievalResult | None = None
    gain: Mapping[str, Any] | None = None
    history: Sequence[Mapping[str, Any]] = ()
    queries: Mapping[str, str] = field(default_factory=dict)
    corpus: Mapping[str, str] = field(default_factory=dict)
    relevant: Mapping[str, set[str]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    plugins: Sequence[tuple[str, str, str, str]] = ()
    patches: Sequence[tuple[str, str, str, str]] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    files: Sequence[tuple[str, str]] = ()
    how_to_use: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A document in a ranking."""

    text: str
    score: float
    relevant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A query whose ranking changed, with ranks counted from 1 and the first results of both rankings."""

    query: str
    document: str
    relevant: int
    before_rank: int
    after_rank: int
    before: tuple[Hit, ...]
    after: tuple[Hit, ...]


def write_report(path: Path, report: RunReport) -> None:
    """Write `report` to `path` as one self-contained HTML file, whole or not at all.

    Raises:
        ConfigError: matplotlib or jinja2, the extra `report`, is not installed.
    """
    template = page_template("report_template.html.j2")
    from markupsafe import Markup

    history = [(int(row["step"]), float(row["loss"])) for row in report.history if math.isfinite(row["loss"])]
    improved, worsened = examples(report)
    result = report.after or report.before
    html = template.render(
        report=report,
        headline=headline(report),
        loss=Markup(loss_chart(history)) if len(history) > 1 else None,
        history=history,
        speed=median_speed(report.history),
        bars=Markup(bar_chart(report)) if result else None,
        result=result,
        improved=improved,
        worsened=worsened,
        patches=grouped(report.patches),
    )
    write_page(path, html)


def page_template(name: str) -> Any:
    """A page of this folder as a jinja2 template that escapes every value and knows the reports' own words.

    Raises:
        ConfigError: matplotlib or jinja2, the extra `report`, is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the report needs {error.name}, which is not installed", fix="pip install 'burnish[report]'"
        ) from error
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda part: (files(__package__) / part).read_text(encoding="utf-8")),
    )
    environment.filters["signed"] = signed
    environment.globals |= {"duration": duration, "setting": setting}
    return environment.get_template(name)


def write_page(path: Path, html: str) -> None:
    """Write a page whole or not at all.

    A text with half a surrogate pair (valid in JSON, not in UTF-8) must not cost the user the page.
    """
    write_atomic(path, html.encode("utf-8", "replace").decode("utf-8"))


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 0.4 s, 12 s, 1 min 07 s, 2 h 03 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def setting(value: object) -> str:
    """A hyper-parameter as text: no quotes, no brackets, no float noise."""
    match value:
        case None:
            return "not set"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case Mapping():
            return ", ".join(f"{key}: {setting(one)}" for key, one in value.items())
        case list() | tuple() | set() | frozenset():
            ordered: Iterable[object] = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
            return ", ".join(setting(one) for one in ordered) or "none"
        case _:
            return str(value)


def signed(value: float) -> str:
    """Three decimals with a sign, a true minus, and none where it rounds to zero."""
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "−")


def median_speed(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Pairs per second in the middle of the logged points; None where none was measured."""
    speeds = [float(row["pairs_per_second"]) for row in history if row.get("pairs_per_second") is not None]
    return statistics.median(speeds) if speeds else None


def headline(report: RunReport) -> list[dict[str, Any]]:
    """Each metric's numbers: `before` and `after` where measured, and `gain` with `verdict` (up, down, unclear)."""
    result = report.after or report.before
    if result is None:
        return []
    rows = []
    for name in NAMES:
        key = f"{name}@{result.k}"
        row: dict[str, Any] = {"title": f"{TITLES[name]}@{result.k}", "gain": None, "verdict": None}
        for when in ("before", "after"):
            measured: RetrievalResult | None = getattr(report, when)
            row[when] = getattr(measured, name) if measured else None
        if report.gain is not None:
            low, high = report.gain["intervals"][key]
            row["gain"] = Metric(mean=report.gain[key], low=low, high=high)
            row["verdict"] = "up" if low > 0 else "down" if high < 0 else "unclear"
        rows.append(row)
    return rows


def shorten(text: str, most: int) -> str:
    """The start of `text` on one line, cut between words where there are any."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    return text[:most].rsplit(" ", 1)[0].rstrip(" ,;:.") + "…"


def examples(report: RunReport) -> tuple[list[Example], list[Example]]:
    """The queries that gained most nDCG and those that lost most; the longer way in ranks goes first among equals."""
    if report.before is None or report.after is None:
        return [], []
    before, after = report.before.per_query, report.after.per_query
    common = [query for query in before if query in after]
    change = {query: after[query].ndcg - before[query].ndcg for query in common}
    way = {query: before[query].rank - after[query].rank for query in common}
    ordered = sorted(common, key=lambda query: (-change[query], -way[query]))
    best = [query for query in ordered if change[query] > 0][:IMPROVED]
    worst = [query for query in ordered[::-1] if change[query] < 0][:WORSENED]
    return [_example(report, query) for query in best], [_example(report, query) for query in worst]


def _example(report: RunReport, query: str) -> Example:
    assert report.before is not None and report.after is not None
    before, after = report.before.per_query[query], report.after.per_query[query]
    relevant = report.relevant.get(query, {before.best, after.best})

    def hits(top: Sequence[tuple[str, float]]) -> tuple[Hit, ...]:
        return tuple(
            Hit(text=shorten(report.corpus.get(key, key), 110), score=score, relevant=key in relevant)
            for key, score in top[:SHOWN]
        )

    return Example(
        query=shorten(report.queries.get(query, query), 240),
        document=shorten(report.corpus.get(after.best, after.best), 240),
        relevant=len(relevant),
        before_rank=before.rank,
        after_rank=after.rank,
        before=hits(before.top),
        after=hits(after.top),
    )


def grouped(patches: Sequence[tuple[str, str, str, str]]) -> list[tuple[str, int, str, str, str]]:
    """One row for what was done alike in every layer: (path with `*` for numbers, how often, patch, state, reason)."""
    counts: dict[tuple[str, str, str, str], int] = {}
    for module, *rest in patches:
        patch, state, reason = rest
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module), patch, state, reason)
        counts[key] = counts.get(key, 0) + 1
    return [(module, count, patch, state, reason) for (module, patch, state, reason), count in counts.items()]


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential mean over a tenth of the run, corrected for its start (Kingma & Ba 2015, section 3)."""
    keep = 1 - 2 / (max(5.0, len(values) / 10) + 1)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


def loss_chart(history: Sequence[tuple[int, float]]) -> str:
    """The logged losses and, from five points on, their smoothed course, as inline SVG."""

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        steps, losses = zip(*history, strict=True)
        many = len(history) >= 5
        axes.plot(steps, losses, color=BEFORE if many else AFTER, linewidth=1.0)
        if many:
            axes.plot(steps, smoothed(losses), color=AFTER, linewidth=2.2, solid_capstyle="round")
        axes.set_ylim(bottom=min(0.0, *losses))
        axes.set_xlabel("step", color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
        axes.margins(x=0.01)

    return svg("loss", f"Loss from {history[0][1]:.3f} to {history[-1][1]:.3f} over {history[-1][0]} steps", draw)


def bar_chart(report: RunReport) -> str:
    """Every metric before and after, from zero, with its 95% interval, as inline SVG."""
    rows = headline(report)
    series = [(when, color) for when, color in (("before", BEFORE), ("after", AFTER)) if getattr(report, when)]
    width = 0.36

    def draw(axes: Axes) -> None:
        for place, (when, color) in enumerate(series):
            for at, row in enumerate(rows):
                metric: Metric = row[when]
                x = at + (place - (len(series) - 1) / 2) * (width + 0.04)
                axes.bar(x, metric.mean, width, color=color)
                axes.plot([x, x], [metric.low, metric.high], color=INK, linewidth=1.2, solid_capstyle="butt")
                axes.annotate(
                    f"{metric.mean:.3f}", (x, metric.high), (0, 3), textcoords="offset points", ha="center", color=INK
                )
        axes.set_xticks(range(len(rows)), [row["title"] for row in rows])
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, min(1.1, 1.15 * max(row[when].high for when, _ in series for row in rows) or 1.0))

    words = "; ".join(
        f"{row['title']} " + ", ".join(f"{when} {row[when].mean:.3f}" for when, _ in series) for row in rows
    )
    return svg("bars", words, draw)


def svg(
    name: str,
    words: str,
    draw: Any,
    size: tuple[float, float] = (WIDTH, HEIGHT),
    style: Mapping[Any, Any] | None = None,
) -> str:
    """What `draw` paints on axes of `size` inches, as an SVG element in the page's colours and fonts, its ids its own.

    Made with matplotlib's objects alone: neither pyplot's figures nor the user's backend or style are touched.
    """
    import matplotlib
    import matplotlib.style
    from markupsafe import escape
    from matplotlib.figure import Figure

    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    settings = {**STYLE, **(style or {}), "svg.hashsalt": name}
    with matplotlib.style.context("default"), matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would restyle the whole page
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return re.sub(
        r'<svg([^>]*?) width="[^"]*" height="[^"]*"', rf'<svg role="img" aria-label="{escape(words)}"\1', text, count=1
    )
