"""The compatible layout, read by releases of Sentence Transformers and transformers from before it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.core.verifying import Verdict

from .conftest import HERE

pytestmark = [pytest.mark.exports, pytest.mark.timeout(1200)]
ReadAll = Callable[..., dict[str, Verdict | str]]
Note = Callable[..., None]
# transformers 4.48 has neither.
YOUNGER = ("gemma", "qwen3")


def right(consumer: str, found: dict[str, Verdict | str], note: Note) -> None:
    for name, verdict in found.items():
        if isinstance(verdict, str):
            note(consumer, name.split()[0], "wrong", what=name, reason=verdict)
        else:
            note(consumer, name.split()[0], verdict, what=name)
        assert isinstance(verdict, Verdict) and verdict.good, (name, verdict)
        assert verdict.cosine is not None and verdict.cosine > 1 - 1e-6 and verdict.difference <= 1e-5, (name, verdict)
        assert verdict.rank == 1.0 and verdict.tokens, (name, verdict)


@pytest.mark.parametrize("environment", ["st-3.4", "st-5.7", HERE])
def test_sentence_transformers(environment: str, saved: dict[str, Path], read_all: ReadAll, note: Note) -> None:
    known = {key: path for key, path in saved.items() if environment != "st-3.4" or not key.startswith(YOUNGER)}
    assert len(known) == (18 if environment == "st-3.4" else 24)
    right("sentence-transformers", read_all(environment, "sentence-transformers", known), note)


@pytest.mark.parametrize("environment", ["st-3.4", "st-5.7", HERE])
def test_transformers_alone(environment: str, saved: dict[str, Path], read_all: ReadAll, note: Note) -> None:
    known = {key: path for key, path in saved.items() if environment != "st-3.4" or not key.startswith(YOUNGER)}
    merged = {key: path for key, path in known.items() if "merged" in key}
    right("transformers", read_all(environment, "transformers", merged), note)


def without(folder: Path, copy: Path, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(folder, copy)
    value = json.loads((copy / file).read_text())
    change(value)
    (copy / file).write_text(json.dumps(value))
    return copy


def test_each_of_the_older_keys_counts(saved: dict[str, Path], read_all: ReadAll, tmp_path: Path) -> None:
    def drop(*names: str) -> Callable[[dict[str, Any]], object]:
        return lambda value: [value.pop(name) for name in names]

    broken = {
        "modernbert, one base": without(
            saved["modernbert merged"], tmp_path / "a", "config.json", drop("global_rope_theta")
        ),
        "modernbert, other base": without(
            saved["modernbert merged"], tmp_path / "b", "config.json", drop("local_rope_theta")
        ),
        "modernbert, whole layers": without(
            saved["modernbert merged"], tmp_path / "c", "config.json", drop("global_attn_every_n_layers")
        ),
        "gemma, base": without(saved["gemma merged"], tmp_path / "d", "config.json", drop("rope_theta")),
        "gemma, local base": without(
            saved["gemma merged"], tmp_path / "e", "config.json", drop("rope_local_base_freq")
        ),
        "gemma, scaling": without(saved["gemma merged"], tmp_path / "f", "config.json", drop("rope_scaling")),
        "qwen3, base": without(saved["qwen3 merged"], tmp_path / "g", "config.json", drop("rope_theta")),
        "qwen3, scaling": without(saved["qwen3 merged"], tmp_path / "h", "config.json", drop("rope_scaling")),
        "length": without(saved["bert merged"], tmp_path / "i", "sentence_bert_config.json",
                          lambda value: value.update(max_seq_length=20)),
        "pooling": without(saved["bert merged"], tmp_path / "j", "1_Pooling/config.json",
                           lambda value: value.update(pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)),
        "prompt": without(saved["bert merged"], tmp_path / "k", "config_sentence_transformers.json",
                          lambda value: value["prompts"].update(query="other: ")),
    }  # fmt: skip
    for name, verdict in read_all("st-5.7", "sentence-transformers", broken).items():
        assert isinstance(verdict, Verdict) and verdict.cosine is not None and verdict.cosine < 0.9999, (name, verdict)


def test_what_sentence_transformers_6_writes_itself_is_refused(
    saved: dict[str, Path], read_all: ReadAll, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    native = {}
    for name in ("bert merged", "minilm merged"):
        SentenceTransformer(str(saved[name]), device="cpu").save(str(tmp_path / name))
        for file in ("deploy.json", "golden.json"):
            shutil.copy(saved[name] / file, tmp_path / name)
        native[name] = tmp_path / name
    found = read_all("st-3.4", "sentence-transformers", native)
    assert all(isinstance(verdict, str) for verdict in found.values()), "then the layout has had its day"
