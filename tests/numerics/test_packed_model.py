"""A prepared BERT against plain Sentence Transformers: embeddings, gradients, masks, copies, and the way back."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer as PlainModel
from torch import Tensor

from burnish import FastSentenceTransformer
from burnish.core.contracts import POOLING_MODES

LONG = "the quick brown fox jumps over the lazy dog " * 60
TEXTS = ["hello world", "a", "", "日本語のテキスト", LONG, "one more sentence, of middling length, to pad"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(params=["tiny", "real"])
def folder(request: pytest.FixtureRequest, tiny_bert_st: Path, minilm: Path) -> Path:
    return tiny_bert_st if request.param == "tiny" else minilm


def load(folder: Path, **options: Any) -> Any:
    return FastSentenceTransformer.from_pretrained(
        str(folder), full_finetuning=True, device="cpu", config_kwargs=NO_DROPOUT, **options
    )


def plain(folder: Path) -> Any:
    return PlainModel(str(folder), device="cpu", config_kwargs=NO_DROPOUT, model_kwargs={"dtype": torch.float32})


def gradients(model: Any, texts: list[str]) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the embeddings, in training mode."""
    model.train()
    out = model(model.preprocess(texts))["sentence_embedding"]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (out * weights).sum().backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(theirs) > 30
    top = max(float(value.abs().max()) for value in theirs.values())
    assert top > 0.01
    for name, value in theirs.items():
        # Float32 sums in another order: within 1e-5 of the tensor's own size, or of nothing where it cancels out.
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5 * top)


def difference(first: Any, second: Any) -> float:
    return float(np.abs(first - second).max())


@pytest.mark.parametrize(
    "texts", [TEXTS, ["alone"], [""], [LONG], ["", "", "x"]], ids=["all", "one", "empty", "longest", "empties"]
)
def test_embeddings_equal_plain_ones(folder: Path, texts: list[str]) -> None:
    ours, theirs = load(folder), plain(folder)
    features = ours.preprocess(texts)
    lengths = theirs.preprocess(texts)["attention_mask"].sum(1)
    assert features["input_ids"].shape == (1, int(lengths.sum())), "the batch holds padding"
    assert int(lengths.max()) <= ours.max_seq_length
    assert (int(lengths.max()) == ours.max_seq_length) == (LONG in texts)
    assert difference(ours.encode(texts), theirs.encode(texts)) <= 1e-5
    assert difference(ours.encode(texts[0]), theirs.encode(texts[0])) <= 1e-5


