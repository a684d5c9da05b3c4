"""What serving takes is kept from training through every kind of save and load: nothing of it is said anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer as PlainModel
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from burnish import FastSentenceTransformer, Trainer
from burnish.core import deploy, dimensions
from burnish.core.contracts import ExportRequest
from burnish.core.exporters.matryoshka import matryoshka
from burnish.core.testing.subject import quietly

PROMPTS = {"query": "find: ", "document": ""}
ASKED = {"prompts": PROMPTS, "similarity_fn_name": "dot", "max_seq_length": 48}


def load(folder: Path, **options: Any) -> Any:
    with quietly():
        return FastSentenceTransformer.from_pretrained(str(folder), device="cpu", **options)


def train(model: Any, pairs: Any, folder: Path, loss: Any, **settings: Any) -> None:
    arguments: Any = Trainer.training_args_class(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        disable_tqdm=True, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()


def nested(model: Any, widths: list[int]) -> MatryoshkaLoss:
    return MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), matryoshka_dims=widths)


def said(folder: Path) -> Any:
    """deploy.json's word on the widths, which must be config.json's own where there is one."""
    found = deploy.read(folder)["matryoshka_dimensions"]
    if (folder / "config.json").exists():
        assert json.loads((folder / "config.json").read_text()).get("matryoshka_dimensions", []) == found
    return found


@pytest.mark.parametrize("full", [True, False])
def test_from_training_to_a_server(full: bool, tiny_bert_st: Path, pairs: Any, tmp_path: Path) -> None:
    model = load(tiny_bert_st, full_finetuning=full, **ASKED)
    model = model if full else FastSentenceTransformer.get_peft_model(model, r=2)
    model.default_prompt_name = "query"
    train(model, pairs, tmp_path / "run", nested(model, [32, 8, 16]), save_strategy="steps", save_steps=1)
    model.save_pretrained(str(tmp_path / "first"))
    again = load(tmp_path / "first", full_finetuning=full)
    again.save_pretrained(str(tmp_path / "second"))
    again.save_pretrained_merged(tmp_path / "merged", save_method="merged_16bit")
    load(tmp_path / "merged", full_finetuning=True).save_pretrained(str(tmp_path / "third"))
    for name in ("first", "second", "merged", "third"):
        found = deploy.read(tmp_path / name)
        assert said(tmp_path / name) == [8, 16, 32], name
        kept = [found[key] for key in ("prompts", "default_prompt", "similarity", "max_seq_length", "dimensions")]
        assert kept == [PROMPTS, "query", "dot", 48, 32], name
        plain = PlainModel(str(tmp_path / name), device="cpu")
        assert (plain.prompts, plain.similarity_fn_name, plain.max_seq_length) == (PROMPTS, "dot", 48), name
    kept = [deploy.read(tmp_path / name)["dtype"] for name in ("first", "merged")]
    assert kept == ["float32", "float16"]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "float16"
    checkpoint = load(tmp_path / "run" / "checkpoint-1", full_finetuning=full)
    assert dimensions.of_config(checkpoint.config) == [8, 16, 32], "a checkpoint is loaded and saved as a model"


def test_only_what_was_trained_is_said(tiny_bert_st: Path, pairs: Any, tmp_path: Path) -> None:
    model = load(tiny_bert_st, full_finetuning=True)
    train(model, pairs, tmp_path / "run", MultipleNegativesRankingLoss(model))
    model.save_pretrained(str(tmp_path / "plain"))
    assert said(tmp_path / "plain") == []
    assert "matryoshka_dimensions" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    train(model, pairs, tmp_path / "run", nested(model, [32, 16]))
    train(model, pairs, tmp_path / "run", MultipleNegativesRankingLoss(model))
    assert dimensions.of_config(model.config) == [16, 32], "training on at the whole width takes nothing back"
    both = [nested(model, [32, 16, 8]), nested(model, [32, 8])]
    assert dimensions.trained_for(both) == [8, 32] and dimensions.trained_for([torch.nn.Identity(), None]) == []


def test_a_shortened_model_says_no_more_than_it_has(tiny_bert_st: Path, pairs: Any, tmp_path: Path) -> None:
    model = load(tiny_bert_st, full_finetuning=True)
    train(model, pairs, tmp_path / "run", nested(model, [32, 16, 8]))
    model.save_pretrained(str(tmp_path / "whole"))
    for width, widths in ((16, [8, 16]), (4, [])):
        output = tmp_path / f"short{width}"
        with quietly():
            matryoshka(ExportRequest(source=tmp_path / "whole", output=output, options={"dimensions": str(width)}))
        assert said(output) == widths and deploy.read(output)["dimensions"] == width
