"""Any built-in family can be taken out: its entry point is removed from the metadata, and the rest goes on."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import pytest

from burnish.core import discovery
from burnish.core.contracts import FamilySpec
from burnish.core.registry import Failure, forget, registry
from burnish.core.selection import choose_family
from burnish.core.testing.backends import model_types
from burnish.core.testing.subject import Subject, backward

FAMILIES = {
    "bert": "bert",
    "distilbert": "distilbert",
    "gemma3_text": "gemma",
    "modernbert": "modernbert",
    "mpnet": "mpnet",
    "qwen3": "qwen3",
    "xlm-roberta": "xlm_roberta",
}


def test_these_are_all_there_are() -> None:
    assert sorted(FAMILIES) == model_types()


class Without(Distribution):
    """A distribution whose metadata lack every line that names one module."""

    def __init__(self, whole: Distribution, module: str) -> None:
        self.whole, self.module = whole, module

    def read_text(self, filename: str) -> str | None:
        text = self.whole.read_text(filename)
        if text is None or filename != "entry_points.txt":
            return text
        return "\n".join(line for line in text.splitlines() if not line.endswith(f"= {self.module}"))

    def locate_file(self, path: Any) -> Any:
        return self.whole.locate_file(path)


@pytest.fixture(params=FAMILIES)
def removed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The model type whose family is not installed."""
    module = f"burnish.families.{FAMILIES[request.param]}"
    monkeypatch.setattr(discovery, "distributions", lambda: [Without(whole, module) for whole in distributions()])
    forget()
    yield request.param
    forget()


def sample(model_type: str) -> Any:
    return import_module(f"burnish.families.{FAMILIES[model_type]}").sample("tiny")


def test_the_others_are_chosen_as_ever(removed: str) -> None:
    names = {plugin.name for plugin in registry().plugins}
    assert FAMILIES[removed] not in names and names > set(FAMILIES.values()) - {FAMILIES[removed]}
    for model_type, name in FAMILIES.items():
        chosen = choose_family(registry(), sample(model_type)).family.name
        assert chosen == ("generic" if model_type == removed else name)
    for plugin in registry().claimants("model_type"):
        assert not isinstance(registry().ask(plugin, "burnish_register_families", FamilySpec), Failure)


def test_its_models_still_load_as_generic_and_the_others_train(removed: str, tmp_path: Path) -> None:
    other = "bert" if removed != "bert" else "mpnet"
    for model_type, packed in ((removed, False), (other, True)):
        folder = tmp_path / model_type
        folder.mkdir()
        subject = Subject(config=sample(model_type), folder=folder)
        model = subject.ours()
        assert bool(model.burnish.packed) == packed
        _, gradients = backward(model, subject.texts)
        assert any(float(value.abs().max()) > 0 for value in gradients.values())
