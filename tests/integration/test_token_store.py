"""Training from the token store: the losses of tokenising batch by batch, whatever the loss, and no stale token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]
from sentence_transformers.sentence_transformer import losses

from burnish import FastSentenceTransformer, Trainer, TrainingArguments
from burnish.core import stream
from burnish.core.errors import ConfigError
from burnish.core.testing.find import sample_config
from burnish.core.testing.subject import Subject

TEXTS = [f"a text of {'many ' * (number % 7)}words, number {number}" for number in range(20)]
PAIRS = {"anchor": TEXTS, "positive": TEXTS[::-1]}
TRIPLES = {**PAIRS, "negative": TEXTS[5:] + TEXTS[:5]}
SCORED = {**PAIRS, "score": [number / 20 for number in range(20)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = sample_config("bert")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    made: Path = Subject(config=config, folder=tmp_path_factory.mktemp("model"), tolerance=1e-5).repository
    return made


def load(folder: Path) -> Any:
    return FastSentenceTransformer.from_pretrained(str(folder), full_finetuning=True, max_seq_length=24)


def run(model: Any, data: dict[str, Any], loss: Any, out: Path, **settings: Any) -> tuple[list[float], Trainer]:
    arguments = TrainingArguments(
        str(out / "run"), per_device_train_batch_size=6, num_train_epochs=2, learning_rate=1e-2, optim="sgd",
        logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_dict(data), loss=loss)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


LOSSES: dict[str, tuple[dict[str, Any], Callable[[Any], Any], bool]] = {
    "in-batch negatives": (PAIRS, losses.MultipleNegativesRankingLoss, True),
    "hard negatives": (TRIPLES, losses.MultipleNegativesRankingLoss, True),
    "matryoshka": (
        PAIRS,
        lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 8]),
        True,
    ),
    "scores": (SCORED, losses.CoSENTLoss, True),
    "triplets": (TRIPLES, losses.TripletLoss, True),
    "cached": (PAIRS, lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), True),
    "layers": (
        PAIRS,
        lambda model: losses.AdaptiveLayerLoss(model, losses.MultipleNegativesRankingLoss(model), n_layers_per_step=-1),
        False,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_weights_are_those_of_tokenising_batch_by_batch(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, loss, joint = LOSSES[name]
    streams = []
    flatten = stream.flatten

    def counted(*args: Any, **keywords: Any) -> Any:
        streams.append(1)
        return flatten(*args, **keywords)

    monkeypatch.setattr(stream, "flatten", counted)
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))  # whatever ran before in this process
    ours, theirs = load(folder), load(folder)
    found, trainer = run(ours, data, loss(ours), tmp_path)
    assert streams and trainer.tokenise_seconds > 0
    columns = len([column for column in data if column != "score"])
    checked = columns  # the first row, before the run, against Sentence Transformers' collator
    if name == "cached":  # 4 texts of 24 tokens at most: two or three chunks a batch, beside the batch itself
        assert len(streams) >= checked + 8 + 2 * 6
    else:
        assert len(streams) == checked + (8 if joint else 8 * columns)
    streams.clear()
    expected, stock = run(theirs, data, loss(theirs), tmp_path, token_store=False)
    assert not streams and stock.tokenise_seconds == 0
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    moved = 0.0
    for (place, weight), (_, other), (_, before) in zip(
        ours.named_parameters(), theirs.named_parameters(), load(folder).named_parameters(), strict=True
    ):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5, msg=place)
        moved += float((weight - before).detach().norm())
    assert moved > 0


@pytest.mark.parametrize("prompts", ["query: ", {"anchor": "a longer question: "}], ids=["one", "one a column"])
@pytest.mark.parametrize("include", [True, False])
def test_prompts_stand_before_the_texts_and_are_pooled_as_the_model_says(
    prompts: Any, include: bool, folder: Path, tmp_path: Path
) -> None:
    both = []
    for store in (True, False):
        model = load(folder)
        model[1].include_prompt = include
        loss = losses.MultipleNegativesRankingLoss(model)
        both.append(run(model, PAIRS, loss, tmp_path, prompts=prompts, token_store=store)[0])
    assert both[0] == pytest.approx(both[1], rel=1e-4)


def test_a_second_run_finds_the_tokens_and_a_changed_text_does_not(folder: Path, tmp_path: Path, capfd: Any) -> None:
    def once(data: dict[str, Any], **settings: Any) -> Trainer:
        model = load(folder)
        loss = losses.MultipleNegativesRankingLoss(model)
        return run(model, data, loss, tmp_path, token_store=str(tmp_path / "tokens"), **settings)[1]

    assert once(PAIRS).tokenise_seconds > 0
    assert "40 texts, " in capfd.readouterr().err
    kept = sorted((tmp_path / "tokens").glob("*/tokens.arrow"))
    assert len(kept) == 2
    assert once(PAIRS).tokenise_seconds == 0
    assert "found tokenised" in capfd.readouterr().err
    changed = {**PAIRS, "anchor": ["another text", *TEXTS[1:]]}
    assert once(changed).tokenise_seconds > 0
    assert len(list((tmp_path / "tokens").glob("*/tokens.arrow"))) == 3
    assert once(PAIRS, prompts="query: ").tokenise_seconds > 0
    capfd.readouterr()
    for path in kept:
        path.write_bytes(path.read_bytes()[:-50])
    assert once(PAIRS).tokenise_seconds > 0
    assert capfd.readouterr().err.count("is damaged") == 2


def test_what_cannot_be_tokenised_ahead_is_said_and_trains(folder: Path, tmp_path: Path, capfd: Any) -> None:
    model = load(folder)
    loss = losses.MultipleNegativesRankingLoss(model)
    data = Dataset.from_dict(PAIRS).with_transform(lambda rows: {name: rows[name] for name in ("anchor", "positive")})
    assert train(model, data, loss, tmp_path).tokenise_seconds == 0
    assert "tokenised batch by batch: the data set has a transform" in capfd.readouterr().err


def train(model: Any, data: Any, loss: Any, out: Path, **settings: Any) -> Trainer:
    given: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 6, **settings}
    arguments = TrainingArguments(
        str(out / "run"), learning_rate=1e-2, optim="sgd", logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True, use_cpu=True, **given,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, loss=loss)
    trainer.train()
    return trainer


def logged(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_several_data_sets_with_losses_of_their_own(folder: Path, tmp_path: Path, capfd: Any) -> None:
    both = []
    for store in (True, False):
        model = load(folder)
        loss = {"one": losses.MultipleNegativesRankingLoss(model), "two": losses.CoSENTLoss(model)}
        data = DatasetDict({"one": Dataset.from_dict(TRIPLES), "two": Dataset.from_dict(SCORED)})
        both.append(logged(train(model, data, loss, tmp_path, token_store=store)))
    assert "100 texts" in capfd.readouterr().err
    assert both[0] == pytest.approx(both[1], rel=1e-4) and len(set(both[0])) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streamed_data_set(folder: Path, tmp_path: Path, workers: int, capfd: Any) -> None:
    model = load(folder)
    data = Dataset.from_dict(SCORED).to_iterable_dataset()
    settings: dict[str, Any] = {"dataloader_num_workers": workers, "max_steps": 3}
    found = logged(train(model, data, losses.CoSENTLoss(model), tmp_path, **settings))
    assert "texts are streamed" in capfd.readouterr().err
    model = load(folder)
    batch: list[Any] = [model.preprocess(TEXTS[:6]), model.preprocess(TEXTS[::-1][:6])]
    expected = losses.CoSENTLoss(model)(batch, torch.tensor([number / 20 for number in range(6)]))
    assert len(set(found)) == 3 and found[0] == pytest.approx(expected.item(), rel=1e-4)


class Own(Trainer):
    """A user's trainer that reads a batch's columns."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
        assert "anchor_input_ids" in inputs and "stream_input_ids" not in inputs
        return super().compute_loss(model, inputs, *args, **keywords)


