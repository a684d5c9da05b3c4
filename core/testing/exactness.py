"""Checks that a prepared model computes what the stock one computes: outputs and every gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..choices import FamilyChoice
from ..contracts import Machine
from ..errors import ModelError
from ..machine import describe
from ..patching import PatchPlan, patched
from ..registry import registry
from ..selection import choose_family
from .subject import GPU, NotApplicable, Subject, backward, compare_gradients, compare_outputs, each, embed, unchanged
from .tokenizer import words


def stock_exactness(subject: Subject) -> str:
    """Embeddings and every parameter's gradient equal those of unpatched transformers, in float64 and in float32."""

    def error(dtype: torch.dtype) -> float:
        ours, theirs = subject.ours().to(dtype), subject.plain().to(dtype)
        tolerance = subject.tolerance if dtype == torch.float64 else 10 * subject.tolerance
        found, gradients = backward(ours, subject.texts)
        expected, reference = backward(theirs, subject.texts)
        apart = compare_outputs(found, expected, tolerance)
        return max(apart, compare_gradients(gradients, reference, tolerance))

    assert not torch.equal(*embed(subject.ours(), subject.texts[:2]).detach()), "two texts have one embedding"
    kinds = {"float64": torch.float64, "float32": torch.float32}
    return ", ".join(
        f"{name} {error(kind):.0e}" for name, kind in kinds.items() if kind in (subject.exact, torch.float32)
    )


def patch_exactness(subject: Subject) -> str:
    """The patches of this machine, and those that a GPU would get, equal the stock modules on padded input."""
    choice = choose_family(registry(subject.plugins), subject.config)
    machines = {"cpu": describe("cpu"), "cuda": describe("cuda") if subject.device == "cuda" else GPU}
    rows = {name: _patched(subject, choice, machines[name]) for name in subject.devices}
    if not any(count for count, _ in rows.values()):
        raise NotApplicable("the family has no patches")
    return ", ".join(f"{count} for {name} {error:.0e}" for name, (count, error) in rows.items() if count)


def _patched(subject: Subject, choice: FamilyChoice, machine: Machine) -> tuple[int, float]:
    """(how many patches there are for this machine, the largest error with them)."""
    model = subject.exactly(subject.plain())
    transformer = model[0].model
    plan = PatchPlan(choice.claims(transformer, machine))
    if not plan.entries:
        return 0, 0.0
    expected, reference = backward(model, subject.texts)
    keys = list(model.state_dict())
    with patched(transformer, plan):
        refused = [entry.row() for entry in plan.entries if entry.state != "applied"]
        assert not refused, f"a patch is not applied: {refused[0]}"
        found, gradients = backward(model, subject.texts)
        assert list(model.state_dict()) == keys, "the patches change the state dict's keys"
    again, _ = backward(model, subject.texts)
    assert unchanged(again, expected), "the model is not what it was once the patches are undone"
    apart = compare_outputs(found, expected, subject.tolerance)
    return len(plan.entries), max(apart, compare_gradients(gradients, reference, subject.tolerance))


