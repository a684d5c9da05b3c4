"""deploy.json, golden vectors and `burnish verify`: what is written, when, and that a wrong reader is found out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer as PlainModel

from burnish import FastSentenceTransformer
from burnish.core import deploy, golden
from burnish.core.errors import ConfigError, ModelError
from burnish.core.testing.subject import quietly
from burnish.core.verifying import _compare, _same_order, verify

Cli = Callable[..., tuple[int, str, str]]
PROMPTS = {"query": "find: ", "document": ""}


def loaded(folder: Path, **options: Any) -> Any:
    with quietly():
        return FastSentenceTransformer.from_pretrained(
            str(folder), **{"full_finetuning": True, "device": "cpu", "prompts": PROMPTS, **options}
        )


@pytest.fixture(scope="module")
def saved(tiny_bert_st: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "saved"
    loaded(tiny_bert_st).save_pretrained(str(folder))
    return folder


def test_what_serving_takes_is_said(saved: Path, tiny_bert_st: Path, tmp_path: Path) -> None:
    said = deploy.read(saved)
    wanted = {
        "kind": "embeddings", "architecture": "BertModel", "adapter_of": None, "pooling": "mean", "normalize": True,
        "prompts": PROMPTS, "similarity": "cosine", "max_seq_length": 64, "dimensions": 32, "dtype": "float32",
        "golden": "golden.json", "modules": ["Transformer", "Pooling", "Normalize"], "dense": [],
        "include_prompt": True,
    }  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted
    assert set(said["files"]) >= {"model.safetensors", "golden.json", "burnish.json", "1_Pooling/config.json"}
    assert deploy.changed(saved, said) == []
    loaded(tiny_bert_st).save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again/deploy.json").read_text() == (saved / "deploy.json").read_text()
    assert str(tmp_path) not in (tmp_path / "again/deploy.json").read_text()


def test_golden_vectors_are_the_models(saved: Path) -> None:
    found = json.loads((saved / golden.FILE).read_text())
    assert len(found["inputs"]) >= 16 and "" in found["inputs"] and "query" in found["prompts"]
    lengths = [len(ids) for ids in found["token_ids"]]
    assert max(lengths) == 64 and min(lengths) == 2, "one text is cut off, one is empty"
    assert all(text == PROMPTS.get(name or "", "") + given for text, name, given in
               zip(found["texts"], found["prompts"], found["inputs"], strict=True))  # fmt: skip
    plain = PlainModel(str(saved), device="cpu")
    assert np.abs(plain.encode(found["texts"]) - np.array(found["outputs"])).max() <= 1e-6
    asked = [text for text, name in zip(found["inputs"], found["prompts"], strict=True) if name == "query"]
    rows = [row for row, name in zip(found["outputs"], found["prompts"], strict=True) if name == "query"]
    assert np.abs(plain.encode_query(asked) - np.array(rows)).max() <= 1e-6


def test_asking_leaves_the_model_as_it_was_and_is_in_float32(tiny_bert_st: Path, tmp_path: Path) -> None:
    model = loaded(tiny_bert_st, full_finetuning=False, for_inference=True, dtype="bfloat16")
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    model.save_pretrained(str(tmp_path / "half"))
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    rows = np.array(json.loads((tmp_path / "half" / golden.FILE).read_text())["outputs"])
    texts = json.loads((tmp_path / "half" / golden.FILE).read_text())["texts"]
    whole = PlainModel(str(tmp_path / "half"), device="cpu", model_kwargs={"dtype": torch.float32}).encode(texts)
    rounded = PlainModel(str(tmp_path / "half"), device="cpu", model_kwargs={"dtype": torch.bfloat16}).encode(texts)
    assert np.abs(whole - rows).max() <= 1e-6 < 1e-3 < np.abs(rounded - rows).max()


def test_a_checkpoint_pays_for_nothing(tiny_bert_st: Path, tmp_path: Path) -> None:
    model = loaded(tiny_bert_st)
    with deploy.checkpoint():
        model.save_pretrained(str(tmp_path / "checkpoint"))
    assert not {golden.FILE, deploy.FILE} & {path.name for path in (tmp_path / "checkpoint").iterdir()}
    model.save_pretrained(str(tmp_path / "checkpoint"))
    assert (tmp_path / "checkpoint" / deploy.FILE).exists()


@pytest.mark.usefixtures("quantises")
def test_where_others_load_another_model_there_are_none(tiny_bert_st: Path, tmp_path: Path) -> None:
    model = loaded(tiny_bert_st, full_finetuning=False, load_in_4bit=True)
    with quietly():
        model = FastSentenceTransformer.get_peft_model(model, r=2)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert "quantised" in deploy.read(tmp_path / "adapter")["golden_reason"]
    with pytest.raises(ModelError, match="there are no golden vectors"):
        verify(tmp_path / "adapter")


def test_layouts(saved: Path, tiny_bert_st: Path, tmp_path: Path) -> None:
    model = loaded(tiny_bert_st)
    model.save_pretrained(str(tmp_path / "native"), layout="native")
    types = [row["type"] for row in json.loads((tmp_path / "native/modules.json").read_text())]
    older = [row["type"] for row in json.loads((saved / "modules.json").read_text())]
    assert not any(".models." in kind for kind in types) and all(".models." in kind for kind in older)
    first, second = PlainModel(str(tmp_path / "native"), device="cpu"), PlainModel(str(saved), device="cpu")
    assert (first.encode(golden.TEXTS) == second.encode(golden.TEXTS)).all()
    with pytest.raises(ConfigError, match=r"^layout: 'old' is unknown"):
        model.save_pretrained_merged(tmp_path / "no", layout="old")
    assert not (tmp_path / "no").exists()


def test_verify_says_right_and_wrong(saved: Path, cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("verify", saved)
    assert code == 0 and "1.000000" in out and "same" in out
    folder = shutil.copytree(saved, tmp_path / "broken")
    pooling = json.loads((folder / "1_Pooling/config.json").read_text())
    pooling |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    code, out, _ = cli("verify", folder)
    assert code == 1 and "1_Pooling/config.json has changed" in out and "smallest cosine is" in out


def test_verify_refuses_in_one_line(saved: Path, tiny_bert_st: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("verify", tiny_bert_st)[2].startswith(f"error: {tiny_bert_st}: there is no deploy.json. Save the model")
    assert "'triton' is unknown. Known: sentence-transformers" in cli("verify", saved, "--runtime", "triton")[2]
    assert "No module named 'fastembed'. pip install fastembed" in cli("verify", saved, "--runtime", "fastembed")[2]
    assert "--python: cannot be run" in cli("verify", saved, "--python", tmp_path / "none")[2]


def test_comparing() -> None:
    vectors = np.eye(3) + 0.1
    reference = {"kind": "embeddings", "outputs": vectors.tolist(), "token_ids": [[1], [2], [3]]}
    answer = {"versions": {}, "outputs": vectors.tolist(), "token_ids": [[1], [2], [3]]}
    assert _compare("x", reference, answer, 0.9999, []).good
    shorter = {**answer, "outputs": vectors[:, :2].tolist()}
    assert _compare("x", reference, shorter, 0.9999, []).good, "cut to its first dimensions"
    other = _compare("x", reference, {**answer, "token_ids": [[1], [2], [4]]}, 0.9999, [])
    assert other.faults == ("1 of 3 inputs became other tokens",) and other.tokens is False
    fewer = _compare("x", reference, {**answer, "outputs": vectors[:2].tolist()}, 0.9999, [])
    assert fewer.faults[0] == "it gives 2 x 3 numbers, not 3 x 3"
    for states in ([[1.0], [1.0, 2.0], [3.0]], [[[1.0, 2.0]]] * 3):
        with pytest.raises(ModelError, match="x: it does not give one row of numbers for each input"):
            _compare("x", reference, {**answer, "outputs": states}, 0.9999, [])
    nothing = _compare("x", reference, {**answer, "outputs": [[float("nan")] * 3] * 3}, 0.9999, [])
    assert not nothing.good, "no number is not the right one"
    scores = {**reference, "kind": "scores", "outputs": [1.0, 2.0, 3.0]}
    assert _compare("x", scores, {**answer, "outputs": [[1.0], [2.0], [3.0]]}, 0.9999, []).good
    wrong = _compare("x", scores, {**answer, "outputs": [[3.0], [2.0], [1.0]]}, 0.9999, [])
    assert wrong.faults == ("a score is off by 2.00e+00",) and wrong.rank == 0.0
    assert _compare("x", scores, {**answer, "outputs": [[3.0], [2.0], [1.0]]}, 0.9999, [], 2.0).good, "as measured"
    classes = {**scores, "outputs": [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]}
    first = _compare("x", classes, {**answer, "outputs": [[1.0], [2.0], [3.0]]}, 0.9999, [])
    assert first.faults[0] == "it gives 3 x 1 numbers, not 3 x 2", "the first of several scores alone"
    assert _same_order(np.array([[1.0], [1.0]]), np.array([[1.0], [2.0]]), True) == 1.0, "a tie has no order"
