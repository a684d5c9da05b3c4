"""Every bad neighbour at once: the real MiniLM trains as ever, and each of them is told by name, version and fault."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

NAMES = {"ahead", "crooked", "garbage", "patcher", "raises", "sampler", "slow", "usurper", "watcher"}


@pytest.fixture(scope="module")
def report(hostile: Any, minilm: Path) -> dict[str, Any]:
    """The journey of the real MiniLM among them."""
    found: dict[str, Any] = hostile.journey(minilm, "burnish_usurper", "met")
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
    assert passed == {
        name: f"also claims bert; to use it, name it: plugins=[{name!r}]" for name in ("patcher", "usurper")
    }
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


def test_a_sample_that_raises_is_told(report: dict[str, Any]) -> None:
    error, code = report["met"]["errors"]["a sample that raises"]
    start = (
        f"plugin {label('sampler')}: the tiny sample of family sampler_raises failed: FileNotFoundError: no such file"
    )
    assert error.startswith(start) and 'raise FileNotFoundError("no such file: samples.json")' in error
    assert code == 5


def test_a_sample_of_another_model_type_is_told(report: dict[str, Any]) -> None:
    error, code = report["met"]["errors"]["a sample of another type"]
    what = "ValueError: its model type is 'bert', and the family takes sampler_other. Mend or disable sampler"
    assert error == f"plugin {label('sampler')}: the tiny sample of family sampler_other failed: {what}"
    assert code == 5


def test_a_patch_over_a_built_in_patch_is_refused(report: dict[str, Any]) -> None:
    error = report["met"]["errors"]["a patch over a built-in's"]
    assert error == [f"{label('patcher')} patches the module pooler twice. Mend or disable it", 5]


def test_a_patch_that_would_change_what_a_config_says_is_refused(report: dict[str, Any]) -> None:
    error, code = report["met"]["errors"]["a patch of the model's name"]
    what = "ValueError: Patch: the transformer's own class must keep its name: set MyElectra.__name__. Mend or disable"
    assert error.startswith(f"plugin {label('patcher')}: the patch rule of family patcher failed: {what} patcher. File")
    assert code == 5


def test_a_kernel_that_returns_another_shape_is_named(report: dict[str, Any]) -> None:
    error, code = report["met"]["errors"]["a kernel's wrong shape"]
    start = f"kernel crooked of {label('crooked')}: packed_attention returned the shape (12, "
    assert error.startswith(start) and error.endswith(", 12, 32). Mend or disable it") and code == 5


def test_a_step_that_returns_no_loss_is_named(report: dict[str, Any]) -> None:
    start = f"backend crooked of {label('crooked')}: its step returned a float, not the loss, detached, as a tensor"
    error, code = report["met"]["errors"]["a step's wrong loss"]
    assert error.startswith(start) and error.endswith("Mend it, or choose another backend") and code == 5


def test_after_all_that_the_model_is_what_it_was(report: dict[str, Any]) -> None:
    met = report["met"]
    assert len(met["errors"]) == 6 and not any("\n" in error for error, _ in met["errors"].values())
    assert met["finite"] and met["moved"] == 0 and 0 < met["loss"] < 10


def test_this_process_has_met_none_of_them() -> None:
    assert not [name for name in sys.modules if name in {f"burnish_{bad}" for bad in NAMES}]
