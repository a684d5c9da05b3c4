"""Training on a CUDA device with the reference backend: dtypes, packed input, quantised storage, checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer as PlainModel
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from burnish import FastSentenceTransformer, Trainer, TrainingArguments

pytestmark = pytest.mark.gpu

TEXTS = ["one", "two words", "", *(f"a sentence of number {n} and {'more ' * n}words" for n in range(40))]


def pairs() -> Any:
    from datasets import Dataset  # type: ignore[import-untyped]

    return Dataset.from_dict(
        {"anchor": [f"question {n}" for n in range(64)], "positive": [f"the answer to it is {n}" for n in range(64)]}
    )


def train(model: Any, folder: Path, **settings: Any) -> list[float]:
    """Train eight steps; returns the logged losses."""
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=16, num_train_epochs=2, learning_rate=1e-3, logging_steps=1,
        report_to="none", save_strategy="no", bf16=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=pairs(), loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error in the Frobenius norm, in float64."""
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def embed(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.encode(TEXTS, convert_to_tensor=True).cpu()
    return result


def test_adapters_get_a_bfloat16_base_and_train_in_float32(minilm: Path, tmp_path: Path) -> None:
    model = FastSentenceTransformer.from_pretrained(str(minilm))
    assert model.device.type == "cuda" and model.dtype == torch.bfloat16
    assert model.burnish is not None and model.burnish.decision.attention is not None
    assert model.burnish.packed is not None and model.burnish.decision.attention.spec.name == "flash"
    FastSentenceTransformer.get_peft_model(model, r=8)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    losses = train(model, tmp_path)
    assert losses[-1] < losses[0]


def test_packed_bfloat16_is_as_close_to_float32_as_padded_bfloat16(minilm: Path) -> None:
    reference = embed(PlainModel(str(minilm), device="cpu", model_kwargs={"dtype": torch.float32}))
    plain = embed(PlainModel(str(minilm), device="cuda", model_kwargs={"dtype": torch.bfloat16}))
    ours = embed(FastSentenceTransformer.from_pretrained(str(minilm), dtype="bfloat16"))
    assert error(plain, reference) > 0
    assert error(ours, reference) <= 1.5 * error(plain, reference)


def test_packed_float32_equals_plain(minilm: Path) -> None:
    plain = embed(PlainModel(str(minilm), device="cuda", model_kwargs={"dtype": torch.float32}))
    ours = embed(FastSentenceTransformer.from_pretrained(str(minilm), dtype="float32"))
    assert (ours - plain).abs().max() <= 1e-5


def test_full_fine_tuning_keeps_float32_masters(minilm: Path, tmp_path: Path) -> None:
    model = FastSentenceTransformer.from_pretrained(str(minilm), full_finetuning=True)
    assert model.dtype == torch.float32
    losses = train(model, tmp_path)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("option", [True, "offload"])
def test_checkpointed_gradients_equal_unchecked_ones(minilm: Path, option: bool | str) -> None:
    gradients = []
    for checkpointing in (False, option):
        model = FastSentenceTransformer.from_pretrained(
            str(minilm), full_finetuning=True, dtype="float32", use_gradient_checkpointing=checkpointing,
            config_kwargs={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        )  # fmt: skip
        model.train()
        features = {
            key: value.to("cuda") if torch.is_tensor(value) else value
            for key, value in model.preprocess(TEXTS[3:9]).items()
        }
        model(features)["sentence_embedding"].square()[:, 0].sum().backward()
        gradients.append(
            {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    assert max(float(value.abs().max()) for value in gradients[0].values()) > 0
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_quantised_base_trains_and_merges(minilm: Path, tmp_path: Path, flag: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = FastSentenceTransformer.from_pretrained(str(minilm), **{flag: True})  # type: ignore[arg-type]
    assert model.config is not None and "quantization_config" in model.config.to_dict()
    FastSentenceTransformer.get_peft_model(model, r=8)
    losses = train(model, tmp_path / "run")
    assert losses[-1] < losses[0]
    live = embed(model)
    model.save_pretrained_merged(tmp_path / "merged", save_method="merged_32bit")
    merged = embed(PlainModel(str(tmp_path / "merged"), device="cuda"))
    # The live model computes in bfloat16 over quantised weights, the merged one in float32 over the same values.
    assert torch.nn.functional.cosine_similarity(live.float(), merged.float()).min() > 0.99