def test_a_compute_loss_of_the_users_own_sees_columns(folder: Path, tmp_path: Path, capfd: Any) -> None:
    model = load(folder)
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    loss = losses.MultipleNegativesRankingLoss(model)
    Own(model=model, args=arguments, train_dataset=Dataset.from_dict(PAIRS), loss=loss).train()
    assert "each column is embedded by itself: Own has a compute_loss of its own" in capfd.readouterr().err


@pytest.mark.parametrize("skip", [True, False])
def test_a_run_resumed_in_an_epoch_goes_on_with_the_same_rows(folder: Path, tmp_path: Path, skip: bool) -> None:
    losses_of = []
    for store in (True, False):
        out = tmp_path / str(store)
        settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "token_store": store}
        model = load(folder)
        resumed = load(folder)
        _, whole = run(model, PAIRS, losses.MultipleNegativesRankingLoss(model), out, **settings)
        trainer = again(resumed, out, ignore_data_skip=skip, **settings)
        trainer.train(resume_from_checkpoint=str(out / "run" / "checkpoint-2"))
        assert (logged(trainer)[2:] == pytest.approx(logged(whole)[2:], rel=1e-4)) != skip
        losses_of.append(logged(trainer))
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-4)


def again(model: Any, out: Path, **settings: Any) -> Trainer:
    settings.pop("save_strategy")
    arguments = TrainingArguments(
        str(out / "run"), per_device_train_batch_size=6, num_train_epochs=2, learning_rate=1e-2, optim="sgd",
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        **{name: value for name, value in settings.items() if name != "save_steps"},
    )  # fmt: skip
    data = Dataset.from_dict(PAIRS)
    return Trainer(model=model, args=arguments, train_dataset=data, loss=losses.MultipleNegativesRankingLoss(model))


