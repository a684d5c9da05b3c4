"""Which backend, kernel and exporter a run gets: by right, by priority, by what this machine can run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import pytest

from burnish.core.choices import BackendChoice
from burnish.core.contracts import Machine
from burnish.core.errors import ConfigError, PluginError
from burnish.core.registry import PluginWarning, registry
from burnish.core.selection import choose_backend, choose_kernel, exporters
from burnish.core.settings import set_disabled

Install = Callable[..., str]
CPU = Machine(device="cpu")
GPU = Machine(device="cuda", compute_capability=(9, 0), dtypes=frozenset({"float32", "bfloat16"}))


def passed(choice: BackendChoice) -> dict[str, tuple[str, str]]:
    return {item.plugin.name: (item.verdict, item.reason) for item in choice.considered}


BROKEN = "raise RuntimeError('out of order')"


# Backends.


def backend(*specs: str) -> str:
    return f"@hookimpl\ndef burnish_register_backends():\n    return [{', '.join(specs)}]\n"


def spec(name: str, priority: int = 0, needs: str = "Needs()") -> str:
    return f"BackendSpec(name={name!r}, summary='', build_step=print, priority={priority}, needs={needs})"


def step(machine: Machine = CPU, name: str = "auto", plugins: Sequence[str] | None = None) -> BackendChoice:
    return choose_backend(registry(plugins), machine, name)


def test_the_reference_is_what_is_left() -> None:
    choice = step()
    assert (choice.spec.name, choice.reason) == ("reference", "the best that this machine can run")
    assert step(name="reference").reason == "asked for"


def test_the_highest_priority_that_can_be_had(install: Install) -> None:
    needs = "Needs(devices=('cuda',))"
    install("fast", "backend.fast", "backend.faster", code=backend(spec("fast", 5), spec("faster", 9, needs)))
    choice = step()
    assert choice.spec.name == "fast"
    considered = {item.name: item.reason for item in choice.considered}
    others = {"fused": "needs cuda, this is cpu", "compiled": "needs the package triton"}
    assert considered == {"faster": "needs cuda, this is cpu", "reference": "fast comes first", **others}
    assert step(GPU).spec.name == "faster"


def test_a_backend_that_was_asked_for_must_be_had(install: Install) -> None:
    install("fast", "backend.fast", code=backend(spec("fast", 9, "Needs(devices=('cuda',), packages=('triton',))")))
    with pytest.raises(ConfigError) as caught:
        step(name="fast")
    assert caught.value.where == "backend='fast'"
    assert caught.value.what == "cannot run here: fast: needs cuda, this is cpu"
    with pytest.raises(ConfigError, match=r"needs the package triton"):
        step(GPU, "fast")
    assert step().spec.name == "reference"


def test_a_backend_by_name_imports_no_other(install: Install) -> None:
    module = install("fast", "backend.fast", code=BROKEN)
    assert step(name="reference").spec.name == "reference" and module not in sys.modules


def test_a_tie_goes_to_the_built_in(install: Install) -> None:
    install("level", "backend.level", code=backend(spec("level")))
    assert step().spec.name == "reference"
    assert step(name="level").spec.name == "level"
    assert step(plugins=["level"]).spec.name == "level"


def test_a_tie_of_strangers_is_an_error_that_names_both(install: Install) -> None:
    install("one", "backend.fast", code=backend(spec("fast", 3)))
    install("two", "backend.quick", code=backend(spec("quick", 3)))
    with pytest.raises(PluginError) as caught:
        step()
    assert caught.value.what == "fast of one (one 1.0) and quick of two (two 1.0) have the same priority 3"
    assert caught.value.fix == "Pass backend='fast' or backend='quick'"
    assert step(name="quick").spec.name == "quick"
    assert step(plugins=["two"]).spec.name == "quick"


def test_two_backends_of_one_name_are_picked_by_plugin(install: Install) -> None:
    install("one", "backend.fast", code=backend(spec("fast", 3)))
    install("two", "backend.fast", code=backend(spec("fast", 3)))
    with pytest.raises(PluginError, match=r"Pick one: plugins=\['one:one'\] or plugins=\['two:two'\], or disable one"):
        step(name="fast")
    assert step(name="fast", plugins=["two"]).plugin.name == "two"


def test_a_stranger_takes_a_built_ins_name_only_when_it_is_named(install: Install) -> None:
    install("usurper", "backend.reference", code=backend(spec("reference", 99)))
    for name in ("auto", "reference"):
        choice = step(name=name)
        assert choice.plugin.own
        assert passed(choice)["usurper"][1].startswith("a built-in one can be had; to use this one, name it")
        assert step(name=name, plugins=["usurper"]).plugin.name == "usurper"


def test_without_a_backend_the_error_names_the_fix(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_PLUGINS", "bert")
    with pytest.raises(
        PluginError, match=r"^backend: no backend is enabled. Add burnish to BURNISH_PLUGINS, or unset it"
    ):
        step()
    monkeypatch.setenv("BURNISH_PLUGINS", "")
    with pytest.raises(PluginError, match=r"Add burnish to BURNISH_PLUGINS, or unset it. Known: none"):
        step(name="reference")
    monkeypatch.delenv("BURNISH_PLUGINS")
    set_disabled(["reference", "compiled", "fused"])
    with pytest.raises(PluginError, match=r"no backend is enabled. Run `burnish plugins enable compiled`"):
        step()
    set_disabled([])
    with pytest.raises(
        PluginError, match=r"no enabled plugin has a backend 'fast'. Install a plugin that does.* Known: .*reference"
    ):
        step(name="fast")


def test_a_broken_backend_is_fatal_only_if_it_is_asked_for(install: Install) -> None:
    install("fast", "backend.fast", code=BROKEN, version="8")
    with pytest.warns(PluginWarning, match=r"^plugin fast \(fast 8\) is left out: RuntimeError: out of order"):
        assert step().spec.name == "reference"
    with (
        pytest.warns(PluginWarning, match=r"is left out"),
        pytest.raises(PluginError, match=r"^plugin fast \(fast 8\): RuntimeError: out of order. Mend or uninstall"),
    ):
        step(name="fast")


def test_a_refused_backend_says_why(install: Install) -> None:
    install("fast", "backend.fast", code=backend(spec("fast", 3)), contract="7")
    assert step().spec.name == "reference"
    with pytest.raises(PluginError, match=r"^plugin fast \(fast 1.0\): is written for contract 7.* Mend or uninstall"):
        step(name="fast")


# Kernels.


def kernels(*specs: str) -> str:
    return f"@hookimpl\ndef burnish_register_kernels():\n    return [{', '.join(specs)}]\n"


def kernel(operation: str, name: str, priority: int = 0, needs: str = "Needs()") -> str:
    return f"KernelSpec(operation={operation!r}, name={name!r}, load=print, priority={priority}, needs={needs})"


def implementation(operation: str, machine: Machine = CPU, plugins: Sequence[str] | None = None) -> str | None:
    choice = choose_kernel(registry(plugins), machine, operation)
    return None if choice is None else f"{choice.spec.name} of {choice.plugin.name}"


def test_the_best_kernel_that_can_be_had() -> None:
    assert implementation("packed_attention") == "reference of reference"
    assert implementation("packed_attention", GPU) == "flash of reference"
    assert implementation("no_such_operation") is None


def test_a_strangers_kernel_takes_a_built_ins_place_only_when_it_is_named(install: Install) -> None:
    install("mine", "operation.packed_attention", code=kernels(kernel("packed_attention", "mine", 99)))
    assert implementation("packed_attention", GPU) == "flash of reference"
    assert implementation("packed_attention", GPU, ["mine"]) == "mine of mine"
    # On a CPU there is only the plain reference, which gives way to anybody.
    assert implementation("packed_attention") == "mine of mine"


def test_a_named_plugins_kernel_comes_first_whatever_its_priority(install: Install) -> None:
    install("slow", "operation.packed_attention", code=kernels(kernel("packed_attention", "slow", -5)))
    assert implementation("packed_attention", GPU) == "flash of reference"
    assert implementation("packed_attention", GPU, ["slow"]) == "slow of slow"


def test_kernels_of_equal_right_are_an_error_that_names_both(install: Install) -> None:
    for name in ("one", "two"):
        install(name, "operation.layer_norm", code=kernels(kernel("layer_norm", name)))
    with pytest.raises(PluginError) as caught:
        implementation("layer_norm")
    assert str(caught.value).startswith(
        "operation layer_norm: one of one (one 1.0) and two of two (two 1.0) have the same"
    )
    assert caught.value.fix == "Disable one, or name one: plugins=['one:one']"
    assert implementation("layer_norm", plugins=["two"]) == "two of two"


def test_a_kernel_that_cannot_run_here_is_no_choice(install: Install) -> None:
    code = kernels(kernel("layer_norm", "triton", 9, "Needs(devices=('cuda',))"), kernel("other", "x"))
    install("fast", "operation.layer_norm", "operation.other", code=code)
    assert implementation("layer_norm") is None
    assert implementation("layer_norm", GPU) == "triton of fast"


def test_a_broken_kernel_plugin_is_left_out(install: Install) -> None:
    install("fast", "operation.packed_attention", code=BROKEN)
    with pytest.warns(PluginWarning, match=r"plugin fast \(fast 1.0\) is left out"):
        assert implementation("packed_attention") == "reference of reference"
    with pytest.raises(PluginError, match=r"out of order"):
        implementation("packed_attention", plugins=["fast"])


# Exporters.


def exporter(*targets: str) -> str:
    specs = ", ".join(f"ExporterSpec(target={target!r}, summary='', run=print)" for target in targets)
    return f"@hookimpl\ndef burnish_register_exporters():\n    return [{specs}]\n"


def offered(plugins: Sequence[str] | None = None, target: str | None = None) -> dict[str, str]:
    found = exporters(registry(plugins), target)
    return {name: plugin.name for name, (plugin, _) in found.items() if not plugin.own}


def test_exporters_are_found_by_target(install: Install) -> None:
    install("one", "exporter.coreml", "exporter.tensors", code=exporter("coreml", "tensors"))
    install("two", "exporter.tflite", code=exporter("tflite"))
    assert offered() == {"coreml": "one", "tensors": "one", "tflite": "two"}


def test_two_exporters_of_one_target_are_an_error_that_names_both(install: Install) -> None:
    install("one", "exporter.coreml", "exporter.tensors", code=exporter("coreml", "tensors"))
    install("two", "exporter.coreml", code=exporter("coreml"))
    for target in (None, "coreml"):
        with pytest.raises(PluginError) as caught:
            offered(target=target)
        assert caught.value.what == "one (one 1.0) and two (two 1.0) both offer the export target 'coreml'"
        assert caught.value.fix == "Disable one, or name one: plugins=['two:two']"
    assert offered(target="tensors")["tensors"] == "one"
    assert offered(["two"])["coreml"] == "two"


def test_a_strangers_exporter_takes_ours_place_only_when_it_is_named(install: Install) -> None:
    install("usurper", "exporter.merged", code=exporter("merged"))
    assert exporters(registry())["merged"][0].own
    assert exporters(registry(["usurper"]))["merged"][0].name == "usurper"


def test_any_package_that_is_needed_is_looked_up() -> None:
    from burnish.core.contracts import Needs
    from burnish.core.machine import describe

    machine = describe("cpu")
    assert Needs(packages=("pluggy", "torch")).missing(machine) is None
    assert Needs(packages=("pluggy", "no-such-package")).missing(machine) == "needs the package no-such-package"
    assert set(machine.packages) <= {"triton", "bitsandbytes", "flash-attn", "kernels", "liger-kernel"}
    assert machine.packages["pluggy"] and len(machine.packages) == len(list(machine.packages))
