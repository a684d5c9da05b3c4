"""What is known of each consumer and family, by the newest logs of `make verify-exports` and `verify-exports-long`.

    python benchmarks/exports.py               core/verified_exports.json, which model cards read, and the table
    python benchmarks/exports.py --part table  only the table, in Markdown

A log is benchmarks/results/exports-DATE-cpu.jsonl or exports-long-DATE-cpu.jsonl, written with ARGS=--write-log: a line
for the machine, then one for each folder that a consumer read (tests/exports/noting.py). Both logs together make the
file; nothing else writes it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from burnish.core.card_serving import CONSUMERS

Row: TypeAlias = Mapping[str, Any]
Runs: TypeAlias = dict[str, dict[str, dict[str, Any]]]

RESULTS = Path(__file__).parent / "results"
FILE = Path(__file__).parents[1] / "core" / "verified_exports.json"
SCHEMA = 2
FAMILIES = ("bert", "distilbert", "gemma", "modernbert", "mpnet", "qwen3", "xlm_roberta")
KINDS = ("embeddings", "scores")
# What `burnish verify` calls some of them.
_NAMES = {"transformers-js": "transformers.js", "llama-cpp": "llama.cpp"}
# The state of several folders is the first of these that one of them has.
_ORDER = ("wrong", "verified", "static", "refused")
_SHOWN = {"static": "static", "refused": "no", "wrong": "**wrong**"}


def newest(folder: Path = RESULTS) -> list[Path]:
    """The newest log of each kind."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("exports-*.jsonl")):
        if match := re.fullmatch(r"exports-(long-)?\d{4}-\d\d-\d\d-cpu\.jsonl", path.name):
            found[match[1] or ""] = path
    return [found[kind] for kind in sorted(found)]


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, each with the log's date."""
    head, *found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{**row, "date": head["date"]} for row in found]


def summary(found: Iterable[Row]) -> Runs:
    """What is known of each consumer and "FAMILY KIND".

    Folders of rounded weights say nothing of a family, and neither does a test that failed: it is left out, so that
    what it is about counts as untested.
    """
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        if row["passed"] and not row["rounded"]:
            consumer = _NAMES.get(str(row["consumer"]), str(row["consumer"]))
            parts.setdefault((consumer, f"{row['family']} {row['kind']}"), []).append(row)
    runs: Runs = {}
    for (consumer, name), together in sorted(parts.items()):
        runs.setdefault(consumer, {})[name] = _one(together)
    return runs


def _one(together: Sequence[Row]) -> dict[str, Any]:
    state = min((row["state"] for row in together), key=_ORDER.index)
    those = [row for row in together if row["state"] == state]
    cosines = [row["cosine"] for row in those if row["cosine"] is not None]
    differences = [row["difference"] for row in those if row["difference"] is not None]
    return {
        "state": state,
        "versions": sorted({_short(row["version"]) for row in those if row["version"]}, key=_numbers),
        "date": max(row["date"] for row in those),
        "folders": len(those),
        "cosine": round(min(cosines), 6) if cosines else None,
        "difference": float(f"{max(differences):.1e}") if differences else None,
        "reasons": sorted({row["reason"] for row in those if row["reason"]}),
    }


def _short(version: str) -> str:
    """A version without the build that some name behind a dash."""
    return version.partition("-")[0] if version[0].isdigit() else version


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def text(runs: Runs) -> str:
    """The file's text: one line for each consumer and family."""
    lines = [f'{{\n  "schema": {SCHEMA},\n  "runs": {{']
    for place, (consumer, known) in enumerate(runs.items(), 1):
        entries = ",\n".join(f"      {json.dumps(name)}: {json.dumps(value)}" for name, value in known.items())
        lines.append(f"    {json.dumps(consumer)}: {{\n{entries}\n    }}{',' if place < len(runs) else ''}")
    return "\n".join([*lines, "  }", "}"]) + "\n"


def cell(known: Mapping[str, Any] | None) -> str:
    """A cell of the table: the smallest cosine or the largest difference where it was run."""
    if known is None:
        return ""
    if known["state"] != "verified":
        return _SHOWN[known["state"]]
    if known["cosine"] is not None:
        return f"{known['cosine']:.6f}"
    return "yes" if known["difference"] is None else f"{known['difference']:.0e}"


def tables(runs: Runs) -> dict[str, list[list[str]]]:
    """For each kind the headings and a row a consumer: its name, what ran, a cell for each family."""
    found = {}
    for kind in KINDS:
        families = [*FAMILIES, *sorted({name.split()[0] for known in runs.values() for name in known} - {*FAMILIES})]
        lines = [["Consumer", "Versions", *families]]
        for consumer in sorted(runs, key=lambda name: (CONSUMERS.index(name) if name in CONSUMERS else 99, name)):
            known = {name.split()[0]: value for name, value in runs[consumer].items() if name.endswith(kind)}
            if known:
                versions = sorted({one for value in known.values() for one in value["versions"]}, key=_numbers)
                lines.append([consumer, ", ".join(versions), *(cell(known.get(family)) for family in families)])
        found[kind] = lines
    return found


def reasons(runs: Runs) -> list[str]:
    """Why cells are "no" or wrong, and what is to be known of verified ones."""
    found: dict[tuple[str, str], list[str]] = {}
    for consumer, known in runs.items():
        for name, value in known.items():
            for reason in value["reasons"]:
                found.setdefault((consumer, reason), []).append(name)
    return [f"{consumer}, {', '.join(names)}: {reason}" for (consumer, reason), names in found.items()]


def plain(runs: Runs) -> list[str]:
    """The tables for a terminal."""
    lines = []
    for kind, table in tables(runs).items():
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines.append(f"{kind}: {'smallest cosine' if kind == 'embeddings' else 'largest difference of a logit'}")
        for line in table:
            cells = [one.ljust(width) for one, width in zip(line, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    return [*lines, *reasons(runs)]


def markdown(runs: Runs) -> str:
    """The tables for the documentation."""
    parts = []
    titles = {
        "embeddings": "Embeddings: the smallest cosine with a golden vector.",
        "scores": "Rerankers and classifiers: the largest difference of a logit.",
    }
    for kind, table in tables(runs).items():
        lines = [table[0], ["---"] * len(table[0]), *table[1:]]
        body = "\n".join("| " + " | ".join(one.replace("|", "\\|") for one in line) + " |" for line in lines)
        parts.append(f"{titles[kind]}\n\n{body}")
    return "\n\n".join([*parts, "\n".join(f"* {reason}" for reason in reasons(runs))])


def main() -> int:
    """Write the file, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("table",))
    given = parser.parse_args()
    if given.part == "table":
        print(markdown(json.loads(FILE.read_text(encoding="utf-8"))["runs"]))
        return 0
    logs = newest()
    runs = summary(row for path in logs for row in rows(path))
    FILE.write_text(text(runs), encoding="utf-8")
    print(f"{FILE.name}: from {', '.join(path.name for path in logs)}")
    print("\n".join(plain(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
