"""The pages on runtimes that read a folder or a graph: each snippet is run where it is installed, against golden.json.

A snippet runs as a script of its own, in a folder that has what the page names, and leaves `vectors` or `scores`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..pages import blocks
from .conftest import HERE, ROOT
from .heads import save
from .test_runtimes import exported

pytestmark = [pytest.mark.exports, pytest.mark.timeout(1800)]
Python = Callable[[str], Path]
SERVING = ROOT / "docs" / "serving"
# Which release an adapter's snippet is for.
ADAPTERS = {"st-3.4": "adapter-3.4.py", "st-5.7": "adapter-5.7.py"}
PAGES = ("transformers", "sentence-transformers", "onnxruntime", "openvino", "fastembed")
QUESTION = "Which planet is known as the Red Planet?"
MARS = "Mars, known for its reddish appearance, is often referred to as the Red Planet."
VENUS = "Venus is often called Earth's twin."
_RUN = """
import json, numpy

QUESTION, MARS, VENUS = TEXTS
answers = {}
for title, code in SNIPPETS.items():
    left = {}
    exec(code, left)
    found = left.get("scores", left.get("vectors"))
    if found is None:  # a model alone, which the page has loaded in another way before
        from transformers import AutoTokenizer

        given = [QUESTION, QUESTION], [MARS, VENUS]
        batch = AutoTokenizer.from_pretrained("adapter")(*given, padding=True, return_tensors="pt")
        found = left["model"].eval()(**batch).logits.detach()
    answers[title] = numpy.asarray([numpy.asarray(row) for row in found], dtype=float).tolist()
json.dump(answers, open("answers.json", "w"))
"""


@pytest.fixture(scope="module")
def folders(saved: dict[str, Path], minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    heads = save("bert ranker", minilm, tmp_path_factory.mktemp("saved") / "model")
    found = {"saved": saved["minilm merged"], "reranker": heads["bert ranker merged"]}
    adapter = heads["bert ranker adapter"]
    return {**found, "adapter": adapter, "base": adapter.parent / "base"}


@pytest.fixture(scope="module")
def graphs(
    folders: dict[str, Path], python: Python, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Path]]:
    """What a page's exports are called there; "served" keeps its own golden.json, which is that of "saved"."""

    def export(target: str) -> dict[str, Path]:
        place = tmp_path_factory.mktemp(target)
        made = {
            name: exported(python, folders[source], target, place / name, "exporter=torchscript")
            for name, source in {"served": "saved", "reranker": "reranker"}.items()
        }
        return {**folders, **made}

    return export


def snippets(page: str) -> dict[str, str]:
    found = blocks((SERVING / f"{page}.md").read_text(encoding="utf-8"))
    return {str(block.title): block.text for block in found if block.kind == "python"}


def run(found: dict[str, str], python: Path, folders: dict[str, Path], place: Path) -> dict[str, Any]:
    """What each snippet leaves; one process for all, since most of the time goes into imports."""
    for name, folder in folders.items():
        (place / name).symlink_to(folder, target_is_directory=True)
    given = f"TEXTS, SNIPPETS = {(QUESTION, MARS, VENUS)!r}, {found!r}\n"
    (place / "all.py").write_text(given + _RUN, encoding="utf-8")
    done = subprocess.run([str(python), "all.py"], cwd=place, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads((place / "answers.json").read_text())
    return {title: np.asarray(rows) for title, rows in answers.items()}


def golden(folder: Path, key: str, asked: Sequence[Any]) -> Any:
    found = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    return np.asarray([found["outputs"][found[key].index(one)] for one in asked])


def wanted(title: str, folders: dict[str, Path]) -> Any:
    """What the snippet of that name must give."""
    if title in ("embed.py", "fewer.py"):
        texts = [f"find this: {QUESTION}", MARS][title == "fewer.py" :]
        whole = golden(folders["saved"], "texts", texts)
        short = whole[:, :64] if title == "fewer.py" else whole
        return short / np.linalg.norm(short, axis=1, keepdims=True)
    return golden(folders["reranker"], "inputs", [[QUESTION, MARS], [QUESTION, VENUS]])


def check(page: str, found: dict[str, str], python: Path, folders: dict[str, Path], place: Path) -> None:
    for title, got in run(found, python, folders, place).items():
        expected = wanted(title, folders)
        if page == "sentence-transformers" and expected.ndim == 1:  # which puts a sigmoid on its scores
            expected = 1 / (1 + np.exp(-expected))
        np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=2e-5, err_msg=f"{page}: {title}")


@pytest.mark.parametrize("environment", ["st-3.4", "st-5.7", HERE])
def test_page_of_transformers(environment: str, python: Python, folders: dict[str, Path], tmp_path: Path) -> None:
    check("transformers", snippets("transformers"), python(environment), folders, tmp_path)


@pytest.mark.parametrize("environment", ["st-3.4", "st-5.7", HERE])
def test_page_of_sentence_transformers(
    environment: str, python: Python, folders: dict[str, Path], tmp_path: Path
) -> None:
    found = snippets("sentence-transformers")
    adapters = {title: found.pop(title) for title in ADAPTERS.values()}
    if title := ADAPTERS.get(environment):  # it loads an adapter, with which the page goes on as with a whole model
        _, _, rest = found["score.py"].partition("\n\n")
        found[title] = adapters[title] + "\n" + rest.partition("\n")[2]
    check("sentence-transformers", found, python(environment), folders, tmp_path)


@pytest.mark.parametrize("page", ["onnxruntime", "openvino", "fastembed"])
def test_pages_of_graphs(page: str, python: Python, graphs: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    check(page, snippets(page), python(page), graphs("onnx" if page == "onnxruntime" else page), tmp_path)


def test_no_page_has_lost_its_snippets() -> None:
    known = {
        "transformers": {"embed.py", "score.py", "adapter.py"},
        "sentence-transformers": {"embed.py", "fewer.py", "score.py", *ADAPTERS.values()},
    }
    for page in PAGES:
        assert set(snippets(page)) == known.get(page, {"embed.py", "score.py"}), page


def test_a_snippet_that_is_wrong_is_found(python: Python, folders: dict[str, Path], tmp_path: Path) -> None:
    right = snippets("transformers")["embed.py"]
    changes = {
        "pooling": ("vectors = (states * mask).sum(1) / mask.sum(1)", "vectors = states[:, 0]"),
        "prompt": ("find this: ", ""),
        "length": ("max_length=256", "max_length=8"),
    }
    assert all(right.count(old) == 1 for old, _ in changes.values())
    wrong = {name: right.replace(old, new) for name, (old, new) in changes.items()}
    for name, got in run(wrong, python(HERE), folders, tmp_path).items():
        assert np.abs(got - wanted("embed.py", folders)).max() > 1e-3, name
