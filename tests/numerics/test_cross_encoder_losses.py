"""Sentence Transformers' losses for cross-encoders in our trainer: loss and gradients are those of its own trainer.

Both trainers take one step of the same weights in float64 on ragged pairs. Theirs pads them and tokenises in the loss;
ours packs them and puts them together out of the token store. Losses that compute in float32 are compared as closely as
that allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]
from sentence_transformers import CrossEncoder as StockEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer as StockTrainer
from sentence_transformers.cross_encoder import losses
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from burnish.core import stream
from burnish.core.cross_encoder_trainer import CrossEncoderTrainer
from burnish.core.pair_tokens import PairRecipe

from .steps import compare, step

Q = ["what is a cat", "dogs", "the third of many questions, and the longest", "x y", "another one?", "six"]
A = [
    "kitten",
    "a very long sentence about dogs and what they do all day, every day " * 3,
    "3",
    "letters",
    "",
    "number 6",
]
B = ["no", "nope and nothing else", "never " * 40, "not", "none of it at all, whoever asks", "nil"]
C = ["other", "one more that nobody wants", "q", "Ünder the bridge 漢字", "five " * 12, "6th"]
DOCS = [A[:3], B[1:3], [C[3]], A[2:6], B, [*C[:2], *A[4:]]]
GRADES = [[float((7 * row + 3 * place) % 4) for place, _ in enumerate(docs)] for row, docs in enumerate(DOCS)]
BINARY, CLASSES = [0, 1, 0, 1, 1, 0], [0, 2, 1, 1, 2, 0]
MARGINS = [0.5, -0.2, 0.1, 0.9, -0.6, 0.3]
SCORES = [0.1, 0.9, 0.4, 0.6, 0.2, 0.7]

PARTS = ("word_embeddings", "token_type", "attention.self.value", "classifier")

PAIRS = {"query": Q, "answer": A}
TRIPLETS = {**PAIRS, "negative": B}
LISTS = {"query": Q, "docs": DOCS, "labels": GRADES}
Make = Callable[[Any], nn.Module]


def _lambda(scheme: Any) -> Make:
    return lambda model: losses.LambdaLoss(model, weighting_scheme=scheme)


# (the loss, its data, the tolerance relative to the largest gradient: float32's where the loss computes in float32)
EXACT, HALF = 1e-10, 3e-5
CASES: dict[str, tuple[Make, Mapping[str, Any], float]] = {
    "binary": (losses.BinaryCrossEntropyLoss, {**PAIRS, "label": BINARY}, EXACT),
    "binary weighted": (
        lambda m: losses.BinaryCrossEntropyLoss(m, pos_weight=torch.tensor(3.0)), {**PAIRS, "label": SCORES}, EXACT,
    ),
    "cross entropy": (losses.CrossEntropyLoss, {**PAIRS, "label": CLASSES}, EXACT),
    "mse": (losses.MSELoss, {**PAIRS, "score": SCORES}, EXACT),
    "margin mse": (losses.MarginMSELoss, {**TRIPLETS, "label": MARGINS}, EXACT),
    "margin mse two": (
        losses.MarginMSELoss, {**TRIPLETS, "second": C, "label": [[one, -one] for one in MARGINS]}, EXACT,
    ),
    "mnr": (lambda m: losses.MultipleNegativesRankingLoss(m, num_negatives=3), TRIPLETS, EXACT),
    "mnr all": (lambda m: losses.MultipleNegativesRankingLoss(m, num_negatives=None), PAIRS, EXACT),
    "cached mnr": (
        lambda m: losses.CachedMultipleNegativesRankingLoss(m, num_negatives=3, mini_batch_size=5), TRIPLETS, EXACT,
    ),
    "lambda": (losses.LambdaLoss, LISTS, HALF),
    "lambda none": (_lambda(losses.NoWeightingScheme()), LISTS, HALF),
    "lambda ndcg1": (_lambda(losses.NDCGLoss1Scheme()), LISTS, HALF),
    "lambda ndcg2": (_lambda(losses.NDCGLoss2Scheme()), LISTS, HALF),
    "lambda rank": (_lambda(losses.LambdaRankScheme()), LISTS, HALF),
    "lambda ndcg2pp": (_lambda(losses.NDCGLoss2PPScheme()), LISTS, HALF),
    "lambda at 2": (lambda m: losses.LambdaLoss(m, k=2, mini_batch_size=4), LISTS, HALF),
    "listnet": (losses.ListNetLoss, LISTS, HALF),
    "listmle": (losses.ListMLELoss, LISTS, HALF),
    "plistmle": (lambda m: losses.PListMLELoss(m, respect_input_order=False), LISTS, HALF),
    "ranknet": (losses.RankNetLoss, LISTS, HALF),
    "adrmse": (losses.ADRMSELoss, LISTS, HALF),
}  # fmt: skip


def test_every_loss_is_here(model_folders: dict[int, Path]) -> None:
    known = {name for name in losses.__all__ if name.endswith("Loss")}
    model = StockEncoder(str(model_folders[1]), device="cpu")
    assert known == {type(make(model)).__name__ for make, _, _ in CASES.values()}
    schemes = {name for name in losses.__all__ if name.endswith("Scheme")}
    made = [make(model) for make, _, _ in CASES.values()]
    assert schemes == {type(one.weighting_scheme).__name__ for one in made if isinstance(one, losses.LambdaLoss)}


@pytest.fixture(scope="module")
def model_folders(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Cross-encoders with one label and with three: BERT of two layers without dropout, random weights."""
    tokenizer = AutoTokenizer.from_pretrained(str(minilm))
    made = {}
    for labels in (1, 3):
        kind: Any = BertConfig
        config = kind(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=labels,
        )  # fmt: skip
        torch.manual_seed(labels)
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        folder = made[labels] = tmp_path_factory.mktemp("cross-encoder") / f"labels-{labels}"
        model.save_pretrained(folder)
        tokenizer.model_max_length = 48
        tokenizer.save_pretrained(folder)
    return made


