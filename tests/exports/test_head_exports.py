"""Rerankers and classifiers as ONNX, OpenVINO and for FastEmbed, read by their own runtimes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.core import deploy
from burnish.core.contracts import ExportRequest
from burnish.core.errors import ModelError
from burnish.core.exporters.onnx import fastembed, onnx
from burnish.core.testing.subject import quietly
from burnish.core.verifying import Verdict, verify

from .heads import save_all
from .test_runtimes import exported

pytestmark = [pytest.mark.exports, pytest.mark.timeout(1800)]
Python = Callable[[str], Path]
Note = Callable[..., None]
# BERT's pooler, RoBERTa's dense head, ModernBERT's norm, a decoder's last token; one label and several.
NAMES = ("bert ranker", "bert classes", "xlm_roberta ranker", "modernbert several", "qwen3 ranker", "qwen3 yes or no")


@pytest.fixture(scope="module")
def heads(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(NAMES, minilm, tmp_path_factory)


def right(verdict: Verdict, runtime: str, what: str, note: Note) -> None:
    assert verdict.good and verdict.runtime == runtime, (what, verdict)
    assert verdict.difference <= 1e-5 and verdict.rank == 1.0 and verdict.tokens is not False, (what, verdict)
    note(runtime, what.split()[0], verdict, what=what)


@pytest.mark.parametrize(
    "name", ["bert ranker adapter", "xlm_roberta ranker merged", "modernbert several merged", "qwen3 ranker merged"]
)
def test_onnx(name: str, heads: dict[str, Path], python: Python, tmp_path: Path, note: Note) -> None:
    folder = exported(python, heads[name], "onnx", tmp_path / "onnx", "exporter=torchscript")
    right(verify(folder, python=python("onnxruntime")), "onnxruntime", name, note)


def test_rounded_scores(heads: dict[str, Path], python: Python, tmp_path: Path, note: Note) -> None:
    source = heads["bert classes merged"]
    folder = exported(python, source, "onnx", tmp_path / "onnx", "exporter=torchscript", "dtype=fp32,fp16,int8")
    quality = {row["precision"]: row for row in deploy.read(folder)["quality"]}
    assert quality["fp32"]["largest_difference"] < 1e-5 < quality["fp16"]["largest_difference"] < 1e-2
    assert quality["fp16"]["largest_difference"] < quality["int8"]["largest_difference"] < 0.5
    for precision, row in quality.items():
        verdict = verify(folder, variant=row["file"], python=python("onnxruntime"))
        assert verdict.good, (precision, verdict)
        note("onnxruntime", "bert", verdict, what=f"bert classes {precision}", rounded=row["rounded"])
    # The same file is wrong for one that says it is float32.
    described = deploy.read(folder)
    deploy.write_description(folder, described | {"quality": []})
    assert not verify(folder, variant=quality["int8"]["file"], python=python("onnxruntime")).good


def test_openvino(heads: dict[str, Path], python: Python, tmp_path: Path, note: Note) -> None:
    for name in ("bert classes merged", "qwen3 ranker merged"):
        folder = exported(python, heads[name], "openvino", tmp_path / name, "exporter=torchscript")
        right(verify(folder, python=python("openvino")), "openvino", name, note)


def test_fastembed(heads: dict[str, Path], python: Python, tmp_path: Path, note: Note) -> None:
    for name in ("bert ranker merged", "xlm_roberta ranker merged"):
        folder = exported(python, heads[name], "fastembed", tmp_path / name, "exporter=torchscript")
        right(verify(folder, python=python("fastembed")), "fastembed", name, note)


def test_what_comes_out_wrong_is_refused(heads: dict[str, Path], tmp_path: Path, note: Note) -> None:
    refused = {
        "bert classes merged": ("fastembed", "the model has 3 labels, and FastEmbed's rerankers give the first alone"),
        "qwen3 yes or no merged": ("onnxruntime", "scores by words of its vocabulary, and only heads that classify"),
    }
    for name, (consumer, what) in refused.items():
        request = ExportRequest(source=heads[name], output=tmp_path / "no", options={})
        with quietly(), pytest.raises(ModelError, match=what):
            fastembed(request) if consumer == "fastembed" else onnx(request)
        assert not (tmp_path / "no").exists(), "before anything is written"
        note(consumer, name.split()[0], "refused", kind="scores", reason=what, what=name)


def test_a_graph_of_another_head_is_found(heads: dict[str, Path], python: Python, tmp_path: Path) -> None:
    # The same head before and after training.
    folder = exported(python, heads["bert ranker full"], "onnx", tmp_path / "full", "exporter=torchscript")
    shutil.copy(heads["bert ranker merged"] / "golden.json", folder)
    verdict = verify(folder, python=python("onnxruntime"))
    assert any("a score is off" in fault for fault in verdict.faults), verdict
    assert "golden.json has changed" in verdict.faults