def test_large_batches_are_tiled_in_training_and_the_loss_is_as_it_was_afterwards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from burnish.core import trainer as module

    calls = []

    def tile(loss: Any, operation: Any) -> Any:
        def counted(*args: Any, **keywords: Any) -> Any:
            calls.append(1)
            return operation(*args, **keywords)

        return module_tile(loss, counted, least_scores=1)

    module_tile = module.tile  # type: ignore[attr-defined]
    both = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(module, "tile", tile)
        model = load(folder)
        loss = losses.MultipleNegativesRankingLoss(model)
        both.append(run(model, PAIRS, loss, tmp_path)[0])
        assert bool(calls) == patched and "compute_loss_from_embeddings" not in vars(loss)
    assert both[0] == pytest.approx(both[1], rel=1e-5)


def test_the_argument(tmp_path: Path) -> None:
    given: Any = TrainingArguments(str(tmp_path), token_store=tmp_path / "tokens", use_cpu=True)  # type: ignore[arg-type]
    assert (
        given.to_dict()["token_store"] == str(tmp_path / "tokens")
        and str(tmp_path / "tokens") in given.to_json_string()
    )
    assert TrainingArguments(str(tmp_path), use_cpu=True).token_store is True
    with pytest.raises(ConfigError, match="token_store: 3 is neither True, False nor a folder"):
        TrainingArguments(str(tmp_path), token_store=3, use_cpu=True)  # type: ignore[arg-type]


def test_a_cache_that_cannot_be_written_costs_speed_and_not_the_run(
    folder: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "file" / "cache"))
    model = load(folder)
    train(model, Dataset.from_dict(PAIRS), losses.MultipleNegativesRankingLoss(model), tmp_path, max_steps=1)
    assert "tokenised batch by batch: " in (said := capfd.readouterr().err) and "cannot be written to" in said
    with pytest.raises(ConfigError, match="cannot be written to"):
        asked: dict[str, Any] = {"token_store": str(tmp_path / "file" / "cache"), "max_steps": 1}
        train(model, Dataset.from_dict(PAIRS), losses.MultipleNegativesRankingLoss(model), tmp_path, **asked)
