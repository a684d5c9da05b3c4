"""Every export target, made with its extra installed and read by its own runtime in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.core import deploy
from burnish.core.verifying import verify

pytestmark = [pytest.mark.exports, pytest.mark.timeout(1800)]
Python = Callable[[str], Path]
Note = Callable[..., None]
_RUN = "from burnish.core.cli import main; main()"
# The prompts, the pooling and the padding of each; the exporter of old does not know Gemma's masks.
FAMILIES = ("minilm", "distilbert", "modernbert", "mpnet", "qwen3", "xlm_roberta")
MODELS = tuple(f"{name} merged" for name in FAMILIES)


def burnish(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    # Not in the checkout, whose folders would stand before libraries of the same names.
    return subprocess.run(
        [str(python), "-c", _RUN, *map(str, arguments)], cwd=Path(python).parent, capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip


def exported(python: Python, source: Path, target: str, folder: Path, *options: str) -> Path:
    more = [part for option in options for part in ("--option", option)]
    done = burnish(python("exporter"), "export", source, "--to", folder, "--target", target, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", [*MODELS, "minilm adapter"])
def test_onnx(name: str, saved: dict[str, Path], python: Python, note: Note, tmp_path: Path) -> None:
    precisions = "dtype=fp32,fp16,int8" if name == "minilm merged" else "dtype=fp32"
    folder = exported(python, saved[name], "onnx", tmp_path / "onnx", precisions, "exporter=torchscript")
    verdict = verify(folder, python=python("onnxruntime"))
    note("onnxruntime", name.split()[0], verdict, what=name)
    assert verdict.good and verdict.runtime == "onnxruntime" and verdict.tokens and verdict.difference <= 1e-5, verdict
    quality = {row["precision"]: row for row in deploy.read(folder)["quality"]}
    if name == "minilm merged":
        assert quality["int8"]["bytes"] < quality["fp16"]["bytes"] < quality["fp32"]["bytes"]
        assert 0.95 < quality["int8"]["cosine_min"] < 0.9999 and quality["fp16"]["cosine_min"] > 0.9999
        for row in quality.values():
            verdict = verify(folder, variant=row["file"], python=python("onnxruntime"))
            note("onnxruntime", "bert", verdict, what=f"minilm {row['precision']}", rounded=row["rounded"])
            assert verdict.good, row


def test_pytorchs_own_exporter_knows_gemma(saved: dict[str, Path], python: Python, note: Note, tmp_path: Path) -> None:
    folder = exported(python, saved["gemma merged"], "onnx", tmp_path / "onnx")
    verdict = verify(folder, python=python("onnxruntime"))
    note("onnxruntime", "gemma", verdict)
    assert verdict.good


@pytest.mark.parametrize("name", MODELS)
def test_openvino(name: str, saved: dict[str, Path], python: Python, note: Note, tmp_path: Path) -> None:
    folder = exported(python, saved[name], "openvino", tmp_path / "openvino", "exporter=torchscript")
    verdict = verify(folder, python=python("openvino"))
    note("openvino", name.split()[0], verdict, what=name)
    assert verdict.good and verdict.runtime == "openvino" and verdict.difference <= 1e-5, verdict


@pytest.mark.parametrize("name", MODELS)
def test_fastembed(name: str, saved: dict[str, Path], python: Python, note: Note, tmp_path: Path) -> None:
    folder = exported(python, saved[name], "fastembed", tmp_path / "fastembed", "exporter=torchscript")
    verdict = verify(folder, python=python("fastembed"))
    note("fastembed", name.split()[0], verdict, what=name)
    assert verdict.good and verdict.runtime == "fastembed" and verdict.difference <= 1e-5, verdict


def test_fewer_dimensions_in_every_release(saved: dict[str, Path], python: Python, note: Note, tmp_path: Path) -> None:
    folder = exported(python, saved["minilm merged"], "matryoshka:64", tmp_path / "short")
    whole = json.loads((saved["minilm merged"] / "golden.json").read_text())["outputs"][0]
    short = json.loads((folder / "golden.json").read_text())["outputs"][0]
    length = sum(number**2 for number in whole[:64]) ** 0.5
    assert len(short) == 64 and max(abs(a - b / length) for a, b in zip(short, whole, strict=False)) < 1e-6
    for environment in ("st-3.4", "st-5.7"):
        verdict = verify(folder, python=python(environment))
        note("sentence-transformers", "minilm", verdict, what="minilm 64 dimensions")
        assert verdict.good


def test_what_is_missing_is_said_in_one_line(saved: dict[str, Path], tmp_path: Path) -> None:
    from burnish.core.exporting import export_folder

    with pytest.raises(Exception, match=r"^--target onnx: needs the package onnx.*pip install 'burnish\[onnx\]'"):
        export_folder(saved["minilm merged"], tmp_path / "no", "onnx", [])
