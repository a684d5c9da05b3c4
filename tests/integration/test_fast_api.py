"""`FastSentenceTransformer.from_pretrained`: every parameter acts, or raises one line that says what to do."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer as PlainModel
from sentence_transformers import SentenceTransformerModelCardData
from torch import nn

import burnish
from burnish import FastSentenceTransformer
from burnish.core.errors import BurnishError, ConfigError, ModelError, PluginError

Make = Callable[..., Any]
LONG = "word " * 300
SIGNATURE = (
    "model_name, max_seq_length, dtype, load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning, for_inference, "
    "pooling_mode, use_gradient_checkpointing, activation_budget_gb, embedding_storage, backend, device, token, "
    "revision, trust_remote_code, device_map, local_files_only, cache_folder, truncate_dim, prompts, "
    "similarity_fn_name, model_card_data, model_kwargs, processor_kwargs, config_kwargs, plugins, packed, "
    "random_state, tokenizer_kwargs, cache_dir"
)


def test_the_signature_is_the_documented_one() -> None:
    parameters = inspect.signature(FastSentenceTransformer.from_pretrained).parameters
    assert ", ".join(parameters) == SIGNATURE
    defaults = {name: entry.default for name, entry in parameters.items() if name != "model_name"}
    odd = {"backend": "auto", "random_state": 3407}
    for name, default in defaults.items():
        assert default == odd.get(name, default) and (name in odd or default in (None, False)), name


def test_what_comes_back_is_a_sentence_transformer(tiny_bert_st: Path) -> None:
    for model in (
        FastSentenceTransformer(str(tiny_bert_st), device="cpu"),
        FastSentenceTransformer(model_name=str(tiny_bert_st), device="cpu"),
        FastSentenceTransformer.from_pretrained(str(tiny_bert_st), 32, device="cpu"),
    ):
        assert isinstance(model, PlainModel) and isinstance(model, burnish.SentenceTransformer)
        assert callable(model.save_pretrained_merged) and callable(model.push_to_hub_merged)
    assert model.max_seq_length == 32


REFUSALS: list[tuple[dict[str, Any], type[BurnishError], str]] = [
    ({"max_seq_length": 129}, ConfigError, r"max_seq_length: 129 is not between 1 and the 128 positions"),
    ({"max_seq_length": 0}, ConfigError, r"max_seq_length: 0 is less than one token"),
    ({"dtype": "float8"}, ConfigError, r"dtype: 'float8' is not a dtype to load in\. Pass None"),
    ({"dtype": torch.int8}, ConfigError, r"dtype: torch\.int8 is not a dtype to load in"),
    (
        {"dtype": "float32", "model_kwargs": {"torch_dtype": torch.float16}},
        ConfigError,
        r"dtype, model_kwargs\['dtype'\]: both are given and differ",
    ),
    ({"load_in_4bit": True, "load_in_8bit": True}, ConfigError, r"load_in_4bit, load_in_8bit: more than one is set"),
    ({"load_in_4bit": True, "load_in_16bit": True}, ConfigError, r"load_in_4bit, load_in_16bit: more than one is set"),
    ({"load_in_16bit": True, "dtype": "float32"}, ConfigError, r"load_in_16bit=True: contradicts dtype=float32"),
    ({"load_in_16bit": False, "dtype": "bfloat16"}, ConfigError, r"load_in_16bit=False: contradicts dtype=bfloat16"),
    ({"full_finetuning": True, "load_in_4bit": True}, ConfigError, r"full_finetuning: .* cannot train 4bit weights"),
    ({"full_finetuning": True, "for_inference": True}, ConfigError, r"full_finetuning, for_inference: both are set"),
    ({"for_inference": True, "packed": True}, ConfigError, r"for_inference: .* loads stock modules"),
    ({"for_inference": True, "use_gradient_checkpointing": True}, ConfigError, r"for_inference: .*Drop use_gradient"),
    ({"for_inference": True, "load_in_8bit": True}, ConfigError, r"for_inference: .*Drop .*load_in_8bit"),
    ({"pooling_mode": "cls"}, ConfigError, r"pooling_mode: the repository's modules\.json says how it is pooled"),
    ({"pooling_mode": "median"}, ConfigError, r"pooling_mode: 'median' is unknown\. Pass one of mean, cls"),
    ({"use_gradient_checkpointing": "often"}, ConfigError, r"use_gradient_checkpointing: 'often' is unknown"),
    ({"use_gradient_checkpointing": []}, ConfigError, r"use_gradient_checkpointing: \[\] is unknown"),
    ({"embedding_storage": "2bit"}, ConfigError, r"embedding_storage: '2bit' is unknown\. Pass None or one of 8bit"),
    ({"embedding_storage": "8bit", "full_finetuning": True}, ConfigError, r"embedding_storage: only the frozen tables"),
    ({"embedding_storage": "host", "for_inference": True}, ConfigError, r"embedding_storage: only the frozen tables"),
    ({"embedding_storage": "4bit"}, ConfigError, r"embedding_storage: this model has no embedding table of 1,000,000"),
    ({"backend": "warp"}, PluginError, r"backend: no enabled plugin has a backend 'warp'"),
    ({"device": "gpu"}, ConfigError, r"device: 'gpu' cannot be used"),
    ({"device": "cuda"}, ConfigError, r"device: 'cuda' cannot be used"),
    ({"device": "cpu", "device_map": "auto"}, ConfigError, r"device, device_map: both are given"),
    (
        {"device": None, "device_map": "cpu", "model_kwargs": {"device_map": "auto"}},
        ConfigError,
        r"device_map, model_kwargs\['device_map'\]: both are given and differ",
    ),
    ({"cache_folder": "a", "cache_dir": "b"}, ConfigError, r"cache_folder, cache_dir: both are given and differ"),
    ({"truncate_dim": 0}, ConfigError, r"truncate_dim: 0 is not between 1 and the 32 dimensions"),
    ({"truncate_dim": 33}, ConfigError, r"truncate_dim: 33 is not between 1 and the 32 dimensions"),
    ({"similarity_fn_name": "jaccard"}, ConfigError, r"similarity_fn_name: 'jaccard' is unknown\. Pass one of cosine"),
    (
        {"model_kwargs": {"attn_implementation": "eager"}, "packed": True},
        ConfigError,
        r"packed=True: packed input has its own attention, model_kwargs asks for 'eager'",
    ),
    (
        {"processor_kwargs": {"padding_side": "left"}, "tokenizer_kwargs": {"padding_side": "right"}},
        ConfigError,
        r"processor_kwargs, tokenizer_kwargs: both are given and differ",
    ),
    ({"plugins": ["no-such-plugin"]}, PluginError, r"no-such-plugin"),
]


@pytest.mark.parametrize("options, kind, message", REFUSALS, ids=[str(options) for options, _, _ in REFUSALS])
def test_what_cannot_be_honoured_is_refused_in_one_line(
    tiny_bert_st: Path, load: Make, options: dict[str, Any], kind: type[BurnishError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        load(tiny_bert_st, **options)
    assert "\n" not in str(caught.value) and caught.value.fix


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such-model", "no-such-model", "./nothing/in/here"])
def test_a_model_that_is_not_there_is_one_line(load: Make, name: str) -> None:
    with pytest.raises(ModelError, match=r"^model .*\. Check the name or path") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_model(load: Make, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(ModelError, match="is a file, not a directory"):
        load(tmp_path / "model.bin")


def test_max_seq_length_cuts(tiny_bert_st: Path, load: Make) -> None:
    model = load(tiny_bert_st, max_seq_length=10)
    assert model.max_seq_length == 10
    assert model.preprocess([LONG])["input_ids"].shape[1] == 10
    assert (model.encode(LONG) == model.encode("word " * 8)).all()
    assert load(tiny_bert_st, max_seq_length=128).preprocess([LONG])["input_ids"].shape[1] == 128
    assert load(tiny_bert_st).max_seq_length == 64


def test_full_finetuning_refuses_an_adapter_folder(adapted: Make, load: Make, tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"full_finetuning: the folder holds an adapter\. Merge it first"):
        load(tmp_path / "adapter", full_finetuning=True)


@pytest.mark.parametrize("which", ["tiny_bert", "tiny_bert_st", "minilm"])
def test_for_inference_is_bit_equal_to_plain(
    request: pytest.FixtureRequest, load: Make, plain: Make, texts: list[str], which: str, capsys: Any
) -> None:
    folder = request.getfixturevalue(which)
    model, stock = load(folder, for_inference=True), plain(folder)
    assert (model.encode(texts) == stock.encode(texts)).all()
    assert [type(module) for module in model.modules()][1:] == [type(module) for module in stock.modules()][1:]
    assert model.burnish.packed is None and not model.burnish.plan.entries
    assert "burnish:" not in capsys.readouterr().err


@pytest.mark.parametrize("for_inference", [False, True])
@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
def test_pooling_mode_without_modules_json(
    tiny_bert: Path, load: Make, plain: Make, texts: list[str], mode: str, for_inference: bool
) -> None:
    model, stock = load(tiny_bert, pooling_mode=mode, for_inference=for_inference), plain(tiny_bert)
    stock[1].pooling_mode = mode
    assert abs(model.encode(texts) - stock.encode(texts)).max() <= 1e-5
    assert f"{mode}, not normalised (asked for, no modules.json)" in str(model.burnish)


def test_modules_json_is_honoured_and_its_absence_said(
    tiny_bert: Path, tiny_bert_st: Path, load: Make, capsys: Any
) -> None:
    load(tiny_bert_st)
    assert "mean, normalised (modules.json)" in capsys.readouterr().err
    load(tiny_bert)
    assert "mean, not normalised (default of family bert, no modules.json)" in capsys.readouterr().err


@pytest.mark.parametrize("value, said", [(False, "off"), (None, "off"), (True, "every layer"), ("unsloth", "offload")])
def test_use_gradient_checkpointing(tiny_bert_st: Path, load: Make, value: Any, said: str) -> None:
    model = load(tiny_bert_st, use_gradient_checkpointing=value)
    assert said in model.burnish.checkpointing
    flags = {layer.gradient_checkpointing for layer in model[0].model.encoder.layer}
    assert flags == {bool(value)}


def test_backend_and_device_are_what_was_asked_for(tiny_bert_st: Path, load: Make) -> None:
    model = load(tiny_bert_st, backend="reference", device="cpu")
    assert model.device.type == "cpu" and "reference (asked for)" in str(model.burnish)
    assert load(tiny_bert_st, device="meta").device.type == "meta"


@pytest.mark.parametrize("placement", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(tiny_bert_st: Path, load: Make, texts: list[str], placement: Any) -> None:
    model = load(tiny_bert_st, device=None, device_map=placement)
    assert abs(model.encode(texts) - load(tiny_bert_st).encode(texts)).max() <= 1e-6


def test_device_map_reaches_the_loader(tiny_bert_st: Path, load: Make) -> None:
    for options in ({"device_map": "meta"}, {"model_kwargs": {"device_map": {"": "meta"}}}):
        model = load(tiny_bert_st, device=None, **options)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert model.burnish.decision.machine.device == "meta"


CUSTOM = """
from transformers import BertModel

