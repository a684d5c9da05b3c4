"""Walks over modules give what torch's give, in torch's order."""

from __future__ import annotations

import pytest
from torch import nn

from burnish.core.walks import Walked


class Tree(Walked):
    """Shared modules, a tied parameter, a module that is None, and one in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Dropout(0.1)) for _ in range(3))
        self.again = self.layers[1]
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.head.weight
        self.own = nn.Parameter(nn.init.ones_(self.head.bias.detach().clone()))
        self.nothing: nn.Module | None = None
        self.register_module("absent", None)


def test_parameters_are_torchs_in_its_order() -> None:
    tree = Tree()
    assert [id(one) for one in tree.parameters()] == [id(one) for _, one in tree.named_parameters()]
    assert [id(one) for one in tree.parameters(recurse=False)] == [id(tree.own)]
    assert len({id(one) for one in tree.parameters()}) == 7
    for one in tree.parameters():
        one.grad = one.detach().clone()
    tree.zero_grad()
    assert all(one.grad is None for one in tree.parameters())


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_reaches_every_module_whatever_one_of_them_was_in(mode: bool) -> None:
    for place in range(len(list(Tree().modules()))):
        tree = Tree().train(mode)
        list(tree.modules())[place].training = not mode
        assert tree.train(mode) is tree
        assert all(module.training is mode for module in tree.modules()), place


def test_nothing_is_done_where_all_are_there_already() -> None:
    tree = Tree().eval()
    calls: list[bool] = []

    def told(mode: bool = True) -> nn.Module:
        calls.append(mode)
        return tree.layers[0]

    tree.layers[0].train = told  # type: ignore[method-assign]
    tree.eval()
    assert not calls
    tree.train()
    assert calls == [True]
