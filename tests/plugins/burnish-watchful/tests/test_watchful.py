"""The backend's step is Sentence Transformers' own, and the kernel equals the plain one; faults are named."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from burnish.core.errors import ModelError
from burnish.core.testing import BackendConformance, KernelConformance
from burnish.core.testing.find import sample_config
from burnish.core.testing.subject import Subject, embed
from burnish.core.testing.training import trainer
from burnish.kernels.attention import packed_attention

import burnish_text_by_text
from burnish_watchful import find_fault


class TestWatchful(BackendConformance):
    backend = "watchful"
    model_types = ("bert", "qwen3")


class TestTextByText(KernelConformance):
    operation = "packed_attention"
    kernel = "text-by-text"


class TestLongTexts(TestTextByText):
    @pytest.fixture(autouse=True)
    def few_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every text is cut, as those above 1024 tokens are."""
        monkeypatch.setattr(burnish_text_by_text, "ROWS", 7)


def hooks(model: Any) -> int:
    """How many hooks a model's modules carry."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(config=sample_config("bert"), folder=tmp_path, backend="watchful")


def test_a_weight_that_is_no_number_is_named(subject: Subject) -> None:
    model = subject.ours()
    spoiled = "0.model.encoder.layer.1.intermediate.dense"
    with torch.no_grad():
        model.get_submodule(spoiled).weight[0, 0] = float("nan")
    before = hooks(model)

    def run() -> torch.Tensor:
        loss = embed(model, subject.texts).sum()
        torch.autograd.backward(loss)
        return loss.detach()

    error = find_fault(model, run)
    assert isinstance(error, ModelError) and "\n" not in str(error)
    assert str(error).startswith(
        f"module {spoiled}: its output is not finite in the forward pass, since its weight is not"
    )
    assert hooks(model) == before and all(value.grad is None for value in model.parameters())


class RootOfNothing(torch.nn.Module):
    """Harmless forwards; the root's slope at 0 is infinite."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + (states - states).sqrt()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_that_is_no_number_is_named(subject: Subject, checkpointing: bool) -> None:
    model = subject.ours(use_gradient_checkpointing=checkpointing).train()
    layer = model.get_submodule("0.model.encoder.layer.1.intermediate")
    layer.intermediate_act_fn = RootOfNothing()
    before = hooks(model)

    def run() -> torch.Tensor:
        loss = embed(model, subject.texts).sum()
        torch.autograd.backward(loss)
        return loss.detach()

    assert torch.isfinite(run())
    error = find_fault(model, run)
    where = "module 0.model.encoder.layer.1.intermediate.intermediate_act_fn"
    assert str(error).startswith(
        f"{where}: the gradient of its input is not finite in the backward pass, while that of"
    )
    assert hooks(model) == before and all(value.grad is None for value in model.parameters())


def test_a_loss_that_is_no_number_is_not_put_on_a_module(subject: Subject) -> None:
    model = subject.ours()

    def run() -> torch.Tensor:
        loss = embed(model, subject.texts).sum().abs().neg().log()
        torch.autograd.backward(loss)
        return loss.detach()

    assert str(find_fault(model, run)).startswith("the loss: it or its gradient is not finite")


def test_a_run_ends_with_that_name(subject: Subject) -> None:
    right = subject.ours

    def spoiled(*arguments: Any, **options: Any) -> Any:
        model = right(*arguments, **options)
        with torch.no_grad():
            model.get_submodule("0.model.embeddings.LayerNorm").weight[3] = float("inf")
        return model

    subject.__dict__["ours"] = spoiled
    with pytest.raises(ModelError, match=r"^module 0\.model\.embeddings\.LayerNorm: its output is not finite"):
        trainer(subject)


def test_dropout_acts_in_every_text() -> None:
    torch.manual_seed(0)
    states = [torch.randn(9, 2, 4) for _ in range(2)] + [torch.ones(9, 2, 4)]
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    whole = burnish_text_by_text.packed_attention(*states, bounds, 5)
    dropped = burnish_text_by_text.packed_attention(*states, bounds, 5, dropout=0.5)
    torch.testing.assert_close(whole, torch.ones_like(whole))
    assert dropped[:4].std() > 0.1 and dropped[4:].std() > 0.1


def test_texts_may_all_be_empty() -> None:
    nothing = torch.zeros(0, 2, 4)
    bounds = torch.zeros(3, dtype=torch.int32)
    assert burnish_text_by_text.packed_attention(nothing, nothing, nothing, bounds, 0).shape == (0, 2, 4)


def kept(lengths: list[int], operation: Any) -> int:
    """Bytes that a forward keeps for the backward."""
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    states = [torch.randn(sum(lengths), 2, 4, requires_grad=True) for _ in range(3)]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        operation(*states, bounds, max(lengths))
    return sum(held.values())


def test_one_long_text_does_not_make_the_others_cost_as_much() -> None:
    lengths = [256, *[8] * 15]
    assert kept(lengths, burnish_text_by_text.packed_attention) < kept(lengths, packed_attention)