class ShoutingBert(BertModel):
    def forward(self, *args, **keywords):
        out = super().forward(*args, **keywords)
        out.last_hidden_state = out.last_hidden_state * 2
        return out
"""


def test_trust_remote_code(tiny_bert: Path, load: Make, tmp_path: Path, texts: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(tiny_bert, tmp_path / "shouting")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "shouting.ShoutingBert"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "shouting.py").write_text(CUSTOM)
    quiet = load(folder).encode(texts)
    assert type(load(folder)[0].model).__name__ == "BertModel"
    loud = load(folder, trust_remote_code=True)
    assert type(loud[0].model).__name__ == "ShoutingBert"
    np.testing.assert_allclose(loud.encode(texts), 2 * quiet, rtol=1e-4, atol=1e-5)


def test_truncate_dim(tiny_bert_st: Path, load: Make, texts: list[str]) -> None:
    model = load(tiny_bert_st, truncate_dim=8)
    assert model.encode(texts).shape == (len(texts), 8)
    np.testing.assert_allclose(model.encode(texts), load(tiny_bert_st).encode(texts)[:, :8], atol=1e-6)


def test_prompts_are_added_to_the_saved_ones(tiny_bert_st: Path, load: Make, tmp_path: Path) -> None:
    first = load(tiny_bert_st, prompts={"query": "query: ", "topic": "topic: "})
    first.save_pretrained(str(tmp_path / "prompted"))
    model = load(tmp_path / "prompted", prompts={"query": "q: "})
    assert model.prompts == {"query": "q: ", "document": "", "topic": "topic: "}
    assert abs(model.encode_query("x") - model.encode("q: x")).max() <= 1e-6
    assert abs(model.encode("x", prompt_name="topic") - model.encode("x")).max() > 1e-3


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_fn_name(tiny_bert_st: Path, load: Make, texts: list[str], name: str) -> None:
    model = load(tiny_bert_st, similarity_fn_name=name)
    embeddings = model.encode(texts)
    expected = {
        "cosine": embeddings @ embeddings.T,
        "dot": embeddings @ embeddings.T,
        "euclidean": -np.linalg.norm(embeddings[:, None] - embeddings, axis=-1),
        "manhattan": -np.abs(embeddings[:, None] - embeddings).sum(-1),
    }
    assert model.similarity_fn_name == name
    np.testing.assert_allclose(model.similarity(embeddings, embeddings), expected[name], atol=1e-5)


def test_model_card_data(tiny_bert_st: Path, load: Make, tmp_path: Path) -> None:
    data = SentenceTransformerModelCardData(language="ja", license="apache-2.0", model_name="A tiny model")
    model = load(tiny_bert_st, model_card_data=data)
    assert model.model_card_data is data
    model._model_card_text = None  # the folder's own card is kept otherwise
    model.save_pretrained(str(tmp_path / "carded"))
    card = (tmp_path / "carded" / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "- ja" in card and "# A tiny model" in card


def test_model_kwargs_reach_the_model_and_keep_their_attention(tiny_bert_st: Path, load: Make) -> None:
    model = load(tiny_bert_st, model_kwargs={"attn_implementation": "eager"})
    assert model.config._attn_implementation == "eager" and model.burnish.packed is None
    assert "padded (model_kwargs asks for the attention eager)" in str(model.burnish)


@pytest.mark.parametrize("name", ["processor_kwargs", "tokenizer_kwargs"])
def test_processor_kwargs_by_both_names(tiny_bert_st: Path, load: Make, name: str) -> None:
    model = load(tiny_bert_st, **{name: {"padding_side": "left", "model_max_length": 12}})
    assert model.tokenizer.padding_side == "left" and model.max_seq_length == 12


def test_config_kwargs(tiny_bert_st: Path, load: Make) -> None:
    model = load(tiny_bert_st, config_kwargs={"hidden_dropout_prob": 0.37})
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.37, 0.1}


@pytest.mark.parametrize("plugins", [[], ["bert"], "bert", ("burnish",)], ids=str)
def test_plugins_by_name(tiny_bert_st: Path, load: Make, plugins: Any) -> None:
    model = load(tiny_bert_st, plugins=plugins)
    assert model.burnish.decision.family.family.name == "bert"
    assert ("named by you" in str(model.burnish)) == bool(plugins)


def test_packed(tiny_bert_st: Path, load: Make, texts: list[str]) -> None:
    assert [load(tiny_bert_st, packed=value)[0].can_flatten_inputs for value in (None, True, False)] == [
        True,
        True,
        False,
    ]
    assert "padded (asked for)" in str(load(tiny_bert_st, packed=False).burnish)


def test_random_state_seeds_what_the_checkpoint_lacks(tiny_bert: Path, load: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_bert, tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler")}
    assert len(kept) == len(weights) - 2
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(11)
    before = torch.get_rng_state()
    poolers = [load(folder, random_state=seed)[0].model.pooler.dense.weight for seed in (3407, 3407, 1)]
    assert torch.equal(poolers[0], poolers[1]) and not torch.equal(poolers[0], poolers[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_chosen_is_printed(tiny_bert_st: Path, load: Make, capsys: pytest.CaptureFixture[str]) -> None:
    load(tiny_bert_st)
    said = capsys.readouterr().err
    for part in (
        "family",
        "weights",
        "float32 (adapters on cpu)",
        "pooling",
        "packed",
        "backend",
        "patches",
        "checkpoints",
    ):
        assert part in said


def test_a_static_model_loads_as_it_is(load: Make, plain: Make, tmp_path: Path, minilm: Path, texts: list[str]) -> None:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    torch.manual_seed(0)
    module = StaticEmbedding(Tokenizer.from_file(str(minilm / "tokenizer.json")), embedding_dim=16)
    PlainModel(modules=[module], device="cpu").save_pretrained(str(tmp_path / "static"))
    model = load(tmp_path / "static")
    assert model.burnish is None
    assert (model.encode(texts[:2]) == plain(tmp_path / "static").encode(texts[:2])).all()
    with pytest.raises(ModelError, match="get_peft_model"):
        FastSentenceTransformer.get_peft_model(model)


def test_a_path_is_a_name(tiny_bert_st: Path) -> None:
    assert FastSentenceTransformer.from_pretrained(tiny_bert_st, device="cpu").burnish is not None
