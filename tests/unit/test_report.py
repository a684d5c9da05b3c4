"""The report: one file, nothing loaded from elsewhere, all text escaped, sections only where there is something."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from burnish.core.errors import ConfigError
from burnish.core.evaluate import Metric, QueryResult, RetrievalResult, paired_gain
from burnish.core.report import RunReport, duration, examples, grouped, setting, shorten, signed, smoothed, write_report

VOID = {"meta", "br", "wbr", "link", "img", "hr", "input"}
EVIL = "<script>alert('x')</script> & \"quoted\" <b>bold</b>"


class Page(HTMLParser):
    """A page's elements, attributes and text; fails where a tag is left open or closes another."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings[-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())


def result(ranks: dict[str, int], *, k: int = 10) -> RetrievalResult:
    """As if query qN's only relevant document dN came at the given rank among 20."""
    per_query = {}
    for query, rank in ranks.items():
        others = [f"x{place}" for place in range(1, 21)]
        order = [*others[: rank - 1], f"d{query[1:]}", *others[rank - 1 :]]
        hit = rank <= k
        per_query[query] = QueryResult(
            ndcg=1 / rank if hit else 0.0,
            recall=float(hit),
            mrr=1 / rank if hit else 0.0,
            top=tuple((document, 1 - place / 100) for place, document in enumerate(order[:k])),
            rank=rank,
            best=f"d{query[1:]}",
        )
    means = [sum(getattr(one, name) for one in per_query.values()) / len(ranks) for name in ("ndcg", "recall", "mrr")]
    ndcg, recall, mrr = (Metric(mean=mean, low=mean - 0.04, high=mean + 0.05) for mean in means)
    return RetrievalResult(
        k=k, ndcg=ndcg, recall=recall, mrr=mrr, per_query=per_query, seconds=1.5, queries=len(ranks), documents=1021
    )


BEFORE = {f"q{i}": 2 + i for i in range(12)} | {"q20": 1, "q21": 1, "q22": 2, "q23": 1, "q30": 4}
AFTER = {f"q{i}": 1 for i in range(12)} | {"q20": 9, "q21": 3, "q22": 3, "q23": 2, "q30": 4}


def bare() -> RunReport:
    return RunReport(title="A title", run="run-1", model="some/model", summary="It ran.")


def full() -> RunReport:
    before, after = result(BEFORE), result(AFTER)
    numbers = [query[1:] for query in BEFORE]
    return RunReport(
        title="A title",
        run="run-1",
        model="some/model",
        summary="It went well.",
        family="bert",
        before=before,
        after=after,
        gain=paired_gain(before, after),
        history=[
            {"step": step, "loss": 2 / step, "learning_rate": 1e-3, "pairs_per_second": 812.0 + step, "seconds": step}
            for step in range(1, 31)
        ],
        queries={f"q{number}": f"query number {number}" for number in numbers},
        corpus={f"d{number}": f"document number {number}" for number in numbers},
        relevant={f"q{number}": {f"d{number}"} for number in numbers},
        environment={"torch": "2.13.0", "device": "cpu"},
        plugins=[("bert", "burnish", "0.1.0", "family")],
        patches=[(f"encoder.layer.{i}.attention", "packed attention", "applied", "") for i in range(6)],
        settings={"learning_rate": 1e-3, "target_modules": ["query", "key"], "use_dora": False, "revision": None},
        timings={"training": 67.0},
        files=[("metrics.json", "the numbers")],
        how_to_use='model = SentenceTransformer("merged")',
        notes=("Mind the gap.",),
    )


def page(tmp_path: Path, report: RunReport) -> Page:
    path = tmp_path / "runs" / "report.html"
    write_report(path, report)
    return Page(path)


def test_all_sections(tmp_path: Path) -> None:
    shown = page(tmp_path, full())
    assert shown.headings == [
        "Held-out retrieval",
        "Training loss",
        "To keep in mind",
        "Queries whose ranking changed",
        "How to use the model",
        "Files of this run",
        "Plugins and patches",
        "Settings",
        "Time spent",
        "Environment",
    ]
    assert shown.tags["svg"] == 2
    assert "17 queries, each against all 1,021 documents" in shown.text
    assert "By nDCG@10, 12 queries improved, 4 got worse and 1 stayed as they were." in shown.text
    compact = "".join(shown.text.split())
    assert "828pairs/s(median)" in compact
    assert "encoder.layer.*.attention6packedattentionapplied" in compact
    assert "learning_rate0.001target_modulesquery,keyuse_doranorevisionnotset" in compact
    assert "training1min07s" in compact and "bertburnish0.1.0family" in compact


