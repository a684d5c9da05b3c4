"""The quality benchmark of rerankers and classifiers: a run of each system, from the same head, and its judgement."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from burnish.core.errors import PluginError

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "benchmarks" / "rerank_quality.py"
FEW = ["--test", "3", "--batch", "8", "--max-steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rerank_quality", SOURCE)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("task", "more"), [("rerank", ["--queries", "8", "--negatives", "3"]), ("classify", ["--texts", "64"])]
)
def test_both_systems_start_from_the_same_head_and_write_a_line(
    task: str,
    more: list[str],
    benchmark: ModuleType,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "results.jsonl"
    for system, seed in (("st", 1), ("burnish", 1), ("burnish", 2)):
        given = ["--task", task, "--system", system, "--seed", str(seed), "--model", str(tiny_bert), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [str(SOURCE), *given, *FEW, *more])
        assert benchmark.main() == 0
    theirs, ours, other = (json.loads(line) for line in out.read_text().splitlines())
    assert theirs["head"] == ours["head"] != other["head"], "the seed does not decide the head, or not both heads"
    for line in (theirs, ours, other):
        assert line["steps"] == 2 and line["rows"] == (32 if task == "rerank" else 64) and line["train_seconds"] > 0
        assert line["metrics"].keys() == set(benchmark.METRICS[task]) and line["precision"] == "float32"
        assert line["commit"] and line["versions"]["torch"] and line["device"] == "cpu"
    assert benchmark.table([theirs, ours, other]).count("burnish") == 4


@pytest.mark.parametrize("task", ["rerank", "classify"])
def test_the_backend_that_is_named_is_asked_for(
    task: str, benchmark: ModuleType, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--task", task, "--system", "burnish", "--model", str(tiny_bert), "--out", str(tmp_path / "results.jsonl")]
    monkeypatch.setattr(sys, "argv", [str(SOURCE), *given, *FEW, "--queries", "8", "--backend", "nowhere"])
    with pytest.raises(PluginError, match="no enabled plugin has a backend 'nowhere'"):
        benchmark.main()


def line(system: str, seed: int, ndcg: float, **changed: Any) -> dict[str, Any]:
    metrics = {"ndcg@10": ndcg, "mrr@10": 0.5, "first_300_ndcg@10": 0.5}
    made = {"task": "rerank", "system": system, "seed": seed, "metrics": metrics, "train_seconds": 9.0}
    return {**made, "recipe": {"queries": 8}, "device": "cpu", "test": 3, **changed}


def test_the_table_pairs_systems_by_seed(benchmark: ModuleType) -> None:
    lines = [line("st", 1, 0.50), line("st", 2, 0.53), line("burnish", 1, 0.52), line("burnish", 2, 0.52)]
    shown = [row.split() for row in benchmark.table([*lines, line("burnish", 3, 0.9)]).splitlines()]
    assert [row[3] for row in shown if row[:3] == ["burnish", "−", "st"]] == ["+0.0050"], "seed 3 has no partner"
    assert [row[5] for row in shown if row[0] == "seeds"] == ["0.0300"]
    for changed in ({"recipe": {"queries": 9}}, {"device": "H100"}, {"test": 4}):
        with pytest.raises(ValueError, match="different recipes or devices"):
            benchmark.table([*lines, line("burnish", 3, 0.5, **changed)])


def test_a_run_names_what_it_needs(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parsed(["--task", "rerank"])
    assert "a run needs --system, --task, --model, --out" in capsys.readouterr().err
    given = benchmark.parsed(["--task", "classify", "--system", "st", "--model", "m", "--out", "o"])
    assert (given.data / "train.jsonl.gz").exists()
