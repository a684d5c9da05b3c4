"""The quality benchmark's judgement; the training itself is `python benchmarks/quality_parity.py`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "benchmarks" / "quality_parity.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_parity", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(arm: str, seed: int, ndcg: float, *, rate: float = 20.0, trained: int = 10) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "after": {"ndcg@10": ndcg, "recall@10": 0.8, "mrr@10": 0.6},
        "train_seconds": 60.0,
        "pairs_per_second": rate,
        "pairs_per_second_after_first_step": None,
        "peak_rss_mib": 1000,
        "trained_parameters": trained,
    }


def lines(ours: list[float], theirs: list[float]) -> list[dict[str, Any]]:
    return [
        *(line("burnish", seed, score, rate=26.0) for seed, score in enumerate(ours)),
        *(line("sentence-transformers", seed, score) for seed, score in enumerate(theirs)),
    ]


def test_worse_than_the_seeds_differ_fails_the_check(benchmark: ModuleType) -> None:
    theirs = [0.650, 0.652, 0.656]  # six thousandths between seeds
    assert benchmark.verdict(lines([0.70, 0.70, 0.70], theirs)) is None
    assert benchmark.verdict(lines([0.647, 0.647, 0.649], theirs)) is None
    assert "0.0067 lower, more than the 0.0060" in benchmark.verdict(lines([0.646, 0.646, 0.646], theirs))
    uneven = [*lines([0.65], [0.65]), line("burnish", 1, 0.65, trained=11)]
    assert "do not train the same weights" in benchmark.verdict(uneven)


def test_the_table_pairs_the_arms_by_seed(benchmark: ModuleType) -> None:
    shown = benchmark.table(lines([0.650, 0.660], [0.655, 0.645])).splitlines()
    assert len(shown) == 1 + 4 + 2 + 2 + 1
    assert len({len(row) for row in shown[:-1]}) == 1, "columns do not line up"
    assert [row.split()[4] for row in shown if row.startswith("burnish − ST")] == ["-0.0050", "+0.0150"]
    assert shown[-1].startswith("mean paired difference: ndcg@10 +0.0050")
    assert shown[-1].endswith("pairs/s ×1.30")


def test_a_check_without_a_spread_is_refused(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quality_parity.py", "--seeds", "2", "--check"])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 2 and "at least three seeds" in capsys.readouterr().err


def test_arms_run_one_after_another_and_take_turns(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str]] = []

    def run(command: list[str], **_: Any) -> Any:
        if command[0] == "git":
            return type("Done", (), {"stdout": "abc"})
        arm, seed = command[3], command[5]
        asked.append((arm, seed))
        text = f"a library's chatter\n{json.dumps(line(arm, int(seed), 0.65))}\n"
        return type("Done", (), {"returncode": 0, "stdout": text})

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    output = tmp_path / "results" / "out.jsonl"
    benchmark.run_all([42, 43], -1, output)
    stock = "sentence-transformers"
    assert asked == [(stock, "42"), ("burnish", "42"), ("burnish", "43"), (stock, "43")]
    written = [json.loads(text) for text in output.read_text().splitlines()]
    assert [(entry["arm"], str(entry["seed"])) for entry in written] == asked
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]
