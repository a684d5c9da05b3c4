"""`burnish.Trainer` against Sentence Transformers' own: losses, checkpoints, evaluation; and what it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformerTrainer as StockTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as StockArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import AlbertConfig, AlbertModel, TrainerCallback

import burnish
from burnish import FastSentenceTransformer, Trainer, TrainingArguments
from burnish.core.errors import ModelError

Make = Callable[..., Any]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def fit(pairs: Any, tmp_path: Path) -> Make:
    """Train `model`; returns (trainer, the loss of every step)."""

    def fit(model: Any, kind: type[Any] = Trainer, arguments: type[Any] = StockArguments, **settings: Any) -> Any:
        passed = {name: settings.pop(name) for name in ("evaluator", "eval_dataset", "callbacks") if name in settings}
        resume = settings.pop("resume", None)
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "max_steps": 6,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        }
        args = arguments(**settings)
        loss = MultipleNegativesRankingLoss(model)
        trainer = kind(model=model, args=args, train_dataset=pairs, loss=loss, **passed)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    return fit


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_names_are_sentence_transformers_own() -> None:
    assert issubclass(Trainer, StockTrainer) and burnish.SentenceTransformerTrainer is Trainer
    assert issubclass(TrainingArguments, StockArguments)
    assert burnish.SentenceTransformerTrainingArguments is TrainingArguments
    assert Trainer.training_args_class is StockArguments, "Sentence Transformers' own arguments would be refused"


@pytest.mark.parametrize("arguments", [StockArguments, TrainingArguments])
@pytest.mark.parametrize("kind", [Trainer, StockTrainer])
def test_either_trainer_takes_either_arguments(
    load: Make, tiny_bert_st: Path, fit: Make, texts: list[str], kind: type[Any], arguments: type[Any]
) -> None:
    model = FastSentenceTransformer.get_peft_model(load(tiny_bert_st), r=4)
    before, frozen = model.encode(texts), weights(model)
    _, losses = fit(model, kind, arguments, max_steps=16, learning_rate=1e-2)
    assert len(losses) == 16 and sum(losses[-4:]) < sum(losses[:4])
    assert abs(model.encode(texts) - before).max() > 1e-3
    moved = {name for name, value in weights(model).items() if not torch.equal(value, frozen[name])}
    assert moved == {name for name in frozen if "lora" in name}


def test_losses_equal_plain_sentence_transformers_step_for_step(
    minilm: Path, load: Make, plain: Make, fit: Make
) -> None:
    """The real MiniLM, every weight, its own dropout: the same random numbers give the same bits."""
    theirs, ours = plain(minilm), load(minilm, packed=False, full_finetuning=True)
    expected, found = fit(theirs, StockTrainer, learning_rate=2e-5)[1], fit(ours, learning_rate=2e-5)[1]
    assert len(expected) == 6 and len(set(expected)) == 6
    assert found == expected
    assert same(weights(ours), weights(theirs))


def test_packed_losses_equal_padded_ones(minilm: Path, load: Make, plain: Make, fit: Make) -> None:
    theirs = plain(minilm, config_kwargs=NO_DROPOUT)
    ours = load(minilm, packed=True, full_finetuning=True, config_kwargs=NO_DROPOUT)
    _, expected = fit(theirs, StockTrainer, learning_rate=2e-5)
    trainer, found = fit(ours, learning_rate=2e-5)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
    assert batch["anchor_input_ids"].shape[0] == 1, "the trainer's batches are padded"
    assert expected[0] != expected[-1] and found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", [Trainer, StockTrainer])
def test_a_plain_model_trains_as_ever(tiny_bert_st: Path, plain: Make, fit: Make, kind: type[Any]) -> None:
    first, second = plain(tiny_bert_st), plain(tiny_bert_st)
    assert fit(first, StockTrainer)[1] == fit(second, kind)[1]
    assert same(weights(first), weights(second))


def test_gradient_accumulation(tiny_bert_st: Path, load: Make, plain: Make, fit: Make) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5}
    theirs, ours = plain(tiny_bert_st), load(tiny_bert_st, packed=False, full_finetuning=True)
    _, expected = fit(theirs, StockTrainer, **settings)
    assert fit(ours, **settings)[1] == expected and same(weights(ours), weights(theirs))
    assert fit(plain(tiny_bert_st), StockTrainer, **{**settings, "gradient_accumulation_steps": 1})[1] != expected


class StopAt(TrainerCallback):
    """Ends a run early, as a crash after a checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("kind", [Trainer, StockTrainer])
