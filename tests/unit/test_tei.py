"""TEI's reading of a folder, rule by rule: each is broken once, and the check says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from burnish import FastClassifier, FastCrossEncoder, FastSentenceTransformer
from burnish.core import deploy, tei
from burnish.core.cli import verify as command
from burnish.core.errors import ConfigError
from burnish.core.runtimes import CHECKED, RUNTIMES
from burnish.core.testing.subject import quietly
from burnish.core.verifying import verify

Cli = Callable[..., tuple[int, str, str]]
Saved = dict[str, Path]
PROMPTS = {"query": "find this: "}


@pytest.fixture(scope="session")
def saved(tiny_bert: Path, tiny_bert_st: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Embeddings with and without a Dense layer, a reranker, a classifier; and two in the native layout."""
    place = tmp_path_factory.mktemp("tei")
    trunk = Transformer(str(tiny_bert), max_seq_length=64)
    dense = Dense(32, 16, activation_function=torch.nn.Tanh())
    layers = [trunk, Pooling(32, pooling_mode="cls"), dense, Normalize()]
    SentenceTransformer(modules=layers, device="cpu").save_pretrained(str(place / "layers"))
    with quietly():
        plain = FastSentenceTransformer.from_pretrained(
            str(tiny_bert_st), full_finetuning=True, device="cpu", prompts=PROMPTS
        )
        deep = FastSentenceTransformer.from_pretrained(str(place / "layers"), full_finetuning=True, device="cpu")
        ranker = FastCrossEncoder.from_pretrained(str(tiny_bert), full_finetuning=True, device="cpu", num_labels=1)
        classifier = FastClassifier.from_pretrained(
            str(tiny_bert), labels=["no", "yes"], full_finetuning=True, device="cpu"
        )
    ranker.max_seq_length = classifier.max_seq_length = 64
    models = {"plain": plain, "dense": deep, "ranker": ranker, "classifier": classifier}
    for name, model in models.items():
        model.save_pretrained(str(place / name))
    plain.save_pretrained(str(place / "native"), layout="native")
    deep.save_pretrained(str(place / "native dense"), layout="native")
    return {name: place / name for name in (*models, "native", "native dense")}


def edited(source: Path, place: Path, file: str, change: Callable[[Any], Any] | None) -> Path:
    """A copy of a folder with one JSON file changed, or without it; its checksums are made to fit."""
    shutil.copytree(source, place)
    path = place / file
    if change is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        value = json.loads(path.read_text())
        found = change(value)
        path.write_text(json.dumps(value if found is None else found))
    deploy.write_description(place, deploy.read(place))
    return place


def put(**fields: Any) -> Callable[[Any], None]:
    return lambda value: value.update(fields)


def drop(field: str) -> Callable[[Any], Any]:
    return lambda value: value.pop(field) and None


@pytest.mark.parametrize("name", ["plain", "dense", "ranker", "classifier"])
def test_what_burnish_saves_is_read(name: str, saved: Saved) -> None:
    found = tei.check(saved[name])
    assert found.good and found.state == "statically checked" and found.runtime == "tei", found
    assert found.version == tei.rules()["version"] and found.read == tei.rules()["read"]


def test_the_native_layout_is_not(saved: Saved) -> None:
    faults = tei.check(saved["native"]).faults
    assert "1_Pooling/config.json has no pooling_mode_cls_token and no pooling_mode_mean_tokens" in faults
    assert any(
        "sentence_transformers.base.modules.transformer.Transformer, which TEI does not" in one for one in faults
    )
    assert any(one.endswith("and therefore skips the Dense layers") for one in tei.check(saved["native dense"]).faults)


