"""The part of a model card that tells how the model was trained, between markers so that it is there once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_START, _END = "<!-- burnish: training provenance -->", "<!-- burnish: end of training provenance -->"
_SECTION = re.compile(rf"\n*{re.escape(_START)}.*?{re.escape(_END)}\n*", re.DOTALL)


def rows(record: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(what, what it was) of the last training.

    Args:
        record: What `provenance.record` made.
        trainings: Its trainings, the last of which is told; none gives no rows.
    """
    if not trainings:
        return []
    last = trainings[-1]
    # Loaded for inference and merged then, the weights are no longer as the training left them.
    adapter = record["adapter"] or last["adapter"]
    parts = [part for part in (last["family"], last["backend"], *last["kernels"]) if part is not None]
    distributions = dict.fromkeys(f"{part['distribution']} {part['version']}" for part in parts)
    kernels = [f"{_part(kernel)} for {kernel['operation']}" for kernel in last["kernels"]]
    libraries = [f"{name} {version}" for name, version in last["versions"].items() if version != "not installed"]
    quantization = last["precision"]["quantization"]
    return [
        ("Family", _part(last["family"])),
        ("Backend", _part(last["backend"])),
        ("Kernels", ", ".join(kernels) or "none"),
        ("Plugins", ", ".join(distributions)),
        ("Patches", "; ".join(_patch(patch) for patch in last["patches"]) or "none"),
        ("Weights", last["precision"]["dtype"] + (f", stored in {quantization}" if quantization else "")),
        ("Adapter", _adapter(adapter) if adapter else "none"),
        ("Input", f"{last['input']['layout']} ({last['input']['reason']})"),
        ("Libraries", ", ".join(libraries)),
        *([("Before", f"{len(trainings) - 1} other set-up(s), told in burnish.json")] if trainings[1:] else []),
    ]


def section(record: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]]) -> str:
    """The section in Markdown, markers included. Takes what `rows` takes."""
    lines = [f"| {name} | {_escape(value)} |" for name, value in rows(record, trainings)]
    told = "What Burnish set this model up with for training. `burnish.json` tells it in full."
    table = ["| Part | What |", "| --- | --- |", *lines]
    return "\n".join([_START, "## Training provenance", "", told, "", *table, "", _END])


def with_section(card: str, section: str) -> str:
    """The card with the section in place of an earlier one, or else at its end."""
    found = _SECTION.search(card)
    if found is None:
        return f"{card.rstrip()}\n\n{section}\n"
    before, after = card[: found.start()], _SECTION.sub("\n\n", card[found.end() :]).strip("\n")
    return f"{before}\n\n{section}\n" + (f"\n{after}\n" if after else "")


def _part(part: Mapping[str, str] | None) -> str:
    if part is None:
        return "none"
    return f"{part['name']} of {part['plugin']} ({part['distribution']} {part['version']})"


def _patch(patch: Mapping[str, Any]) -> str:
    old, new = (str(patch[side]).rpartition(".")[2] for side in ("old", "new"))
    return f"{patch['modules']} {old} → {new}, {patch['state']} ({patch['why']}; {patch['owner']})"


def _adapter(adapter: Mapping[str, Any]) -> str:
    settings = [f"{key}={adapter[key]}" for key in ("r", "lora_alpha") if adapter[key] is not None]
    flags = [key for key in ("use_rslora", "use_dora") if adapter[key]]
    return ", ".join([adapter["type"], *settings, *flags, *(["merged into the weights"] if adapter["merged"] else [])])


def _escape(text: str) -> str:
    """A table cell that shows the text as it is."""
    return text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