def test_a_run_without_evaluation_or_losses(tmp_path: Path) -> None:
    shown = page(tmp_path, bare())
    assert shown.headings == [] and shown.tags["svg"] == 0 and shown.tags["table"] == 0
    assert "It ran." in shown.text and "nDCG" not in shown.text
    assert page(tmp_path, replace(bare(), history=full().history)).headings == ["Training loss"]
    assert page(tmp_path, replace(bare(), history=full().history[:1])).headings == []
    assert page(tmp_path, replace(bare(), timings={"training": 1.0})).headings == ["Time spent"]


def test_only_one_evaluation(tmp_path: Path) -> None:
    first = page(tmp_path, replace(full(), after=None, gain=None))
    assert "nDCG@10, before training" in first.text and "Queries whose ranking changed" not in first.headings
    last = page(tmp_path, replace(full(), before=None, gain=None))
    assert "before" not in last.text and "after training" in last.text and "change" not in last.text


@pytest.mark.parametrize(("low", "high", "words"), [(0.01, 0.3, "up"), (-0.3, -0.1, "down"), (-0.1, 0.1, "unclear")])
def test_gain_says_when_it_is_unclear(tmp_path: Path, low: float, high: float, words: str) -> None:
    gain: dict[str, Any] = {f"{name}@10": (low + high) / 2 for name in ("ndcg", "recall", "mrr")}
    gain |= {"intervals": {key: [low, high] for key in gain}, "improved": 1, "worsened": 2, "unchanged": 3}
    shown = page(tmp_path, replace(full(), gain=gain))
    assert sum(1 for tag, name, value in shown.attributes if (tag, name, value) == ("tr", "class", words)) == 3
    assert ("no clear change" in shown.text) == (words == "unclear")
    assert f"{signed(low)} to {signed(high)}" in shown.text


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    links = "see https://example.org/x.png and url(http://example.org)"
    shown = page(tmp_path, replace(full(), summary=links, notes=(links,)))
    assert links in shown.text, "links in text stay text"
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "base"} & set(shown.tags)
    loading = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "background"}
    references = [value for _, name, value in shown.attributes if name in loading]
    assert references and all(value and value.startswith("#") for value in references)
    styled = [value or "" for _, name, value in shown.attributes if name in ("style", "clip-path")]
    sheet = shown.source[shown.source.index("<style>") : shown.source.index("</style>")]
    assert shown.tags["style"] == 1 and "@import" not in sheet
    for place in re.findall(r"url\(([^)]*)\)", " ".join([*styled, sheet])):
        assert place.startswith("#")
    assert not any(name.startswith("on") for _, name, _ in shown.attributes)


def test_ids_are_unique_and_found(tmp_path: Path) -> None:
    shown = page(tmp_path, full())
    ids = Counter(value for _, name, value in shown.attributes if name == "id")
    assert ids and set(ids.values()) == {1}
    used = {value[1:] for _, name, value in shown.attributes if name == "xlink:href" and value}
    used |= set(re.findall(r"url\(#([^)]+)\)", shown.source))
    assert used and used <= set(ids)


