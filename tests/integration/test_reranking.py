"""A reranker as its users meet it: measured on the command line, and taught by another one in our trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import CrossEncoder as Stock
from sentence_transformers.cross_encoder.losses import ListNetLoss, MarginMSELoss, MSELoss
from torch import nn

from burnish import CrossEncoderTrainer, CrossEncoderTrainingArguments, FastCrossEncoder
from burnish.core.errors import ModelError
from burnish.core.teacher_scores import with_teacher_scores

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUERIES = ["which?", "how long does it take", "where to", "who"]
TEXTS = ["this one, if anything", "five days", "anywhere in Europe, and beyond", "nobody " * 9]
COLUMNS: dict[str, dict[str, Any]] = {
    "pairs": {"query": QUERIES, "document": TEXTS},
    "tuples": {"query": QUERIES, "positive": TEXTS, "negative_1": TEXTS[::-1], "negative_2": [*TEXTS[1:], "other"]},
    "lists": {"query": QUERIES, "documents": [TEXTS, TEXTS[:2], TEXTS[1:], TEXTS[::-1]]},
}


@pytest.fixture(scope="module")
def rerankers(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two cross-encoders with other random weights."""
    folder = tmp_path_factory.mktemp("rerankers")
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Stock(str(tiny_bert), num_labels=1, max_length=48, device="cpu")
        for parameter in model.parameters():  # scores that are far enough apart to be taught
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(str(folder / str(seed)))
    return folder / "1", folder / "2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "shop"
    place.mkdir()
    corpus = [{"_id": f"d{number}", "text": text} for number, text in enumerate(TEXTS)]
    rows = [{"query": query, "doc_ids": ["d0", "d1", "d2", "d3"], "labels": [0, 1, 0, 0]} for query in QUERIES]
    (place / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (place / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.mark.parametrize(
    ("columns", "loss", "label"),
    [("pairs", MSELoss, "label"), ("tuples", MarginMSELoss, "label"), ("lists", ListNetLoss, "labels")],
)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(
    columns: str, loss: Callable[..., nn.Module], label: str, rerankers: tuple[Path, Path], tmp_path: Path
) -> None:
    """The loss of the first step is that of the teacher's own scores: 0, or for ListNet their entropy."""
    lost = {}
    for teacher in rerankers:
        data = with_teacher_scores(
            Dataset.from_dict(COLUMNS[columns]), str(teacher), load={"device": "cpu"}, folder=tmp_path / "kept"
        )
        assert data.column_names[-1] == label
        model = FastCrossEncoder.from_pretrained(
            str(rerankers[0]), full_finetuning=True, config_kwargs=NO_DROPOUT, device="cpu"
        )
        arguments = CrossEncoderTrainingArguments(
            str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, disable_tqdm=True, token_store=str(tmp_path / "tokens"),
        )  # fmt: skip
        trainer = CrossEncoderTrainer(model, arguments, train_dataset=data, loss=loss(model))
        trainer.train()
        least = 0.0
        if columns == "lists":
            scores = [torch.tensor(row).softmax(0) for row in data["labels"]]
            least = float(torch.stack([-(one * one.log()).sum() for one in scores]).mean())
        lost[teacher] = next(row["loss"] for row in trainer.state.log_history if "loss" in row) - least
    assert abs(lost[rerankers[0]]) < 1e-5 < 1e-3 < lost[rerankers[1]]


def test_the_command_measures_a_reranker(cli: Any, rerankers: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    code, out, _ = cli("eval", rerankers[0], "--data", folder, "--device", "cpu", "--output", tmp_path / "figures.json")
    assert code == 0 and "4 queries" in " ".join(out.split()) and "ndcg@10" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    model = Stock(str(rerankers[0]), device="cpu")
    places = [[hit["corpus_id"] for hit in model.rank(query, TEXTS)].index(1) for query in QUERIES]
    assert figures["mrr@10"] == pytest.approx(sum(1 / (place + 1) for place in places) / 4)
    assert figures["as they came"]["ndcg@10"] == pytest.approx(0.63093, abs=1e-5) and figures["at best"]["ndcg@10"] == 1
    assert f"as the candidates came {figures['as they came']['ndcg@10']:.4f}" in out


def test_what_has_no_trained_head_neither_ranks_nor_teaches(
    cli: Any, tiny_bert: Path, tiny_bert_st: Path, folder: Path, tmp_path: Path
) -> None:
    for model in (tiny_bert, tiny_bert_st):
        code, out, err = cli("eval", model, "--data", folder, "--device", "cpu")
        assert code == 4 and not out and "it has no head to score pairs with: " in err
    pairs = Dataset.from_dict(COLUMNS["pairs"])
    with pytest.raises(ModelError, match="no head to score pairs with"):
        with_teacher_scores(pairs, str(tiny_bert_st), load={"device": "cpu"}, folder=tmp_path / "kept")
    torch.manual_seed(0)
    Stock(str(tiny_bert), num_labels=3, device="cpu").save_pretrained(str(tmp_path / "three"))
    with pytest.raises(ModelError, match="it gives 3 numbers a pair, not one"):
        with_teacher_scores(pairs, str(tmp_path / "three"), load={"device": "cpu"}, folder=tmp_path / "kept")


def test_an_adapter_ranks_with_the_head_that_it_saved(cli: Any, tiny_bert: Path, folder: Path, tmp_path: Path) -> None:
    model = FastCrossEncoder.from_pretrained(str(tiny_bert), num_labels=1, device="cpu")
    model = FastCrossEncoder.get_peft_model(model, r=2)
    model.save_pretrained(str(tmp_path / "adapter"))
    code, out, err = cli("eval", tmp_path / "adapter", "--data", folder, "--device", "cpu")
    assert code == 0 and "mrr@10" in out, err