CONFIG, SBERT, MODULES, POOL = "config.json", "sentence_bert_config.json", "modules.json", "1_Pooling/config.json"
BROKEN: list[tuple[str, str, Callable[[Any], Any] | None, str]] = [
    ("plain", CONFIG, None, "config.json is missing, or no JSON"),
    ("plain", CONFIG, put(model_type="unheard-of"), "TEI knows no model type 'unheard-of'"),
    ("plain", CONFIG, put(model_type="absolute"), "TEI knows no model type 'absolute'"),
    ("plain", CONFIG, drop("vocab_size"), "config.json has no vocab_size"),
    ("plain", CONFIG, put(vocab_size="many"), 'config.json has vocab_size "many", and TEI wants an integer'),
    ("plain", CONFIG, put(pad_token_id=None), "config.json has pad_token_id null, and TEI wants an integer"),
    ("plain", CONFIG, put(pad_token_id=True), "config.json has pad_token_id true, and TEI wants an integer"),
    ("plain", CONFIG, put(position_embedding_type="relative_key"),
     'config.json has position_embedding_type "relative_key", and TEI computes "absolute" alone'),
    ("plain", CONFIG, put(hidden_act="mish"), 'config.json has hidden_act "mish", and TEI knows gelu'),
    ("plain", CONFIG, drop("architectures"), "config.json has no list of architectures"),
    ("plain", CONFIG, put(architectures=["BertForSequenceClassification"]), "which TEI takes for a classifier"),
    ("plain", "tokenizer.json", None, "tokenizer.json is missing, or no JSON: TEI has fast tokenizers only"),
    ("plain", "model.safetensors", None, "there are no weights: TEI wants model.safetensors"),
    ("plain", SBERT, drop("max_seq_length"), "sentence_bert_config.json has no max_seq_length"),
    ("plain", SBERT, put(max_seq_length=None), "sentence_bert_config.json has max_seq_length null"),
    ("plain", SBERT, put(do_lower_case=True), "sentence_bert_config.json lowers the case of texts"),
    ("plain", SBERT, lambda value: [], "sentence_bert_config.json is no JSON object"),
    ("plain", POOL, None, "1_Pooling/config.json is missing, or no JSON"),
    ("plain", POOL, drop("pooling_mode_mean_tokens"), "1_Pooling/config.json has no pooling_mode_mean_tokens"),
    ("plain", POOL, put(pooling_mode_cls_token=True), "1_Pooling/config.json says cls, and the model pools by mean"),
    ("plain", MODULES, lambda value: value[1].update(path="pool"), "modules.json has the pooling in 'pool'"),
    ("plain", MODULES, lambda value: value[0].update(path="0_T"), "modules.json has the transformer in '0_T'"),
    ("plain", MODULES, lambda value: value[2].update(type="x.LayerNorm"), "modules.json has x.LayerNorm, which TEI"),
    ("dense", MODULES, lambda value: value[3].update(type="x.Own"), "and therefore skips the Dense layers"),
    ("dense", MODULES, lambda value: [value[0], value[1], value[3], value[2]], "it normalises before a Dense layer"),
    ("dense", "2_Dense/config.json", None, "2_Dense/config.json is missing, or no JSON"),
    ("dense", "2_Dense/config.json", drop("bias"), "2_Dense/config.json has no bias"),
    ("dense", "2_Dense/config.json", put(activation_function="torch.nn.modules.activation.ReLU"),
     "2_Dense/config.json has the activation torch.nn.modules.activation.ReLU, and TEI knows torch.nn.modules"),
    ("dense", "2_Dense/model.safetensors", None, "2_Dense has no weights"),
    ("ranker", CONFIG, drop("id2label"), "config.json has no id2label"),
    ("ranker", CONFIG, drop("label2id"), "config.json has no label2id"),
    ("ranker", CONFIG, put(architectures=["BertModel"]), "BertModel, which TEI takes for a model of embeddings"),
    ("ranker", CONFIG, put(model_type="mpnet"), "TEI has no rerankers or classifiers of model type mpnet"),
    ("ranker", SBERT, drop("max_seq_length"), "sentence_bert_config.json has no max_seq_length"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "change", "line"), BROKEN)
def test_every_rule(
    name: str, file: str, change: Callable[[Any], Any] | None, line: str, saved: Saved, tmp_path: Path
) -> None:
    faults = tei.check(edited(saved[name], tmp_path / "broken", file, change)).faults
    assert any(line in fault for fault in faults), faults
    assert all("\n" not in fault for fault in faults)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"pooling": "max"}, "it pools by max, and TEI by cls or mean"),
        ({"pooling": "lasttoken"}, "it pools by lasttoken, and TEI by cls or mean"),
        ({"pooling": ["cls", "mean"]}, "it pools by cls+mean, and TEI by cls or mean"),
        ({"include_prompt": False}, "it leaves its prompts out of the pooling, which TEI does not"),
    ],
)
def test_what_the_model_does_and_tei_does_not(said: dict[str, Any], line: str, saved: Saved, tmp_path: Path) -> None:
    copy = shutil.copytree(saved["plain"], tmp_path / "copy")
    deploy.write_description(copy, deploy.read(copy) | said)
    assert line in tei.check(copy).faults


