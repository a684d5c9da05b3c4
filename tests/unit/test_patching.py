"""Patches go on one model's instances, meet nobody else's, and come off bit for bit, whatever happens in between."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish import FastSentenceTransformer
from burnish.core.contracts import Patch
from burnish.core.errors import PatchError
from burnish.core.patching import Claim, PatchPlan, patched


class Norm(nn.LayerNorm):
    """What is patched."""


class Shifted(Norm):
    """A patch whose effect is seen in the output."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1.0


class Doubled(Shifted):
    """A patch over a patch."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class Slotted(Norm):
    """A class whose instances are laid out otherwise: Python refuses the swap."""

    __slots__ = ("extra",)


class Block(nn.Module):
    """A layer with a part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(4)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.norm(input)
        return out


class FastBlock(Block):
    """A patch on the layer itself."""


class Model(nn.Module):
    """Two layers, and the plan where a test gives it one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.plan: PatchPlan | None = None

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.layers:
            input = layer(input)
        return input


@pytest.fixture
def model() -> Model:
    return Model().eval()


def norm(model: Model, layer: int) -> Any:
    """The part that the tests patch."""
    return model.layers[layer].norm


INPUT = torch.linspace(-1, 1, 8).view(2, 4)


def claim(path: str = "layers.0.norm", old: type = Norm, new: type = Shifted, owner: str = "a (a 1.0)") -> Claim:
    return Claim(owner=owner, patch=Patch(path=path, old=old, new=new, why="to be seen"))


def states(plan: PatchPlan) -> list[str]:
    return [entry.state for entry in plan.entries]


def test_a_patch_acts_and_comes_off_bit_for_bit(model: Model) -> None:
    before, keys = model(INPUT), list(model.state_dict())
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    plan = PatchPlan([claim(), claim("layers.1.norm")])
    plan.apply(model)
    assert states(plan) == ["applied", "applied"] and len(plan.applied) == 2
    assert not torch.equal(model(INPUT), before)
    assert list(model.state_dict()) == keys
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    plan.undo()
    assert states(plan) == ["undone", "undone"] and not plan.applied
    assert torch.equal(model(INPUT), before)
    assert [type(module) for module in model.modules()] == [type(module) for module in Model().modules()]


def test_what_a_patched_model_learnt_stays_after_undo(model: Model) -> None:
    plan = PatchPlan([claim()])
    plan.apply(model)
    model(INPUT).square().sum().backward()
    grad = norm(model, 0).weight.grad
    assert grad is not None and grad.abs().sum() > 0
    plan.undo()
    assert norm(model, 0).weight.grad is grad


def test_no_class_of_the_models_is_touched(model: Model) -> None:
    forward, members = Norm.forward, set(vars(Norm))
    other = Model().eval()
    before = other(INPUT)
    with patched(model, PatchPlan([claim()])):
        assert Norm.forward is forward and set(vars(Norm)) == members
        assert type(norm(other, 0)) is Norm
        assert torch.equal(other(INPUT), before)


def test_two_models_are_patched_and_undone_apart(model: Model) -> None:
    other = Model().eval()
    before = other(INPUT)
    first, second = PatchPlan([claim()]), PatchPlan([claim("layers.1.norm")])
    first.apply(model)
    second.apply(other)
    first.undo()
    assert type(norm(model, 0)) is Norm and type(norm(other, 1)) is Shifted
    second.undo()
    assert torch.equal(other(INPUT), before)


def test_undo_goes_backwards(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {id(module): path for path, module in model.named_modules()}
    swaps: list[tuple[str, str]] = []
    stock = nn.Module.__setattr__

    def spy(module: nn.Module, name: str, value: Any) -> None:
        if name == "__class__":
            swaps.append((paths[id(module)], value.__name__))
        stock(module, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", spy)
    with patched(model, PatchPlan([claim(), claim("layers.1.norm"), claim("layers.1", Block, FastBlock)])):
        assert swaps == [("layers.0.norm", "Shifted"), ("layers.1.norm", "Shifted"), ("layers.1", "FastBlock")]
        swaps.clear()
    assert swaps == [("layers.1", "Block"), ("layers.1.norm", "Norm"), ("layers.0.norm", "Norm")]


def test_skipped_applied_and_undone_are_printed(model: Model) -> None:
    model.layers[1].norm = nn.LayerNorm(4)
    plan = PatchPlan([claim("layers.7.norm"), claim("layers.1.norm"), claim()])
    assert str(plan).splitlines()[0] == "planned  layers.7.norm: Norm → Shifted (to be seen)"
    plan.apply(model)
    assert str(plan).splitlines() == [
        "skipped  layers.7.norm: Norm → Shifted (the model has no such module)",
        "skipped  layers.1.norm: Norm → Shifted (the module is a LayerNorm)",
        "applied  layers.0.norm: Norm → Shifted (to be seen)",
    ]
    assert plan.rows()[2] == ("layers.0.norm", "Norm → Shifted", "applied", "to be seen")
    plan.undo()
    assert [row[2] for row in plan.rows()] == ["skipped", "skipped", "undone"]
    assert str(PatchPlan([])) == "no patches"


def test_a_module_whose_forward_is_bound_is_skipped(model: Model) -> None:
    part = norm(model, 0)
    part.forward = part.forward  # as accelerate's hooks do
    plan = PatchPlan([claim()])
    plan.apply(model)
    assert plan.rows()[0][2:] == ("skipped", "something has bound a forward of its own to the module")


def test_a_shared_module_is_found_under_either_name(model: Model) -> None:
    model.layers[1] = model.layers[0]
    plan = PatchPlan([claim("layers.1.norm")])
    plan.apply(model)
    assert states(plan) == ["applied"] and type(norm(model, 0)) is Shifted


# Claims that meet.


def test_two_claims_on_one_module_are_refused_with_both_names() -> None:
    with pytest.raises(PatchError) as caught:
        PatchPlan([claim(owner="a (a 1.0)"), claim(owner="b (b 2.0)")])
    assert caught.value.what == "a (a 1.0) and b (b 2.0) both patch the module layers.0.norm"


def test_one_plugin_that_claims_a_module_twice_is_refused() -> None:
    with pytest.raises(PatchError, match=r"^a \(a 1.0\) patches the module layers.0.norm twice"):
        PatchPlan([claim(), claim()])


@pytest.mark.parametrize("above", ["layers.0", "layers"])
@pytest.mark.parametrize("turn", [1, -1])
def test_claims_on_a_module_and_its_ancestor_are_refused(above: str, turn: int) -> None:
    claims = [claim(owner="a (a 1.0)"), claim(above, Block, FastBlock, owner="b (b 2.0)")]
    with pytest.raises(PatchError, match=rf"both patch layers.0.norm and its ancestor {above}. Disable one"):
        PatchPlan(claims[::turn])


def test_one_plugin_may_patch_a_module_and_its_ancestor(model: Model) -> None:
    with patched(model, PatchPlan([claim("layers.0", Block, FastBlock), claim()])) as plan:
        assert states(plan) == ["applied", "applied"]


def test_a_sibling_with_a_like_name_is_no_ancestor() -> None:
    PatchPlan([claim("layers.1", Block, FastBlock, owner="a"), claim("layers.10.norm", owner="b")])


# What goes wrong.


def test_a_plan_is_applied_once(model: Model) -> None:
    plan = PatchPlan([claim()])
    plan.apply(model)
    with pytest.raises(PatchError, match=r"this plan is applied already"):
        plan.apply(Model())
    plan.undo()
    plan.undo()  # nothing left to do
    plan.apply(model)
    assert states(plan) == ["applied"]


def test_a_failure_half_way_undoes_everything(model: Model) -> None:
    before = model(INPUT)
    plan = PatchPlan([claim(), claim("layers.1.norm", new=Slotted)])
    with pytest.raises(PatchError, match=r"^a \(a 1.0\) cannot patch layers.1.norm: .*layout differs"):
        plan.apply(model)
    assert states(plan) == ["undone", "planned"] and not plan.applied
    assert type(norm(model, 0)) is Norm and torch.equal(model(INPUT), before)


def test_ctrl_c_half_way_undoes_everything(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_one, calls = PatchPlan._apply_one, []

    def interrupted(self: PatchPlan, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        apply_one(self, *args)

    monkeypatch.setattr(PatchPlan, "_apply_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PatchPlan([claim(), claim("layers.1.norm")]).apply(model)
    assert type(norm(model, 0)) is Norm


def test_a_patch_over_ours_is_left_and_told_and_can_be_undone_later(model: Model) -> None:
    before = model(INPUT)
    ours = PatchPlan([claim(), claim("layers.1.norm")])
    ours.apply(model)
    theirs = PatchPlan([claim(old=Shifted, new=Doubled, owner="b (b 2.0)")])
    theirs.apply(model)
    with pytest.raises(
        PatchError, match=r"patched over by something else: layers.0.norm is now a Doubled, not Shifted"
    ):
        ours.undo()
    assert type(norm(model, 0)) is Doubled and type(norm(model, 1)) is Norm
    assert states(ours) == ["applied", "undone"]
    theirs.undo()
    ours.undo()
    assert states(ours) == ["undone", "undone"] and torch.equal(model(INPUT), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, None])
def test_the_context_undoes_whatever_happens(error: type[BaseException] | None, model: Model) -> None:
    plan = PatchPlan([claim()])
    caught: AbstractContextManager[Any] = pytest.raises(error) if error else nullcontext()
    with caught, patched(model, plan) as given:
        assert given is plan and type(norm(model, 0)) is Shifted
        if error:
            raise error
    assert type(norm(model, 0)) is Norm and states(plan) == ["undone"]


# Copies.


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES = [copy.deepcopy, pickled]


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("plan_first", [True, False])
def test_a_copied_model_takes_its_plan_along(duplicate: Any, plan_first: bool, model: Model) -> None:
    before = model(INPUT)
    plan = PatchPlan([claim(), claim("layers.7.norm")])
    plan.apply(model)
    if plan_first:  # the plan is then met, and copied, before the modules that it has patched
        members = dict(vars(model))
        vars(model).clear()
        vars(model).update({"plan": plan, **{name: value for name, value in members.items() if name != "plan"}})
    model.plan = plan
    assert (next(iter(vars(model))) == "plan") == plan_first
    twin = duplicate(model)
    assert torch.equal(twin(INPUT), model(INPUT)) and not torch.equal(twin(INPUT), before)
    assert twin.plan.rows() == plan.rows()
    twin.plan.undo()
    assert torch.equal(twin(INPUT), before) and states(twin.plan) == ["undone", "skipped"]
    # The original's patches are still on, and its own to undo.
    assert type(norm(model, 0)) is Shifted and states(plan) == ["applied", "skipped"]
    plan.undo()
    assert torch.equal(model(INPUT), before)


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_plan_copied_alone_does_not_touch_the_model(duplicate: Any, model: Model) -> None:
    plan = PatchPlan([claim()])
    plan.apply(model)
    twin = duplicate(plan)
    assert str(twin) == str(plan)
    twin.undo()
    assert type(norm(model, 0)) is Shifted and states(plan) == ["applied"] and states(twin) == ["undone"]


# A real family's patches on a model of real shape.


@pytest.fixture
def loaded(tiny_bert_st: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    model = FastSentenceTransformer.from_pretrained(str(tiny_bert_st), device="cpu", packed=False)
    assert model.burnish is not None and model.burnish.plan.applied
    yield model


TEXTS = ["a short text", "and one that is a little longer than the first"]


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copied_models_patches_are_its_own(duplicate: Any, loaded: Any, tiny_bert_st: Path) -> None:
    stock = FastSentenceTransformer.from_pretrained(str(tiny_bert_st), device="cpu", for_inference=True)
    keys = list(stock.state_dict())
    twin = duplicate(loaded)
    assert list(loaded.state_dict()) == list(twin.state_dict()) == keys
    twin.undo_patches()
    assert not twin.burnish.plan.applied and loaded.burnish.plan.applied
    assert torch.equal(twin.encode(TEXTS, convert_to_tensor=True), stock.encode(TEXTS, convert_to_tensor=True))
    kinds = [type(module) for module in stock[0].modules()]
    assert [type(module) for module in twin[0].modules()] == kinds
    assert [type(module) for module in loaded[0].modules()] != kinds
