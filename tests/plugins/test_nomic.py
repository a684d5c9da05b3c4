"""A whole family of somebody else's, with patches: it passes its own tests where it is installed, trains, and leaves
others alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def journey(nomic: Any, tiny_nomic: Path) -> dict[str, Any]:
    """A NomicBERT is found, loaded and trained."""
    found: dict[str, Any] = nomic.journey(tiny_nomic, "burnish_nomic")
    return found


@pytest.fixture(scope="module")
def beside(nomic: Any, tiny_nomic: Path, tiny_bert: Path) -> dict[str, Any]:
    """It and a BERT in one process."""
    found: dict[str, Any] = nomic.report("beside.py", tiny_nomic, tiny_bert)
    return found


def own_tests(nomic: Any, folder: Path, *arguments: str) -> str:
    """What pytest says of the plugin's own tests, run in `folder`, whose modules come before the installed ones."""
    source = nomic.folder.parent / "burnish-nomic"
    options = ("-q", "-p", "no:cacheprovider", "--tb=line", "--rootdir", source, *arguments)
    said: str = nomic.run("-m", "pytest", *options, source / "tests", cwd=folder)
    return said


def test_its_own_tests_pass_unchanged_where_it_is_installed(nomic: Any, tmp_path: Path) -> None:
    said = own_tests(nomic, tmp_path)
    counts = re.search(r"^(\d+) passed(?:, (\d+) skipped)? in ", said, re.MULTILINE)
    # Every check of the suite but that of the padding's side, which is one for families read at the last token.
    assert counts and int(counts[1]) > 20 and counts[2] == "1", said


def test_its_tests_would_notice_a_wrong_family(nomic: Any, tmp_path: Path) -> None:
    text = (nomic.folder / "burnish_nomic.py").read_text(encoding="utf-8")
    wrong = text.replace("return torch.ops.aten.silu_backward(grad * up, gate),", "return grad * up,")
    assert wrong != text
    (tmp_path / "burnish_nomic.py").write_text(wrong, encoding="utf-8")
    with pytest.raises(AssertionError, match=r"the gradient of \S+ is off by [\s\S]*1 failed"):
        own_tests(nomic, tmp_path, "-k", "test_family and patches")


def test_a_nomic_bert_trains_on_packed_input(journey: dict[str, Any]) -> None:
    trained = journey["trained"]
    assert trained["family"] == "nomic_bert of burnish-nomic:nomic: the only plugin that claims it"
    assert trained["pooling"].startswith("mean, normalised (default of family nomic_bert")
    assert trained["rows"] == [1, 4] and trained["apart"] < 1e-5 < 0.1 < trained["size"]
    assert (trained["adapters"], trained["moved"]) == (28, 14)
    assert 0 < trained["loss"] < 10
    assert journey["warnings"] == []
    assert journey["checked"]["health"]["nomic"] == "healthy" and journey["checked"]["errors"] == {}
    assert journey["resolved"]["bert"] == ["bert", "burnish:bert", False]


def test_it_and_a_built_in_family_live_in_one_process(beside: dict[str, Any]) -> None:
    assert beside["families"] == {"stranger": "nomic_bert", "built in": "bert"}
    assert beside["plugins"] == {"stranger": "burnish-nomic:nomic", "built in": "burnish:bert"}
    assert [row[:3] for row in beside["patches"]["stranger"]] == [
        [f"layers.{layer}.mlp", "NomicBertMLP → FrugalNomicBertMLP", "applied"] for layer in range(2)
    ]
    assert len(beside["patches"]["built in"]) == 1
    assert beside["apart from stock"] < 1e-6
    for name in ("stranger", "built in"):
        assert beside["moved"][name] > 1e-3
        assert beside["other moved"][name] == 0


def test_neither_sees_the_patches_of_the_other(beside: dict[str, Any]) -> None:
    before, after = beside["owners"], beside["owners after undoing"]
    assert "burnish_nomic" in before["stranger"] and "burnish.families.bert" not in before["stranger"]
    assert "burnish.families.bert" in before["built in"] and "burnish_nomic" not in before["built in"]
    assert set(before["stranger"]) - set(after["stranger"]) == {"burnish_nomic"}
    assert before["built in"] == after["built in"] and beside["undoing moved the other"] == 0