def test_token_embeddings_equal_plain_ones(tiny_bert_st: Path) -> None:
    ours, theirs = load(tiny_bert_st), plain(tiny_bert_st)
    asked = {"output_value": "token_embeddings", "convert_to_numpy": False}
    found, expected = (model.encode(TEXTS, **asked) for model in (ours, theirs))
    assert len(found) == len(expected) == len(TEXTS)
    for mine, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, stock, rtol=0, atol=1e-5)
    assert ours[0].can_flatten_inputs
    # By position, as `encode` also takes it.
    torch.testing.assert_close(ours.encode(TEXTS, None, None, 32, False, "token_embeddings")[0], found[0])


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_every_pooling_reads_packed_texts(tiny_bert: Path, mode: str, include_prompt: bool) -> None:
    ours, theirs = load(tiny_bert, pooling_mode=mode), plain(tiny_bert)
    theirs[1].pooling_mode = mode
    assert ours[1].pooling_mode == mode and ours[0].can_flatten_inputs
    for model in (ours, theirs):
        model.set_pooling_include_prompt(include_prompt)
    found, expected = (model.encode(TEXTS, prompt="in the beginning: ") for model in (ours, theirs))
    assert difference(found, expected) <= 1e-5
    assert difference(found, ours.encode(TEXTS)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_a_long_text_in_16_bits_is_as_near_as_that_of_padded_input(
    minilm: Path, dtype: torch.dtype
) -> None:
    """Sentence Transformers before 6.2 adds packed tokens up in 16 bits, which loses more the longer a text is."""
    ours, theirs = load(minilm, dtype=dtype), PlainModel(str(minilm), device="cpu", model_kwargs={"dtype": dtype})
    texts, exact = [LONG, TEXTS[0]], plain(minilm).encode([LONG, TEXTS[0]])
    assert ours.burnish.packed and ours.preprocess(texts)["input_ids"].shape[1] > 256
    found, stock = (model.encode(texts, convert_to_tensor=True) for model in (ours, theirs))
    assert found.dtype == dtype
    errors = [np.linalg.norm(embedded.float().numpy() - exact, axis=1) for embedded in (found, stock)]
    assert (errors[1] > 0).all() and (errors[0] <= 1.5 * errors[1]).all()


def test_every_gradient_equals_the_plain_one(folder: Path) -> None:
    ours, theirs = load(folder), plain(folder)
    ours.train()
    first, second = (ours(ours.preprocess(TEXTS))["sentence_embedding"] for _ in range(2))
    assert torch.equal(first, second), "dropout is on"
    found = gradients(ours, TEXTS)
    assert_same_gradients(found, gradients(theirs, TEXTS))
    without = {name for name, _ in ours.named_parameters()} - found.keys()
    assert without == {"0.model.pooler.dense.weight", "0.model.pooler.dense.bias"}


def test_dropout_is_on_unless_switched_off(tiny_bert_st: Path) -> None:
    model = FastSentenceTransformer.from_pretrained(str(tiny_bert_st), full_finetuning=True, device="cpu")
    model.train()
    first, second = (model(model.preprocess(TEXTS))["sentence_embedding"] for _ in range(2))
    assert not torch.equal(first, second)
    attention_only = FastSentenceTransformer.from_pretrained(
        str(tiny_bert_st), full_finetuning=True, device="cpu", config_kwargs={"hidden_dropout_prob": 0.0}
    )
    attention_only.train()
    first, second = (attention_only(attention_only.preprocess(TEXTS))["sentence_embedding"] for _ in range(2))
    assert not torch.equal(first, second), "packed attention forgets its dropout"


def test_padded_input_is_masked_by_the_same_attention(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ours, theirs = load(folder), plain(folder)
    ours[0].can_flatten_inputs = False
    name = ours.config._attn_implementation
    assert name == "burnish_packed_reference" and "attention_mask" in ours.preprocess(TEXTS)
    expected = theirs.encode(TEXTS)
    assert difference(ours.encode(TEXTS), expected) <= 1e-5
    assert_same_gradients(gradients(ours, TEXTS), gradients(theirs, TEXTS))
    # Unregistered, transformers hands the attention no mask at all: this test can fail.
    monkeypatch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name)
    assert difference(ours.encode(TEXTS), expected) > 1e-3


def test_packed_false_stays_stock(folder: Path) -> None:
    ours, theirs = load(folder, packed=False), plain(folder)
    assert ours.burnish.packed is None and ours.config._attn_implementation == "sdpa"
    assert (ours.encode(TEXTS) == theirs.encode(TEXTS)).all()


def test_state_dict_keys_stay_and_undoing_is_bit_equal(folder: Path) -> None:
    ours, theirs = load(folder), plain(folder)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert type(ours[0].model.pooler).__name__ == "UnreadBertPooler"
    ours.undo_patches()
    assert type(ours[0].model.pooler) is type(theirs[0].model.pooler)
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert "attention_mask" in ours.preprocess(TEXTS) and "padded" in str(ours.burnish)
    assert (ours.encode(TEXTS) == theirs.encode(TEXTS)).all()
    ours.undo_patches()  # nothing left to undo


def test_a_deep_copy_works_and_undoes_on_its_own(tiny_bert_st: Path) -> None:
    model = load(tiny_bert_st)
    twin = copy.deepcopy(model)
    assert difference(twin.encode(TEXTS), model.encode(TEXTS)) == 0
    twin.undo_patches()
    assert type(model[0].model.pooler).__name__ == "UnreadBertPooler" and model[0].can_flatten_inputs
    assert type(twin[0].model.pooler).__name__ == "BertPooler" and not twin[0].can_flatten_inputs
    with torch.no_grad():
        next(iter(twin.parameters())).zero_()
    assert difference(twin.encode(TEXTS), model.encode(TEXTS)) > 0


def test_a_pickled_model_works_here_and_in_a_process_that_knows_nothing(tiny_bert_st: Path, tmp_path: Path) -> None:
    model = load(tiny_bert_st)
    expected = model.encode(TEXTS)
    again = pickle.loads(pickle.dumps(model))
    assert difference(again.encode(TEXTS), expected) == 0
    again.undo_patches()
    assert type(again[0].model.pooler).__name__ == "BertPooler" and model.burnish.packed is not None
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((model, TEXTS, expected)))
    code = (
        f"import pickle, pathlib; model, texts, expected = pickle.loads(pathlib.Path({str(file)!r}).read_bytes()); "
        "assert model[0].can_flatten_inputs; assert abs(model.encode(texts) - expected).max() <= 1e-6; print('same')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr


def test_models_in_one_process_do_not_see_each_other(tiny_bert_st: Path, minilm: Path) -> None:
    small, large, stock = load(tiny_bert_st), load(minilm), plain(tiny_bert_st)
    before = small.encode(TEXTS), large.encode(TEXTS), stock.encode(TEXTS)
    assert type(stock[0].model.pooler).__name__ == "BertPooler" and stock.config._attn_implementation == "sdpa"
    large.undo_patches()
    assert (small.encode(TEXTS) == before[0]).all() and (stock.encode(TEXTS) == before[2]).all()
    assert type(small[0].model.pooler).__name__ == "UnreadBertPooler"
    assert difference(large.encode(TEXTS), before[1]) <= 1e-5


class Counter:
    """Counts how often a layer's feed-forward runs."""

    def __init__(self, model: Any) -> None:
        self.calls = 0
        for layer in model[0].model.encoder.layer:
            layer.intermediate.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("option", [True, "offload", "unsloth"])
def test_checkpointed_gradients_equal_unchecked_ones(tiny_bert_st: Path, option: bool | str, packed: bool) -> None:
    kept = load(tiny_bert_st, packed=packed)
    checked = load(tiny_bert_st, packed=packed, use_gradient_checkpointing=option)
    counters = [Counter(model) for model in (kept, checked)]
    assert_same_gradients(gradients(checked, TEXTS), gradients(kept, TEXTS))
    assert [counter.calls for counter in counters] == [2, 4], "nothing was computed again"
    word = "nothing to do on a CPU" if option in ("offload", "unsloth") else "every layer"
    assert word in checked.burnish.checkpointing and kept.burnish.checkpointing == "off"