class Count:
    """How often pairs were put together, and how many of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[int] = []
        own = PairRecipe.features

        def features(recipe: PairRecipe, inputs: Any, prompt: str | None = None) -> Any:
            found = own(recipe, inputs, prompt)
            assert found is not None, "a step tokenised"
            assert found["input_ids"].shape[0] == 1 and found["texts"] == len(inputs)
            self.calls.append(len(inputs))
            return found

        monkeypatch.setattr(PairRecipe, "features", features)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(
    case: str, filled: bool, model_folders: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, columns, tolerance = CASES[case]
    folder = model_folders[3 if case == "cross entropy" else 1]
    data = Dataset.from_dict(dict(columns))
    theirs, expected, _ = step(StockTrainer, folder, make, data, tmp_path)
    if filled:
        monkeypatch.setattr(CrossEncoderTrainer, "_shapes", lambda self: (stream.fit_eighths, stream.fit_octave))
    count = Count(monkeypatch)
    ours, found, trainer = step(CrossEncoderTrainer, folder, make, data, tmp_path)
    assert count.calls, "the loss never asked the model's preprocess"
    assert math.isfinite(theirs) and theirs != 0.0
    assert ours == pytest.approx(theirs, rel=max(tolerance, 1e-12) if tolerance == EXACT else 1e-5)
    compare(found, expected, tolerance, *PARTS)
    assert "preprocess" not in vars(trainer.model), "nothing is left on the model"


@pytest.mark.parametrize(
    ("case", "forwards"),
    [("lambda", [20]), ("lambda at 2", [4] * 5), ("mnr", [6 * 5]), ("margin mse two", [18]), ("binary", [6])],
)
def test_how_many_forwards_a_step_takes(
    case: str,
    forwards: list[int],
    model_folders: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, columns, _ = CASES[case]
    count = Count(monkeypatch)
    _, _, trainer = step(CrossEncoderTrainer, model_folders[1], make, Dataset.from_dict(dict(columns)), tmp_path)
    assert count.calls == forwards
    said = capsys.readouterr().err
    assert ("all pairs of a batch go through the model at once" in said) == (case not in ("lambda at 2", "binary"))
    loss = trainer.loss
    assert getattr(loss, "mini_batch_size", None) == (4 if case == "lambda at 2" else None)
    assert not {"forward", "calculate_loss", "call_model_with_columns", "logits_from_pairs"} & set(vars(loss))


def test_a_cached_loss_goes_through_twice_in_its_own_parts(
    model_folders: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, columns, _ = CASES["cached mnr"]
    count = Count(monkeypatch)
    step(CrossEncoderTrainer, model_folders[1], make, Dataset.from_dict(dict(columns)), tmp_path)
    assert count.calls == [5] * 6 * 2, "30 pairs, five at a time, once without a graph and once with one"


class Shuffled(losses.BinaryCrossEntropyLoss):
    """A loss of a user's own: it turns pairs round, and forwards them one by one."""

    def forward(self, inputs: Any, labels: Any, prompt: str | None = None, task: str | None = None) -> Tensor:
        scores = [
            self.model(self.model.preprocess([(answer, query)], prompt=prompt, task=task))["scores"].view(-1)
            for query, answer in zip(*inputs, strict=True)
        ]
        loss: Tensor = self.bce_with_logits_loss(torch.cat(scores), labels.to(scores[0]))
        return loss


