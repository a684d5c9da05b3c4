"""`plugins bench`: both arms do the same work, and the table says what was timed."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.core.errors import ConfigError
from burnish.core.testing.bench import HEADINGS, bench_distribution

SETTING: dict[str, Any] = {
    "model": None, "device": "cpu", "size": "tiny", "lora": 4, "batch": 2, "length": 20, "steps": 2, "packed": True,
}  # fmt: skip


@pytest.mark.parametrize("lora", [0, 4])
def test_both_arms_are_timed_in_turns(lora: int) -> None:
    headings, rows = bench_distribution("mpnet", **{**SETTING, "lora": lora})
    assert headings == HEADINGS and [row[:3] for row in rows] == [
        ("mpnet", "transformers", "20 tokens"),
        ("mpnet", "burnish mpnet (burnish 0.1.0)", "20 tokens"),
    ]
    times = [float(row[3]) for row in rows]
    assert min(times) > 0 and rows[0][5] == "1.00" and float(rows[1][5]) == pytest.approx(times[0] / times[1], abs=0.1)


def test_texts_are_as_long_as_the_table_says() -> None:
    _, rows = bench_distribution("mpnet", **{**SETTING, "length": 500})
    assert {row[2] for row in rows} == {"96 tokens"}  # 98 positions, of which MPNet never uses two


def test_a_plugin_without_a_family_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^plugin reference: has no family\. Families are timed"):
        bench_distribution("reference", **SETTING)
