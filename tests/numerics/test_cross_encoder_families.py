"""A step of our trainer is Sentence Transformers' for a cross-encoder of every family, whatever its tokenizer does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers.cross_encoder import CrossEncoderTrainer as StockTrainer
from sentence_transformers.cross_encoder import losses
from transformers import AutoConfig

from burnish.core import stream
from burnish.core.cross_encoder_trainer import CrossEncoderTrainer
from burnish.core.pair_tokens import PairRecipe

from .crossing import FAMILIES, PAIRS, make
from .steps import compare, step

QUERIES = [query for query, _ in PAIRS]
ANSWERS = [answer for _, answer in PAIRS]
LABELED = {"query": QUERIES, "answer": ANSWERS, "label": [0, 1, 1, 0, 0, 1, 0, 1]}
LISTS: dict[str, Any] = {
    "query": QUERIES,
    "docs": [ANSWERS[place : place + 1 + place % 3] for place in range(8)],
}
LISTS["labels"] = [
    [float((place + grade) % 3) for grade, _ in enumerate(docs)] for place, docs in enumerate(LISTS["docs"])
]
SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 8}


def still(folder: str) -> None:
    """No dropout."""
    config = AutoConfig.from_pretrained(folder)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    config.save_pretrained(folder)


def both(folder: str, loss: Any, data: Any, output: Path, monkeypatch: pytest.MonkeyPatch, *, filled: bool) -> Any:
    still(folder)
    rows = Dataset.from_dict(data)
    theirs, expected, _ = step(StockTrainer, Path(folder), loss, rows, output, SETTINGS)
    if filled:
        monkeypatch.setattr(CrossEncoderTrainer, "_shapes", lambda self: (stream.fit_eighths, stream.fit_octave))
    found = list[bool]()
    own = PairRecipe.features

    def features(recipe: PairRecipe, inputs: Any, prompt: str | None = None) -> Any:
        made = own(recipe, inputs, prompt)
        found.append(made is not None)
        return made

    monkeypatch.setattr(PairRecipe, "features", features)
    ours, gradients, trainer = step(CrossEncoderTrainer, Path(folder), loss, rows, output, SETTINGS)
    assert ours == pytest.approx(theirs, rel=1e-6)
    compare(gradients, expected, 3e-5)
    return trainer, found


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_step_of_every_family(
    model_type: str, filled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(model_type, tmp_path / "model")
    trainer, found = both(folder, losses.ListNetLoss, LISTS, tmp_path / "run", monkeypatch, filled=filled)
    said = capsys.readouterr().err
    if model_type == "roberta":  # no family of its own: padded, and tokenised in the step
        assert not found and "pairs are tokenised batch by batch: the input is padded" in said
        return
    assert found == [True] and "texts: " in said and trainer._pairs is not None
    assert "all pairs of a batch go through the model at once" in said


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("loss", [losses.ListNetLoss, losses.BinaryCrossEntropyLoss])
def test_pairs_in_a_chat_template_are_tokenised_whole(
    loss: Any, filled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("qwen3", tmp_path / "model", task="text-generation")
    data = LISTS if loss is losses.ListNetLoss else LABELED
    _, found = both(folder, loss, data, tmp_path / "run", monkeypatch, filled=filled)
    assert found == [True]
    said = capsys.readouterr().err
    assert "pairs, tokenised whole since the model puts texts into a chat template: " in said


def test_pairs_across_rows_are_tokenised_in_the_step_where_only_whole_ones_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("qwen3", tmp_path / "model", task="text-generation")
    data = {"query": QUERIES, "answer": ANSWERS}
    loss = losses.MultipleNegativesRankingLoss
    _, found = both(folder, loss, data, tmp_path / "run", monkeypatch, filled=True)
    assert found == [False]
    said = capsys.readouterr().err
    assert "tokenised in the step: the loss puts texts together otherwise than the columns stand" in said


def test_whole_pairs_where_putting_them_together_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("xlm-roberta", tmp_path / "model")
    monkeypatch.setattr(PairRecipe, "max_length", 60)
    _, found = both(folder, losses.ListNetLoss, LISTS, tmp_path / "run", monkeypatch, filled=False)
    assert found == [True]
    assert "pairs, tokenised whole since the model makes another" in capsys.readouterr().err


def test_pairs_joined_are_told_apart() -> None:
    from burnish.core.whole_pairs import _apart, joined

    for pair in (("", ""), ("a", ""), ("3:4", "5:"), (":", "x"), ("漢字", "b")):
        assert _apart(str(joined(*pair))) == pair
    assert joined("a", None) is None and joined("ab", "c") != joined("a", "bc")


def test_two_processes_train_as_theirs_do(tmp_path: Path) -> None:
    """Real ones. Losses call the `preprocess` of DistributedDataParallel, to which Sentence Transformers binds it."""
    still(make("bert", tmp_path / "model"))
    rows = [
        {"query": query, "docs": [*docs, "w9 w8"], "labels": [*labels, 2.0]}
        for query, docs, labels in zip(LISTS["query"], LISTS["docs"], LISTS["labels"], strict=True)
    ]
    Dataset.from_list(rows * 2).to_json(str(tmp_path / "rows.json"))
    script = str(Path(__file__).with_name("cross_encoder_processes.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    ran = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))
    assert len(found["ours"]) == 3 and len(set(found["ours"])) == 3
    assert found["ours"] == pytest.approx(found["theirs"], rel=1e-5)
