"""What is recorded of a model's training, what is read back of it, and the card that tells it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from burnish.core.contracts import Patch
from burnish.core.files import STALE
from burnish.core.model_card import PROVENANCE, provenance, rows, with_section
from burnish.core.patching import Claim, PatchPlan
from burnish.core.provenance import FILE, KEPT, Provenance, record
from burnish.core.recall import recall
from burnish.core.registry import PluginWarning

from .recorded import (
    DOCS,
    EVERYTHING,
    First,
    Install,
    Record,
    Second,
    decided,
    from_zeta,
    made,
    model,
    read,
)

# What is recorded


def test_what_was_chosen_is_recorded(install: Install) -> None:
    claims = ("model_type.zeta", "backend.zap", "operation.packed_attention")
    install("zeta-plugin", *claims, code=EVERYTHING, version="3.1")
    part = {"plugin": "zeta-plugin", "distribution": "zeta-plugin", "version": "3.1"}
    # The built-in kernel is a reference, so a stranger's above it is taken; by the same right as the backend.
    found = made()
    assert found["family"] == {"name": "zeta", **part}
    assert found["backend"] == {"name": "zap", **part}
    assert found["kernels"] == [{"operation": "packed_attention", "name": "zip", **part}]
    assert found["input"] == {"layout": "packed", "reason": "no padding is computed; attention: zip"}
    assert found["precision"] == {"dtype": "float32", "quantization": None, "reason": "adapters on cpu"}
    assert (found["schema"], found["contract"], found["purpose"]) == (1, 1, "adapters")
    assert found["burnish"] == found["versions"]["burnish"] and found["versions"]["torch"]
    assert found["adapter"] is None and found["trained_with"] == [] and found["left_out"] == []


def test_a_kernel_that_nothing_used_is_not_recorded() -> None:
    found = made()  # generic: padded input
    assert found["input"]["layout"] == "padded" and found["kernels"] == []
    assert found["family"]["distribution"] == "burnish"


def test_of_a_model_for_inference_nothing_was_used() -> None:
    found = made(decided(purpose="inference"))
    assert found["family"] is None and found["backend"] is None and found["purpose"] == "inference"


def test_a_model_that_burnish_did_not_prepare_has_no_record() -> None:
    assert record(SimpleNamespace(burnish=None)) is None  # type: ignore[arg-type]


def test_equal_patches_are_told_together() -> None:
    layers = nn.ModuleDict({"a": First(2, 2), "b": First(2, 2), "c": nn.Linear(2, 2), "d": First(2, 2)})
    claims = [Claim(owner="p (p 1)", patch=Patch(path=path, old=First, new=Second, why="speed")) for path in "abc"]
    claims.append(Claim(owner="p (p 1)", patch=Patch(path="d", old=First, new=Second, why="memory")))
    plan = PatchPlan(claims)
    plan.apply(layers)
    found = made(plan=plan)["patches"]
    name = f"{First.__module__}.First"
    whose = {"old": name, "new": name.replace("First", "Second"), "owner": "p (p 1)"}
    assert found == [
        {**whose, "modules": 2, "state": "applied", "why": "speed"},
        {**whose, "modules": 1, "state": "skipped", "why": "the module is a Linear"},
        {**whose, "modules": 1, "state": "applied", "why": "memory"},
    ]
    plan.undo()
    assert [one["state"] for one in made(plan=plan)["patches"]] == ["undone", "skipped", "undone"]


def test_a_plugin_that_failed_is_recorded_without_the_users_paths(install: Install, tmp_path: Path) -> None:
    code = f"raise OSError('no\\nluck in {tmp_path}/site/luck.bin, see https://luck.test/a/b')"
    install("unlucky", "backend.luck", code=code, version="7")
    with pytest.warns(PluginWarning, match="unlucky"):
        found = made()
    reason = "OSError: no luck in luck.bin, see https://luck.test/a/b"
    assert found["left_out"] == [{"plugin": "unlucky", "distribution": "unlucky", "version": "7", "reason": reason}]
    assert str(tmp_path) not in json.dumps(found) and "/tmp" not in json.dumps(found)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("cannot import 'x' from 'y' (/home/me/site/y.py)", "cannot import 'x' from 'y' (y.py)"),
        ("No such file: '/home/me and you/x.bin'", "No such file: 'x.bin'"),
        (r"C:\Users\me\x.py: no", "x.py: no"),
        (r"one of .*\.query|.*\.key and/or Q/K/V </s> 1 / 2", r"one of .*\.query|.*\.key and/or Q/K/V </s> 1 / 2"),
        ("a\nb\x1b[31m\tc", "a b [31m c"),
    ],
)
def test_texts_are_one_line_and_without_paths(said: str, kept: str) -> None:
    decision = decided()
    preparation = model(decision)
    preparation.burnish.pooling = said
    found = record(preparation)
    assert found is not None and found["pooling"] == kept


def test_a_record_is_the_same_each_time() -> None:
    assert json.dumps(made()) == json.dumps(made())


def test_an_old_record_does_not_outlive_the_model_it_was_of() -> None:
    assert FILE in STALE


# Its history


def test_saving_again_does_not_grow_the_history() -> None:
    first = made()
    again = made(former=read(first))
    assert again == first
    assert made(former=read(again)) == first
    # Another set-up is another training; going back and forth between two adds none.
    full = made(decided(purpose="full"), former=read(first))
    assert [one["purpose"] for one in full["trained_with"]] == ["adapters"]
    back = made(former=read(full))
    assert [one["purpose"] for one in back["trained_with"]] == ["full"]
    assert made(decided(purpose="full"), former=read(back)) == full


def test_loads_for_inference_keep_the_history_and_are_no_part_of_it() -> None:
    first = made()
    stock = made(decided(purpose="inference"), former=read(first))
    assert [one["purpose"] for one in stock["trained_with"]] == ["adapters"]
    assert "trained_with" not in stock["trained_with"][0]
    assert made(decided(purpose="inference"), former=read(stock)) == stock
    assert made(former=read(stock)) == first


def test_the_history_is_in_order_and_short() -> None:
    former: Provenance | None = None
    for number in range(KEPT + 3):
        found = made(former=former) | {"checkpointing": f"number {number}"}
        former = read(found)
    told = [one["checkpointing"] for one in made(former=former)["trained_with"]]
    assert told == [f"number {number}" for number in range(3, KEPT + 3)]


# What is read back


def test_what_is_written_is_read() -> None:
    found = made(decided(purpose="full"), former=read(made()))
    assert read(found).record == found
    assert [one["purpose"] for one in read(found).trainings] == ["adapters", "full"]
    assert "family" in str(read(found)) and "generic of generic (burnish" in str(read(found))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 2}, "it is of schema 2, this Burnish reads 1"),
        ({"schema": None}, "it names no schema"),
        ({"family": "bert"}, "'family' is a str, or not complete"),
        ({"family": {"name": "bert"}}, "'family' is a dict, or not complete"),
        ({"kernels": {}}, "'kernels' is a dict, not a list"),
        ({"kernels": [{"operation": "x"}]}, "an item of 'kernels' has no 'name'"),
        ({"versions": {"torch": 2}}, "'torch' of 'versions' is a int"),
        ({"input": []}, "'input' is a list, not a mapping"),
        ({"contract": True}, "'contract' is a bool"),
        ({"trained_with": None}, "'trained_with' is a NoneType, not a list"),
        ({"trained_with": [{}]}, "an item of 'trained_with' has no 'schema'"),
    ],
    ids=str,
)
def test_a_malformed_file_is_told(change: Record, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(reason)}$"):
        read(made() | change)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', "[" * 100_000, "\x00\xff"])
def test_no_file_keeps_a_model_from_being_loaded(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    message = rf"^model {re.escape(str(tmp_path))}: its burnish.json is not read \(.+\), so that plugins .*affected$"
    with pytest.warns(PluginWarning, match=message) as caught:
        assert recall(str(tmp_path), decided()) is None
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_a_hub_that_fails_does_not_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("429: too\nmany")

    monkeypatch.setattr("sentence_transformers.util.load_file_path", fail)
    with pytest.warns(PluginWarning, match=r"^model org/x: its burnish.json is not read \(429: too many\)"):
        assert recall("org/x", decided()) is None


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert recall(str(tmp_path), decided()) is None


# The card


def test_the_card_tells_it() -> None:
    adapter = {"type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q"], "use_rslora": True,
               "use_dora": False, "merged": True}  # fmt: skip
    patch = {"old": "a.b.Old", "new": "c.New", "modules": 6, "owner": "p (p 1)", "state": "applied", "why": "a|b<c"}
    found = made(former=from_zeta()) | {"adapter": adapter, "patches": [patch]}
    told = dict(rows(found, read(found).trainings))
    burnish = found["burnish"]
    assert told["Family"] == f"generic of generic (burnish {burnish})" and told["Plugins"] == f"burnish {burnish}"
    assert told["Adapter"] == "LORA, r=4, lora_alpha=16, use_rslora, merged into the weights"
    assert told["Patches"] == "6 Old → New, applied (a|b<c; p (p 1))"
    assert f"torch {found['versions']['torch']}" in told["Libraries"] and "not installed" not in told["Libraries"]
    assert told["Before"] == "1 other set-up(s), told in burnish.json"
    text = provenance(found, read(found).trainings)
    assert "| Patches | 6 Old → New, applied (a\\|b&lt;c; p (p 1)) |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {3}


def test_merged_for_inference_the_card_tells_of_the_training() -> None:
    stock = made(decided(purpose="inference"), former=from_zeta())
    assert dict(rows(stock, read(stock).trainings))["Family"] == "zeta of zeta (zeta-plugin 1.0)"
    assert rows(made(decided(purpose="inference")), []) == []


def test_the_section_is_there_once() -> None:
    found = made()
    other = found | {"input": {"layout": "other", "reason": "other"}}
    one, two = provenance(found, [found]), provenance(found, [other])
    card = "---\ntags: [x]\n---\n\n# A model\n\nText.\n"
    once = with_section(card, PROVENANCE, one)
    assert once.startswith(card) and once.count("## Training provenance") == 1
    assert with_section(once, PROVENANCE, one) == once
    changed = with_section(once, PROVENANCE, two)
    assert changed.count("## Training provenance") == 1 and "other (other)" in changed
    assert with_section(changed, PROVENANCE, one) == once
    assert with_section(with_section("", PROVENANCE, one), PROVENANCE, one) == with_section("", PROVENANCE, one)


def test_the_section_keeps_its_place_and_what_is_around_it() -> None:
    found = made()
    text = provenance(found, [found])
    marked = with_section("", PROVENANCE, text).strip()
    card = f"# A model\n\n{marked}\n\n## Mine\n\nWords.\n"
    assert with_section(card, PROVENANCE, text) == card
    assert with_section(f"{card}\n{marked}\n", PROVENANCE, text) == card, "a second section stays"
    assert with_section(card, "limits", "few").startswith(card), "another section takes its place"
    broken = "# A model\n\n<!-- burnish: training provenance -->\n\nWords.\n"
    assert with_section(broken, PROVENANCE, text).count("Words.") == 1, "a marker without its end swallows the card"


# The docs


def test_the_docs_name_every_field() -> None:
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    part = page.split("## What a saved model records")[1].split("\n## ")[0]
    fields = re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)
    assert fields == list(made())
