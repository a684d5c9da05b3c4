"""What Burnish asks of every family, asked of NomicBERT; and what is special about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from burnish.core.contracts import Machine
from burnish.core.testing import FamilyConformance
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, NomicBertConfig

import burnish_nomic as nomic


class TestNomicBert(FamilyConformance):
    model_type = "nomic_bert"


def model(**changed: Any) -> Any:
    """A tiny model with random weights."""
    config: Any = nomic.sample("tiny")
    kind: Any = AutoModel
    return kind.from_config(NomicBertConfig(**{**config.to_diff_dict(), **changed}))


def patched(device: str, **changed: Any) -> list[str]:
    """The classes that modules get on a device."""
    return sorted({patch.new.__name__ for patch in nomic.patches(model(**changed), Machine(device=device))})


def test_each_device_gets_its_patches() -> None:
    assert patched("cpu") == ["FrugalNomicBertMLP"]
    assert patched("cuda") == ["JoinedNomicBertAttention", "JoinedNomicBertMLP"]
    assert patched("cuda", hidden_act="gelu") == ["JoinedNomicBertAttention"]


def test_heads_of_another_size_than_hidden_by_heads() -> None:
    stock, ours = model(head_dim=16).double(), model(head_dim=16).double()
    ours.load_state_dict(stock.state_dict())
    for patch in nomic.patches(ours, Machine(device="cuda")):
        ours.get_submodule(patch.path).__class__ = patch.new
    ids = torch.arange(5, 25).view(2, 10)
    for one in (stock, ours):
        (one(ids).last_hidden_state * torch.arange(32)).sum().backward()
    for name, parameter in stock.named_parameters():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_swiglu() -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    swiglu: Any = nomic.SwiGLU.apply
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    assert torch.equal(swiglu(gate, up), functional.silu(gate) * up)


def kept(module: Any, x: Tensor) -> int:
    """Bytes that a forward keeps for the backward."""
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(x)
    return sum(held.values())


def test_the_mlp_keeps_one_tensor_less() -> None:
    mlp, x = model().layers[0].mlp, torch.randn(2, 50, 32)
    stock = kept(mlp, x)
    mlp.__class__ = nomic.FrugalNomicBertMLP
    assert stock - kept(mlp, x) == 2 * 50 * 64 * 4


def test_a_mixture_of_experts_is_left_to_others() -> None:
    config: Any = NomicBertConfig()
    assert nomic.takes(config) == 1
    config.moe_every_n_layers = 2
    assert nomic.takes(config) == 0


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_samples_are_what_they_say(size: Any) -> None:
    config: Any = nomic.sample(size)
    assert config.hidden_size == {"tiny": 32, "base": 768}[size] and config.model_type == "nomic_bert"
