"""Patches on the instances of one model: claimed first, checked against each other, applied, and undone bit for bit.

A patch swaps one module's class (`module.__class__`), so parameters, buffers, hooks and state-dict keys stay the very
objects they were, a transformers class is never touched, and two models in one process do not see each other's patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .contracts import Patch
from .errors import PatchError

if TYPE_CHECKING:
    from torch import nn

State = Literal["planned", "applied", "skipped", "undone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A patch and the plugin that hands it in."""

    owner: str
    patch: Patch


@dataclass(slots=True, kw_only=True)
class Entry:
    """One line of a plan: the claim, what became of it, and why where it was skipped."""

    claim: Claim
    state: State = "planned"
    reason: str = ""

    def row(self) -> tuple[str, str, str, str]:
        """(module, patch, state, reason) for tables."""
        patch = self.claim.patch
        classes = f"{patch.old.__name__} → {patch.new.__qualname__.rpartition('.')[2]}"
        return (patch.path or "the model itself", classes, self.state, self.reason or patch.why)


@dataclass(slots=True)
class PatchPlan:
    """Every patch of one model, in the order in which it is applied; printable at any time.

    A plan copied or pickled with its model belongs to the copy, and undoes the copy's patches.

    Raises:
        PatchError: When made, if two claims meet: one module twice, or a module and its ancestor by two plugins.
    """

    claims: Sequence[Claim]
    entries: list[Entry] = field(init=False)
    _applied: list[tuple[nn.Module, Entry]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.claims = tuple(self.claims)
        _refuse_meeting(self.claims)
        self.entries = [Entry(claim=claim) for claim in self.claims]

    @property
    def applied(self) -> tuple[Entry, ...]:
        """The entries in force now."""
        return tuple(entry for entry in self.entries if entry.state == "applied")

    def apply(self, model: nn.Module) -> None:
        """Apply every patch whose module is there with the expected class; the rest are skipped, with the reason.

        Raises:
            PatchError: If the plan is applied already. Whatever goes wrong half-way is undone before it is raised.
        """
        if self._applied:
            raise PatchError("this plan is applied already", fix="Undo it first, or make a plan for each model")
        # A module that stands in two places (shared layers) is found under either name.
        modules = dict(model.named_modules(remove_duplicate=False))
        try:
            for entry in self.entries:
                self._apply_one(modules.get(entry.claim.patch.path), entry)
        except BaseException:
            self.undo()
            raise

    def _apply_one(self, module: nn.Module | None, entry: Entry) -> None:
        patch = entry.claim.patch
        if module is None:
            entry.state, entry.reason = "skipped", "the model has no such module"
        elif type(module) is not patch.old:
            entry.state, entry.reason = "skipped", f"the module is a {type(module).__name__}"
        elif "forward" in vars(module):
            # accelerate's hooks do this: the instance's forward would go on being called, and the patch do nothing.
            entry.state, entry.reason = "skipped", "something has bound a forward of its own to the module"
        else:
            try:
                module.__class__ = patch.new
            except TypeError as error:
                what = f"{entry.claim.owner} cannot patch {patch.path}: {error}"
                raise PatchError(what, fix="Disable the plugin") from error
            entry.state, entry.reason = "applied", ""
            self._applied.append((module, entry))

    def undo(self) -> None:
        """Take every applied patch back, the last one first.

        Raises:
            PatchError: If something else has patched a module over this plan's patch. That module is left as it is,
                and can be undone once the later patch is; all others are restored.
        """
        foreign: list[tuple[nn.Module, Entry]] = []
        while self._applied:
            module, entry = self._applied.pop()
            if type(module) is entry.claim.patch.new:
                module.__class__ = entry.claim.patch.old
                entry.state = "undone"
            else:
                foreign.insert(0, (module, entry))
        if foreign:
            self._applied = foreign
            patches = [(entry.claim.patch, type(module).__name__) for module, entry in foreign]
            found = "; ".join(f"{patch.path} is now a {name}, not {patch.new.__name__}" for patch, name in patches)
            raise PatchError(f"patched over by something else: {found}", fix="Undo the later patch first")

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(module, patch, state, reason) of every entry."""
        return [entry.row() for entry in self.entries]

    def __str__(self) -> str:
        if not self.entries:
            return "no patches"
        return "\n".join(f"{state:8} {path}: {patch} ({reason})" for path, patch, state, reason in self.rows())


def _refuse_meeting(claims: Iterable[Claim]) -> None:
    taken: dict[str, Claim] = {}
    for claim in claims:
        path = claim.patch.path
        if path in taken:
            raise _meeting(taken[path], claim, f"the module {path}" if path else "the model itself")
        taken[path] = claim
    for path, claim in taken.items():
        parts = path.split(".")
        for ancestor in ("", *(".".join(parts[:depth]) for depth in range(1, len(parts)))):
            if ancestor in taken and taken[ancestor].owner != claim.owner:
                raise _meeting(taken[ancestor], claim, f"{path} and its ancestor {ancestor or '(the model itself)'}")


def _meeting(first: Claim, second: Claim, what: str) -> PatchError:
    if first.owner == second.owner:
        return PatchError(f"{first.owner} patches {what} twice", fix="Mend or disable it")
    fix = "Disable one of them, or leave one out of plugins"
    return PatchError(f"{first.owner} and {second.owner} both patch {what}", fix=fix)


@contextmanager
def patched(model: nn.Module, plan: PatchPlan) -> Iterator[PatchPlan]:
    """Apply `plan` to `model` for the length of a block; undone at its end, also after an exception."""
    plan.apply(model)
    try:
        yield plan
    finally:
        plan.undo()
