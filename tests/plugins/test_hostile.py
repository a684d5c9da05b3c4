"""Every bad neighbour at once: the real MiniLM trains as ever, and each of them is told by name, version and fault."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

NAMES = {"ahead", "garbage", "raises", "slow", "usurper", "watcher"}


@pytest.fixture(scope="module")
def report(hostile: Any, minilm: Path) -> dict[str, Any]:
    """The journey of the real MiniLM among them."""
    found: dict[str, Any] = hostile.journey(minilm, "burnish_usurper")
    return found


def label(name: str) -> str:
    return f"{name} (burnish-{name} 6.6.6)"


def warned(report: dict[str, Any], name: str) -> str:
    """The one warning about that plugin while the model was loaded and trained."""
    (message,) = {message for message in report["warnings"] if label(name) in message}
    return str(message)


def test_all_are_installed_and_none_is_imported_to_be_listed(report: dict[str, Any]) -> None:
    assert report["listed"]["labels"] == {name: label(name) for name in NAMES}
    assert report["listed"]["loaded"] == []
    states = report["listed"]["states"]
    assert {name for name, state in states.items() if state == "on"} == NAMES - {"ahead"}
    assert states["ahead"] == ("refused is written for contract 99, this Burnish speaks 1: install versions that match")


def test_minilm_trains_as_ever(report: dict[str, Any]) -> None:
    trained = report["trained"]
    assert trained["family"] == "bert of burnish:bert: built in"
    assert trained["backend"] == "reference of burnish:reference"
    assert trained["kernel"] == "reference of burnish:reference"
    assert trained["rows"] == [1, 4] and trained["apart"] < 1e-5 < trained["size"]
    assert trained["adapters"] == 2 * trained["moved"] > 0
    assert 0 < trained["loss"] < 10


def test_a_plugin_that_claims_bert_is_passed_over_unread(report: dict[str, Any]) -> None:
    passed = report["trained"]["passed over"]
    assert passed == {"usurper": "also claims bert; to use it, name it: plugins=['usurper']"}
    assert report["resolved"]["bert"] == ["bert", "burnish:bert", False]
    assert report["checked"]["health"]["usurper"] == "healthy"


def test_a_plugin_that_raises_on_import_is_left_out(report: dict[str, Any]) -> None:
    message = warned(report, "raises")
    assert message.startswith(f"plugin {label('raises')} is left out: ImportError: cannot import name 'no_such_name'")
    assert "burnish_raises.py" in message and "line 3" in message


def test_a_plugin_that_answers_garbage_is_left_out(report: dict[str, Any]) -> None:
    reason = "burnish_register_backends returned a str among its BackendSpecs"
    assert warned(report, "garbage") == f"plugin {label('garbage')} is left out: {reason}"


def test_a_slow_plugin_is_told(report: dict[str, Any]) -> None:
    assert warned(report, "slow").startswith(f"plugin {label('slow')} took 2.")
    assert warned(report, "slow").endswith("s to import; if you do not need it: burnish plugins disable slow")


def test_an_observer_that_raises_does_not_end_the_run(report: dict[str, Any]) -> None:
    message = warned(report, "watcher")
    assert message.startswith(f"plugin {label('watcher')} is left out: OSError: nobody listens on port 4317. File")


def test_nobody_else_is_warned_of(report: dict[str, Any]) -> None:
    assert {name for name in NAMES for message in report["warnings"] if label(name) in message} == {
        "raises",
        "garbage",
        "slow",
        "watcher",
    }


def test_what_needs_a_broken_one_gets_its_error(report: dict[str, Any]) -> None:
    errors = report["checked"]["errors"]
    assert errors.keys() == {
        "model_type.raises",
        "model_type.garbage",
        "model_type.ahead",
        "backend.garbage",
        "backend.ahead",
    }
    for claim, error in errors.items():
        name = claim.split(".")[1]
        assert label(name) in error and f"burnish plugins disable {name}" in error and "\n" not in error
    assert "ImportError: cannot import name 'no_such_name'" in errors["model_type.raises"]
    assert "is written for contract 99" in errors["model_type.ahead"]


def test_the_check_of_all_plugins_shows_each(report: dict[str, Any]) -> None:
    health = report["checked"]["health"]
    assert report["checked"]["broken"] is True
    assert health["raises"].startswith("broken: ImportError")
    assert health["garbage"].startswith("broken: burnish_register_backends returned a str among its BackendSpecs")
    assert health["watcher"].startswith("broken: OSError: nobody listens")
    assert health["ahead"].startswith("refused: is written for contract 99")
    assert health["slow"] == health["bert"] == health["reference"] == "healthy"


def test_this_process_has_met_none_of_them() -> None:
    assert not [name for name in sys.modules if name in {f"burnish_{bad}" for bad in NAMES}]