def test_scores_that_more_than_the_transformer_computes(saved: Saved, tmp_path: Path) -> None:
    more = {"idx": 1, "name": "1", "path": "1_LogitScore", "type": "x.LogitScore"}
    copy = edited(saved["ranker"], tmp_path / "more", MODULES, lambda value: [*value, more])
    assert "its scores come from LogitScore too, which TEI does not compute" in tei.check(copy).faults


def test_an_adapter_and_a_changed_file(saved: Saved, tmp_path: Path) -> None:
    copy = shutil.copytree(saved["plain"], tmp_path / "adapter")
    (copy / "adapter_config.json").write_text("{}")
    assert tei.check(copy).faults == ("it is an adapter, which TEI does not read: save it merged",)
    other = shutil.copytree(saved["plain"], tmp_path / "changed")
    (other / "vocab.txt").write_text("")
    assert tei.check(other).faults == ("vocab.txt has changed",)


def test_shards(saved: Saved, tmp_path: Path) -> None:
    copy = shutil.copytree(saved["plain"], tmp_path / "shards")
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    deploy.write_description(copy, deploy.read(copy))
    assert tei.check(copy).faults == ("model-2.safetensors is missing, which model.safetensors.index.json names",)


def test_a_graph_in_place_of_weights(saved: Saved, tmp_path: Path) -> None:
    copy = edited(saved["plain"], tmp_path / "graph", "model.safetensors", None)
    (copy / "onnx").mkdir()
    (copy / "onnx" / "model.onnx").write_bytes(b"")
    deploy.write_description(copy, deploy.read(copy))
    (fault,) = tei.check(copy).faults
    assert fault.startswith("it has an ONNX graph and no safetensors")


def fitting(model_type: str) -> dict[str, Any]:
    """A config of a model type as TEI wants it."""
    values = {"integer": 8, "number": 0.5, "boolean": False, "string": "gelu"}
    kind = tei._kind(model_type)
    assert kind is not None
    fields = {field: values[wanted] for field, wanted in kind.get("fields", {}).items()}
    fields |= {field: allowed[0] for field, allowed in kind.get("values", {}).items()}
    fields |= {kind["activation"]: "gelu"} if "activation" in kind else {}
    return fields | {"model_type": model_type, "architectures": ["Model"]}


def typed(source: Path, place: Path, config: dict[str, Any], pooling: str = "mean") -> Path:
    copy = edited(source, place, CONFIG, lambda value: config)
    flags = {f"pooling_mode_{name}": name.startswith(pooling) for name in ("cls_token", "mean_tokens", "lasttoken")}
    (copy / POOL).write_text(json.dumps(flags))
    deploy.write_description(copy, deploy.read(copy) | {"pooling": pooling})
    return copy


TYPES = [name for name, kind in tei.rules()["types"].items() if not kind.get("template")]


@pytest.mark.parametrize("name", TYPES)
def test_every_model_type(name: str, saved: Saved, tmp_path: Path) -> None:
    fits = fitting(name)
    found = tei.check(typed(saved["plain"], tmp_path / "fits", fits))
    assert found.good, found.faults
    kind = tei._kind(name)
    assert kind is not None
    checked = not any("are not checked" in note for note in found.notes)
    assert checked == bool(kind.get("fields"))
    for place, field in enumerate([*kind.get("fields", {}), *filter(None, [kind.get("activation")])]):
        less = {key: value for key, value in fits.items() if key != field}
        (fault, *_) = tei.check(typed(saved["plain"], tmp_path / str(place), less)).faults
        assert field in fault, fault


