"""transformers.js by node: every kind of file that it looks for, heads, and what its own defaults get wrong."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.core import deploy
from burnish.core.errors import ModelError
from burnish.core.verifying import verify

from .conftest import FAMILIES, ROOT
from .heads import save
from .test_runtimes import exported

pytestmark = [pytest.mark.exports, pytest.mark.timeout(1800)]
Python = Callable[[str], Path]
PAGE = ROOT / "docs" / "serving" / "transformers-js.md"
QUESTION = "Which planet is known as the Red Planet?"


@pytest.fixture(scope="session")
def packages(python: Python) -> Path:
    """The node_modules that has transformers.js."""
    return python("node")


@pytest.fixture(scope="session")
def embedder(saved: dict[str, Path], python: Python, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The export of a family's merged model, made once."""
    made: dict[str, Path] = {}

    def export(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "js"
            precisions = "fp32,fp16,int8" if name == "minilm" else "fp32,int8"
            # The former exporter is quicker, and does not know Gemma's masks.
            options = [f"dtype={precisions}", *(["exporter=torchscript"] if name != "gemma" else [])]
            made[name] = exported(python, saved[f"{name} merged"], "transformers-js", folder, *options)
        return made[name]

    return export


@pytest.fixture(scope="session")
def scripts() -> dict[str, str]:
    """The page's scripts by their names."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "tests" / "pages.py")
    assert spec is not None and spec.loader is not None
    pages = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    found = pages.blocks(PAGE.read_text(encoding="utf-8"))
    return {block.title: block.text for block in found if block.kind == "js"}


def run(code: str, served: Path, packages: Path, place: Path) -> list[list[float]]:
    """The numbers that a script prints, run where it finds the packages and a folder `served`."""
    place.mkdir(exist_ok=True)
    for name, target in (("node_modules", packages), ("served", served)):
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(target, target_is_directory=True)
    (place / "script.mjs").write_text(code, encoding="utf-8")
    done = subprocess.run(["node", "script.mjs"], cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[list[float]] = json.loads(done.stdout)
    return rows


def golden(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    return found


def cosine(ours: Any, theirs: Any) -> float:
    one, other = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


@pytest.mark.parametrize("name", ["minilm", *FAMILIES])
def test_embeddings(name: str, embedder: Callable[[str], Path], packages: Path, note: Callable[..., None]) -> None:
    folder = embedder(name)
    verdict = verify(folder, node_modules=packages)
    note("transformers-js", name, verdict, version=verdict.versions["transformers.js"])
    assert verdict.good and verdict.runtime == "transformers-js" and verdict.tokens, verdict
    assert verdict.cosine is not None and verdict.cosine > 0.999999 and verdict.difference < 1e-5
    for row in deploy.read(folder)["quality"]:
        if row["rounded"]:
            rounded = verify(folder, node_modules=packages, variant=row["file"])
            # Another build of ONNX Runtime than the one that was measured.
            assert rounded.cosine == pytest.approx(row["cosine_min"], abs=0.01) and rounded.good, rounded


HEADED = ("bert ranker", "xlm_roberta ranker", "modernbert ranker", "bert classes", "modernbert several")


@pytest.mark.parametrize("name", HEADED)
def test_logits(
    name: str, minilm: Path, python: Python, packages: Path, note: Callable[..., None], tmp_path: Path
) -> None:
    served = headed(name, minilm, python, tmp_path)
    verdict = verify(served, node_modules=packages)
    note("transformers-js", name.split()[0], verdict, version=verdict.versions["transformers.js"], what=name)
    assert verdict.good and verdict.tokens and verdict.cosine is None and verdict.difference < 1e-5, verdict


def headed(name: str, minilm: Path, python: Python, place: Path) -> Path:
    source = save(name, minilm, place)[f"{name} full"]
    return exported(python, source, "transformers-js", place / "served", "dtype=fp32", "exporter=torchscript")


def broken(folder: Path, place: Path, **said: Any) -> Path:
    """A copy whose deploy.json says otherwise."""
    shutil.copytree(folder, place)
    (place / deploy.FILE).write_text(json.dumps({**deploy.read(folder), **said}))
    return place


def test_what_is_pooled_or_left_long_otherwise_is_seen(
    embedder: Callable[[str], Path], packages: Path, tmp_path: Path
) -> None:
    served = embedder("minilm")
    wrong = verify(broken(served, tmp_path / "cls", pooling="cls"), node_modules=packages)
    assert not wrong.good and wrong.cosine is not None and wrong.cosine < 0.95 and wrong.tokens, wrong
    long = verify(broken(served, tmp_path / "long", normalize=False), node_modules=packages)
    assert long.difference > 0.1, long


def test_what_the_graph_pools_itself(embedder: Callable[[str], Path], packages: Path, tmp_path: Path) -> None:
    # To the pipeline it is an unknown word; the graph has pooled by mean, whatever the description calls it.
    verdict = verify(broken(embedder("minilm"), tmp_path / "odd", pooling="weightedmean"), node_modules=packages)
    assert verdict.good and verdict.difference < 1e-5, verdict


def test_weights_are_in_the_graphs_own_file(saved: dict[str, Path], python: Python, tmp_path: Path) -> None:
    # A browser is given one file a graph.
    served = exported(python, saved["bert merged"], "transformers-js", tmp_path / "js", "dtype=fp32")
    assert [path.name for path in (served / "onnx").iterdir()] == ["model.onnx"]


def test_a_file_that_it_would_not_look_for(embedder: Callable[[str], Path], packages: Path) -> None:
    with pytest.raises(ModelError, match=r"transformers-js does not read it: it looks for onnx/model\.onnx, .*not for"):
        verify(embedder("bert"), node_modules=packages, variant="config.json")


def test_a_graph_that_is_none(embedder: Callable[[str], Path], packages: Path, tmp_path: Path) -> None:
    folder = broken(embedder("bert"), tmp_path / "torn")
    (folder / "onnx" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="transformers-js does not read it: Error: ") as caught:
        verify(folder, node_modules=packages)
    assert "\n" not in str(caught.value)


def test_the_pages_embeddings(
    embedder: Callable[[str], Path], packages: Path, scripts: dict[str, str], tmp_path: Path
) -> None:
    served = embedder("minilm")
    wanted = golden(served)
    query = wanted["outputs"][wanted["texts"].index(f"find this: {QUESTION}")]
    for name in ("embed.mjs", "whole.mjs"):
        (row,) = run(scripts[name], served, packages, tmp_path)
        assert np.abs(np.asarray(row) - query).max() < 1e-5, name
    long, place = max(wanted["texts"], key=len), int(np.argmax([len(text) for text in wanted["texts"]]))
    script = scripts["long.mjs"].replace('"a text, or a book of it"', json.dumps(long))
    assert script != scripts["long.mjs"]
    (row,) = run(script, served, packages, tmp_path)
    assert np.abs(np.asarray(row) - wanted["outputs"][place]).max() < 1e-5
    # And it is needed: by itself the library cuts the closing token off.
    (row,) = run(script.replace("extractor.tokenizer = closing", "closing"), served, packages, tmp_path)
    assert 0.9 < cosine(row, wanted["outputs"][place]) < 0.99999


def test_the_pages_reranker(
    minilm: Path, python: Python, packages: Path, scripts: dict[str, str], tmp_path: Path
) -> None:
    served = headed("bert ranker", minilm, python, tmp_path)
    wanted = golden(served)
    asked = [[QUESTION, "Venus is often called Earth's twin."], [QUESTION, ""]]
    outputs = [wanted["outputs"][wanted["inputs"].index(pair)] for pair in asked]
    rows = run(scripts["rerank.mjs"], served, packages, tmp_path / "run")
    assert np.abs(np.asarray(rows) - np.reshape(outputs, (2, 1))).max() < 1e-5
    plain = scripts["rerank.mjs"].replace("new String(text)", "text")
    empty = run(plain, served, packages, tmp_path / "run")[1]
    assert np.abs(np.asarray(empty) - outputs[1]).max() > 1e-3
    text = """
        import { env, pipeline } from "@huggingface/transformers";
        env.allowRemoteModels = false;
        const classify = await pipeline("text-classification", "./served", { dtype: "fp32" });
        console.log(JSON.stringify([(await classify(["one", "two"])).map(({ score }) => score)]));
    """
    assert run(text, served, packages, tmp_path / "run") == [[1, 1]]
