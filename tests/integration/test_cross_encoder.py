"""A reranker out of the real all-MiniLM-L6-v2: a fresh head, LoRA, saved, merged, read by plain libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from safetensors.torch import load_file
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

import burnish
from burnish import CrossEncoder, FastCrossEncoder
from burnish.core.adapters import reads_saved_modules

QUERIES = {
    "How do I bake bread?": "Mix flour, water, salt and yeast, let the dough rise, and bake it in a hot oven.",
    "What makes the tides?": "The pull of the moon raises the water of the sea twice a day.",
    "How does a bicycle stay upright?": "A moving bicycle steers into a fall by itself, which keeps its rider up.",
    "When do swallows leave?": "Swallows fly south in September, before the insects they live on are gone.",
    "Why is the sky blue?": "Air scatters short waves of sunlight more than long ones.",
    "How is paper made?": "Wood is ground to a pulp, pressed to sheets and dried.",
    "What do bees eat?": "Bees live on nectar and pollen, and on honey in winter.",
    "How are knots tied?": "Cross the ends of the rope, pass one under the other and pull both tight.",
}


@pytest.fixture(scope="module")
def trained(minilm: Path) -> Any:
    """MiniLM with an adapter and a head, after 40 steps of Sentence Transformers' own trainer."""
    rows = [(query, text, float(text == right)) for query, right in QUERIES.items() for text in QUERIES.values()]
    rows += [(query, right, 1.0) for query, right in QUERIES.items()] * 3
    data = Dataset.from_dict(dict(zip(("query", "text", "label"), map(list, zip(*rows, strict=True)), strict=True)))
    model = FastCrossEncoder.from_pretrained(minilm, device="cpu", max_seq_length=64)
    model = FastCrossEncoder.get_peft_model(model, r=16, lora_alpha=32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = sentence_transformers.CrossEncoderTrainingArguments(
        "unused", max_steps=40, per_device_train_batch_size=16, learning_rate=2e-3, report_to="none", seed=3,
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = sentence_transformers.CrossEncoderTrainer(
        model, arguments, train_dataset=data, loss=BinaryCrossEntropyLoss(model)
    )
    trainer.train()
    return model, before


def ranking(model: Any) -> int:
    """How many queries have their own text first."""
    texts = list(QUERIES.values())
    return sum(model.rank(query, texts)[0]["corpus_id"] == place for place, query in enumerate(QUERIES))


def test_it_is_a_cross_encoder_with_packed_input(trained: Any) -> None:
    model, before = trained
    assert isinstance(model, CrossEncoder) and isinstance(model, sentence_transformers.CrossEncoder)
    assert model.fresh == ("classifier",) and model.packed_scores is not None and model.num_labels == 1
    features = model.preprocess(list(QUERIES.items()))
    assert features["input_ids"].shape[0] == 1 and features["token_type_ids"].any()
    state = model.state_dict()
    moved = {name for name, value in state.items() if not value.equal(before[name])}
    assert moved == {name for name, value in model.named_parameters() if value.requires_grad}
    # Every linear layer of the six, and the head with BERT's pooler, which it alone reads.
    assert len([name for name in moved if ".lora_A." in name]) == 6 * 6
    assert {name.partition(".modules_to_save.")[0] for name in moved if "lora" not in name} == {
        "0.model.bert.pooler", "0.model.classifier",
    }  # fmt: skip
    assert ranking(model) >= 7


def test_saved_merged_and_read_by_plain_sentence_transformers(trained: Any, tmp_path: Path) -> None:
    model, _ = trained
    pairs = [(query, text) for query in QUERIES for text in QUERIES.values()]
    expected = model.predict(pairs)
    assert np.ptp(expected) > 0.5
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained_merged(tmp_path / "merged")
    model.save_pretrained_merged(tmp_path / "half", save_method="merged_16bit")
    for folder in ("adapter", "merged") if reads_saved_modules() else ("merged",):
        plain = sentence_transformers.CrossEncoder(str(tmp_path / folder), device="cpu")
        assert type(plain) is sentence_transformers.CrossEncoder and plain.max_seq_length == 64
        assert abs(plain.predict(pairs) - expected).max() <= 1e-5
    half = sentence_transformers.CrossEncoder(str(tmp_path / "half"), device="cpu")
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert abs(half.predict(pairs) - expected).max() <= 0.01
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 8e6
    record = json.loads((tmp_path / "adapter" / "burnish.json").read_text())
    assert record["pooling"].startswith("1 label, read of the first token") and record["input"]["layout"] == "packed"
    assert record["family"]["name"] == "bert" and record["adapter"]["r"] == 16
    again = FastCrossEncoder.from_pretrained(tmp_path / "adapter", device="cpu").eval()
    assert abs(again.predict(pairs) - expected).max() <= 1e-5 and again.packed_scores is not None
    card = (tmp_path / "merged" / "README.md").read_text()
    assert again.trained_with is not None and "## Training provenance" in card
    # The live model still holds its adapter, and packs.
    assert model.transformers_model.active_adapters() == ["default"] and abs(model.predict(pairs) - expected).max() == 0


def test_a_script_moves_by_its_import(minilm: Path) -> None:
    model: Any = burnish.CrossEncoder(str(minilm), num_labels=2, device="cpu", max_length=32)
    assert model.burnish is not None and model.burnish.decision.options.purpose == "full"
    assert model.num_labels == 2 and model.max_seq_length == 32 and all(p.requires_grad for p in model.parameters())
    plain: Any = sentence_transformers.CrossEncoder(str(minilm), num_labels=2, device="cpu", max_length=32)
    plain[0].model.load_state_dict(model[0].model.state_dict())
    pairs = list(QUERIES.items())
    np.testing.assert_allclose(model.predict(pairs), plain.predict(pairs), atol=1e-5)


def test_doctor_says_which_head_there_is(trained: Any, tmp_path: Path, cli: Any) -> None:
    model, _ = trained
    model.save_pretrained_merged(tmp_path / "merged")
    code, out, _ = cli("doctor", tmp_path / "merged", "--device", "cpu")
    assert code == 0
    assert "sequence-classification" in out and "reads the first token" in out and "bert.pooler" in out
    assert "nothing reads its output" not in out
