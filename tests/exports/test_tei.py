"""Text Embeddings Inference by its rules: every family's folders as they are saved. Nothing is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from burnish import FastSentenceTransformer
from burnish.core.tei import check
from burnish.core.testing.subject import quietly

from .conftest import FAMILIES
from .heads import HEADS, bare, save

pytestmark = [pytest.mark.exports, pytest.mark.timeout(600)]
Note = Callable[..., None]
# What it stops at, or would take for another model.
REFUSED = {
    "gemma ranker": "TEI has no rerankers or classifiers of model type gemma3_text",
    "mpnet ranker": "TEI has no rerankers or classifiers of model type mpnet",
    "qwen3 ranker": "TEI has no rerankers or classifiers of model type qwen3",
    "qwen3 classes": "TEI has no rerankers or classifiers of model type qwen3",
}


def settle(name: str, kind: str, folder: Path, note: Note) -> None:
    found = check(folder)
    state = "refused" if name in REFUSED else "static" if found.good else "wrong"
    reason = "; ".join(found.faults)
    note("tei", name.split()[0], state, kind=kind, version=found.version, what=name, reason=reason)
    assert found.good if name not in REFUSED else REFUSED[name] in reason, (name, found.faults)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings(family: str, minilm: Path, note: Note, tmp_path: Path) -> None:
    base = bare(f"{family} ranker", minilm, tmp_path / "base")
    with quietly():
        model = FastSentenceTransformer.from_pretrained(base, device="cpu", full_finetuning=True)
        model.save_pretrained(str(tmp_path / "model"))
    settle(family, "embeddings", tmp_path / "model", note)


def test_the_real_minilm_and_what_is_out_of_the_ordinary(saved: dict[str, Path], note: Note) -> None:
    settle("minilm", "embeddings", saved["minilm merged"], note)
    for name in ("gemma", "qwen3"):
        assert any("scales its rotary positions" in fault for fault in check(saved[f"{name} merged"]).faults)


@pytest.mark.parametrize("name", [name for name in HEADS if "yes or no" not in name])
def test_heads(name: str, minilm: Path, note: Note, tmp_path: Path) -> None:
    settle(name, "scores", save(name, minilm, tmp_path)[f"{name} merged"], note)
