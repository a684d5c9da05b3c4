"""Packed scores of every family are the padded ones of plain Sentence Transformers: predictions, training, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as Plain

from burnish.core.cross_encoder import CrossEncoder
from burnish.core.errors import ConfigError
from burnish.core.fast_cross_encoder import FastCrossEncoder
from burnish.core.packing import Flattening

from .crossing import FAMILIES, PAIRS, make


def both(folder: str, **options: Any) -> tuple[Any, Any]:
    """Ours for full fine-tuning, and the plain one, without dropout from here on."""
    ours = FastCrossEncoder.from_pretrained(folder, full_finetuning=True, device="cpu", **options)
    return ours.eval(), Plain(folder, device="cpu").eval()


def to_score(model: Any, pairs: Any) -> torch.Tensor:
    scores: torch.Tensor = model(model.preprocess(pairs))["scores"]
    return scores


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max())


def gradients(model: Any, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(4), dtype=scores.dtype)
    torch.autograd.backward((scores * weights).sum())
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_predictions_are_the_plain_ones(model_type: str, labels: int, tmp_path: Path) -> None:
    ours, plain = both(make(model_type, tmp_path, labels))
    assert ours.num_labels == plain.num_labels == labels
    assert (ours.packed_scores is not None) == (model_type != "roberta")
    expected = plain.predict(PAIRS, batch_size=3)
    assert np.ptp(expected, axis=0).min() > 1e-3  # they differ
    for size in (3, 32):
        np.testing.assert_allclose(ours.predict(PAIRS, batch_size=size), expected, atol=1e-5)
    np.testing.assert_allclose(ours.predict(PAIRS[0]), plain.predict(PAIRS[0]), atol=1e-5)
    tensors = ours.predict(PAIRS, convert_to_tensor=True, activation_fn=torch.nn.Tanh())
    torch.testing.assert_close(tensors, plain.predict(PAIRS, convert_to_tensor=True, activation_fn=torch.nn.Tanh()))
    prompted = plain.predict(PAIRS, prompt="w3 w4 ")
    assert np.abs(prompted - expected).max() > 1e-4
    np.testing.assert_allclose(ours.predict(PAIRS, prompt="w3 w4 "), prompted, atol=1e-5)
    if labels > 1:
        soft = ours.predict(PAIRS, apply_softmax=True)
        np.testing.assert_allclose(soft, plain.predict(PAIRS, apply_softmax=True), atol=1e-5)
        return
    query, documents = PAIRS[0][0], [document for _, document in PAIRS]
    found = ours.rank(query, documents, top_k=3, return_documents=True)
    wanted = plain.rank(query, documents, top_k=3, return_documents=True)
    assert len(found) == 3 and [one["corpus_id"] for one in found] == [one["corpus_id"] for one in wanted]
    np.testing.assert_allclose([one["score"] for one in found], [one["score"] for one in wanted], atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scores_and_gradients_in_float64(model_type: str, tmp_path: Path) -> None:
    ours, plain = both(make(model_type, tmp_path, 3))
    ours.double()
    plain.double()
    found, expected = to_score(ours, PAIRS), to_score(plain, PAIRS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # norms of decoders compute in float32
    reference = gradients(plain, expected)
    assert all(float(value.abs().max()) > 1e-6 for name, value in reference.items() if "0.model.classifier" in name)
    for name, value in gradients(ours, found).items():
        torch.testing.assert_close(value, reference.pop(name), rtol=1e-5, atol=1e-5)
    assert all(float(value.abs().max()) == 0 for value in reference.values()), reference.keys()


def test_a_head_that_reads_the_mean(tmp_path: Path) -> None:
    """As gte-reranker-modernbert-base does."""
    ours, plain = both(make("modernbert", tmp_path, classifier_pooling="mean"))
    assert ours.burnish.decision.head.reads == "mean"
    expected = plain.predict(PAIRS, batch_size=3)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(ours.predict(PAIRS, batch_size=3), expected, atol=1e-5)
    reference = gradients(plain, to_score(plain, PAIRS))
    for name, value in gradients(ours, to_score(ours, PAIRS)).items():
        torch.testing.assert_close(value, reference[name], rtol=1e-3, atol=1e-5)


def test_single_texts_are_scored_too(tmp_path: Path) -> None:
    ours, plain = both(make("bert", tmp_path, 3))
    texts = [first for first, _ in PAIRS]
    features = ours.preprocess(texts)
    assert features["input_ids"].shape[0] == 1 and not features["token_type_ids"].any()
    torch.testing.assert_close(to_score(ours, texts), to_score(plain, texts), rtol=1e-5, atol=1e-6)


def test_token_types_count(tmp_path: Path) -> None:
    ours, _ = both(make("bert", tmp_path))
    features = ours.preprocess(PAIRS)
    assert 0 < int(features["token_type_ids"].sum()) < features["input_ids"].numel()
    with_types = to_score(ours, PAIRS)
    without = ours({**features, "token_type_ids": torch.zeros_like(features["token_type_ids"])})["scores"]
    assert apart(with_types, without) > 1e-3


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta", "modernbert", "distilbert", "mpnet"])
def test_dropout_before_the_head_is_drawn_as_the_stock_model_draws_it(model_type: str, tmp_path: Path) -> None:
    """Without any other dropout the same seed drops the same units, since the drawn shape is the same."""
    folder = make(model_type, tmp_path, 3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, dropout=0.0,
                  attention_dropout=0.0, classifier_dropout=0.5, seq_classif_dropout=0.5)  # fmt: skip
    ours, plain = both(folder)
    if model_type == "mpnet":  # its head takes hidden_dropout_prob
        ours[0].model.classifier.dropout.p = plain[0].model.classifier.dropout.p = 0.5
    plain.train()
    still = to_score(ours.eval(), PAIRS)
    ours.train()
    torch.manual_seed(3)
    found = to_score(ours, PAIRS)
    torch.manual_seed(3)
    expected = to_score(plain, PAIRS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert apart(found, still) > 1e-2 and apart(to_score(ours, PAIRS), found) > 1e-2


def test_a_vocabulary_answers_with_two_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("qwen3", tmp_path, task="text-generation")
    ours, plain = both(folder)
    assert "message" in ours[0].modality_config and ours.peft_task == "CAUSAL_LM"
    features = ours.preprocess(PAIRS)
    ends = features["cu_seq_lens_q"][1:].long() - 1
    last = features["input_ids"][0, torch.stack([ends - 1, ends])]
    assert (last == last[:, :1]).all() and int(features["max_length_q"]) == 64  # the suffix, after truncation too
    expected = plain.predict(PAIRS, batch_size=3)
    np.testing.assert_allclose(ours.predict(PAIRS, batch_size=3), expected, atol=1e-5)
    assert np.ptp(expected) > 1e-3
    found, wanted = to_score(ours, PAIRS), to_score(plain, PAIRS)
    theirs, mine = gradients(plain, wanted), gradients(ours, found)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)

    def refuse(*args: Any) -> None:
        raise AssertionError("the whole vocabulary was computed")

    monkeypatch.setattr(ours[0].model.lm_head, "forward", refuse)
    to_score(ours, PAIRS)


def test_a_decoder_reads_the_last_token_that_is_no_padding(tmp_path: Path) -> None:
    """Whoever put it there: a tokenizer whose end token is its padding token has it at the end of every text."""
    from transformers import AutoTokenizer

    folder = make("qwen3", tmp_path, 3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    ours, plain = both(folder, config_kwargs={"pad_token_id": tokenizer.pad_token_id})
    plain = Plain(folder, device="cpu", config_kwargs={"pad_token_id": tokenizer.pad_token_id}).eval()
    torch.testing.assert_close(to_score(ours, PAIRS), to_score(plain, PAIRS), rtol=1e-5, atol=1e-5)
    ours[0].model.config.pad_token_id = None
    assert apart(to_score(ours, PAIRS), to_score(plain, PAIRS)) > 1e-3


def test_a_text_without_tokens_is_one_of_padding(tmp_path: Path) -> None:
    batch = Flattening(9)([{"input_ids": [4, 5], "token_type_ids": [0, 1]}, {"input_ids": [], "token_type_ids": []}])
    assert batch["input_ids"].tolist() == [[4, 5, 9]] and batch["token_type_ids"].tolist() == [[0, 1, 0]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 3] and batch["position_ids"].tolist() == [[0, 1, 0]]
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["max_length_q"] == 2


def test_texts_that_fill_a_stream_up_are_cut_off(tmp_path: Path) -> None:
    ours, _ = both(make("modernbert", tmp_path, 3))
    expected = to_score(ours, PAIRS)
    features = ours.preprocess([*PAIRS, PAIRS[0], PAIRS[1]])
    assert ours.packed_scores is not None
    assert ours.packed_scores.run({k: v for k, v in features.items() if k != "modality"}).shape == (10, 3)
    torch.testing.assert_close(ours({**features, "texts": len(PAIRS)})["scores"], expected)


def test_the_forward_is_one_replaceable_callable(tmp_path: Path) -> None:
    ours, _ = both(make("bert", tmp_path, 3))
    assert ours.packed_scores is not None
    seen: list[set[str]] = []
    run = ours.packed_scores.run

    def twice(inputs: Any) -> Any:
        seen.append(set(inputs))
        return 2 * run(inputs)

    before = to_score(ours, PAIRS)
    ours.packed_scores.run = twice
    torch.testing.assert_close(to_score(ours, PAIRS), 2 * before)
    assert seen == [{"input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
                     "token_type_ids"}]  # fmt: skip


def test_copies_score_by_themselves(tmp_path: Path) -> None:
    import copy
    import pickle

    ours, _ = both(make("bert", tmp_path))
    expected = to_score(ours, PAIRS)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.nn.init.zeros_(twin[0].model.classifier.weight)
        assert not torch.allclose(to_score(twin, PAIRS), expected)
        torch.testing.assert_close(to_score(ours, PAIRS), expected)


def test_padded_on_demand(tmp_path: Path) -> None:
    folder = make("mpnet", tmp_path)
    ours, plain = both(folder, packed=False)
    assert ours.packed_scores is None and ours.preprocess(PAIRS)["input_ids"].shape[0] == len(PAIRS)
    torch.testing.assert_close(to_score(ours, PAIRS), to_score(plain, PAIRS), rtol=1e-5, atol=1e-5)
    ours, _ = both(folder)
    ours.undo_patches()
    assert ours.packed_scores is None and ours.preprocess(PAIRS)["input_ids"].shape[0] == len(PAIRS)
    torch.testing.assert_close(to_score(ours, PAIRS), to_score(plain, PAIRS), rtol=1e-5, atol=1e-5)


def test_for_inference_it_is_the_plain_model(tmp_path: Path) -> None:
    folder = make("bert", tmp_path)
    ours = FastCrossEncoder.from_pretrained(folder, for_inference=True, device="cpu")
    assert (ours.predict(PAIRS) == Plain(folder, device="cpu").predict(PAIRS)).all() and ours.packed_scores is None


def test_packed_input_needs_a_head_that_the_family_knows(tmp_path: Path) -> None:
    folder = make("gemma3_text", tmp_path, task="text-generation")
    with pytest.raises(ConfigError, match="does not say how a head for text-generation reads packed input"):
        both(folder, packed=True)
    ours, plain = both(folder)
    np.testing.assert_allclose(ours.predict(PAIRS), plain.predict(PAIRS), atol=1e-6)


def headless(folder: str, labels: int = 1) -> list[Any]:
    """Also a cross-encoder to Sentence Transformers: an encoder, a pooling and a Dense layer for the scores."""
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(2)
    score = Dense(64, labels, activation_function=torch.nn.Identity(), module_output_name="scores")
    return [Transformer(folder), Pooling(32, pooling_mode=("mean", "cls")), score]


def test_a_cross_encoder_made_of_modules(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "base")
    plain: Any = Plain(modules=headless(folder), device="cpu").eval()
    ours: Any = CrossEncoder(modules=headless(folder), device="cpu").eval()
    expected = plain.predict(PAIRS)
    assert np.ptp(expected) > 1e-3 and ours.packed_scores is not None
    assert ours.preprocess(PAIRS)["token_type_ids"].shape[0] == 1
    np.testing.assert_allclose(ours.predict(PAIRS), expected, atol=1e-5)
    plain.save_pretrained(str(tmp_path / "saved"))
    model: Any = FastCrossEncoder.get_peft_model(FastCrossEncoder.from_pretrained(tmp_path / "saved", device="cpu"))
    np.testing.assert_allclose(model.predict(PAIRS), expected, atol=1e-5)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {"2.linear.weight", "2.linear.bias"} <= trained and not any("pooler" in name for name in trained)
    torch.nn.init.ones_(model[2].linear.weight)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = FastCrossEncoder.from_pretrained(tmp_path / "adapter", device="cpu")
    assert {name for name, value in again.named_parameters() if value.requires_grad} == trained
    np.testing.assert_allclose(again.eval().predict(PAIRS), model.predict(PAIRS), atol=1e-5)
    np.testing.assert_allclose(Plain(str(tmp_path / "adapter"), device="cpu").predict(PAIRS), model.predict(PAIRS),
                               atol=1e-5)  # fmt: skip
    seen = CrossEncoder(modules=list(Plain(folder, device="cpu").children()), device="cpu").eval()
    np.testing.assert_allclose(seen.predict(PAIRS), Plain(folder, device="cpu").predict(PAIRS), atol=1e-5)
    assert seen.packed_scores is not None
