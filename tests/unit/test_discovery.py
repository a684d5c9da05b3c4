"""Claims are read from metadata, in one order, without importing anything; what cannot run says why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.core.discovery import CAPABILITIES, EVENTS, KINDS, OFFERS, Plugin, find, installed, under_policy
from burnish.core.errors import PluginError
from burnish.core.settings import Policy

Install = Callable[..., str]
BOMB = "raise RuntimeError('imported')"


def strangers() -> list[Plugin]:
    return [plugin for plugin in installed() if not plugin.own]


def reason_of(name: str) -> str:
    """Why the one plugin of that name is refused."""
    (plugin,) = find(installed(), name)
    assert plugin.state == "refused"
    return plugin.reason


def test_claims_are_read_without_importing(install: Install) -> None:
    module = install("zeta-plugin", "model_type.zeta", "model_type.zeta_text", "device.cuda", code=BOMB, version="2.3")
    (plugin,) = strangers()
    assert plugin.id == "zeta-plugin:zeta-plugin"
    assert plugin.label == "zeta-plugin (zeta-plugin 2.3)"
    assert (plugin.module, plugin.state, plugin.own) == (module, "on", False)
    assert plugin.values("model_type") == ("zeta", "zeta_text")
    assert plugin.values("contract") == ("1",) and plugin.values("backend") == ()
    assert module not in sys.modules


def test_built_ins_come_by_the_same_way_and_first(install: Install) -> None:
    install("aaa-plugin", "model_type.zeta")
    plugins = installed()
    own = [plugin for plugin in plugins if plugin.own]
    assert {"bert", "generic", "reference"} <= {plugin.name for plugin in own}
    assert all(plugin.state == "on" and plugin.distribution == "burnish" for plugin in own)
    assert list(plugins[: len(own)]) == own
    assert find(plugins, "bert")[0].values("model_type") == ("bert",)


LISTING = """
import json, sys
from burnish.core.registry import registry
rows = [(plugin.label, plugin.state, plugin.values("model_type")) for plugin in registry().plugins]
assert ("bert", "on") in [(label.split()[0], state) for label, state, _ in rows], rows
loaded = [name for name in sys.modules if name.split(".")[0] in ("torch", "transformers", "numpy", "zeta_plugin")]
print(json.dumps([loaded, [name for name in sys.modules if name.startswith(("burnish.families", "burnish.backends"))]]))
"""


def test_listing_plugins_imports_none_of_them(install: Install, tmp_path: Path) -> None:
    install("zeta-plugin", "model_type.zeta", code=BOMB)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{LISTING}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], []]


def test_the_order_is_that_of_distributions_and_names(install: Install) -> None:
    install(
        "beta", "model_type.x", plugins={"y": "beta", "b": "beta.two"}, capabilities=[("model_type.x.2", "beta.two")]
    )
    install("Alpha_Two", "model_type.x", plugins={"z": "Alpha_Two"})
    install("alpha", "model_type.x")
    assert [plugin.id for plugin in strangers()] == ["alpha:alpha", "alpha-two:z", "beta:b", "beta:y"]
    assert installed() == installed()


def test_two_modules_of_one_distribution_claim_each_their_own(install: Install) -> None:
    module = install(
        "pair",
        "model_type.x",
        "model_type.y.of_one",
        plugins={"one": "pair", "two": "pair_more"},
        capabilities=[("model_type.y.of_two", "pair_more"), ("backend.fast", "pair_more")],
    )
    one, two = strangers()
    assert (one.module, two.module) == (module, "pair_more")
    assert one.values("model_type") == ("x", "y") and one.values("backend") == ()
    assert two.values("model_type") == ("y",) and two.values("backend") == ("fast",)
    assert one.values("contract") == two.values("contract") == ("1",)


def test_one_entry_point_name_in_two_distributions_is_two_plugins(install: Install) -> None:
    for name in ("first-dist", "second-dist"):
        install(name, "model_type.zeta", plugins={"zeta": name.replace("-", "_")})
    assert [plugin.id for plugin in strangers()] == ["first-dist:zeta", "second-dist:zeta"]
    assert len(find(installed(), "zeta")) == 2
    for name in ("second-dist:zeta", "Second_Dist:zeta", "Second.Dist", "second-dist"):
        assert [plugin.id for plugin in find(installed(), name)] == ["second-dist:zeta"]
    with pytest.raises(PluginError, match=r"no plugin called 'second-dist:other'"):
        find(installed(), "second-dist:other")


def test_the_first_of_two_copies_on_the_path_is_the_one(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("zeta-plugin", "model_type.zeta", version="1.0")
    nearer = tmp_path / "nearer"
    (tmp_path / "site").rename(nearer)
    (tmp_path / "site").mkdir()
    install("zeta-plugin", "model_type.zeta", "model_type.eta", version="0.9")
    monkeypatch.syspath_prepend(str(nearer))
    (plugin,) = strangers()
    assert (plugin.version, plugin.values("model_type")) == ("1.0", ("zeta",))


@pytest.mark.parametrize("claim", ["modeltype.zeta", "model_type", "model_type.", "zeta", "quantizer.nf4"])
def test_an_odd_capability_is_refused(claim: str, install: Install) -> None:
    install("odd", "model_type.zeta", claim)
    assert reason_of("odd") == f"capability {claim!r} is not kind.value with a kind of {', '.join(KINDS)}"


def test_an_unknown_event_is_refused(install: Install) -> None:
    install("odd", "observer.model_loded")
    assert reason_of("odd") == f"capability 'observer.model_loded': there is no event but {', '.join(EVENTS)}"


def test_no_contract_is_refused_with_the_line_to_add(install: Install) -> None:
    install("bare", "model_type.zeta", contract=None)
    assert (
        reason_of("bare")
        == f'declares no contract version: add "contract.1" to [project.entry-points."{CAPABILITIES}"]'
    )


def test_another_contract_is_refused_with_both_versions(install: Install) -> None:
    install("ahead", "model_type.zeta", contract="2")
    assert reason_of("ahead").startswith("is written for contract 2, this Burnish speaks 1")


def test_a_plugin_for_several_contracts_is_on(install: Install) -> None:
    install("both", "model_type.zeta", contract="2", capabilities=[("contract.1", "both")])
    assert strangers()[0].state == "on"


def test_a_claim_for_a_module_that_is_no_plugin_is_refused(install: Install) -> None:
    install("typo", plugins={"typo": "typo"}, capabilities=[("model_type.zeta", "typo.families")])
    assert reason_of("typo").startswith("capability 'model_type.zeta' names typo.families, which is no plugin")


def test_claims_without_any_plugin_are_told_under_the_distributions_name(install: Install) -> None:
    install("lost", "model_type.zeta", plugins={})
    assert reason_of("lost").startswith("capability 'model_type.zeta' names lost, which is no plugin")


@pytest.mark.parametrize("claims", [[], ["device.cuda", "dtype.bfloat16", "attention.flex"]])
def test_a_plugin_that_nothing_would_ask_is_refused(claims: list[str], install: Install) -> None:
    install("mute", *claims)
    assert reason_of("mute").startswith("claims nothing, so that nothing would ever ask it")


@pytest.mark.parametrize("module", ["odd-module", "odd:plugin", "odd [extra]", "3d", "odd..x", "!", ""])
def test_an_entry_point_that_names_no_module_is_refused(module: str, install: Install) -> None:
    install("odd", plugins={"odd": module}, capabilities=[("model_type.zeta", module)])
    assert reason_of("odd") == f"entry point odd = {module!r} does not name a module"


def test_only_one_plugin_may_name_a_module(install: Install) -> None:
    install(
        "fork", plugins={"fork": "burnish.families.bert"}, capabilities=[("model_type.zeta", "burnish.families.bert")]
    )
    assert reason_of("fork").startswith("names the module burnish.families.bert, as bert (burnish ")
    assert find(installed(), "bert")[0].state == "on"


def test_a_stranger_may_not_call_itself_burnish(install: Install) -> None:
    install("wolf", "model_type.zeta", plugins={"burnish": "wolf"})
    assert reason_of("wolf") == "the name 'burnish' is Burnish's own: call the entry point something else"


def test_a_file_that_cannot_be_parsed_harms_nobody_else(install: Install) -> None:
    install("torn", entry_points="[burnish]\nthis line has no equals sign\n")
    install("zeta-plugin", "model_type.zeta")
    assert reason_of("torn").startswith("its entry_points.txt cannot be read (")
    assert [plugin.state for plugin in strangers()] == ["refused", "on"]
    assert find(installed(), "bert")[0].state == "on"


def test_metadata_without_a_name_are_reported_as_unknown(install: Install) -> None:
    install("nameless", "model_type.zeta", metadata="")
    assert strangers()[0].label == "nameless (unknown 0)"


def test_distributions_without_our_groups_are_no_plugins(install: Install) -> None:
    install("other", entry_points="[console_scripts]\nburnished = x:y\n[burnished]\na = b\n")
    assert strangers() == []


def test_every_offer_is_a_kind() -> None:
    assert set(OFFERS) < set(KINDS)


def test_an_unknown_name_is_told_with_its_neighbour_and_all_that_are_known(install: Install) -> None:
    install("zeta-plugin", "model_type.zeta", plugins={"zeta": "zeta_plugin"})
    with pytest.raises(
        PluginError, match=r"no plugin called 'zetta' is installed. Did you mean 'zeta'\? Known: bert, burnish"
    ) as caught:
        find(installed(), "zetta")
    assert str(caught.value).endswith("zeta, zeta-plugin")
    with pytest.raises(PluginError, match=r"Install it with pip, or take the name out"):
        find(installed(), "qqqqqq")
    with pytest.raises(PluginError, match=r"Known: none"):
        find((), "zeta")


def states(policy: Policy) -> dict[str, str]:
    return {plugin.name: plugin.state for plugin in under_policy(installed(), policy)}


def reasons(policy: Policy) -> dict[str, str]:
    return {plugin.name: plugin.reason for plugin in under_policy(installed(), policy)}


def named(policy: Policy) -> set[str]:
    return {plugin.name for plugin in under_policy(installed(), policy) if plugin.named}


def test_without_a_policy_all_are_on_and_none_is_named(install: Install) -> None:
    install("zeta", "model_type.zeta")
    assert set(states(Policy()).values()) == {"on"} and named(Policy()) == set()


def test_the_allow_list_is_the_whole_list(install: Install) -> None:
    install("zeta", "model_type.zeta")
    install("eta", "model_type.eta")
    policy = Policy(allowed=frozenset({"zeta", "burnish:bert"}))
    assert {name for name, state in states(policy).items() if state == "on"} == {"zeta", "bert"}
    assert reasons(policy)["generic"] == reasons(policy)["eta"] == "not in BURNISH_PLUGINS"
    # A stranger in the list is there by name; a built-in in it is only kept.
    assert named(policy) == {"zeta"}
    assert set(states(Policy(allowed=frozenset())).values()) == {"off"}
    everything = Policy(allowed=frozenset({"burnish", "zeta", "eta"}))
    assert set(states(everything).values()) == {"on"}


def test_an_unknown_name_is_told_with_where_it_was_said() -> None:
    with pytest.raises(
        PluginError, match=r"^BURNISH_PLUGINS: no plugin called 'brt' is installed. Did you mean 'bert'"
    ):
        under_policy(installed(), Policy(allowed=frozenset({"brt"})))
    with pytest.raises(PluginError, match=r"^plugins: no plugin called 'brt' is installed"):
        under_policy(installed(), Policy(named=("brt",)))
    assert states(Policy(disabled=frozenset({"gone"})))["bert"] == "on"  # it may have been uninstalled since


def test_disabled_plugins_are_off(install: Install) -> None:
    install("zeta", "model_type.zeta")
    policy = Policy(disabled=frozenset({"zeta", "generic"}))
    assert [name for name, state in states(policy).items() if state == "off"] == ["generic", "zeta"]
    assert reasons(policy)["zeta"] == "disabled by `burnish plugins disable`"
    both = Policy(disabled=frozenset({"zeta"}), allowed=frozenset({"zeta", "burnish"}))
    assert states(both)["zeta"] == "off"


def test_a_run_of_our_own_switches_strangers_off(install: Install) -> None:
    install("zeta", "model_type.zeta")
    policy = Policy(only_own=True)
    assert [name for name, state in states(policy).items() if state == "off"] == ["zeta"]
    assert reasons(policy)["zeta"] == "this run uses no plugins of others"


def test_a_run_names_plugins(install: Install) -> None:
    install("zeta-plugin", "model_type.zeta", plugins={"zeta": "zeta_plugin"})
    for name in ("zeta", "zeta-plugin", "zeta_plugin", "zeta-plugin:zeta"):
        assert named(Policy(named=(name,))) == {"zeta"}
    assert set(states(Policy(named=("zeta",))).values()) == {"on"}
    assert "bert" in named(Policy(named=("burnish",)))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            Policy(named=("zeta",), disabled=frozenset({"zeta"})),
            "is off: disabled by .* Enable it: burnish plugins enable zeta",
        ),
        (
            Policy(named=("zeta",), allowed=frozenset({"bert"})),
            "is off: not in BURNISH_PLUGINS. Add zeta:zeta to BURNISH_PLUGINS",
        ),
        (Policy(named=("ahead",)), "is refused: is written for contract 9.* Take it out of plugins, or mend the cause"),
    ],
)
def test_a_run_cannot_name_what_it_cannot_have(policy: Policy, message: str, install: Install) -> None:
    install("zeta", "model_type.zeta")
    install("ahead", "model_type.zeta", contract="9")
    with pytest.raises(PluginError, match=rf"^plugins: plugin (zeta|ahead) .*{message}"):
        under_policy(installed(), policy)


def test_what_is_refused_can_be_switched_off(install: Install) -> None:
    install("ahead", "model_type.zeta", contract="9")
    assert states(Policy())["ahead"] == "refused"
    assert states(Policy(disabled=frozenset({"ahead"})))["ahead"] == "off"
    assert states(Policy(allowed=frozenset({"burnish"})))["ahead"] == "off"
