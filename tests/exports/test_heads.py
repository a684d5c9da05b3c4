"""Rerankers and classifiers in the compatible layout, read by releases from before it and by the installed ones."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from burnish.core.verifying import Verdict

from .conftest import HERE
from .heads import HEADS, save_all

pytestmark = [pytest.mark.exports, pytest.mark.timeout(1200)]
Folders = Mapping[str, Path]
ReadAll = Callable[..., dict[str, Verdict | str]]
Note = Callable[..., None]
# transformers 4.48 has neither.
YOUNGER = ("gemma", "qwen3")
ANSWERS = "yes or no"


@pytest.fixture(scope="session")
def heads(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "NAME full", "NAME adapter" and "NAME merged" folders of all heads."""
    return save_all(HEADS, minilm, tmp_path_factory)


def known(heads: Folders, environment: str) -> dict[str, Path]:
    return {key: path for key, path in heads.items() if environment != "st-3.4" or not key.startswith(YOUNGER)}


def right(found: Mapping[str, Verdict | str], consumer: str, note: Note) -> None:
    for name, verdict in found.items():
        assert isinstance(verdict, Verdict) and verdict.good, (name, verdict)
        assert verdict.difference <= 1e-5 and verdict.rank == 1.0 and verdict.tokens is not False, (name, verdict)
        note(consumer, name.split()[0], verdict, what=name)


@pytest.mark.parametrize("environment", ["st-3.4", "st-5.7", HERE])
def test_sentence_transformers(environment: str, heads: Folders, read_all: ReadAll, note: Note) -> None:
    asked = known(heads, environment)
    assert len(asked) == (24 if environment == "st-3.4" else 36)
    right(read_all(environment, "sentence-transformers", asked), "sentence-transformers", note)


@pytest.mark.parametrize("environment", ["st-3.4", "st-5.7", HERE])
def test_transformers_alone(environment: str, heads: Folders, read_all: ReadAll, note: Note) -> None:
    found = read_all(environment, "transformers", known(heads, environment))
    answers = {name: found.pop(name) for name in list(found) if ANSWERS in name}
    right(found, "transformers", note)
    assert all("come from LogitScore" in str(said) for said in answers.values()), answers
    assert len(answers) == (0 if environment == "st-3.4" else 3)


def altered(folder: Path, copy: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(folder, copy)
    (weights,) = copy.glob("*.safetensors")
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, {"format": "pt"})
    return copy


def test_a_head_that_is_lost_is_found(heads: Folders, read_all: ReadAll, tmp_path: Path) -> None:
    def drop(part: str) -> Callable[[dict[str, Any]], object]:
        return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]

    def zero(part: str) -> Callable[[dict[str, Any]], object]:
        return lambda tensors: [value.zero_() for name, value in tensors.items() if part in name]

    broken = {
        "no pooler": altered(heads["bert ranker merged"], tmp_path / "a", drop("pooler.dense.weight")),
        "no dense": altered(heads["xlm_roberta ranker merged"], tmp_path / "b", drop("classifier.dense.weight")),
        "no norm": altered(heads["modernbert ranker merged"], tmp_path / "c", drop("head.norm")),
        "no score": altered(heads["qwen3 ranker merged"], tmp_path / "d", drop("score")),
        "an adapter's head": altered(heads["bert classes adapter"], tmp_path / "e", zero(".classifier.")),
        "an adapter alone": altered(heads["bert classes adapter"], tmp_path / "f", zero("lora_B")),
    }
    for name, verdict in read_all("st-5.7", "sentence-transformers", broken).items():
        assert isinstance(verdict, Verdict) and any("a score is off" in one for one in verdict.faults), (name, verdict)


@pytest.mark.parametrize(
    ("environment", "what"), [("st-3.4", "Unrecognized model in"), ("st-5.7", "size mismatch for classifier")]
)
def test_an_adapter_that_is_not_told_its_labels_stops(
    environment: str, what: str, heads: Folders, python: Callable[[str], Path], tmp_path: Path
) -> None:
    script = "import sys, sentence_transformers; sentence_transformers.CrossEncoder(sys.argv[1], device='cpu')"
    command = [str(python(environment)), "-c", script, str(heads["bert classes adapter"])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0 and what in done.stderr, done.stderr[-1000:]
