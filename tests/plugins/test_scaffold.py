"""`burnish plugin new`, all the way: what it writes is installed by pip and passes its own tests unchanged.

A conformance run takes a process twenty seconds to start and each family ten more, on one core. So one run here is an
author's to the letter, and one more takes what is different in the rest of the scaffold: an encoder of the plugin's
own, with packed input (like BERT) and without (like MPNet). That each of the other families can be started from, and
that what is found of it is what the family itself says, `tests/unit` shows without running the suite.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import pytest

from burnish.core.scaffold import new_plugin
from burnish.core.testing.suite import CHECKS

PLUGINS = {"electra": "bert", "acme": "bert", "padded": "mpnet", "broken": "bert"}
# How the last one is broken: an adapter goes on the pooler, whose output nothing reads.
FAULT = ('exclude=("pooler.dense",)', "exclude=()")
# The exit code of pytest is looked at too; `python -P` keeps the sources out of the way of what is installed.
PYTEST = ("-P", "-c", "import sys, pytest; print('exit code', int(pytest.main(sys.argv[1:])))", "-rpfE")

Outcomes = dict[str, dict[str, list[str]]]


@pytest.fixture(scope="module")
def site(install_together: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All of them, installed; the sources lie beside the site."""
    folder = tmp_path_factory.mktemp("scaffolded")
    for name, like in PLUGINS.items():
        new_plugin(name, like, folder)
    family = folder / "burnish-broken" / "burnish_broken.py"
    text = family.read_text(encoding="utf-8")
    assert text.count(FAULT[0]) == 1
    family.write_text(text.replace(*FAULT), encoding="utf-8")
    return install_together([folder / f"burnish-{name}" for name in PLUGINS], folder)


def outcomes(printed: str) -> Outcomes:
    """Test class to outcome to checks; skips are counted only, under the class "": pytest tells them without names."""
    found: Outcomes = defaultdict(lambda: defaultdict(list))
    for outcome, kind, check in re.findall(r"^([A-Z]+) \S+::(\w+)::test_family\[(.+?)\]", printed, re.M):
        found[kind][outcome].append(check)
    (skipped,) = re.findall(r"(\d+) skipped", printed)
    found[""]["SKIPPED"] = [""] * int(skipped)
    return found


def test_an_authors_first_run(site: Any) -> None:
    printed = site.run(*PYTEST, cwd=site.folder.parent / "burnish-electra")
    found = outcomes(printed)
    assert "exit code 0" in printed and set(found) == {"TestElectra", ""} and set(found["TestElectra"]) == {"PASSED"}
    passed, skipped = found["TestElectra"]["PASSED"], found[""]["SKIPPED"]
    assert len(passed) + len(skipped) == len(CHECKS)
    # It has neither patches nor heads yet, and no token of a mean comes last.
    assert set(CHECKS) - set(passed) <= {"patches", "heads", "padding side"}


def test_an_encoder_of_its_own_with_and_without_packed_input_and_a_broken_one(site: Any) -> None:
    fault = "burnish-broken/tests/test_broken.py::TestBroken::test_family[LoRA reach]"
    printed = site.run(*PYTEST, "burnish-acme/tests", "burnish-padded/tests", fault, cwd=site.folder.parent)
    found = outcomes(printed)
    for kind in ("TestAcme", "TestPadded"):
        assert set(found[kind]) == {"PASSED"}, printed[-4000:]
    assert "packed equals padded" in found["TestAcme"]["PASSED"]
    unsaid = set(found["TestAcme"]["PASSED"]) - set(found["TestPadded"]["PASSED"])
    assert {"packed equals padded", "gradient checkpointing"} <= unsaid
    assert found["TestBroken"] == {"FAILED": ["LoRA reach"]} and "exit code 1" in printed
    assert re.search(r"pooler\.dense", printed)
