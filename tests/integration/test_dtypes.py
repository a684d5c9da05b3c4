"""The dtype a model is loaded in: what was asked for, or what keeps training right, and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Make = Callable[..., Any]


@pytest.mark.parametrize("asked", ["bfloat16", "torch.float16", torch.float16, torch.bfloat16, "float32"], ids=str)
@pytest.mark.parametrize("way", ["dtype", "model_kwargs", "torch_dtype"])
def test_dtype_by_name_or_as_itself(tiny_bert_st: Path, load: Make, asked: Any, way: str) -> None:
    options = {
        "dtype": {"dtype": asked},
        "model_kwargs": {"model_kwargs": {"dtype": asked}},
        "torch_dtype": {"model_kwargs": {"torch_dtype": asked}},
    }
    model = load(tiny_bert_st, **options[way])
    expected = getattr(torch, str(asked).removeprefix("torch."))
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert f"{str(expected).removeprefix('torch.')} (asked for)" in str(model.burnish)


@pytest.mark.parametrize("checkpoint", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "options, expected, why",
    [
        ({"full_finetuning": True}, "float32", "master weights for full fine-tuning"),
        ({}, "float32", "adapters on cpu"),
        ({"load_in_16bit": False}, "float32", "load_in_16bit=False"),
        ({"load_in_16bit": True}, "bfloat16", "load_in_16bit"),
        ({"load_in_16bit": True, "for_inference": True}, "bfloat16", "load_in_16bit"),
        ({"dtype": "auto"}, None, "asked for as the checkpoint's own"),
        ({"for_inference": True}, None, "as Sentence Transformers loads it"),
        ({"dtype": "auto", "full_finetuning": True}, None, "small updates round away"),
    ],
    ids=str,
)
def test_dtype_of_half_precision_checkpoints(
    half_bert: Callable[[str], Path], load: Make, checkpoint: str, options: Any, expected: str | None, why: str
) -> None:
    model = load(half_bert(checkpoint), **options)
    assert model.dtype == getattr(torch, expected or checkpoint)
    assert why in str(model.burnish)


def test_full_fine_tuning_moves_where_plain_loading_does_not(
    half_bert: Callable[[str], Path], load: Make, plain: Make
) -> None:
    """At 2e-5 a weight near 1 does not move in bfloat16, which is what transformers 5 loads by itself."""
    folder = half_bert("bfloat16")
    moved = {}
    for name, model in {"plain": plain(folder), "ours": load(folder, full_finetuning=True)}.items():
        weight = next(p for key, p in model.named_parameters() if key.endswith("LayerNorm.weight"))
        before = weight.detach().clone()
        optimizer = torch.optim.AdamW([weight], lr=2e-5, weight_decay=0.0)
        for _ in range(3):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[name] = float(((weight - before).abs() > 0).float().mean())
    assert moved == {"plain": 0.0, "ours": 1.0}


def test_adapters_over_a_bfloat16_base_train_in_float32(half_bert: Callable[[str], Path], adapted: Make) -> None:
    model = adapted(half_bert("bfloat16"), load_options={"load_in_16bit": True})
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
