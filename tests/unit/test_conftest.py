"""The shared fixtures are what they say."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch


def test_no_network_and_no_user_files(own_config: Path) -> None:
    from huggingface_hub import constants, get_token

    assert constants.HF_HUB_OFFLINE
    assert Path(constants.HF_HOME) != Path.home() / ".cache" / "huggingface"
    assert get_token() is None
    assert os.environ["BURNISH_CONFIG_DIR"] == str(own_config)
    assert list(own_config.iterdir()) == []


@pytest.mark.parametrize("time", ["first", "second"])
def test_every_test_starts_from_the_same_seeds(time: str) -> None:
    drawn = (random.random(), float(np.random.rand()), torch.rand(1).item())
    assert drawn == pytest.approx((0.8444218515250481, 0.5488135039273248, 0.49625658988952637))


def test_tiny_bert_loads_with_plain_transformers(tiny_bert: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(tiny_bert), AutoTokenizer.from_pretrained(tiny_bert)
    assert model.config.hidden_size == 32
    assert tokenizer.tokenize("unbelievable") == ["unbelievable"] != tokenizer.tokenize("burnishing")
    with torch.no_grad():
        states = model(**tokenizer(["one", "a longer one"], padding=True, return_tensors="pt")).last_hidden_state
    assert states.shape == (2, 5, 32)
    assert not torch.equal(states[0, 0], states[1, 0])


def test_tiny_bert_st_loads_with_plain_sentence_transformers(tiny_bert_st: Path) -> None:
    from sentence_transformers import SentenceTransformer

    kinds = [module["type"].rpartition(".")[2] for module in json.loads((tiny_bert_st / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Normalize"]
    model = SentenceTransformer(str(tiny_bert_st), device="cpu")
    assert model.max_seq_length == 64
    embeddings = model.encode(["one", "another"])
    assert embeddings.shape == (2, 32)
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert abs(float(embeddings[0] @ embeddings[1])) < 0.9999
