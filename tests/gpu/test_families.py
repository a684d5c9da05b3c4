"""The conformance suite of every built-in family on a GPU: its patches, FlashAttention in half precision, windows."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.core.testing import FamilyConformance
from burnish.core.testing.subject import Subject, backward

pytestmark = pytest.mark.gpu


class OnGpu(FamilyConformance):
    """Patches for the card that is there; float64 and float32 take the plain attention, the rest FlashAttention."""

    device = "cuda"
    devices = ("cuda",)


class TestBert(OnGpu):
    model_type = "bert"


class TestMPNet(OnGpu):
    model_type = "mpnet"


class TestDistilBert(OnGpu):
    model_type = "distilbert"


class TestModernBert(OnGpu):
    model_type = "modernbert"


class TestXLMRoberta(OnGpu):
    model_type = "xlm-roberta"


class TestGemma(OnGpu):
    model_type = "gemma3_text"


class TestQwen3(OnGpu):
    model_type = "qwen3"


FAMILIES = ("bert", "mpnet", "distilbert", "modernbert", "xlm_roberta", "gemma", "qwen3")


@pytest.mark.parametrize("name", FAMILIES)
def test_long_texts_in_bfloat16_are_as_near_to_float32_as_stock(name: str, tmp_path: Any) -> None:
    """Two layers of real width, 96 tokens and more: FlashAttention's kernels proper, with the family's windows."""
    config = import_module(f"burnish.families.{name}").sample("base")
    config.update({"num_hidden_layers": 6, "n_layers": 6, "vocab_size": 1000})
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:6]
    subject = Subject(config=config, folder=tmp_path, device="cuda")
    texts = subject.texts
    exact = backward(subject.plain(), texts)
    ours, stock = (
        backward(model, texts) for model in (subject.ours(dtype="bfloat16"), subject.plain(dtype=torch.bfloat16))
    )
    pairs = [
        (ours[0], stock[0], exact[0]),
        *((ours[1][key], stock[1][key], exact[1][key]) for key in exact[1] if key in ours[1]),
    ]
    found, allowed = (sum(error(pair[place], pair[2]) ** 2 for pair in pairs[1:]) ** 0.5 for place in (0, 1))
    assert 0 < error(ours[0], exact[0]) <= 1.5 * error(stock[0], exact[0])
    assert 0 < found <= 1.5 * allowed


def error(found: Tensor, exact: Tensor) -> float:
    """The Frobenius norm of the difference."""
    return float((found.double() - exact.double()).norm())


def test_a_fast_kernel_is_what_half_precision_gets(tmp_path: Any) -> None:
    config = import_module("burnish.families.modernbert").sample("tiny")
    model = Subject(config=config, folder=tmp_path, device="cuda").ours(dtype="bfloat16")
    kernels = {"name": model.burnish.decision.attention.spec.name, "used": model.config._attn_implementation}
    assert kernels == {"name": "flash", "used": "burnish_packed_fa"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        backward(model, ["w1 w2 w3", "w4"])
    found = [event.key for event in profile.key_averages()]
    assert any("flash" in name or name == "query_gradient" for name in found), "no kernel of FlashAttention or ours ran"
