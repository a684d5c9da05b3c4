"""Who gets a model, a step, an operation or an export target: by right, then by fit, and always with reasons."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import pytest
from transformers import PretrainedConfig

from burnish.core.choices import BackendChoice, FamilyChoice
from burnish.core.contracts import Machine
from burnish.core.errors import PluginError
from burnish.core.registry import PluginWarning, registry
from burnish.core.selection import choose_family
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


BROKEN_RULES = """
from burnish.core.contracts import Family, FamilySpec
from burnish.core.hookspecs import hookimpl


def pooling(config, files):
    raise KeyError("no such pooling")


def patches(model, machine):
    return ["not a patch"]


@hookimpl
def burnish_register_families():
    build = lambda config: Family(name="zeta", pooling=pooling, patches=patches)
    return [FamilySpec(name="zeta", model_types=("zeta",), build=build)]
"""


def test_a_rule_that_fails_when_it_is_used_names_its_plugin(install: Install) -> None:
    install("zeta", "model_type.zeta", code=BROKEN_RULES)
    choice = choose_family(registry(), config("zeta"))
    with pytest.raises(PluginError, match=r"zeta.*pooling rule of family zeta failed: KeyError"):
        choice.pooling(config("zeta"), frozenset())
    with pytest.raises(PluginError, match=r"zeta.*patch rule of family zeta failed: TypeError: it returned a str"):
        choice.claims(object(), CPU)  # type: ignore[arg-type]
