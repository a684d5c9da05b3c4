"""AdamW for rows of a table and for bfloat16 masters, and steps inside the backward: against `torch.optim.AdamW`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.core.errors import ModelError
from burnish.core.optimizers import AdamW, InBackward, Rounding, clip, tables_of
from burnish.kernels.adamw import rounded_adamw

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
ROWS, WIDTH = 50, 8


class Net(nn.Module):
    """A table, two layers of which one is used twice, and a norm."""

    def __init__(self, *, sparse: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(ROWS, WIDTH, sparse=sparse)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 3)
        self.norm = nn.LayerNorm(WIDTH)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.norm(self.twice(self.twice(self.table(ids)).tanh()))
        result: Tensor = self.last(states).float().pow(2).mean()
        return result


def groups(net: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without, as the trainer groups them."""
    decayed = [weight for weight in net.parameters() if weight.dim() > 1]
    rest = [weight for weight in net.parameters() if weight.dim() == 1]
    return [{"params": decayed, **SETTINGS, **settings}, {"params": rest, **SETTINGS, **settings, "weight_decay": 0.0}]


def batch(step: int) -> Tensor:
    """Ids with repetitions; other rows in every step."""
    return torch.randint(0, ROWS, (2, 7), generator=torch.Generator().manual_seed(step))


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int, first: int = 0, limit: float | None = None) -> None:
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["lr"] / (step + 1)  # a schedule
        net(batch(step)).backward()
        if limit is not None:
            clip(net.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()


def equal(first: Any, second: Any) -> bool:
    """Whether two state dicts of models or optimizers are the same to the bit."""
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


@pytest.mark.parametrize("way", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_steps_in_the_backward_are_adamw_s_bit_for_bit(way: dict[str, Any]) -> None:
    """Weights and state after five steps with a schedule and two groups."""
    theirs, ours = Net(), Net()
    expected, found = torch.optim.AdamW(groups(theirs, **way)), torch.optim.AdamW(groups(ours, **way))
    before = copy.deepcopy(ours.state_dict())
    train(theirs, expected, 5)
    stepping = InBackward(found, {})
    for step in range(5):
        stepping.begin()
        for group in found.param_groups:
            group["lr"] = SETTINGS["lr"] / (step + 1)
        ours(batch(step)).backward()
        assert all(weight.grad is None for weight in ours.parameters()), "a gradient is held"
        found.step()
    assert equal(ours.state_dict(), theirs.state_dict()) and equal(found.state_dict(), expected.state_dict())
    assert not any(torch.equal(ours.state_dict()[name], before[name]) for name in before), "a weight did not move"
    stepping.remove()
    ours(batch(0)).backward()
    assert all(weight.grad is not None for weight in ours.parameters()), "a hook is left"


def test_gradients_are_never_held_together() -> None:
    """Of eight layers, at most two have a gradient at a time."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    stepping = InBackward(torch.optim.AdamW(net.parameters()), {})
    most = 0

    def look(weight: Tensor) -> None:
        nonlocal most
        most = max(most, sum(one.grad is not None for one in net.parameters()))

    parameters: list[Any] = list(net.parameters())
    hooks = [weight.register_post_accumulate_grad_hook(look) for weight in parameters]
    stepping.begin()
    net(torch.ones(2, 16)).sum().backward()
    assert most <= 2 and len(hooks) == 16
    assert all(weight.grad is None for weight in net.parameters())


def test_the_norm_of_gradients_that_are_gone() -> None:
    ours, theirs = Net(sparse=True), Net()
    stepping = InBackward(AdamW(groups(ours)), {})
    stepping.begin()
    ours(batch(0)).backward()
    theirs(batch(0)).backward()
    expected = torch.nn.utils.get_total_norm([weight.grad for weight in theirs.parameters() if weight.grad is not None])
    assert expected > 0 and torch.allclose(stepping.norm(), expected)
    stepping.begin()
    assert stepping.norm() == 0


def test_a_gradient_in_parts_is_refused() -> None:
    net = Net()
    stepping = InBackward(torch.optim.AdamW(groups(net)), {net.last.bias: "last.bias"})
    stepping.begin()
    net(batch(0)).backward()
    with pytest.raises(ModelError, match=r"^optimizer_in_backward: the gradient of last\.bias comes in several parts"):
        net(batch(1)).backward()


def test_the_first_step_of_rows_is_adamw_s() -> None:
    """Rows of the batch equal AdamW's to the bit; others have not moved, though AdamW's weight decay moved them."""
    theirs, ours = Net(), Net(sparse=True)
    start = theirs.table.weight.detach().clone()
    train(theirs, torch.optim.AdamW(groups(theirs)), 1)
    train(ours, AdamW(groups(ours)), 1)
    touched = torch.unique(batch(0))
    assert torch.equal(ours.table.weight[touched], theirs.table.weight[touched])
    others = [row for row in range(ROWS) if row not in touched]
    assert torch.equal(ours.table.weight[others], start[others])
    assert not torch.equal(theirs.table.weight[others], start[others])
    assert all(torch.equal(a, b) for a, b in zip(ours.twice.parameters(), theirs.twice.parameters(), strict=True))


def test_rows_that_every_batch_has_are_adamw_s_throughout() -> None:
    """With every row in every batch nothing is lazy; sums in another order differ in their last bits."""
    theirs, ours = Net(), Net(sparse=True)
    expected, found = torch.optim.AdamW(groups(theirs)), AdamW(groups(ours))
    every = torch.arange(ROWS).repeat(2)
    for _ in range(4):
        for net, optimizer in ((theirs, expected), (ours, found)):
            net(every).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (ours.table.weight - theirs.table.weight).abs().max() <= 1e-6


def test_rows_are_stepped_as_sparse_adam_does_without_weight_decay() -> None:
    torch.manual_seed(0)
    start = torch.randn(ROWS, WIDTH)
    tables = [nn.Embedding(ROWS, WIDTH, sparse=True, _weight=start.clone()) for _ in range(2)]
    # SparseAdam adds epsilon before it corrects the bias of the root, AdamW after: with an epsilon of 0 they agree.
    common: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 0.0}
    ours = AdamW(tables[0].parameters(), weight_decay=0.0, **common)
    theirs = torch.optim.SparseAdam(list(tables[1].parameters()), **{**common, "eps": 1e-30})
    for step in range(6):
        for table, optimizer in zip(tables, (ours, theirs), strict=True):
            (table(batch(step)) * torch.randn(WIDTH, generator=torch.Generator().manual_seed(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (tables[0].weight - start).abs().max() > 1e-2
    assert torch.allclose(tables[0].weight, tables[1].weight, atol=1e-6)


@pytest.mark.parametrize("limit", [0.01, 1e9, float("inf")])
def test_clipping_counts_rows(limit: float) -> None:
    """Repeated rows are summed before the norm is taken; the uncoalesced norm is another number."""
    theirs, ours = Net(), Net(sparse=True)
    theirs(batch(0)).backward()
    ours(batch(0)).backward()
    gradient: Any = ours.table.weight.grad
    assert not gradient.is_coalesced() and len(torch.unique(batch(0))) < batch(0).numel()
    raw = gradient._values().norm()
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    assert not torch.isclose(raw, gradient.to_dense().norm(), rtol=1e-3)
    assert torch.allclose(clip(ours.parameters(), limit), expected)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert torch.allclose(mine.grad.to_dense(), other.grad, rtol=1e-5, atol=0)
    with pytest.raises((RuntimeError, NotImplementedError)):  # why torch's own is not used
        Net(sparse=True)(batch(0)).backward()
        torch.nn.utils.clip_grad_norm_([ours.table.weight], limit)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most numbers that any new tensor holds."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {
            value.untyped_storage().data_ptr()
            for value in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(value, Tensor) and value.layout == torch.strided
        }
        for value in torch.utils._pytree.tree_leaves(result):
            dense = isinstance(value, Tensor) and value.layout == torch.strided
            if dense and value.untyped_storage().data_ptr() not in known:
                self.numbers = max(self.numbers, value.numel())
        return result


@pytest.mark.parametrize("how", ["rows", "rounded", "dense"])
def test_nothing_of_the_table_s_size_is_made(how: str) -> None:
    """Once the moments are there: neither by the backward, nor by clipping, nor by the step."""
    rows = 3000
    dtype = torch.bfloat16 if how == "rounded" else torch.float32
    table = nn.Embedding(rows, WIDTH, sparse=how != "dense").to(dtype)
    optimizer = AdamW(table.parameters(), rounding=Rounding(rounded_adamw, 1) if how == "rounded" else None)
    for step in range(2):
        with Largest() as largest:  # type: ignore[no-untyped-call]
            table(batch(step)).float().pow(2).sum().backward()
            clip(table.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
    assert (largest.numbers < rows) == (how != "dense"), largest.numbers


def copies(net: Net, optimizer: AdamW, make: Callable[[], Net], rounding: Rounding | None) -> tuple[Net, AdamW]:
    """What a run that resumes has: written to a file's bytes and read again."""
    import io

    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = make()
    again.load_state_dict(saved["net"])
    other = AdamW(groups(again, fused=True), rounding=rounding)
    other.load_state_dict(saved["optimizer"])
    return again, other


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounds", [True, False])
def test_a_resumed_optimizer_goes_on_to_the_bit(dtype: torch.dtype, moments: torch.dtype, rounds: bool) -> None:
    rounding = Rounding(rounded_adamw, 7, moments) if rounds else None

    def make() -> Net:
        return Net(sparse=True, dtype=dtype)

    whole = make()
    first = AdamW(groups(whole, fused=True), rounding=rounding)
    train(whole, first, 3)
    net, second = copies(whole, first, make, rounding)
    train(whole, first, 3, first=3, limit=0.5)
    train(net, second, 3, first=3, limit=0.5)
    assert equal(net.state_dict(), whole.state_dict()) and equal(second.state_dict(), first.state_dict())
    table = first.state[whole.table.weight]
    kept = moments if rounds and dtype == torch.bfloat16 else torch.float32
    assert {table["exp_avg"].dtype, table["exp_avg_sq"].dtype} == {kept}


@pytest.mark.parametrize("sparse", [True, False])
def test_all_three_together_in_the_backward(sparse: bool) -> None:
    """Rounded weights and rows, stepped in the backward: the same bits as stepped after it."""
    rounding = Rounding(rounded_adamw, 7)
    nets = [Net(sparse=sparse, dtype=torch.bfloat16) for _ in range(2)]
    after, inside = (AdamW(groups(net), rounding=rounding) for net in nets)
    stepping = InBackward(inside, {})
    for step in range(4):
        nets[0](batch(step)).backward()
        after.step()
        after.zero_grad()
        stepping.begin()
        nets[1](batch(step)).backward()
    assert equal(nets[0].state_dict(), nets[1].state_dict()) and equal(after.state_dict(), inside.state_dict())


def test_which_tables_are_taken() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Embedding(1 << 12, 1 << 8), nn.Embedding((1 << 12) - 1, 1 << 8)
            self.frozen, self.tied = nn.Embedding(1 << 12, 1 << 8), nn.Embedding(1 << 12, 1 << 8)
            self.by_frequency = nn.Embedding(1 << 12, 1 << 8, scale_grad_by_freq=True)
            self.frozen.weight.requires_grad_(False)
            self.head = nn.Linear(1 << 8, 1 << 12, bias=False)
            self.head.weight = self.tied.weight

    model = Model()
    assert tables_of(model) == [model.large]
