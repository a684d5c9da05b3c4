"""A model's prompts in training: what `burnish train` puts before texts, and what the trainer says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from burnish import FastSentenceTransformer, Trainer, TrainingArguments
from burnish.core.columns import PAIRS
from burnish.core.config import RunConfig
from burnish.core.training import TrainingSet, pair_prompts

PROMPTS = {"query": "look for: ", "document": "", "other": "x"}


@pytest.fixture
def prompted(tiny_bert_st: Path, tmp_path: Path) -> Path:
    """A model that was saved with prompts."""
    folder = Path(shutil.copytree(tiny_bert_st, tmp_path / "prompted"))
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prompts": PROMPTS}))
    return folder


def load(folder: Path, **options: Any) -> Any:
    return FastSentenceTransformer.from_pretrained(str(folder), device="cpu", full_finetuning=True, **options)


def pairs() -> Dataset:
    return Dataset.from_dict({"anchor": ["a question", "another"], "positive": ["an answer", "and one more"]})


def trainer(model: Any, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, **settings)
    return Trainer(model, arguments, train_dataset=pairs(), loss=MultipleNegativesRankingLoss(model))


def test_pairs_get_the_prompts_of_queries_and_documents(prompted: Path) -> None:
    model, data = load(prompted), TrainingSet(dataset=pairs(), loss="x", summary="", kind=PAIRS)
    config = RunConfig(train="pairs.csv", model="m")
    assert pair_prompts(config, model, data) == {"anchor": "look for: "}
    model.prompts["document"] = "text: "
    assert pair_prompts(config, model, data) == {"anchor": "look for: ", "positive": "text: "}
    assert pair_prompts(RunConfig(train="pairs.csv", model="m", use_prompts=False), model, data) == {}
    scored = TrainingSet(dataset=pairs(), loss="x", summary="", kind="scored")
    assert pair_prompts(config, model, scored) == {}


def test_a_model_without_prompts_gets_none(tiny_bert_st: Path) -> None:
    data = TrainingSet(dataset=pairs(), loss="x", summary="")
    assert pair_prompts(RunConfig(train="pairs.csv", model="m"), load(tiny_bert_st), data) == {}


def test_the_trainer_says_which_prompts_it_uses(
    prompted: Path, tiny_bert_st: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(prompted)
    assert "prompts      query, other (saved with the model, or given)" in capsys.readouterr().err
    trainer(model, tmp_path)
    said = capsys.readouterr().err
    assert (
        "the model's prompts (query, other) are not put before the training texts; TrainingArguments(prompts=" in said
    )
    run = trainer(model, tmp_path, prompts={"anchor": "look for: "})
    assert "burnish: prompts before the training texts: {'anchor': 'look for: '}" in capsys.readouterr().err
    batch = next(iter(run.get_train_dataloader()))
    bare = next(iter(trainer(model, tmp_path).get_train_dataloader()))
    longer = batch["stream_cu_seq_lens"].diff() - bare["stream_cu_seq_lens"].diff()
    assert longer.tolist() == [3, 3, 0, 0], "the anchors are longer by their prompt, the positives as they were"
    capsys.readouterr()
    trainer(load(tiny_bert_st), tmp_path)
    assert "prompt" not in capsys.readouterr().err


def test_prompts_come_through_a_run_of_the_program(
    prompted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    from burnish.core.runs import run

    monkeypatch.chdir(tmp_path)
    rows = ["anchor,positive", *(f"question {n},answer {n}" for n in range(8))]
    Path("pairs.csv").write_text("\n".join(rows) + "\n")
    done = run(RunConfig(train="pairs.csv", model=str(prompted), batch_size=4, max_steps=1, name="trial", device="cpu"))
    for name in ("adapter", "merged"):
        read = SentenceTransformer(str(done.folder / name), device="cpu")
        assert {key: text for key, text in read.prompts.items() if text} == {"query": "look for: ", "other": "x"}
