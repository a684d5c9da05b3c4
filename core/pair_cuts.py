"""How a tokenizer cuts pairs of texts that are too long together, in numbers of tokens."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Lengths: TypeAlias = "NDArray[np.int64]"


def cut_lengths(lengths: Lengths, budget: int, strategy: str) -> Lengths | None:
    """What a tokenizer leaves of texts that together are longer than `budget` tokens.

    Args:
        lengths: (texts, parts) tokens of each part, one or two.
        budget: Tokens of a text's parts together.
        strategy: "longest_first", "only_first" or "only_second". The first shortens the longer part to what the shorter
            leaves, or both to halves, the longer getting the odd one (`truncate_encodings` of the library tokenizers);
            transformers' own, for tokenizers in Python, rounds otherwise.

    Returns:
        (texts, parts); None where a part that alone may be cut is too short for it, which the tokenizer refuses.
    """
    over = np.maximum(lengths.sum(axis=1) - budget, 0)
    if not over.any():
        return lengths
    kept = lengths.copy()
    if strategy == "longest_first" and lengths.shape[1] == 2:
        shorter = lengths.min(axis=1)
        left = np.where(shorter > budget, shorter, np.maximum(shorter, budget - shorter))
        halves = shorter + left > budget
        few = np.where(halves, budget // 2, shorter)
        many = np.where(halves, budget // 2 + budget % 2, left)
        swapped = lengths[:, 0] > lengths[:, 1]
        cut = np.stack([np.where(swapped, many, few), np.where(swapped, few, many)], axis=1)
        kept[over > 0] = np.minimum(cut, lengths)[over > 0]
        return kept
    part = 1 if strategy == "only_second" else 0
    if strategy == "longest_first":
        kept[:, 0] -= over
        return kept
    if part >= lengths.shape[1] or (over >= lengths[:, part])[over > 0].any():
        return None
    kept[:, part] -= over
    return kept


def cuts_each(backend: Any, room: int) -> bool:
    """Whether this version of the library tokenizers cuts each text to the longest pair before it cuts the pair.

    0.23.2 does, 0.23.3 does not: of two texts that are both longer, the first then counts as no longer than the second,
    and an odd token goes to the other of them.

    Args:
        backend: A tokenizer's backend, which is left as it is.
        room: The tokens that it puts around a pair.
    """
    from tokenizers import Tokenizer

    probe = Tokenizer.from_str(backend.to_str())
    first, second = "a " * (room + 9), "a " * (room + 8)
    lengths = np.asarray(
        [[len(probe.encode(text, add_special_tokens=False).ids) for text in (first, second)]], np.int64
    )
    probe.enable_truncation(room + 5)
    found = probe.encode(first, second).sequence_ids
    each = np.minimum(lengths, room + 5)
    kept = cut_lengths(each, 5, "longest_first")
    assert kept is not None
    return [found.count(0), found.count(1)] == kept[0].tolist() and bool((lengths[0, 0] > lengths[0, 1]).all())
