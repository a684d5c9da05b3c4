"""Plugins are imported when they are needed and not before; a broken one is set aside by name, and the others go on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.core import registry as registry_module
from burnish.core.contracts import BackendSpec, CommandSpec, ExporterSpec, FamilySpec, KernelSpec
from burnish.core.discovery import Plugin
from burnish.core.errors import BurnishError, PluginError
from burnish.core.registry import Failure, PluginWarning, Registry, blame, forget, registry
from burnish.core.settings import Policy

Install = Callable[..., str]
FAMILIES = "burnish_register_families"

ZETA = """
@hookimpl
def burnish_register_families():
    return [FamilySpec(name="zeta", model_types=("zeta",), build=lambda config: Family(name="zeta"))]
"""


def the(name: str) -> Plugin:
    """The one plugin of that name, as the registry has it."""
    (plugin,) = registry().named(name)
    return plugin


def failure_of(name: str, hook: str = FAMILIES, kind: Any = FamilySpec) -> Failure:
    failure = registry().ask(the(name), hook, kind)
    assert isinstance(failure, Failure)
    return failure


def test_a_plugin_is_imported_when_something_it_claims_is_asked_for(install: Install) -> None:
    module = install("zeta", "model_type.zeta", code=ZETA)
    assert registry().claimants("model_type", "bert") and not registry().claimants("model_type", "eta")
    (plugin,) = registry().claimants("model_type", "zeta")
    assert module not in sys.modules
    (spec,) = registry().ask(plugin, FAMILIES, FamilySpec)  # type: ignore[misc]
    assert module in sys.modules
    assert spec.name == "zeta"


def test_a_plugin_is_imported_once(install: Install) -> None:
    install("zeta", "model_type.zeta", code=ZETA)
    sys.modules.pop("zeta", None)
    assert registry().load(the("zeta")) is None
    first = sys.modules["zeta"]
    assert registry().load(the("zeta")) is None
    assert sys.modules["zeta"] is first


def test_one_registry_for_each_policy(monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    install("zeta", "model_type.zeta", code=ZETA)
    assert registry() is registry() is registry(None)
    assert registry([]) is not registry() and registry([]) is registry(())
    assert registry(["zeta"]).policy == Policy(named=("zeta",))
    before = registry()
    monkeypatch.setenv("BURNISH_PLUGINS", "bert")
    assert registry() is not before and registry().policy.allowed == frozenset({"bert"})
    forget()
    monkeypatch.delenv("BURNISH_PLUGINS")
    assert registry() is not before


# What a stranger's code may do wrong, and what is said of it.
FAULTY = {
    "raises": ("raise RuntimeError('no such\\n  luck')", "RuntimeError: no such luck", "raise RuntimeError"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3", "raise SystemExit(3)"),
    "says-nothing": ("raise ValueError", "ValueError", "raise ValueError"),
    "misses-import": (
        "import no_such_module_at_all",
        "ModuleNotFoundError: No module named 'no_such_",
        "import no_such",
    ),
    "is-no-python": ("def (:", "SyntaxError: ", ""),
    "misspells": (
        "@hookimpl\ndef burnish_register_familys(): return []",
        "PluginValidationError: unknown hook 'burnish_register_familys'",
        "",
    ),
    "wants-argument": (
        "@hookimpl\ndef burnish_register_families(registry): return []",
        "Argument(s) {'registry'} are declared in the hookimpl but can not be found in the hookspec",
        "",
    ),
    "raises-in-hook": (
        "@hookimpl\ndef burnish_register_families():\n    return 1 / 0",
        "ZeroDivisionError: division by zero",
        "return 1 / 0",
    ),
    "exits-in-hook": (
        "import sys\n@hookimpl\ndef burnish_register_families():\n    sys.exit('bye')",
        "SystemExit: bye",
        "sys.exit('bye')",
    ),
    "returns-number": (
        "@hookimpl\ndef burnish_register_families(): return 3",
        "returned int, not a list of FamilySpec",
        "",
    ),
    "returns-text": ("@hookimpl\ndef burnish_register_families(): return 'zeta'", "returned str, not a list", ""),
    "returns-dicts": ("@hookimpl\ndef burnish_register_families(): return [{}]", "a dict among its FamilySpecs", ""),
    "returns-class": ("@hookimpl\ndef burnish_register_families(): return [FamilySpec]", "a type among its", ""),
    "yields-then-raises": (
        "@hookimpl\ndef burnish_register_families():\n    yield 1\n    raise OSError('late')",
        "OSError: late",
        "raise OSError('late')",
    ),
    "wrong-spec": (
        "@hookimpl\ndef burnish_register_families():\n"
        "    return [FamilySpec(name='zeta', model_types='zeta', build=print)]",
        "ValueError: FamilySpec zeta: model_types 'zeta' is not a tuple",
        "FamilySpec(name='zeta'",
    ),
    "returns-nothing": ("@hookimpl\ndef burnish_register_families(): return []", "claims model_type.zeta", ""),
    "forgets-marker": ("def burnish_register_families(): return []", "a hook without @hookimpl is not seen", ""),
    "returns-other": (
        "@hookimpl\ndef burnish_register_families():\n"
        "    return [FamilySpec(name='x', model_types=('zeta', 'theta'), build=print)]",
        "offers model_type 'theta' without claiming it in its metadata: add \"model_type.theta\" to",
        "",
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_plugin_is_set_aside_with_one_line(name: str, install: Install) -> None:
    code, reason, tail = FAULTY[name]
    module = install(name, "model_type.zeta", code=code, version="4.5")
    failure = failure_of(name)
    assert reason in failure.reason and "\n" not in failure.reason
    assert tail in failure.tail
    assert not failure.tail or f"{module}.py" in failure.tail
    message = str(failure.error())
    assert message.startswith(f"plugin {name} ({name} 4.5): ")
    assert f"Mend or uninstall {name}, or run `burnish plugins disable {name}`" in message
    assert "\n" not in message
    # Asked again it is not run again, and the built-ins are as they were.
    assert failure_of(name) is failure
    assert registry().ask(the("bert"), FAMILIES, FamilySpec)[0].model_types == ("bert",)  # type: ignore[index]


def test_a_faulty_plugin_harms_no_other_stranger(install: Install) -> None:
    for name, (code, _, _) in FAULTY.items():
        install(name, "model_type.zeta", code=code)
    install("sound", "model_type.zeta", code=ZETA)
    answers = {
        plugin.name: registry().ask(plugin, FAMILIES, FamilySpec)
        for plugin in registry().claimants("model_type", "zeta")
    }
    assert {name for name, answer in answers.items() if isinstance(answer, Failure)} == set(FAULTY)
    assert set(registry().failures) == {f"{name}:{name}" for name in FAULTY}
    assert len(answers["sound"]) == 1  # type: ignore[arg-type]


def test_ctrl_c_is_the_users(install: Install) -> None:
    install("slow", "model_type.zeta", code="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        registry().load(the("slow"))
    assert registry().failures == {}


def test_a_refused_plugin_is_never_imported(install: Install) -> None:
    module = install("ahead", "model_type.zeta", contract="9", code=ZETA)
    assert registry().claimants("model_type", "zeta") == ()
    assert [plugin.name for plugin in registry().absent("model_type", "zeta")] == ["ahead"]
    failure = registry().load(the("ahead"))
    assert failure is not None and failure.reason.startswith("is written for contract 9")
    assert module not in sys.modules


def test_a_slow_import_is_told(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time\ntime.sleep(0.05)\n" + ZETA
    install("quick", "model_type.zeta", code=code)
    install("slow", "model_type.zeta", code=code, version="3.1")
    assert registry().load(the("quick")) is None
    monkeypatch.setattr(registry_module, "SLOW_SECONDS", 0.05)
    with pytest.warns(PluginWarning, match=r"^plugin slow \(slow 3.1\) took 0\.\d s to import; .* disable slow$"):
        assert registry().load(the("slow")) is None


def test_torch_is_not_a_plugins_slowness(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "SLOW_SECONDS", 0.05)
    monkeypatch.setitem(sys.modules, "torch.brought_in", sys)  # put back, that is removed, after the test
    monkeypatch.delitem(sys.modules, "torch.brought_in")
    code = f"import sys, time\nsys.modules['torch.brought_in'] = sys\ntime.sleep(0.1)\n{ZETA}"
    install("brings-torch", "model_type.zeta", code=code)
    assert registry().load(the("brings-torch")) is None
    assert "torch.brought_in" in sys.modules


def test_collecting_leaves_a_broken_plugin_out_with_a_warning(install: Install) -> None:
    install("broken", "model_type.zeta", code="raise RuntimeError('no')", version="7")
    install("sound", "model_type.zeta", code=ZETA)
    plugins = registry().claimants("model_type", "zeta")
    with pytest.warns(
        PluginWarning, match=r"^plugin broken \(broken 7\) is left out: RuntimeError: no. File .*broken.py"
    ):
        found = registry().collect(plugins, FAMILIES, FamilySpec)
    assert [(plugin.name, spec.name) for plugin, spec in found] == [("sound", "zeta")]


def test_collecting_needs_what_the_user_named(install: Install) -> None:
    install("broken", "model_type.zeta", code="raise RuntimeError('no')")
    plugins = registry(["broken"])
    with pytest.raises(PluginError, match=r"^plugin broken \(broken 1.0\): RuntimeError: no"):
        plugins.collect(plugins.claimants("model_type", "zeta"), FAMILIES, FamilySpec)


OFFERS = [
    ("backend", "burnish_register_backends", BackendSpec, "BackendSpec(name='x', summary='', build_step=print)"),
    ("operation", "burnish_register_kernels", KernelSpec, "KernelSpec(operation='x', name='y', load=print)"),
    ("exporter", "burnish_register_exporters", ExporterSpec, "ExporterSpec(target='x', summary='', run=print)"),
    ("command", "burnish_register_commands", CommandSpec, "CommandSpec(name='x', summary='', run=print)"),
    ("fallback", FAMILIES, FamilySpec, "FamilySpec(name='x', build=print, fallback=True)"),
]


@pytest.mark.parametrize(("kind", "hook", "spec", "value"), OFFERS)
def test_claims_and_offers_must_agree(kind: str, hook: str, spec: Any, value: str, install: Install) -> None:
    code = f"@hookimpl\ndef {hook}():\n    return [{value}]\n"
    install("sound", f"{kind}.x", code=code)
    install("silent", "device.cpu", "observer.model_saved", code=code)
    install("boasts", f"{kind}.x", code=code.replace(value, ""))
    answer = registry().ask(the("sound"), hook, spec)
    assert isinstance(answer, tuple) and len(answer) == 1
    claim = "family" if kind == "fallback" else "x"
    assert f"offers {kind} '{claim}' without claiming it in its metadata" in failure_of("silent", hook, spec).reason
    assert f"claims {kind}.{claim} in its metadata and offers no such thing" in failure_of("boasts", hook, spec).reason


WATCHER = """
seen = []
@hookimpl
def burnish_step_finished(step, logs):
    seen.append((step, logs))
