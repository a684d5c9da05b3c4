"""Adapters, merged models and full ones of cross-encoders: what plain libraries read has the live model's scores."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder as Plain

from burnish.core.adapters import reads_saved_modules
from burnish.core.cross_encoder import CrossEncoder
from burnish.core.errors import ConfigError, ModelError
from burnish.core.fast_cross_encoder import FastCrossEncoder

from ..numerics.crossing import FAMILIES, PAIRS, make


def load(folder: str | Path, **options: Any) -> Any:
    return FastCrossEncoder.from_pretrained(folder, device="cpu", **options)


def adapted(folder: str, **options: Any) -> Any:
    return FastCrossEncoder.get_peft_model(load(folder, **options), r=4, lora_alpha=64)


def train(model: Any, steps: int = 3) -> None:
    """Some steps that move every trainable weight, adapters' too, which start at nothing."""
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        scores = model(model.preprocess(PAIRS))["scores"]
        wanted = torch.arange(scores.numel()).reshape(scores.shape).float()
        torch.autograd.backward(torch.nn.functional.mse_loss(scores, wanted))
        optimizer.step()
    model.eval()


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if name in before and not value.equal(before[name])}


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_adapter_with_its_head_survives(model_type: str, labels: int, tmp_path: Path) -> None:
    model = adapted(make(model_type, tmp_path / "base", labels), num_labels=labels)
    assert isinstance(model, CrossEncoder) and model.peft_task == "SEQ_CLS"
    before = copy.deepcopy(model.state_dict())
    start = model.predict(PAIRS)
    train(model)
    # Every trained weight has moved, and none that is frozen.
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert changed(model, before) == trained and any(".modules_to_save." in name for name in trained)
    expected, weights = model.predict(PAIRS), copy.deepcopy(model.state_dict())
    assert np.abs(expected - start).max() > 1e-2

    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained_merged(tmp_path / "merged")
    assert (not changed(model, weights) and model.packed_scores is not None) or model_type == "roberta"
    assert not (tmp_path / "adapter" / "config.json").exists()
    for folder in ("adapter", "merged") if reads_saved_modules() else ("merged",):
        again = Plain(str(tmp_path / folder), device="cpu")
        assert again.num_labels == labels and type(again.activation_fn) is type(model.activation_fn)
        np.testing.assert_allclose(again.predict(PAIRS), expected, atol=2e-5)
    for folder in ("adapter", "merged"):
        np.testing.assert_allclose(load(tmp_path / folder).eval().predict(PAIRS), expected, atol=2e-5)
    _reads_in_transformers(tmp_path, again, labels)
    record = json.loads((tmp_path / "merged" / "burnish.json").read_text())
    assert record["adapter"]["merged"] and record["adapter"]["r"] == 4 and "label" in record["pooling"]

    # The adapter trains on as it was.
    resumed = load(tmp_path / "adapter")
    assert {name for name, value in resumed.named_parameters() if value.requires_grad} == trained
    assert not changed(resumed, weights)


def _reads_in_transformers(tmp_path: Path, plain: Any, labels: int) -> None:
    from transformers import AutoModelForSequenceClassification

    features = plain.preprocess(PAIRS)
    features.pop("modality")
    asked: list[tuple[str, dict[str, Any]]] = [("merged", {})]
    if reads_saved_modules():
        asked.append(("adapter", {"num_labels": labels}))
    for folder, settings in asked:
        model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder, **settings)
        with torch.no_grad():
            found = model.eval()(**features).logits
            torch.testing.assert_close(found, plain.eval()(dict(features))["scores"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "qwen3", "roberta"])
def test_a_model_trained_in_full_survives(model_type: str, tmp_path: Path) -> None:
    model = load(make(model_type, tmp_path / "base", 2), full_finetuning=True)
    before = copy.deepcopy(model.state_dict())
    train(model)
    frozen = {name for name in before if name not in changed(model, before)}
    assert not {name for name in frozen if name.endswith("weight")}, frozen
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained_merged(tmp_path / "half", save_method="merged_16bit")
    expected = model.predict(PAIRS)
    again = Plain(str(tmp_path / "full"), device="cpu")
    np.testing.assert_allclose(again.predict(PAIRS), expected, atol=1e-5)
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "full" / "burnish.json").read_text())["adapter"] is None


def test_a_vocabulary_under_an_adapter(tmp_path: Path) -> None:
    model = adapted(make("qwen3", tmp_path / "base", task="text-generation"))
    assert not any("lm_head" in name and value.requires_grad for name, value in model.named_parameters())
    train(model)
    expected = model.predict(PAIRS)
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained_merged(tmp_path / "merged")
    for folder in ("adapter", "merged"):
        again = Plain(str(tmp_path / folder), device="cpu")
        assert type(again[1]).__name__ == "LogitScore"
        np.testing.assert_allclose(again.predict(PAIRS), expected, atol=2e-5)


def test_a_decoder_may_be_given_a_head_of_its_own(tmp_path: Path) -> None:
    folder = make("qwen3", tmp_path / "base", task="text-generation", pad_token_id=None)
    model = load(folder, task="sequence-classification", num_labels=3)
    assert model.num_labels == 3 and model[0].model.config.pad_token_id is not None and model.fresh == ("score",)
    model = FastCrossEncoder.get_peft_model(model)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained_merged(tmp_path / "merged")
    for place in ("adapter", "merged") if reads_saved_modules() else ("merged",):
        again = Plain(str(tmp_path / place), device="cpu")
        np.testing.assert_allclose(again.predict(PAIRS), model.predict(PAIRS), atol=2e-5)


