"""One changed import: a Sentence Transformers script and an Unsloth notebook run on Burnish as they are."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from safetensors.torch import load_file
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import burnish
from burnish import FastSentenceTransformer
from burnish.core.errors import ConfigError
from burnish.core.options import LoadOptions

Make = Callable[..., Any]
SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture
def run(
    pairs: Any, tiny_bert_st: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, str], dict[str, Any]]:
    """Run a script with one piece of its text changed, in this process; returns its variables."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in pairs), encoding="utf-8")

    def run(script: str, old: str, new: str) -> dict[str, Any]:
        text = (SCRIPTS / script).read_text(encoding="utf-8")
        output = tmp_path / new.split()[1]
        output.mkdir()
        changed = tmp_path / script
        changed.write_text(text.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [script, str(tiny_bert_st), str(data), str(output)])
        return runpy.run_path(str(changed), run_name="__main__") | {"output": output}

    return run


def test_a_sentence_transformers_script(run: Any, plain: Make, texts: list[str]) -> None:
    line = "from sentence_transformers import ("
    assert (SCRIPTS / "st_script.py").read_text(encoding="utf-8").count(line) == 1
    results = {}
    for package in ("sentence_transformers", "burnish"):
        variables = run("st_script.py", line, f"from {package} import (")
        output = variables["output"]
        results[package] = json.loads((output / "results.json").read_text())
        final = plain(output / "final")
        assert abs(final.encode(texts) - variables["model"].encode(texts)).max() <= 1e-5
        assert final.prompts == {"query": "query: ", "document": "document: "} and final.max_seq_length == 48
        card = (output / "final" / "README.md").read_text(encoding="utf-8")
        assert "license: apache-2.0" in card and "# Places" in card and "MatryoshkaLoss" in card
    # The last model was trained by Burnish, the one before it was not.
    assert isinstance(variables["trainer"], burnish.Trainer) and variables["model"].burnish.packed is not None
    stock, ours = results["sentence_transformers"], results["burnish"]
    assert stock["before"] == pytest.approx(ours["before"], abs=1e-6)
    for result in (stock, ours):
        assert result["after"] > result["before"] + 0.05
        assert np.shape(result["similarity"]) == (16, 16) and "checkpoint-" in result["best"]
    # Dropout draws other numbers for packed texts: the curves start close and part.
    assert len(ours["losses"]) == len(stock["losses"]) == 12
    np.testing.assert_allclose(ours["losses"][:2], stock["losses"][:2], rtol=0.1)
    assert max(ours["losses"][-3:]) < 0.5 * ours["losses"][0] and max(stock["losses"][-3:]) < 0.5 * stock["losses"][0]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_an_unsloth_notebook(run: Any, plain: Make, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert (SCRIPTS / "unsloth_notebook.py").read_text(encoding="utf-8").count("from unsloth import") == 2
    variables = run("unsloth_notebook.py", "from unsloth import", "from burnish import")
    said, output = capsys.readouterr().out, variables["output"]
    assert "seconds used for training" in said and said.count(" | ") == 2
    losses = [row["loss"] for row in variables["trainer"].state.log_history if "loss" in row]
    assert len(losses) == 16 and sum(losses[-4:]) < 0.8 * sum(losses[:4])
    live = variables["trainer"].model
    assert variables["ranking"][0] == 0
    np.testing.assert_allclose(variables["again"], live.encode(variables["candidates"]), atol=1e-5)
    assert abs(plain(output / "lora_model").encode(texts) - live.encode(texts)).max() <= 1e-5
    merged = load_file(output / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}
    found = plain(output / "merged").encode(texts).astype(np.float32)
    assert abs(found - live.encode(texts)).max() <= 4 * torch.finfo(torch.float16).eps


def test_every_name_of_sentence_transformers_is_here_ours_or_refused() -> None:
    kinds = ("SentenceTransformer", "CrossEncoder")
    ours = {f"{kind}{part}" for kind in kinds for part in ("", "Trainer", "TrainingArguments")}
    kept = []
    for name in sentence_transformers.__all__:
        stock = getattr(sentence_transformers, name)
        if name in ours:
            assert issubclass(getattr(burnish, name), stock) and getattr(burnish, name) is not stock
        elif name.startswith(("SparseEncoder", "MultiVectorEncoder")):
            with pytest.raises(ImportError, match=f"^burnish has no {name} of its own: import it from sentence_transf"):
                getattr(burnish, name)
        else:
            assert getattr(burnish, name) is stock
            kept.append(name)
    assert {"InputExample", "SentenceTransformerModelCardData", "mine_hard_negatives"} <= set(kept)


def test_its_modules_are_here_without_their_warnings() -> None:
    from burnish import datasets, evaluation, losses, models, readers, training_args, util

    assert losses.MultipleNegativesRankingLoss.__module__.startswith("sentence_transformers.")
    assert models.Transformer is Transformer and models.Pooling is Pooling
    assert readers.InputExample is burnish.InputExample and training_args.BatchSamplers.NO_DUPLICATES
    assert all(map(callable, (evaluation.InformationRetrievalEvaluator, datasets.SentencesDataset, util.cos_sim)))


def test_other_names_are_attribute_errors_and_cost_nothing() -> None:
    code = (
        "import sys, burnish; assert not hasattr(burnish, 'nonsense') and not hasattr(burnish, 'pytest_plugins'); "
        "assert 'losses' not in dir(burnish); heavy = {'torch', 'transformers', 'sentence_transformers'}; "
        "assert not heavy & set(sys.modules); burnish.losses; assert heavy <= set(sys.modules); print('light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "light", done.stderr


def test_bf16_is_what_the_training_arguments_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from burnish import TrainingArguments, is_bf16_supported, is_bfloat16_supported

    assert is_bfloat16_supported is is_bf16_supported
    if not torch.cuda.is_available():
        assert is_bf16_supported() is False
        with pytest.raises(ValueError, match="bf16"):
            TrainingArguments(str(tmp_path), bf16=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for capability, expected in {(7, 5): False, (8, 0): True, (9, 0): True}.items():
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda found=capability: found)
        assert is_bf16_supported() is expected


def test_sentence_transformer_by_parts(tiny_bert: Path, plain: Make, texts: list[str]) -> None:
    trunk = Transformer(str(tiny_bert), max_seq_length=32)
    model = burnish.SentenceTransformer(modules=[trunk, Pooling(32, pooling_mode="cls")], device="cpu")
    stock = plain(tiny_bert)
    stock[1].pooling_mode, stock.max_seq_length = "cls", 32
    assert model.burnish is not None and model.burnish.packed is not None
    assert "float32 (as the modules came)" in str(model.burnish)
    assert abs(model.encode(texts) - stock.encode(texts)).max() <= 1e-5


def test_what_a_script_expects_of_a_folder() -> None:
    """Float32 as Sentence Transformers loads it, also where the policy for adapters would take bfloat16."""
    asked = LoadOptions(purpose="script")
    assert (asked.resolved(None).purpose, asked.resolved(None).dtype) == ("full", None)
    assert (asked.resolved("base").purpose, asked.resolved("base").dtype) == ("adapters", torch.float32)
    assert LoadOptions(purpose="script", dtype=torch.bfloat16).resolved("base").dtype == torch.bfloat16
    assert LoadOptions(purpose="inference").resolved("base").purpose == "inference"


def test_sentence_transformer_as_a_script_calls_it(
    tiny_bert_st: Path, half_bert: Callable[[str], Path], adapted: Make, tmp_path: Path, texts: list[str]
) -> None:
    model = burnish.SentenceTransformer(str(tiny_bert_st), device="cpu", truncate_dim=8)
    assert model.encode(texts).shape == (len(texts), 8) and all(p.requires_grad for p in model.parameters())
    kinds = {
        "float32": {},
        "float16": {"dtype": "auto"},
        "bfloat16": {"torch_dtype": torch.bfloat16},
    }
    for expected, model_kwargs in kinds.items():
        loaded = burnish.SentenceTransformer(str(half_bert("float16")), device="cpu", model_kwargs=model_kwargs)
        assert loaded.dtype == getattr(torch, expected)
    eager = burnish.SentenceTransformer(str(tiny_bert_st), device="cpu", model_kwargs={"attn_implementation": "eager"})
    assert eager.burnish is not None and eager.burnish.packed is None
    with pytest.raises(ConfigError, match=r"^backend: 'onnx' is for inference only\. Load it with sentence_tr"):
        burnish.SentenceTransformer(str(tiny_bert_st), backend="onnx")
    tuned = adapted()
    tuned.save_pretrained(str(tmp_path / "adapter"))
    again = burnish.SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    assert abs(again.encode(texts) - tuned.encode(texts)).max() <= 1e-5
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in tuned.named_parameters() if p.requires_grad
    }
    assert isinstance(FastSentenceTransformer(str(tmp_path / "adapter"), device="cpu"), burnish.SentenceTransformer)