@pytest.mark.parametrize("how", ["adapter", "dora", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_bert_st: Path, load: Make, fit: Make, tmp_path: Path, how: str, kind: type[Any], capsys: Any
) -> None:
    def fresh() -> Any:
        model = load(tiny_bert_st, full_finetuning=how == "full")
        if how == "full":
            return model
        lora: dict[str, Any] = {"r": 4, "use_dora": how == "dora", "bias": "lora_only", "lora_dropout": 0.1}
        return FastSentenceTransformer.get_peft_model(model, **lora)

    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    whole = fresh()
    _, expected = fit(whole, kind, output_dir=str(tmp_path / "whole"), **settings)
    fit(fresh(), kind, callbacks=[StopAt(4)], **settings)
    again = fresh()
    capsys.readouterr()
    trainer, found = fit(again, kind, resume=True, **settings)
    assert trainer.state.global_step == 6 and len(expected) == 6
    assert found == expected, "the resumed run went another way"
    assert same(weights(again), weights(whole))
    assert "is ready to train" not in capsys.readouterr().err, "reading a checkpoint announced a model"


def test_resuming_with_another_adapter_is_refused(tiny_bert_st: Path, load: Make, fit: Make) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    fit(FastSentenceTransformer.get_peft_model(load(tiny_bert_st), target_modules=["query"]), **settings)
    other = FastSentenceTransformer.get_peft_model(load(tiny_bert_st), target_modules=["query", "value"])
    message = r"^checkpoint .*checkpoint-2: it has no .*value\.lora_A.*Resume with the adapter"
    with pytest.raises(ModelError, match=message):
        fit(other, **{**settings, "max_steps": 4}, resume=True)


@pytest.mark.parametrize("kind", [Trainer, StockTrainer])
@pytest.mark.parametrize("adapter", [True, False])
def test_evaluation_and_the_best_model_at_the_end(
    tiny_bert_st: Path, load: Make, plain: Make, fit: Make, pairs: Any, texts: list[str], kind: type[Any], adapter: bool
) -> None:
    model = load(tiny_bert_st, full_finetuning=not adapter)
    if adapter:
        FastSentenceTransformer.get_peft_model(model, r=4)
    queries = {str(n): text for n, text in enumerate(pairs["anchor"][:16])}
    corpus = {str(n): text for n, text in enumerate(pairs["positive"])}
    evaluator = InformationRetrievalEvaluator(queries, corpus, {key: {key} for key in queries}, name="held-out")
    trainer, _ = fit(
        model, kind, evaluator=evaluator, eval_dataset=pairs.select(range(16)), max_steps=12, learning_rate=1e-2,
        eval_strategy="steps", save_strategy="steps", eval_steps=4, save_steps=4, load_best_model_at_end=True,
        # The highest loss is the best: the first checkpoint, not the last.
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in rows] == [4, 8, 12] and rows[0]["eval_loss"] == max(r["eval_loss"] for r in rows)
    assert all(0 <= row["eval_held-out_cosine_ndcg@10"] <= 1 for row in rows)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-4"
    assert abs(model.encode(texts) - plain(best).encode(texts)).max() <= 1e-5
    assert abs(model.encode(texts) - plain(best.parent / "checkpoint-12").encode(texts)).max() > 1e-3
    assert (best / "adapter_config.json").exists() == adapter


def test_a_best_model_that_cannot_be_read_is_an_error(tiny_bert_st: Path, load: Make, fit: Make, pairs: Any) -> None:
    """Sentence Transformers logs it and goes on with the last weights."""

    class Spoil(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / "adapter_model.safetensors").write_bytes(b"nothing")

    model = FastSentenceTransformer.get_peft_model(load(tiny_bert_st), r=4)
    with pytest.raises(Exception, match=r"(?i)header|safetensor|deserializ"):
        fit(
            model, eval_dataset=pairs.select(range(8)), callbacks=[Spoil()], max_steps=2, eval_strategy="steps",
            save_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        )  # fmt: skip


def checkpointing_argument() -> dict[str, bool]:
    new = "activation_checkpointing"  # transformers 5.18; the old name warns there
    return {new if new in inspect.signature(StockArguments).parameters else "gradient_checkpointing": True}


@pytest.mark.parametrize("loaded", [False, "offload"])
def test_gradient_checkpointing_by_the_arguments(tiny_bert_st: Path, load: Make, fit: Make, loaded: Any) -> None:
    losses, kinds = [], []
    for settings in ({}, checkpointing_argument()):
        model = load(tiny_bert_st, config_kwargs=NO_DROPOUT, use_gradient_checkpointing=loaded)
        FastSentenceTransformer.get_peft_model(model, r=4)
        losses.append(fit(model, **settings)[1])
        kinds.append(model.burnish.checkpointing)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    offload = "every layer (offload has nothing to do on a CPU)"
    assert kinds == ([offload, offload] if loaded else ["off", "every layer"])


def test_gradient_checkpointing_that_cannot_be_had_is_refused(
    tiny_bert: Path, load: Make, fit: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = AlbertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        embedding_size=16, max_position_embeddings=130, pad_token_id=0,
    )  # fmt: skip
    AlbertModel(config).save_pretrained(tmp_path / "albert")
    tokenizer.save_pretrained(tmp_path / "albert")
    model = load(tmp_path / "albert", full_finetuning=True)
    with pytest.raises(ModelError, match=r"^gradient_checkpointing: transformers has no .* for AlbertModel"):
        fit(model, **checkpointing_argument())


def test_what_would_train_wrong_is_refused(
    half_bert: Callable[[str], Path], tiny_bert_st: Path, load: Make, plain: Make, fit: Make
) -> None:
    with pytest.raises(ModelError, match=r"Trainer: \d+ weights would train in half precision .*get_peft_model"):
        fit(load(half_bert("bfloat16"), load_in_16bit=True))
    with pytest.raises(ModelError, match=r"Trainer: this model was loaded with for_inference=True\. Load it without"):
        fit(load(tiny_bert_st, for_inference=True))
    for frozen in (load(tiny_bert_st, full_finetuning=True), plain(tiny_bert_st)):
        frozen.requires_grad_(False)
        with pytest.raises(ModelError, match=r"Trainer: no weight of this model is trainable\. Call"):
            fit(frozen)
    # Nobody has to add an adapter: float32 weights train as they are.
    assert len(fit(load(tiny_bert_st), max_steps=2)[1]) == 2


def test_an_adapter_over_a_bfloat16_base_trains(half_bert: Callable[[str], Path], load: Make, fit: Make) -> None:
    model = FastSentenceTransformer.get_peft_model(load(half_bert("bfloat16"), load_in_16bit=True), r=4)
    frozen = {name: value for name, value in weights(model).items() if "lora" not in name}
    _, losses = fit(model, max_steps=24, learning_rate=1e-2)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert {value.dtype for value in frozen.values()} == {torch.bfloat16}
    assert all(torch.equal(weights(model)[name], value) for name, value in frozen.items())


def test_the_checkpoints_of_a_run_load_anywhere(
    tiny_bert_st: Path, load: Make, plain: Make, fit: Make, texts: list[str], tmp_path: Path
) -> None:
    model = FastSentenceTransformer.get_peft_model(load(tiny_bert_st), r=4)
    fit(model, save_strategy="steps", save_steps=6)
    folder = tmp_path / "run" / "checkpoint-6"
    for again in (plain(folder), load(folder), burnish.SentenceTransformer(str(folder), device="cpu")):
        assert abs(again.encode(texts) - model.encode(texts)).max() <= 1e-5
