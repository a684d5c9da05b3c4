"""Which length to try next, for context.py: from tries that fit and tries that do not to the longest that fits.

Loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Line = dict[str, Any]

WITHIN = 0.05
"""How near the longest length that fits and the shortest that does not must be."""
SLOW = 20.0
"""Seconds of a step above which a try is one step."""


@dataclass(frozen=True, slots=True)
class Try:
    """One length that was tried.

    Args:
        length: Tokens of each text.
        fits: Whether the step was done within the limit.
        peak: Bytes that torch allocated at the most; None where that is not known.
        room: Bytes that torch was allowed; None without a limit.
        step_s: Seconds of the last step; None of one that did not fit.
        steps: Steps that were run.
        process_gib: The device's figure.
        process_by: How that is known.
    """

    length: int
    fits: bool
    peak: int | None = None
    room: int | None = None
    step_s: float | None = None
    steps: int = 0
    process_gib: float | None = None
    process_by: str | None = None


def next_length(tries: Sequence[Try], start: int, longest: int) -> int | None:
    """The length to try next; None if the search is at its end."""
    good = sorted({one.length: one for one in tries if one.fits}.items())
    low = good[-1][0] if good else 0
    high = min((one.length for one in tries if not one.fits), default=None)
    if low >= longest or (high is not None and (high <= 64 or (low and high <= low * (1 + WITHIN) + 1))):
        return None
    if not good:
        return start if high is None else _whole(high / 2)
    ceiling = longest if high is None else high
    if len(good) == 1:
        wanted = low * 4 if high is None else math.sqrt(low * high)
    elif high is not None and len(tries) > 8:  # the line does not tell: halve
        wanted = math.sqrt(low * high)
    else:
        wanted = foreseen([one for _, one in good]) or low * 2
        # A little above what fits, or a little below what does not, ends the search.
        wanted = max(wanted, low * (1 + WITHIN))
        if high is not None and wanted > high / (1 + WITHIN):
            failed = next((place for place, one in enumerate(reversed(tries)) if one.fits), len(tries))
            steps = 2 ** max(0, failed - 1)  # 5% less, then 10, then 20
            wanted = max(high / (1 + WITHIN) ** steps, math.sqrt(low * high))
    found = min(_whole(wanted), longest)
    if low < found < ceiling or (high is None and found == longest):
        return found
    return _between(low, high)


def _whole(length: float) -> int:
    return max(64, int(length) // 64 * 64)


def _between(low: int, high: int | None) -> int | None:
    middle = low + 64 if high is None else (low + high) // 2
    return middle if high is None or low < middle < high else None


def foreseen(good: Sequence[Try]) -> float | None:
    """The length that just fits, by the line through the two longest; None if memory is not known or does not grow."""
    first, second = good[-2:]
    if first.peak is None or second.peak is None or second.room is None or second.peak <= first.peak:
        return None
    slope = (second.peak - first.peak) / (second.length - first.length)
    return second.length + (0.985 * second.room - second.peak) / slope


def seconds_of(tries: Sequence[Try], length: int) -> float:
    """About how long a step of that length takes, growing with its square."""
    timed = [one for one in tries if one.step_s is not None]
    return max(((one.step_s or 0.0) * (length / one.length) ** 2 for one in timed[-1:]), default=0.0)


def affordable(tries: Sequence[Try], left: float) -> int | None:
    """The longest length of which one step takes about the seconds that are left, to foresee the limit from. None where
    that is hardly longer than what has fitted."""
    best = max((one for one in tries if one.fits), key=lambda one: one.length, default=None)
    if best is None or not best.step_s or left <= 0:
        return None
    found = _whole(best.length * math.sqrt(left / (1.6 * best.step_s)))
    high = min((one.length for one in tries if not one.fits), default=None)
    return found if found >= 1.25 * best.length and (high is None or found < high) else None


def search(bench: Any, start: int, longest: int, end: float) -> tuple[list[Try], bool]:
    """(all tries, whether the search came to its end before `end` on the monotonic clock).

    Args:
        bench: What has `attempt(length, steps)`, which gives a `Try`.
        start: The first length.
        longest: The last length that there may be.
        end: On the monotonic clock.
    """
    tries: list[Try] = []

    def attempt(length: int, steps: int) -> Try:
        tries.append(bench.attempt(length, steps))
        print("TRY " + json.dumps(asdict(tries[-1])), flush=True)
        return tries[-1]

    while True:
        length = next_length(tries, start, longest)
        step = seconds_of(tries, length or 0)
        steps = 1 if step > SLOW else 2
        if length is None:
            best = max((one for one in tries if one.fits), key=lambda one: one.length, default=None)
            if best is None or best.steps > 1 or time.monotonic() + 1.2 * 3 * (best.step_s or 0.0) > end:
                return tries, True
            tries.remove(best)
            if attempt(best.length, 3).fits:
                return tries, True
        elif time.monotonic() + 1.2 * step * steps > end:
            nearer = affordable(tries, end - time.monotonic())
            if nearer is None:
                return tries, False
            attempt(nearer, 1)
        else:
            attempt(length, steps)


def result(known: Line, tries: Sequence[Try], complete: bool) -> Line:
    """The line of a search. `foreseen_tokens`, of one that its time ended: what the line through the memory of its two
    longest steps gives."""
    good = max((one for one in tries if one.fits), key=lambda one: one.length, default=None)
    bad = min((one.length for one in tries if not one.fits), default=None)
    fitted = sorted((one for one in tries if one.fits), key=lambda one: one.length)
    line = None if complete or len(fitted) < 2 else foreseen(fitted)
    found = {
        "foreseen_tokens": None if line is None else int(min(line, bad or line)),
        "longest_tokens": good.length if good else None,
        "shortest_that_does_not_fit": bad,
        "complete": complete,
        "peak_gib": None if good is None or good.peak is None else round(good.peak / 2**30, 3),
        "process_gib": good.process_gib if good else None,
        "process_by": good.process_by if good else None,
        "step_s": good.step_s if good else None,
        "steps": good.steps if good else 0,
        "tries": [[one.length, one.fits] for one in tries],
    }
    return {**known, **found, **({} if good else {"error": "no length fits"})}