@pytest.mark.parametrize(
    ("name", "fields", "pooling", "line"),
    [
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "yarn"}},
            "mean",
            "scales its rotary positions (yarn), which TEI does",
        ),
        ("qwen3", {"rope_parameters": {"rope_type": "linear"}}, "mean", "scales its rotary positions (linear)"),
        ("qwen3", {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, "lasttoken", None),
        ("qwen3", {"use_sliding_window": True}, "mean", "has use_sliding_window true, and TEI computes false alone"),
        ("gemma3_text", {"use_bidirectional_attention": False}, "mean", "use_bidirectional_attention false, and TEI"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "mean", "positions (linear)"),
        ("gemma3_text", {}, "lasttoken", "it pools by lasttoken, and TEI by mean"),
        ("modernbert", {}, "lasttoken", "it pools by lasttoken, and TEI by cls or mean"),
    ],
)
def test_rules_of_one_model_type(
    name: str, fields: dict[str, Any], pooling: str, line: str | None, saved: Saved, tmp_path: Path
) -> None:
    faults = tei.check(typed(saved["plain"], tmp_path / "one", fitting(name) | fields, pooling)).faults
    assert (faults == ()) if line is None else any(line in fault for fault in faults), faults


def test_labels_that_it_does_not_count(saved: Saved, tmp_path: Path) -> None:
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    config = fitting("modernbert") | labels | {"architectures": ["XForSequenceClassification"]}
    line = "config.json has 2 labels and no num_labels, without which TEI takes them for 1"
    assert line in tei.check(edited(saved["classifier"], tmp_path / "a", CONFIG, lambda value: config)).faults
    counted = {**config, "num_labels": 2}
    assert tei.check(edited(saved["classifier"], tmp_path / "b", CONFIG, lambda value: counted)).good


def test_notes(saved: Saved, tmp_path: Path) -> None:
    notes = tei.check(saved["plain"]).notes
    assert any("puts no prompt before a text" in note for note in notes)
    assert any("computes gelu by its tanh form" in note for note in notes)
    assert any("float16 unless it is started with --dtype float32" in note for note in notes)
    assert not any("ask /embed with normalize false" in note for note in notes)
    copy = shutil.copytree(saved["plain"], tmp_path / "copy")
    deploy.write_description(copy, deploy.read(copy) | {"normalize": False, "prompts": {}})
    assert any("ask /embed with normalize false" in note for note in tei.check(copy).notes)
    assert not any("prompt" in note for note in tei.check(copy).notes)
    several = edited(saved["classifier"], tmp_path / "several", CONFIG, put(problem_type="multi_label_classification"))
    assert any("softmax" in note for note in tei.check(several).notes)
    assert any("CUDA only" in note for note in tei.check(typed(saved["plain"], tmp_path / "c", fitting("qwen2"))).notes)
    gemma = tei.check(typed(saved["plain"], tmp_path / "g", fitting("gemma3_text"))).notes
    assert any("--dtype float32" in note and "only" in note for note in gemma)


def test_the_command(saved: Saved, cli: Cli) -> None:
    code, out, _ = cli("verify", saved["plain"], "--runtime", "tei")
    assert code == 0 and "nothing was run" in out and "statically checked" in out and "verified" not in out
    assert f"{tei.rules()['version']}, read {tei.rules()['read']}" in out
    code, out, _ = cli("verify", saved["native"], "--runtime", "tei")
    assert code == 1 and "wrong" in out and "tei: 1_Pooling/config.json has no pooling_mode_cls_token" in out
    code, out, _ = cli("verify", saved["plain"], "--runtime", "tei", "--runtime", "transformers")
    assert code == 0 and "nothing was run" in out and "smallest cosine" in out
    code, _, err = cli("verify", saved["plain"], "--runtime", "tei", "--cosine", "0.9")
    assert code == 2 and "--cosine: goes with what is run, and this is only read" in err
    with pytest.raises(ConfigError, match=r"^runtime: tei is only read about, and not run\. Run `burnish verify`"):
        verify(saved["plain"], "tei")


def test_help_names_every_runtime() -> None:
    hints = get_type_hints(command.verify, include_extras=True)
    helped = hints["runtime"].__metadata__[0].help
    assert all(name in helped for name in (*RUNTIMES, *CHECKED))