def test_charts_follow_the_page(tmp_path: Path) -> None:
    shown = page(tmp_path, full())
    drawings = re.findall(r"<svg.*?</svg>", shown.source, flags=re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        assert re.findall(r"#[0-9a-f]{6}\b", drawing) == [], "a fixed colour would vanish in the dark"
        assert "font-family" not in drawing and "<style" not in drawing and "<text" in drawing
        assert {"var(--ink)", "var(--rule)", "var(--accent)"} <= set(re.findall(r"var\(--\w+\)", drawing))
    labels = [value for tag, name, value in shown.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == [
        "nDCG@10 before 0.334, after 0.796; Recall@10 before 0.824, after 1.000; MRR@10 before 0.334, after 0.796",
        "Loss from 2.000 to 0.067 over 30 steps",
    ]


def test_text_is_escaped(tmp_path: Path) -> None:
    base = full()
    shown = page(
        tmp_path,
        replace(
            base,
            title=EVIL,
            run=EVIL,
            model=EVIL,
            summary=EVIL,
            family=EVIL,
            queries=dict.fromkeys(base.queries, EVIL),
            corpus=dict.fromkeys(base.corpus, EVIL),
            environment={EVIL: EVIL},
            plugins=[(EVIL, EVIL, EVIL, EVIL)],
            patches=[(EVIL, EVIL, EVIL, EVIL)],
            settings={EVIL: [EVIL]},
            timings={EVIL: 1.0},
            files=[(EVIL, EVIL)],
            how_to_use=EVIL,
            notes=(EVIL,),
        ),
    )
    assert shown.tags["script"] == 0 and "<script" not in shown.source
    assert shown.text.count(EVIL) > 40


def test_half_a_surrogate_pair_does_not_cost_the_page(tmp_path: Path) -> None:
    shown = page(tmp_path, replace(bare(), summary="odd \ud800 text, 日本語"))
    assert "odd ? text, 日本語" in shown.text


def test_examples_are_the_extremes_both_ways() -> None:
    improved, worsened = examples(full())
    assert [one.query for one in improved] == [f"query number {i}" for i in (11, 10, 9, 8, 7, 6)]
    assert [(one.query, one.before_rank, one.after_rank) for one in worsened] == [
        ("query number 20", 1, 9),
        ("query number 21", 1, 3),
        ("query number 23", 1, 2),
    ]
    first = worsened[0]
    assert [hit.relevant for hit in first.before] == [True, False, False]
    assert [hit.text for hit in first.after] == ["x1", "x2", "x3"] and not any(hit.relevant for hit in first.after)
    assert improved[0].document == "document number 11" and improved[0].after[0].score == 1.0


def test_examples_without_texts_show_ids() -> None:
    improved, _ = examples(replace(full(), queries={}, corpus={}, relevant={}))
    assert (improved[0].query, improved[0].document, improved[0].after[0].relevant) == ("q11", "d11", True)


def test_losses_that_are_not_finite_leave_a_page(tmp_path: Path) -> None:
    history = [{"step": step, "loss": float("nan") if step > 3 else 1.0} for step in range(1, 9)]
    assert page(tmp_path, replace(bare(), history=history)).headings == ["Training loss"]
    assert page(tmp_path, replace(bare(), history=history[3:])).headings == []


def test_patches_alike_in_every_layer_share_a_row() -> None:
    rows = [(f"encoder.layer.{i}.attention", "packed", "applied", "") for i in range(12)]
    rows += [("encoder.layer.0.attention", "packed", "skipped", "no GPU"), ("conv1d.norm2", "norm", "applied", "")]
    assert grouped(rows) == [
        ("encoder.layer.*.attention", 12, "packed", "applied", ""),
        ("encoder.layer.*.attention", 1, "packed", "skipped", "no GPU"),
        ("conv1d.norm2", 1, "norm", "applied", ""),
    ]


def test_words_and_numbers() -> None:
    assert [duration(value) for value in (0.04, 9.94, 9.96, 59.4, 59.6, 67, 3599.7, 7503)] == [
        "0.0 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "1 min 07 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip
    values: list[object] = [None, True, 5e-5, 0.1 + 0.2, 3, [], {"b", "a"}, {"x": 0.5}]
    assert [setting(value) for value in values] == [
        "not set", "yes", "5e-05", "0.3", "3", "none", "a, b", "x: 0.5",
    ]  # fmt: skip
    assert [signed(value) for value in (0.1, -0.0996, 0.0, -0.0001)] == ["+0.100", "−0.100", "0.000", "0.000"]
    assert shorten("one  two\nthree", 40) == "one two three"
    assert shorten("one two, three", 9) == "one two…"
    assert shorten("x" * 30, 10) == "x" * 10 + "…"
    assert smoothed([3.0] * 7) == pytest.approx([3.0] * 7)
    assert smoothed([0.0, 1.0])[1] == pytest.approx(0.6)


def test_a_missing_extra_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ConfigError, match=rf"{name}.*pip install 'burnish\[report\]'"):
                write_report(tmp_path / "report.html", bare())
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    assert page(tmp_path, full()).source == page(tmp_path, full()).source


def test_imports_and_the_users_matplotlib_are_left_alone(tmp_path: Path) -> None:
    """Importing loads no matplotlib; writing neither pyplot nor a change of the user's settings."""
    script = f"""
import sys
from burnish.core.report import RunReport, write_report
heavy = {{"matplotlib", "jinja2", "torch", "transformers", "sentence_transformers"}} & set(sys.modules)
assert not heavy, heavy
import matplotlib
matplotlib.rcParams["axes.grid"] = True
matplotlib.rcParams["font.size"] = 33
before = dict(matplotlib.rcParams)
from pathlib import Path
report = RunReport(title="t", run="r", model="m", summary="s", history=[{{"step": i, "loss": 1.0}} for i in range(9)])
write_report(Path({str(tmp_path)!r}) / "report.html", report)
assert "matplotlib.pyplot" not in sys.modules
assert dict(matplotlib.rcParams) == before
assert "font-size: 33" not in Path({str(tmp_path)!r}, "report.html").read_text(encoding="utf-8")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
