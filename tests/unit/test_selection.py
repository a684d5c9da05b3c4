"""Who gets a model, a step, an operation or an export target: by right, then by fit, and always with reasons."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import pytest
from transformers import PretrainedConfig

from burnish.core.contracts import Machine
from burnish.core.errors import ConfigError, PluginError
from burnish.core.registry import PluginWarning, registry
from burnish.core.selection import (
    BackendChoice,
    FamilyChoice,
    choose_backend,
    choose_family,
    choose_kernel,
    exporters,
)
from burnish.core.settings import set_disabled

Install = Callable[..., str]
CPU = Machine(device="cpu")
GPU = Machine(device="cuda", compute_capability=(9, 0), dtypes=frozenset({"float32", "bfloat16"}))


def config(model_type: str) -> PretrainedConfig:
    made: PretrainedConfig = type("Config", (PretrainedConfig,), {"model_type": model_type})()
    return made


def family(name: str, *model_types: str, more: str = "", build: str = "") -> str:
    """The code of a plugin with one family."""
    types = repr(model_types)
    made = build or f"lambda config: Family(name={name!r})"
    return (
        "@hookimpl\ndef burnish_register_families():\n"
        f"    return [FamilySpec(name={name!r}, model_types={types}, build={made}{more})]\n"
    )


def chosen(model_type: str, plugins: Sequence[str] | None = None) -> FamilyChoice:
    return choose_family(registry(plugins), config(model_type))


def passed(choice: FamilyChoice | BackendChoice) -> dict[str, tuple[str, str]]:
    return {item.plugin.name: (item.verdict, item.reason) for item in choice.considered}


# Families: whose it is.


def test_a_stranger_takes_a_type_that_nobody_else_claims(install: Install) -> None:
    install("zeta", "model_type.zeta", code=family("zeta-family", "zeta"))
    choice = chosen("zeta")
    assert (choice.family.name, choice.plugin.name) == ("zeta-family", "zeta")
    assert choice.reason == "the only plugin that claims it" and choice.considered == ()


def test_a_stranger_is_not_imported_for_a_built_ins_type(install: Install) -> None:
    module = install("usurper", "model_type.bert", code="raise RuntimeError('imported')")
    choice = chosen("bert")
    assert choice.plugin.id == "burnish:bert" and choice.reason == "built in"
    assert passed(choice) == {"usurper": ("passed over", "also claims bert; to use it, name it: plugins=['usurper']")}
    assert module not in sys.modules and registry().failures == {}


def test_a_stranger_takes_a_built_ins_type_when_it_is_named(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("usurper", "model_type.bert", code=family("mine", "bert"))
    choice = chosen("bert", ["usurper"])
    assert choice.family.name == "mine" and choice.reason == "named by you"
    assert passed(choice)["bert"][0] == "passed over"
    monkeypatch.setenv("BURNISH_PLUGINS", "burnish, usurper")
    assert chosen("bert").family.name == "mine"
    monkeypatch.setenv("BURNISH_PLUGINS", "burnish")
    assert chosen("bert").family.name == "bert"


def test_a_named_plugin_that_does_not_take_the_config_leaves_it_to_the_built_in(install: Install) -> None:
    install("picky", "model_type.bert", code=family("picky", "bert", more=", specificity=lambda config: 0"))
    choice = chosen("bert", ["picky"])
    assert choice.plugin.name == "bert"
    assert passed(choice)["picky"] == ("passed over", "does not take this bert config")


def test_two_strangers_of_equal_right_are_an_error_that_names_both(install: Install) -> None:
    install("one", "model_type.zeta", code=family("first", "zeta"), version="1.2")
    install("two", "model_type.zeta", code=family("second", "zeta"), version="3.4")
    with pytest.raises(PluginError) as caught:
        chosen("zeta")
    assert caught.value.what == "first of one (one 1.2) and second of two (two 3.4) both claim model type 'zeta'"
    assert caught.value.fix == "Pick one: plugins=['one:one'] or plugins=['two:two'], or disable one"
    assert chosen("zeta", ["two"]).family.name == "second"
    set_disabled(["two"])
    assert chosen("zeta").family.name == "first"


def test_plugins_of_one_name_are_picked_by_their_full_name(install: Install) -> None:
    for name in ("one", "two"):
        install(name, "model_type.zeta", code=family(name, "zeta"), plugins={"zeta": name})
    with pytest.raises(PluginError, match=r"plugins=\['one:zeta'\] or plugins=\['two:zeta'\]"):
        chosen("zeta", ["zeta"])
    assert chosen("zeta", ["two:zeta"]).family.name == "two"


def test_the_narrowest_claim_wins(install: Install) -> None:
    narrow = ", specificity=lambda config: 2 if config.hidden == 7 else 0"
    install("wide", "model_type.zeta", code=family("wide", "zeta"))
    install("narrow", "model_type.zeta", code=family("narrow", "zeta", more=narrow))
    small, large = config("zeta"), config("zeta")
    small.hidden, large.hidden = 7, 8
    choice = choose_family(registry(), small)
    assert choice.family.name == "narrow" and passed(choice)["wide"][0] == "passed over"
    choice = choose_family(registry(), large)
    assert choice.family.name == "wide"
    assert passed(choice)["narrow"] == ("passed over", "does not take this zeta config")


def test_one_plugin_with_two_equal_claims_is_told_what_to_mend(install: Install) -> None:
    code = family("a", "zeta").replace("]\n", f", {family('b', 'zeta').split('return [')[1]}")
    install("twice", "model_type.zeta", code=code)
    with pytest.raises(PluginError, match=r"a of twice .* and b of twice .* The plugin must give one of them a higher"):
        chosen("zeta")


# Families: nobody's.


def test_the_generic_family_takes_what_nobody_claims_and_never_claims_itself(install: Install) -> None:
    choice = chosen("zeta")
    assert choice.plugin.id == "burnish:generic" and choice.reason == "nobody claims model type zeta"
    install("zeta", "model_type.zeta", code=family("zeta", "zeta"))
    assert chosen("zeta").family.name == "zeta" and chosen("eta").family.name == "generic"
    # Not even by name: a fallback is for what is left.
    assert chosen("zeta", ["generic", "zeta"]).family.name == "zeta"
    assert chosen("zeta", ["generic"]).family.name == "zeta"


FALLBACK = family("mine").replace("model_types=()", "fallback=True")


def test_a_strangers_fallback_takes_the_place_of_ours_only_when_named(install: Install) -> None:
    module = install("catch-all", "fallback.family", code=FALLBACK)
    assert chosen("zeta").family.name == "generic" and module not in sys.modules
    assert chosen("zeta", ["catch-all"]).family.name == "mine"
    set_disabled(["generic"])
    assert chosen("zeta").family.name == "mine"
    install("catch-more", "fallback.family", code=FALLBACK)
    with pytest.raises(
        PluginError, match=r"both claim every model that nobody else claims. Pick one: plugins=\['catch-all"
    ):
        chosen("zeta")


def test_a_type_whose_plugin_is_off_says_so(install: Install) -> None:
    install("zeta", "model_type.zeta", code=family("zeta", "zeta"))
    set_disabled(["zeta"])
    choice = chosen("zeta")
    assert choice.family.name == "generic"
    why = "off: disabled by `burnish plugins disable`"
    assert choice.reason == f"no enabled plugin takes model type zeta; zeta (zeta 1.0) does and is {why}"
    assert passed(choice) == {"zeta": ("passed over", why)}


def test_no_plugins_means_our_own(install: Install) -> None:
    install("zeta", "model_type.zeta", code=family("zeta", "zeta"))
    assert chosen("zeta", []).family.name == "generic" and chosen("bert", []).family.name == "bert"
    assert chosen("zeta", ["zeta"]).family.name == chosen("zeta").family.name == "zeta"


def test_without_a_family_the_error_names_the_fix(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("zeta", "model_type.zeta", code=family("zeta", "zeta"))
    monkeypatch.setenv("BURNISH_PLUGINS", "zeta")
    with pytest.raises(PluginError) as caught:
        chosen("bert")
    assert caught.value.what == "no enabled plugin takes model type 'bert'"
    assert caught.value.fix is not None and caught.value.fix.startswith("Add burnish to BURNISH_PLUGINS, or unset it.")
    assert chosen("zeta").family.name == "zeta"
    monkeypatch.delenv("BURNISH_PLUGINS")
    set_disabled(["generic"])
    with pytest.raises(PluginError, match=r"Run `burnish plugins enable generic`. Known: bert.*, zeta"):
        chosen("eta")


# Families: broken ones.

BROKEN = "raise RuntimeError('out of order')"


def test_a_broken_claimant_is_fatal_only_for_its_own_models(install: Install) -> None:
    install("zeta", "model_type.zeta", code=BROKEN, version="0.9")
    assert chosen("bert").family.name == "bert" and chosen("eta").family.name == "generic"
    with pytest.raises(
        PluginError, match=r"^plugin zeta \(zeta 0.9\): RuntimeError: out of order. Mend or uninstall zeta"
    ):
        chosen("zeta")
    set_disabled(["zeta"])
    assert chosen("zeta").family.name == "generic"


def test_a_refused_claimant_is_fatal_only_for_its_own_models(install: Install) -> None:
    install("zeta", "model_type.zeta", "model_type.bert", code=BROKEN, version="0.9", contract="7")
    choice = chosen("bert")
    assert choice.family.name == "bert"
    assert passed(choice)["zeta"][1].startswith("refused: is written for contract 7")
    with pytest.raises(
        PluginError, match=r"^plugin zeta \(zeta 0.9\): is written for contract 7.* `burnish plugins disable zeta`"
    ):
        chosen("zeta")
    set_disabled(["zeta"])
    assert chosen("zeta").family.name == "generic"


def test_another_claimant_takes_a_broken_ones_place_with_a_warning(install: Install) -> None:
    install("broken", "model_type.zeta", code=BROKEN, version="0.9")
    install("sound", "model_type.zeta", code=family("sound", "zeta"))
    message = (
        r"^broken \(broken 0.9\) failed \(RuntimeError: out of order\); sound of sound \(sound 1.0\) takes its place"
    )
    with pytest.warns(PluginWarning, match=message):
        choice = chosen("zeta")
    assert choice.family.name == "sound"
    assert passed(choice) == {"broken": ("failed", "RuntimeError: out of order")}


def test_a_broken_plugin_that_was_named_is_fatal(install: Install) -> None:
    install("broken", "model_type.bert", code=BROKEN)
    with pytest.raises(PluginError, match=r"^plugin broken \(broken 1.0\): RuntimeError: out of order"):
        chosen("bert", ["broken"])
    assert chosen("eta", ["broken"]).family.name == "generic"


@pytest.mark.parametrize("rule", ["1 / 0", "None", "'narrow'", "__import__('sys').exit(1)"])
def test_a_broken_rule_is_its_plugins_fault(rule: str, install: Install) -> None:
    install("broken", "model_type.zeta", code=family("broken", "zeta", more=f", specificity=lambda config: {rule}"))
    with pytest.raises(PluginError, match=r"^plugin broken \(broken 1.0\): (ZeroDivision|Type|Value|System)"):
        chosen("zeta")
    assert chosen("bert").family.name == "bert"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            "lambda config: 1 / 0",
            "building family zeta failed: ZeroDivisionError: division by zero. Mend or disable zeta. File",
        ),
        ("lambda config: exit(1)", "building family zeta failed: SystemExit: 1"),
        ("lambda config: Family(name='no name')", "building family zeta failed: ValueError: Family: name 'no name'"),
        ("lambda config: None", "family zeta built a NoneType, not a Family. Mend or disable zeta"),
    ],
)
def test_a_family_that_cannot_be_built_names_its_plugin(build: str, message: str, install: Install) -> None:
    install("zeta", "model_type.zeta", code=family("zeta", "zeta", build=build))
    with pytest.raises(PluginError) as caught:
        chosen("zeta")
    assert str(caught.value).startswith(f"plugin zeta (zeta 1.0): {message}")


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
    assert considered == {"faster": "needs cuda, this is cpu", "reference": "fast comes first"}
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
    set_disabled(["reference"])
    with pytest.raises(PluginError, match=r"no backend is enabled. Run `burnish plugins enable reference`"):
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
    install("one", "exporter.gguf", "exporter.onnx", code=exporter("gguf", "onnx"))
    install("two", "exporter.tflite", code=exporter("tflite"))
    assert offered() == {"gguf": "one", "onnx": "one", "tflite": "two"}


def test_two_exporters_of_one_target_are_an_error_that_names_both(install: Install) -> None:
    install("one", "exporter.gguf", "exporter.onnx", code=exporter("gguf", "onnx"))
    install("two", "exporter.gguf", code=exporter("gguf"))
    for target in (None, "gguf"):
        with pytest.raises(PluginError) as caught:
            offered(target=target)
        assert caught.value.what == "one (one 1.0) and two (two 1.0) both offer the export target 'gguf'"
        assert caught.value.fix == "Disable one, or name one: plugins=['two:two']"
    assert offered(target="onnx")["onnx"] == "one"
    assert offered(["two"])["gguf"] == "two"


def test_a_strangers_exporter_takes_ours_place_only_when_it_is_named(install: Install) -> None:
    install("usurper", "exporter.merged", code=exporter("merged"))
    assert exporters(registry())["merged"][0].own
    assert exporters(registry(["usurper"]))["merged"][0].name == "usurper"
