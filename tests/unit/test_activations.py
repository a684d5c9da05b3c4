"""What layers keep for the backward: by option, by budget, and how it is counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.backends.activations import OF_OPTION, SHARES, Activations, Kind


@pytest.mark.parametrize("option", list(OF_OPTION))
def test_without_a_budget_all_layers_are_treated_alike(option: bool | str) -> None:
    found = {Activations(3, option).kind(place, 100) for place in range(3)}
    assert found == {OF_OPTION[option]} and SHARES[OF_OPTION[option]] <= SHARES["kept"]


def budgeted(budget: float, option: bool | str = True) -> Activations:
    said: list[str] = []
    made = Activations(4, option, budget, said.append)
    made.bytes_per_token = {"kept": 100.0, made.spare: 0.0 if option == "offload" else 20.0}
    return made


@pytest.mark.parametrize(
    ("budget", "kept"), [(8_000, 0), (8_001, 0), (16_000, 1), (31_999, 2), (32_000, 3), (40_000, 4), (1e9, 4)]
)
def test_as_many_of_the_last_layers_as_fit_keep_theirs(budget: float, kept: int) -> None:
    """100 tokens in 4 layers: 8,000 bytes with all computed again, 8,000 more for each that is not."""
    made = budgeted(budget)
    kinds = [made.kind(place, 100) for place in range(4)]
    assert kinds == ["again"] * (4 - kept) + ["kept"] * kept
    taken = sum(100 * made.bytes_per_token[kind] for kind in kinds)
    assert taken <= budget
    longer = [made.kind(place, 200) for place in range(4)]
    assert longer.count("kept") <= kept


def test_inputs_on_the_host_take_nothing_of_the_budget() -> None:
    made = budgeted(20_000, "offload")
    assert [made.kind(place, 100) for place in range(4)] == ["offload", "offload", "kept", "kept"]


def test_a_budget_that_cannot_be_kept_is_told() -> None:
    said: list[str] = []
    made = Activations(4, True, 7_999, said.append, {"kept": 100.0, "again": 20.0})
    assert made.kind(3, 100) == "again"
    assert len(said) == 1 and "less than" in said[0] and "offload" in said[0]


@pytest.mark.parametrize("kind", ["kept", "again"])
def test_what_a_layer_keeps_is_counted_once_and_weights_are_not(kind: Kind) -> None:
    layer = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    weights = frozenset(weight.untyped_storage().data_ptr() for weight in layer.parameters())
    made = Activations(2, True, 1e9)
    states = torch.randn(5, 8, requires_grad=True)
    assert made.keeping(5) == 1, "before both kinds are seen one layer keeps its activations, to be counted"
    for _ in range(2):
        with made.watch(kind, 5, weights):
            layer(states)
        # The input, GELU's input and its output, in float32.
        assert made.bytes_per_token == {kind: 4 * (8 + 32 + 32)}
    with torch.no_grad(), Activations(2, True, 1e9).watch(kind, 5, weights):
        layer(states)


def test_without_a_budget_nothing_is_counted() -> None:
    made = Activations(2, True)
    with made.watch("again", 5, frozenset()):
        torch.randn(5, requires_grad=True).exp()
    assert made.bytes_per_token == {}