def test_a_loss_of_a_users_own_finds_tokens_too(
    model_folders: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Dataset.from_dict({**PAIRS, "label": BINARY})
    theirs, expected, _ = step(StockTrainer, model_folders[1], Shuffled, data, tmp_path)
    count = Count(monkeypatch)
    ours, found, _ = step(CrossEncoderTrainer, model_folders[1], Shuffled, data, tmp_path)
    assert count.calls == [1] * 6 and ours == pytest.approx(theirs, rel=1e-12)
    compare(found, expected, EXACT, *PARTS)


class Louder(losses.BinaryCrossEntropyLoss):
    """A loss that changes texts."""

    def forward(self, inputs: Any, labels: Any, prompt: str | None = None, task: str | None = None) -> Tensor:
        return super().forward([inputs[0], [text.upper() + "!" for text in inputs[1]]], labels, prompt, task)


def test_texts_that_a_loss_makes_are_tokenised_and_it_is_said(
    model_folders: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Dataset.from_dict({**PAIRS, "label": BINARY})
    theirs, expected, _ = step(StockTrainer, model_folders[1], Louder, data, tmp_path)
    ours, found, _ = step(CrossEncoderTrainer, model_folders[1], Louder, data, tmp_path)
    assert ours == pytest.approx(theirs, rel=1e-12)
    compare(found, expected, EXACT, *PARTS)
    assert capsys.readouterr().err.count("tokenised in the step: the loss makes texts of its own") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_prompts_and_several_data_sets(
    workers: int, model_folders: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"pairs": {**PAIRS, "label": BINARY}, "lists": {**LISTS}}
    arguments = {
        "prompts": {"pairs": "Is it so? ", "lists": "Rank: "}, "max_steps": 2, "dataloader_num_workers": workers,
        "multi_dataset_batch_sampler": "round_robin",
    }  # fmt: skip
    found = []
    for kind in (StockTrainer, CrossEncoderTrainer):

        def make(model: Any) -> Any:
            return {"pairs": losses.BinaryCrossEntropyLoss(model), "lists": losses.ListNetLoss(model)}

        if kind is CrossEncoderTrainer:
            count = Count(monkeypatch)
        parts = DatasetDict({name: Dataset.from_dict(columns) for name, columns in data.items()})
        _, gradients, trainer = step(kind, model_folders[1], make, parts, tmp_path, arguments)
        history = [row for row in trainer.state.log_history if "train_loss" in row]
        found.append((history[0]["train_loss"], gradients))
    assert sorted(count.calls) == [6, 20], "one batch of each"
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    compare(found[1][1], found[0][1], HALF, *PARTS)
