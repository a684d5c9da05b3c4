"""Pairs of texts whose length in tokens is known: every word is one token of the tokenizer's vocabulary."""

from __future__ import annotations

import random
from typing import Any

LENGTHS = ("fixed", "natural")
ENDS = 2
"""The tokens that WordPiece puts around a text."""


def words(tokenizer: Any) -> list[str]:
    """Words that are one token each, alone and among others."""
    return sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) >= 4)


def lengths(kind: str, count: int, longest: int, seed: int) -> list[int]:
    """Lengths in tokens, the ends included.

    "fixed": every text fills the window. "natural": log-normal with median 0.3 and sigma 0.6 of it, from 8 tokens to
    the window, as the lengths of real texts are spread: 35% of the window on average.
    """
    if kind == "fixed":
        return [longest] * count
    chance = random.Random(seed)
    return [max(8, min(longest, int(0.3 * longest * chance.lognormvariate(0, 0.6)))) for _ in range(count)]


def pairs(tokenizer: Any, kind: str, count: int, longest: int, seed: int = 0) -> tuple[dict[str, list[str]], list[int]]:
    """(`count` pairs as columns "anchor" and "positive", the lengths in tokens of all their texts)."""
    known, chance = words(tokenizer), random.Random(seed)
    columns: dict[str, list[str]] = {}
    every: list[int] = []
    for place, name in enumerate(("anchor", "positive"), start=1):
        drawn = lengths(kind, count, longest, seed + place)
        columns[name] = [" ".join(chance.choices(known, k=length - ENDS)) for length in drawn]
        every += drawn
    return columns, every