"""


def seen_by(module: str) -> list[tuple[int, dict[str, Any]]]:
    seen: list[tuple[int, dict[str, Any]]] = sys.modules[module].seen
    return seen


def test_observers_are_told_in_order_and_only_those_who_claim_it(install: Install) -> None:
    for name in ("b-watch", "a-watch"):
        install(name, "observer.step_finished", code=WATCHER + f"    logs['by'] = logs.get('by', '') + {name[0]!r}\n")
    bystander = install("bystander", "model_type.zeta", code=ZETA + WATCHER)
    registry().load(the("bystander"))
    tell = registry().observers("step_finished")
    logs: dict[str, Any] = {}
    tell(step=1, logs=logs)
    assert logs == {"by": "ab"}
    assert [step for step, _ in seen_by("a_watch")] == [1]
    assert seen_by(bystander) == []
    registry().observers("model_saved")(model=None, folder=Path())  # nobody watches that


def test_an_observer_that_raises_is_left_out_and_the_run_goes_on(install: Install) -> None:
    install("sound", "observer.step_finished", code=WATCHER)
    install("a-broken", "observer.step_finished", code=WATCHER + "    raise OSError('disk')\n")
    tell = registry().observers("step_finished")
    with pytest.warns(
        PluginWarning, match=r"^plugin a-broken \(a-broken 1.0\) is left out: OSError: disk. File .*a_broken.py"
    ):
        tell(step=1, logs={})
    tell(step=2, logs={})
    assert [step for step, _ in seen_by("sound")] == [1, 2]
    assert [step for step, _ in seen_by("a_broken")] == [1]


def test_an_observer_that_cannot_be_loaded_is_left_out(install: Install) -> None:
    install("broken", "observer.step_finished", code="raise RuntimeError('no')")
    install("idle", "observer.step_finished", code=ZETA.replace("@hookimpl", ""))
    with pytest.warns(PluginWarning) as caught:
        tell = registry().observers("step_finished")
    messages = sorted(str(warning.message) for warning in caught)
    assert messages[0].startswith("plugin broken (broken 1.0) is left out: RuntimeError: no")
    assert messages[1].startswith("plugin idle (idle 1.0) is left out: claims observer.step_finished")
    assert "has no burnish_step_finished" in messages[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell(step=1, logs={})


@pytest.mark.parametrize("code", ["raise RuntimeError('no')", WATCHER + "    raise RuntimeError('no')\n"])
def test_an_observer_that_the_user_named_must_work(code: str, install: Install) -> None:
    install("watch", "observer.step_finished", code=code)
    with pytest.raises(PluginError, match=r"^plugin watch \(watch 1.0\): RuntimeError: no"):
        registry(["watch"]).observers("step_finished")(step=1, logs={})


def test_blame_names_the_plugin(install: Install) -> None:
    module = install("zeta", "model_type.zeta", code=ZETA + "def fail():\n    raise KeyError('a\\nb')\n")
    registry().load(the("zeta"))
    message = r"^plugin zeta \(zeta 1.0\): patching failed: KeyError: 'a.nb'. Mend or disable zeta. File"
    with pytest.raises(PluginError, match=message), blame(the("zeta"), "patching"):
        sys.modules[module].fail()
    with pytest.raises(BurnishError, match=r"^as it is$"), blame(the("zeta"), "patching"):
        raise BurnishError("as it is")


def test_the_registry_knows_names(install: Install) -> None:
    install("zeta", "model_type.zeta", code=ZETA)
    assert [plugin.name for plugin in Registry(Policy()).named("zeta")] == ["zeta"]
    with pytest.raises(PluginError, match=r"no plugin called 'eta' is installed. Did you mean 'zeta'"):
        Registry(Policy()).named("eta")
