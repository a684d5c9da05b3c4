"""What a batch is cut to: `auto_batch`, a loss's own budget, and the plan for the memory that is free."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers.sentence_transformer import losses

from burnish import FastSentenceTransformer, TrainingArguments
from burnish.core import planning_live
from burnish.core.cached import BUDGET, ranking_of
from burnish.core.errors import ConfigError, ModelError
from burnish.core.out_of_memory import WHOLE, Room


def loaded(folder: Path) -> Any:
    return FastSentenceTransformer.from_pretrained(str(folder), device="cpu", full_finetuning=True)


@pytest.mark.parametrize("given", [-1, 0, 1.5, "yes", None])
def test_what_auto_batch_takes(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auto_batch: .* is neither True, False nor a number of tokens"):
        TrainingArguments(str(tmp_path), use_cpu=True, auto_batch=given)


def test_what_auto_batch_contradicts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auto_batch, auto_find_batch_size: both are set"):
        TrainingArguments(str(tmp_path), use_cpu=True, auto_batch=True, auto_find_batch_size=True)
    with pytest.raises(ConfigError, match="auto_batch, optimizer_in_backward"):
        TrainingArguments(str(tmp_path), use_cpu=True, auto_batch=True, optimizer_in_backward=True, max_grad_norm=0)


class Told:
    """A loss with settings of a cached one."""

    mini_batch_size = 4

    def __init__(self, tokens: int | None) -> None:
        self.mini_batch_num_tokens = tokens


def test_a_losss_own_budget_and_the_plans(tiny_bert_st: Path, tmp_path: Path) -> None:
    model = loaded(tiny_bert_st)
    plain = losses.MultipleNegativesRankingLoss(model)
    room = Room(model, TrainingArguments(str(tmp_path), use_cpu=True, auto_batch=True), print)
    assert (room.limit(plain), room.limit(Told(None)), room.limit(Told(100))) == (WHOLE, 256, 100)
    room.budget = 300
    assert (room.limit(plain), room.limit(Told(None)), room.limit(Told(100))) == (300, 300, 100)
    assert room.limit(Told(1000)) == 300


def test_which_losses_may_be_cut(tiny_bert_st: Path) -> None:
    model = loaded(tiny_bert_st)

    class Own(losses.MultipleNegativesRankingLoss):
        def compute_loss_from_embeddings(self, embeddings: Any, labels: Any) -> Any:
            return super().compute_loss_from_embeddings(embeddings, labels) * 2

    assert ranking_of(losses.MultipleNegativesRankingLoss(model)) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert ranking_of(losses.MultipleNegativesSymmetricRankingLoss(model)) is not None
    for other in (Own(model), losses.CoSENTLoss(model), losses.CachedMultipleNegativesRankingLoss(model)):
        assert ranking_of(other) is None
    bound = losses.MultipleNegativesRankingLoss(model)
    bound.compute_loss_from_embeddings = lambda embeddings, labels: embeddings[0].sum()  # type: ignore[method-assign]
    assert ranking_of(bound) is None


def test_the_plan_for_free_memory(tiny_bert_st: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tiny_bert_st)

    def tokens(free: float, model: Any = model, **settings: Any) -> int:
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, **settings)
        return planning_live.token_budget(model, arguments, free)[0]

    plain = tokens(2e9)
    assert plain > 0 and plain % 64 == 0 and tokens(1e6) == 0
    assert tokens(4e9) > plain > tokens(2e9, gradient_accumulation_steps=2) - 1
    # The model is of float32 and nothing is autocast: twice the bytes of what was fitted.
    monkeypatch.setattr(planning_live, "_trains_in", lambda model, dtype, every=False: False)
    assert tokens(2e9) == pytest.approx(2 * plain, rel=0.1)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, optim="rmsprop")
    assert "counted as adamw" in planning_live.token_budget(model, arguments, 2e9)[1][0]


def test_the_plan_is_made_once_and_told(tiny_bert_st: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = loaded(tiny_bert_st), list[str]()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, auto_batch=True)
    room = Room(model, arguments, said.append)
    tokens = room._planned_tokens(2e9)
    assert said == [f"auto_batch: 2.00 GB free on cpu: forwards of at most {tokens:,} tokens"]
    assert room._planned_tokens(1e6) == 1 and "0.00 GB free on cpu are little for one text of 64 tokens" in said[-1]

    def no_shapes(*_: Any, **__: Any) -> Any:
        raise ModelError("it repeats no layer", where="a model")

    monkeypatch.setattr(planning_live, "shapes_of", no_shapes)
    assert room._planned_tokens(2e9) == BUDGET and "a model: it repeats no layer" in said[-1]
