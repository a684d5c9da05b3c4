"""What the tests of the user's API and of whole runs share: small models, a Hub cache, a training step, small data."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import burnish.core.quickstart as shipped

TEXTS = ["hello world", "a", "", "日本語のテキスト", "one more sentence, of middling length, " * 12]
TRAIN_PAIRS, TEST_QUERIES = 96, 24


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Short, empty, Japanese, and one that is cut."""
    return TEXTS


@pytest.fixture(scope="session")
def pairs() -> Any:
    """64 (anchor, positive) pairs about 64 different things."""
    from datasets import Dataset  # type: ignore[import-untyped]

    places = [f"{a} {b}" for a in ("old", "new", "far", "near", "red", "blue", "cold", "warm") for b in "abcdefgh"]
    return Dataset.from_dict(
        {
            "anchor": [f"what is in {place}?" for place in places],
            "positive": [
                f"in {place} there is {'much ' * (n % 5)}room for number {n}" for n, place in enumerate(places)
            ],
        }
    )


@pytest.fixture(scope="session")
def quantises() -> None:
    """For tests of 4 and 8 bits on the CPU, which an older bitsandbytes is refused for."""
    from importlib.metadata import version

    from packaging.version import Version

    from burnish.core.quantised import CPU_FLOOR

    if Version(version("bitsandbytes")) < Version(CPU_FLOOR):
        pytest.skip(f"bitsandbytes {CPU_FLOOR} has the CPU path")


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    """`FastSentenceTransformer.from_pretrained` on the CPU."""
    from burnish import FastSentenceTransformer

    def load(folder: Path | str, **options: Any) -> Any:
        return FastSentenceTransformer.from_pretrained(str(folder), **{"device": "cpu", **options})

    return load


@pytest.fixture(scope="session")
def plain() -> Callable[..., Any]:
    """Plain `sentence_transformers.SentenceTransformer` on the CPU."""
    from sentence_transformers import SentenceTransformer

    def plain(folder: Path | str, **options: Any) -> Any:
        return SentenceTransformer(str(folder), device="cpu", **options)

    return plain


@pytest.fixture(scope="session")
def step() -> Callable[..., None]:
    """One large step of SGD away from wherever a model is."""

    def step(model: Any, rate: float = 0.05) -> None:
        model.train()
        model.zero_grad()
        out = model(model.preprocess(TEXTS))["sentence_embedding"]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (out.float() * weights).sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate).step()
        model.zero_grad()
        model.eval()

    return step


@pytest.fixture(scope="session")
def adapted(load: Callable[..., Any], step: Callable[..., None], tiny_bert_st: Path) -> Callable[..., Any]:
    """A tiny model with an adapter that has been trained two steps; takes `get_peft_model`'s parameters."""
    from burnish import FastSentenceTransformer

    def adapted(folder: Path | str | None = None, load_options: dict[str, Any] | None = None, **lora: Any) -> Any:
        model = FastSentenceTransformer.get_peft_model(
            load(folder or tiny_bert_st, **(load_options or {})), **{"r": 4, **lora}
        )
        step(model)
        step(model)
        return model

    return adapted


@pytest.fixture(scope="session")
def half_bert(tiny_bert_st: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny Sentence Transformers folder with its weights in "bfloat16" or "float16"."""
    from sentence_transformers import SentenceTransformer

    made: dict[str, Path] = {}

    def half_bert(dtype: str) -> Path:
        if dtype not in made:
            folder = tmp_path_factory.mktemp(dtype) / f"tiny-{dtype}"
            model = SentenceTransformer(str(tiny_bert_st), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
            model.save_pretrained(str(folder))
            made[dtype] = folder
        return made[dtype]

    return half_bert


@pytest.fixture(scope="session")
def hub_cache(tiny_bert_st: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder as the Hub's client leaves it: `org/tiny` at `main`, and at `v2` with another weight."""
    from safetensors.torch import load_file, save_file

    cache = tmp_path_factory.mktemp("cache")
    repository = cache / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for number, revision in enumerate(["main", "v2"]):
        commit = str(number) * 40
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(tiny_bert_st, repository / "snapshots" / commit)
    weights = repository / "snapshots" / ("1" * 40) / "model.safetensors"
    changed = load_file(weights)
    for name in [name for name in changed if name.endswith("value.weight")]:
        changed[name] = 2 * changed[name]
    save_file(changed, weights, metadata={"format": "pt"})
    return cache


def _rows(name: str) -> dict[str, dict[str, Any]]:
    with gzip.open(shipped.DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return {row["_id"]: row for row in map(json.loads, file)}


@pytest.fixture(scope="session")
def small_retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retrieval folder cut from the shipped data: 96 training pairs, 24 test queries, and their documents.

    Shared by the session: read it only.
    """
    folder = tmp_path_factory.mktemp("small") / "small"
    (folder / "qrels").mkdir(parents=True)
    queries, corpus = _rows("queries"), _rows("corpus")
    asked, found = [], set()
    for split, count in (("train", TRAIN_PAIRS), ("test", TEST_QUERIES)):
        header, *lines = (shipped.DATA / "qrels" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[: count + 1]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        asked += [queries[line.split("\t")[0]] for line in lines]
        found |= {line.split("\t")[1] for line in lines}
    for name, rows in (("queries", asked), ("corpus", [corpus[key] for key in sorted(found)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert len(found) > 12, "a corpus this small measures nothing"
    return folder
