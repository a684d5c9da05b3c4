"""The contract's acceptance test: a small distribution of somebody else's does everything that a user sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def report(electra: Any, tiny_electra: Path) -> dict[str, Any]:
    """The journey of an ELECTRA with the plugin installed as a wheel, from a sdist and editable."""
    found: dict[str, Any] = electra.journey(tiny_electra, "burnish_electra")
    return found | {"site": electra.folder}


def test_it_is_small() -> None:
    source = Path(__file__).parent / "burnish-electra"
    lines = [
        line for name in ("burnish_electra.py", "pyproject.toml") for line in (source / name).read_text().splitlines()
    ]
    assert len([line for line in lines if line.strip()]) <= 35


def test_its_claims_are_read_without_importing_it(report: dict[str, Any]) -> None:
    assert report["listed"] == {
        "labels": {"electra": "electra (burnish-electra 0.1.0)"},
        "states": {"electra": "on"},
        "claims": {"electra": ["contract.1", "model_type.electra"]},
        "loaded": [],
    }


def test_an_electra_config_and_no_other_resolves_to_it(report: dict[str, Any]) -> None:
    resolved = report["resolved"]
    assert resolved["bert"] == ["bert", "burnish:bert", False]
    assert resolved["mpnet"][2] is False
    assert resolved["electra"] == ["electra", "burnish-electra:electra", True]
    assert resolved["without plugins"] == "generic"


def test_an_editable_install_runs_the_file_that_its_author_edits(
    report: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    installed = Path(report["resolved"]["file"]).parent == report["site"]
    assert installed == ("editable" not in request.node.callspec.id)


def test_packed_input_equals_padded_input(report: dict[str, Any]) -> None:
    trained = report["trained"]
    assert trained["rows"] == [1, 4]
    assert trained["apart"] < 1e-5 < 0.1 < trained["size"]


def test_an_electra_trains(report: dict[str, Any]) -> None:
    trained = report["trained"]
    assert trained["family"] == "electra of burnish-electra:electra: the only plugin that claims it"
    assert trained["pooling"].startswith("mean, normalised (default of family electra")
    # Query, key, value and three dense layers in each of two layers, and the projection of the embeddings: A and B of
    # each; in the first step only B moves.
    assert (trained["adapters"], trained["moved"]) == (26, 13)
    assert 0 < trained["loss"] < 10
    assert report["warnings"] == []
    assert report["checked"]["health"]["electra"] == "healthy" and report["checked"]["errors"] == {}