def packed_exactness(subject: Subject) -> str:
    """Packed input equals padded input for texts of any lengths: none, one word, the longest, one text, many."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    if subject.family.packing is None:
        raise NotApplicable("the family takes padded input only")
    ours, theirs = subject.exactly(subject.ours(packed=True)), subject.exactly(subject.plain())
    longest, tolerance = subject.longest, subject.tolerance
    worst = [0.0]

    def examine(lengths: list[int], *, gradients: bool) -> None:
        texts = [words(length, seed) for seed, length in enumerate(lengths)]
        features = ours.preprocess(texts)
        tokens = int(theirs.preprocess(texts)["attention_mask"].sum())
        assert features["input_ids"].shape == (1, tokens), "the batch holds padding"
        if gradients:
            (found, mine), (expected, stock) = backward(ours, texts), backward(theirs, texts)
            worst.append(compare_gradients(mine, stock, tolerance))
        else:
            with torch.no_grad():
                found, expected = embed(ours, texts), embed(theirs, texts)
        worst.append(compare_outputs(found, expected, tolerance))

    for lengths in ([1], [0], [longest + 9], [longest - 2, longest - 1, longest], [1] * 12, [0, longest, 1, 5, 0, 23]):
        examine(lengths, gradients=True)

    @settings(
        max_examples=subject.examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.integers(0, longest + 2), min_size=1, max_size=10))
    def random(lengths: list[int]) -> None:
        examine(lengths, gradients=False)

    random()
    return f"{len(worst) - 1} comparisons, {max(worst):.0e}"


def causal_order(subject: Subject) -> str:
    """A later word moves an earlier token just where the family does not call the architecture causal."""
    if subject.family.packing is None:
        raise NotApplicable("the family takes padded input only")
    model = subject.plain()
    ids = model.preprocess([words(9)])["input_ids"].to(subject.device)
    other = ids.clone()
    other[0, -2] = ids[0, 2]
    with torch.no_grad():
        first, second = (model[0].model(input_ids=tokens).last_hidden_state[0] for tokens in (ids, other))
    moved = float((first - second)[:-2].abs().max())
    assert float((first - second)[-2].abs().max()) > 1e-3, "another word changes nothing: nothing would be proved"
    causal = moved < 1e-6
    claimed = subject.family.packing.causal
    assert causal == claimed, (
        f"a later word moves an earlier token by {moved:.0e}, and the family says causal={claimed}"
    )
    return "causal" if causal else "both ways"


def padding_side(subject: Subject) -> str:
    """A family read at the last token gives the same embeddings whichever side the padding is on."""
    if subject.pooling.mode != "lasttoken":
        raise NotApplicable(f"the pooling is {subject.pooling.mode}")
    found = []
    for side in ("right", "left"):
        model = subject.exactly(subject.ours(packed=False))
        model.tokenizer.padding_side = side
        ids = model.preprocess(subject.texts)["attention_mask"]
        assert (ids[:, 0] == 0).any() == (side == "left"), f"the padding is not on the {side}"
        found.append(backward(model, subject.texts))
    apart = compare_outputs(found[1][0], found[0][0], subject.tolerance)
    return f"{max(apart, compare_gradients(found[1][1], found[0][1], subject.tolerance)):.0e}"


def checkpointing_exactness(subject: Subject) -> str:
    """Gradients under gradient checkpointing equal those without, and the layers are really computed again."""
    from torch.utils.flop_counter import FlopCounterMode

    def run(**options: Any) -> tuple[int, dict[str, torch.Tensor]]:
        model = subject.exactly(subject.ours(**options))
        with FlopCounterMode(display=False) as counter:
            _, gradients = backward(model, subject.texts)
        return int(counter.get_total_flops()), gradients

    try:
        subject.ours(use_gradient_checkpointing=True)
    except ModelError as refusal:
        raise NotApplicable(f"refused: {refusal.what}") from refusal

    def error(packed: bool) -> float:
        (kept, reference), (again, gradients) = run(packed=packed), run(packed=packed, use_gradient_checkpointing=True)
        assert again > 1.15 * kept, f"nothing is computed again: {again / kept:.2f} times the operations"
        return compare_gradients(gradients, reference, subject.tolerance)

    layouts = (False,) if subject.family.packing is None else (False, True)
    return f"{each(layouts, error):.0e}"


def undoing(subject: Subject) -> str:
    """Patched, then unpatched, a model is bit-equal to one that never was."""
    ours, theirs = subject.ours(), subject.plain()
    backward(ours, subject.texts)
    applied = len(ours.burnish.plan.applied)
    ours.undo_patches()
    kinds = {name: type(module) for name, module in theirs.named_modules()}
    changed = [name for name, module in ours.named_modules() if name and type(module) is not kinds.get(name)]
    assert not changed, f"{changed[0]} is still a {type(dict(ours.named_modules())[changed[0]]).__name__}"
    found, gradients = backward(ours, subject.texts)
    expected, reference = backward(theirs, subject.texts)
    assert unchanged(found, expected), "the embeddings differ in some bit"
    odd = [name for name, value in reference.items() if not unchanged(gradients[name], value)]
    assert not odd, f"the gradient of {odd[0]} differs in some bit"
    return f"{applied} patches undone, bit-equal"


def precision(subject: Subject) -> str:
    """In every dtype that the policy allows all is finite and as near to float32 as the stock model; others raise."""
    policy = subject.family.precision
    exact, reference = backward(subject.plain(), subject.texts)
    said = []
    for name in ("float32", "bfloat16", "float16"):
        if name in policy.refused:
            try:
                subject.ours(dtype=name)
            except ModelError as error:
                assert policy.refused[name] in str(error), "the refusal does not give the policy's reason"
                said.append(f"{name} refused")
                continue
            raise AssertionError(f"{name} is refused by the policy, and loads")
        dtype = getattr(torch, name)
        ours, theirs = subject.ours(dtype=name), subject.plain(dtype=dtype)
        (found, mine), (plain, stock) = backward(ours, subject.texts), backward(theirs, subject.texts)
        assert found.dtype == dtype and all(value.dtype == dtype for value in mine.values() if name != "float32")
        assert torch.isfinite(found).all() and all(torch.isfinite(value).all() for value in mine.values()), name
        if name == "float32":
            said.append(f"float32 {compare_gradients(mine, reference, 10 * subject.tolerance):.0e}")
            continue
        ratio = _error(found, exact) / _error(plain, exact)
        slope = _worst(mine, reference) / _worst(stock, reference)
        assert ratio <= 2.5 and slope <= 2.5, (
            f"{name}: {ratio:.1f} (outputs), {slope:.1f} (gradients) times stock's error"
        )
        said.append(f"{name} {max(ratio, slope):.2f} x stock's error")
    return ", ".join(said)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm())


def _worst(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The error of all gradients together."""
    return math.hypot(*(_error(found[name], value) for name, value in exact.items() if name in found))