def test_a_fresh_head_is_told_trained_and_not_left_out(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BertModel

    bare = tmp_path / "bare"
    BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).save_pretrained(bare)
    for file in tiny_bert.glob("tokenizer*"):
        (bare / file.name).write_bytes(file.read_bytes())
    one = load(bare)
    assert one.num_labels == 1 and one.fresh == ("bert.pooler.dense", "classifier")
    assert "not in the checkpoint, drawn at random: bert.pooler.dense, classifier" in capsys.readouterr().err
    assert one[0].model.classifier.weight.equal(load(bare)[0].model.classifier.weight)
    other = load(bare, random_state=5)
    assert not one[0].model.classifier.weight.equal(other[0].model.classifier.weight)
    with pytest.raises(ConfigError, match=r"modules_to_save: bert\.pooler\.dense was drawn at random"):
        FastCrossEncoder.get_peft_model(one, modules_to_save=["classifier"])
    with pytest.raises(ConfigError, match="would neither train nor be saved"):
        FastCrossEncoder.get_peft_model(one, modules_to_save=[])
    FastCrossEncoder.get_peft_model(one)
    assert "trained and saved in full: bert.pooler, classifier" in capsys.readouterr().err
    names = {name for name, value in one.named_parameters() if value.requires_grad}
    assert not any("pooler" in name and "lora" in name for name in names)
    assert "0.model.bert.pooler.modules_to_save.default.dense.weight" in names
    assert load(tiny_bert).fresh == ("classifier",)


def test_a_trained_head_may_stay_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(make("bert", tmp_path / "base"))
    FastCrossEncoder.get_peft_model(model, modules_to_save=[], target_modules="all-linear")
    assert "bert.pooler.dense gets no adapter: it belongs to the head, which stays as it is" in capsys.readouterr().err
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained and all("lora" in name for name in trained)


def test_parameters_act_or_raise(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "base", 2)
    with pytest.raises(ConfigError, match="the checkpoint's head does not have 3 labels"):
        load(folder, num_labels=3)
    other = load(folder, num_labels=3, model_kwargs={"ignore_mismatched_sizes": True})
    assert other.num_labels == 3 and other.fresh == ("classifier",)
    for name, value in {
        "pooling_mode": "mean",
        "truncate_dim": 8,
        "similarity_fn_name": "dot",
        "num_labels": 0,
    }.items():
        with pytest.raises(ConfigError, match=f"^{name}"):
            load(folder, **{name: value})
    with pytest.raises(ConfigError, match="the repository holds no causal language model"):
        load(folder, task="text-generation")
    decoder = make("qwen3", tmp_path / "decoder", task="text-generation")
    with pytest.raises(ConfigError, match="a vocabulary's answer is one score"):
        load(decoder, num_labels=2)
    saved = load(decoder, full_finetuning=True)
    saved.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"modules\.json says text-generation"):
        load(tmp_path / "saved", task="sequence-classification")
    model = load(
        folder, activation_fn=torch.nn.Tanh(), prompts={"q": "w1 "}, default_prompt_name="q", max_seq_length=24
    )
    plain = Plain(folder, device="cpu", activation_fn=torch.nn.Tanh(), prompts={"q": "w1 "}, default_prompt_name="q")
    plain.max_seq_length = 24
    np.testing.assert_allclose(model.predict(PAIRS), plain.predict(PAIRS), atol=1e-5)
    with pytest.raises(ModelError, match=r"Load it with FastCrossEncoder\.from_pretrained"):
        FastCrossEncoder.get_peft_model(plain)


def test_a_sixteen_bit_base_has_a_head_in_float32(tmp_path: Path) -> None:
    for model_type in ("bert", "xlm-roberta", "modernbert", "distilbert"):
        model = adapted(make(model_type, tmp_path / model_type, 3), dtype="bfloat16")
        trained = {value.dtype for value in model.parameters() if value.requires_grad}
        assert trained == {torch.float32} and model[0].model.dtype == torch.bfloat16
        before = model.predict(PAIRS)
        train(model)
        assert np.abs(model.predict(PAIRS) - before).max() > 1e-2
        model.save_pretrained(tmp_path / "adapter")
        again = load(tmp_path / "adapter", dtype="bfloat16").eval()
        np.testing.assert_allclose(again.predict(PAIRS), model.predict(PAIRS), atol=1e-6)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "modernbert", "qwen3", "mpnet", "xlm-roberta"])
@pytest.mark.usefixtures("quantises")
@pytest.mark.parametrize("bits", [4, 8])
def test_heads_over_a_quantised_base(model_type: str, bits: int, tmp_path: Path) -> None:
    from burnish.core.heads import head_modules
    from burnish.core.quantised import layers

    folder = make(model_type, tmp_path / "base", 3)
    model = load(folder, **{f"load_in_{bits}bit": True})
    transformer = model[0].model
    heads = head_modules(transformer, model.burnish.decision.head)
    quantised = [name for name, _ in layers(transformer)]
    assert quantised and heads and not [one for one in quantised for head in heads if f".{head}." in f".{one}."]
    model = FastCrossEncoder.get_peft_model(model, r=4, lora_alpha=64)
    train(model)
    expected = model.predict(PAIRS)
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained_merged(tmp_path / "merged")
    again = load(tmp_path / "adapter", **{f"load_in_{bits}bit": True}).eval()
    np.testing.assert_allclose(again.predict(PAIRS), expected, atol=1e-4)
    plain = Plain(str(tmp_path / "merged"), device="cpu").predict(PAIRS)
    # LLM.int8() rounds what goes into its layers too; a merged model does not.
    assert np.abs(plain - expected).max() < (1e-4 if bits == 4 else 0.1) * np.abs(expected).max()
