"""What each test found out about a consumer and a family: the table that `make verify-exports` prints and writes down.

A test asks for the fixture `note` and calls it once for each folder that it had read:

    note("faiss", "bert", verdict)                                # a Verdict: right or wrong, with its figures
    note("tei", "bert", "static", kind="scores", version="1.9")   # rules were read, nothing ran
    note("gguf", "mpnet", "refused", reason="no architecture")    # we, or the consumer, say no: and why

Rows of tests of broken folders are not noted: the table is about what Burnish saves. `reason` beside a verdict that is
good says what is to be known of it. What becomes of rows is in benchmarks/exports.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from burnish.core.environment import describe_environment
from burnish.core.verifying import Verdict

State: TypeAlias = Literal["verified", "static", "wrong", "refused"]
KINDS = ("embeddings", "scores")
# The key under which rows travel from the process of a test to the one that prints them.
PROPERTY = "exports"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One consumer and one folder.

    Args:
        consumer: Its name, as model cards have it: "onnxruntime", "llama.cpp".
        version: What ran, or what the rules were read of.
        family: A family's name, such as "bert".
        kind: "embeddings" or "scores".
        state: How it went.
        cosine: The smallest with a golden vector; None for scores, and where nothing ran.
        difference: The largest of a number; None where nothing ran.
        reason: What is wrong, or why it is refused.
        what: Which folder: "minilm merged", "onnx int8".
        rounded: Whether its weights were rounded, for which the figures are worse and no state of the family's.
    """

    consumer: str
    version: str
    family: str
    kind: str
    state: State
    cosine: float | None = None
    difference: float | None = None
    reason: str = ""
    what: str = ""
    rounded: bool = False

    def __post_init__(self) -> None:
        where = f"note({self.consumer!r}, {self.family!r})"
        if self.state not in get_args(State) or self.kind not in KINDS:
            raise ValueError(f"{where}: state is one of {get_args(State)}, kind one of {KINDS}")
        if self.state in ("wrong", "refused") and not self.reason:
            raise ValueError(f"{where}: say why it is {self.state}")
        if self.state in ("verified", "static") and not self.version:
            raise ValueError(f"{where}: say which version it was")


def noting(properties: list[tuple[str, object]]) -> Callable[..., None]:
    """What the fixture `note` is: rows go to a test's own properties."""

    def note(
        consumer: str, family: str, found: Verdict | State, *, kind: str | None = None, version: str = "",
        reason: str = "", what: str = "", rounded: bool = False,
    ) -> None:  # fmt: skip
        """Note a row: see the module. `version` is taken from a verdict's versions where none is given."""
        figures: dict[str, Any] = {}
        if isinstance(found, Verdict):
            figures = {"cosine": found.cosine, "difference": found.difference}
            kind = kind or ("scores" if found.cosine is None else "embeddings")
            version = version or _version(consumer, found.versions)
            reason = reason or "; ".join(found.faults)
        state = found if not isinstance(found, Verdict) else "verified" if found.good else "wrong"
        row = Row(
            consumer=consumer, version=version, family="bert" if family == "minilm" else family,
            kind=kind or "embeddings", state=state, reason=reason, what=what or family, rounded=rounded, **figures,
        )  # fmt: skip
        properties.append((PROPERTY, asdict(row)))

    return note


def _version(consumer: str, versions: dict[str, str]) -> str:
    """The consumer's own version, or that of what its script names first."""
    return versions.get(consumer) or versions.get(consumer.replace("-", "_")) or next(iter(versions.values()), "")


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a table of text, one line each, consumer by consumer."""
    found = []
    for row in sorted(rows, key=lambda row: (row["consumer"], row["family"], row["kind"], row["what"], row["version"])):
        cosine = "" if row["cosine"] is None else f"{row['cosine']:.6f}"
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        state = row["state"] if row["passed"] else f"{row['state']}, but the test failed"
        words = f"{state}: {row['reason']}" if row["reason"] else state
        found.append(
            f"{row['consumer']:22} {row['version']:12} {row['family']:12} {row['kind']:10} {cosine:9} {difference:8} "
            f"{row['what']:28} {words}"
        )
    return found


def write_logs(rows: list[dict[str, Any]], ran: set[str], folder: Path) -> list[Path]:
    """Write the rows to dated logs, those of long tests to one of their own.

    A log of today keeps what tests noted that are not among those that ran now.
    """
    written = []
    head = {"date": date.today().isoformat(), **describe_environment("cpu")}
    for name, long in (("exports", False), ("exports-long", True)):
        part = [{key: value for key, value in row.items() if key != "long"} for row in rows if row["long"] == long]
        if part:
            path = folder / f"{name}-{head['date']}-cpu.jsonl"
            before = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
            part = [*(row for row in map(json.loads, before) if row["test"] not in ran), *part]
            path.write_text("".join(json.dumps(line) + "\n" for line in (head, *part)), encoding="utf-8")
            written.append(path)
    return written
