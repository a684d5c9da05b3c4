"""The conformance suite of a family: every check by name, in the order in which an author wants to see them fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from . import exactness, isolation, training
from .subject import NotApplicable, Subject

Check = Callable[[Subject], str]

CHECKS: dict[str, Check] = {
    "equals stock": exactness.stock_exactness,
    "patches": exactness.patch_exactness,
    "packed equals padded": exactness.packed_exactness,
    "causal order": exactness.causal_order,
    "padding side": exactness.padding_side,
    "gradient checkpointing": exactness.checkpointing_exactness,
    "undoing": exactness.undoing,
    "dtypes": exactness.precision,
    "master weights": training.masters,
    "dropout": training.dropout,
    "LoRA reach": training.lora_reach,
    "save, merge, reload": training.merging,
    "state dict": training.state_dict,
    "prompts": training.prompts,
    "heads": training.heads,
    "trainer": training.trainer,
    "copies": training.copies,
    "neighbours": isolation.neighbours,
    "nothing global": isolation.globals_untouched,
    "files untouched": isolation.files_untouched,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One check's outcome: what was measured, or why it failed or says nothing."""

    check: str
    state: Literal["passed", "failed", "not applicable"]
    words: str


def run(subject: Subject, only: Sequence[str] = ()) -> Iterator[Result]:
    """Each check in turn; one that fails does not keep the next from running.

    Args:
        subject: What is examined.
        only: Names of checks; empty means all.
    """
    for name, check in CHECKS.items():
        if only and name not in only:
            continue
        try:
            yield Result(check=name, state="passed", words=check(subject))
        except NotApplicable as reason:
            yield Result(check=name, state="not applicable", words=str(reason))
        except Exception as error:  # whatever a stranger's plugin raises is its failure of this check
            told = " ".join(str(error).split())
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            yield Result(check=name, state="failed", words=f"{kind}{told}" or type(error).__name__)
