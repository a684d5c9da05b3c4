"""Checks that a prepared model leaves everything else alone: other models, transformers' classes, global tables."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..contracts import FamilySpec
from ..registry import Failure, registry
from .subject import NotApplicable, Subject, backward, embed, unchanged
from .training import adapted


def neighbours(subject: Subject) -> str:
    """A model of another family, and a stock one of the same, are alive beside it and do not change by a bit."""
    other = _companion(subject)
    stock = subject.plain()
    before = embed(other.ours(), other.texts).detach(), embed(stock, subject.texts).detach()
    alive = other.ours()
    model = subject.ours()
    backward(model, subject.texts)
    assert unchanged(embed(alive, other.texts), before[0]), f"a {other.config.model_type} model beside it changed"
    assert unchanged(embed(stock, subject.texts), before[1]), "a stock model of the same architecture changed"
    own = embed(model, subject.texts).detach()
    alive.undo_patches()
    assert unchanged(embed(model, subject.texts), own), f"undoing a {other.config.model_type} model changed this one"
    model.undo_patches()
    assert unchanged(embed(stock, subject.texts), before[1]), "undoing changed a stock model"
    return f"beside {other.config.model_type} and a stock model"


def _companion(subject: Subject) -> Subject:
    """A subject of another family: the first of Burnish's own that has a sample config."""
    known = registry(())
    for plugin in known.claimants("model_type"):
        answer = known.ask(plugin, "burnish_register_families", FamilySpec)
        specs = () if isinstance(answer, Failure) else answer
        for spec in specs:
            if spec.sample is not None and subject.config.model_type not in spec.model_types:
                folder = subject.folder / "companion"
                folder.mkdir(exist_ok=True)
                return Subject(config=spec.sample("tiny"), folder=folder, plugins=(), device=subject.device)
    raise NotApplicable("no other family is installed")


def globals_untouched(subject: Subject) -> str:
    """Loaded, adapted, trained and let go, it leaves no class, function or table of the libraries changed."""
    backward(subject.plain(), subject.texts)  # what transformers itself sets up at first use
    before = _tables(subject)
    for model in (subject.ours(), adapted(subject)):
        backward(model, subject.texts)
        model.undo_patches()
        del model
    gc.collect()
    after = _tables(subject)
    changed = [name for name, value in before.items() if after.get(name) is not value]
    assert not changed, f"{changed[0]} is not what it was ({len(changed)} things in all)"
    # An attention for packed input is made known to transformers once a process, under a name of Burnish's own.
    new = [name for name in after.keys() - before.keys() if "burnish_" not in name]
    assert not new, f"{sorted(new)[0]} is new ({len(new)} things in all)"
    return f"{len(before)} things as they were"


def _tables(subject: Subject) -> dict[str, Any]:
    """Everything of the libraries that a patch could have been tempted to change, by name."""
    from transformers import AttentionInterface
    from transformers.activations import ACT2FN
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    found: dict[str, Any] = {}
    classes: set[type] = {nn.Module, nn.Linear, nn.LayerNorm, nn.Embedding, torch.Tensor}
    transformer = subject.plain()[0].model
    modules = {sys.modules[type(module).__module__] for module in transformer.modules()}
    for module in {*modules, torch.nn.functional}:
        for name, value in vars(module).items():
            found[f"{module.__name__}.{name}"] = value
            if isinstance(value, type):
                classes.add(value)
    for kind in classes:
        for name, value in vars(kind).items():
            # Caches that Python and the libraries fill as they go.
            if not name.startswith(("__", "_abc_", "_compiled")) and not name.endswith("_cached_value"):
                found[f"{kind.__module__}.{kind.__qualname__}.{name}"] = value
    tables: dict[str, Any] = {
        "attention": AttentionInterface._global_mapping,
        "mask": ALL_MASK_ATTENTION_FUNCTIONS._global_mapping,
        "activation": ACT2FN,
    }
    for table, entries in tables.items():
        found |= {f"{table} {name}": entries.get(name) for name in dict.keys(entries)}
    return found


def files_untouched(subject: Subject) -> str:
    """Loading and training write nothing into the repository."""

    def state(folder: Path) -> dict[str, tuple[int, int]]:
        return {
            str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")
        }

    before = state(subject.repository)
    backward(subject.ours(), subject.texts)
    assert state(subject.repository) == before, "the repository's files changed"
    return f"{len(before)} files"
