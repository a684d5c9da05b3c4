"""The table of consumers and families: what is made of logs, and that what is shipped was made of those in the tree."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from burnish.core import card_serving
from burnish.core.card_exports import complete_export, section

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("exports", ROOT / "benchmarks" / "exports.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(consumer: str, family: str, state: str = "verified", **other: Any) -> dict[str, Any]:
    made = {
        "consumer": consumer, "version": "1.0", "family": family, "kind": "embeddings", "state": state, "cosine": 1.0,
        "difference": 1e-7, "reason": "", "what": family, "rounded": False, "passed": True, "date": "2026-11-26",
    }  # fmt: skip
    return {**made, **other}


def test_the_shipped_table_comes_from_the_newest_logs(table: ModuleType) -> None:
    logs = table.newest()
    assert logs, "run: make verify-exports ARGS=--write-log"
    runs = table.summary(line for log in logs for line in table.rows(log))
    assert table.FILE.read_text(encoding="utf-8") == table.text(runs), "run: python benchmarks/exports.py"
    assert set(table.CONSUMERS) == set(card_serving.CONSUMERS)


def test_what_several_folders_make(table: ModuleType) -> None:
    runs = table.summary([
        row("a", "bert", version="10.0", cosine=0.99999), row("a", "bert", version="9.1"),
        row("a", "bert", cosine=0.9, rounded=True), row("a", "qwen3", passed=False),
        row("b", "bert", "refused", reason="no"), row("b", "bert", "static"),
        row("c", "bert", "wrong", reason="off", cosine=0.5), row("c", "bert"),
    ])  # fmt: skip
    assert set(runs["a"]) == {"bert embeddings"}, "a test that failed says nothing"
    known = runs["a"]["bert embeddings"]
    assert known["versions"] == ["9.1", "10.0"] and known["cosine"] == 0.99999 and known["folders"] == 2
    assert runs["b"]["bert embeddings"]["state"] == "static"
    assert runs["c"]["bert embeddings"]["state"] == "wrong" and runs["c"]["bert embeddings"]["reasons"] == ["off"]
    assert json.loads(table.text(runs)) == {"schema": 2, "runs": runs}
    assert "| a | 9.1, 10.0 | 0.999990 |" in table.markdown(runs) and "**wrong**" in table.markdown(runs)
    assert any(line.startswith("a ") and "0.999990" in line for line in table.plain(runs))
    assert "c, bert embeddings: off" in table.plain(runs)


def test_the_newest_log_of_each_kind_counts(table: ModuleType, tmp_path: Path) -> None:
    names = ("exports-2026-11-25-cpu", "exports-2026-11-26-cpu", "exports-long-2026-11-20-cpu", "exports-other")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text('{"date": "2026-11-26"}\n')
    assert [path.stem for path in table.newest(tmp_path)] == [names[1], names[2]]


def test_the_card_of_an_export(tmp_path: Path) -> None:
    quality = [
        {"precision": "fp32", "file": "onnx/model.onnx", "bytes": 91e6, "cosine_min": 1.0, "largest_difference": 1e-7,
         "same_order": 1.0},
        {"precision": "int8", "file": "onnx/model_quantized.onnx", "bytes": 23e6, "cosine_min": 0.98421,
         "largest_difference": 0.05, "same_order": 0.955},
    ]  # fmt: skip
    described = {"schema": 1, "kind": "embeddings", "runtime": "onnxruntime", "quality": quality}
    source, folder = tmp_path / "source", tmp_path / "folder"
    for place, heading in ((source, "# Refunds"), (folder, "# A model")):
        place.mkdir()
        (place / "README.md").write_text(
            f"{heading}\n\n<!-- burnish: serving -->\nx\n\n<!-- burnish: end of serving -->\n"
        )
    complete_export(source, folder)
    assert (folder / "README.md").read_text().startswith("# A model"), "nothing was measured"
    (folder / "deploy.json").write_text(json.dumps(described))
    complete_export(source, folder)
    card = (folder / "README.md").read_text()
    assert card.startswith("# Refunds") and "\nx\n" in card
    assert "| `onnx/model_quantized.onnx` | int8 | 23.0 | 0.984210 | 95.5% |" in card
    (source / "adapter_config.json").write_text("{}")
    complete_export(source, folder)
    assert "\nx\n" not in (folder / "README.md").read_text(), "an adapter's card says how to merge it"
    assert "| 5.0e-02 | 95.5% |" in section({**described, "kind": "scores"})
