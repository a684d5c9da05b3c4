"""The model card: Sentence Transformers' machinery with a template of ours, and sections between markers.

A section is there once, and is written again by every save that knows more. A card that somebody else wrote keeps its
words and gets the sections at its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import card_serving
from .card_facts import CardFacts, Cost, Held
from .deploy import longest_of

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

    from .evaluate import Metric
    from .prepared import Prepared

TEMPLATE = Path(__file__).parent / "model_card.md.j2"
PROVENANCE = "training provenance"
_FIGURES = {"ndcg": "nDCG", "mrr": "MRR", "auroc": "AUROC", "macro_f1": "Macro F1", "micro_f1": "Micro F1",
            "mse": "Mean squared error"}  # fmt: skip
# In the order in which a card that has none of them gets them.
SECTIONS = ("results", "serving", "limits", "cost", PROVENANCE)


def adopt(model: Prepared) -> None:
    """Have Sentence Transformers write this model's card with our template, unless the user gave it another, and note
    on `model.card` what it shall say beside that."""
    model.card = CardFacts()
    data: Any = model.model_card_data
    if data.template_path == type(data).__dataclass_fields__["template_path"].default:
        data.template_path = TEMPLATE


def complete(
    model: Prepared, served: BaseModel, folder: Path, record: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]]
) -> None:
    """Fill the sections of the card that was just saved; without a card nothing is done.

    Args:
        model: The model that the user holds.
        served: The model that was saved: the same, or the one with its adapter folded in.
        folder: Where.
        record, trainings: As `rows` takes them. A card of somebody else's is left as it is without a training.
    """
    path = folder / "README.md"
    if not path.exists():
        return
    card = path.read_text(encoding="utf-8")
    ours = _marks("serving")[0] in card
    if not ours and not trainings:
        return
    made = {
        "results": results(model.card),
        "serving": card_serving.section(model, served, folder, used=ours),
        "limits": limits(model, served),
        "cost": cost(model.card.cost),
        PROVENANCE: provenance(record, trainings),
    }
    for name in SECTIONS:
        if made[name]:
            card = with_section(card, name, made[name])
    # The templates leave blank lines where a part of theirs has nothing to say.
    path.write_text(re.sub(r"\n{3,}", "\n\n", card) if ours else card, encoding="utf-8")


def results(facts: CardFacts) -> str:
    """Held-out figures before and after, in Markdown; empty where none are known."""
    if not facts.results:
        return ""
    lines = ["## How good it is", ""]
    for held in facts.results:
        lines += [
            f"On {_escape(held.data)}, held out: {held.count}. Ranges are 95% intervals.",
            "",
            *_figures(held),
            "",
        ]
    return "\n".join(lines).rstrip()


def _figures(held: Held) -> list[str]:
    columns = [
        "Figure",
        *(["Before training"] if held.before else []),
        "This model",
        *(["Change"] if held.change else []),
    ]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for name, after in held.after.items():
        cells = [_figure(name), *([_range(held.before[name])] if held.before else []), f"**{_range(after)}**"]
        if held.change:
            cells.append(_range(held.change[name], sign="+") if name in held.change else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _figure(name: str) -> str:
    """A figure as people write it."""
    word, at, depth = name.partition("@")
    return _FIGURES.get(word, word.replace("_", " ").capitalize()) + at + depth


def _range(metric: Metric, sign: str = "") -> str:
    return f"{metric.mean:{sign}.3f} ({metric.low:{sign}.3f} to {metric.high:{sign}.3f})"


def cost(found: Cost | None) -> str:
    """What the training took, in Markdown; empty where that is not known."""
    if found is None:
        return ""
    devices = f"{found.devices} × {found.hardware}" if found.devices > 1 else found.hardware
    steps = f"steps {found.first:,} to {found.last:,}" if found.first else f"{found.last:,} steps"
    if found.measured:
        energy = "measured by CodeCarbon, see below"
    elif found.kilowatt_hours is None:
        energy = "not estimated: the device's power limit cannot be read"
    else:
        power = f"{found.watts:.0f} W" + (f" for each of {found.devices}" if found.devices > 1 else "")
        energy = f"at most {_short(found.kilowatt_hours)} kWh, an estimate: the time at the device's limit of {power}"
    rows = [("Hardware", _escape(devices)), ("Time", f"{_duration(found.seconds)} for {steps}"), ("Energy", energy)]
    table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(["### What the training took", "", *table])


def _short(number: float) -> str:
    """A number with two digits that count, not in powers of ten."""
    return (
        f"{number:.6f}".rstrip("0").rstrip(".")
        if number < 0.001
        else f"{number:.2g}"
        if number < 10
        else f"{number:.0f}"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def limits(model: Prepared, served: BaseModel) -> str:
    """What the model is not known to do, or known not to do."""
    held = [one.data for one in model.card.results]
    lines = [
        f"It was measured on {_escape(', '.join(held))} and on nothing else; other texts may give other figures."
        if held
        else "Burnish knows of no figures on held-out data for it: measure it on your own before you rely on it.",
        "It knows the languages and subjects of its base model and its training data, and has their biases.",
    ]
    if (longest := longest_of(served)) is not None:
        lines.append(f"It reads the first {longest} tokens of a text and drops the rest without a word.")
    if isinstance(prompts := getattr(served, "prompts", None), dict) and any(prompts.values()):
        lines.append("Without its prompts, or with other ones, it is another model.")
    if (preparation := model.burnish) is not None:
        decision = preparation.decision
        lines += [f"Not in {dtype}: {reason}." for dtype, reason in decision.family.family.precision.refused.items()]
        if decision.precision.storage is not None:
            lines.append(f"The adapter was trained over a base in {decision.precision.storage}.")
    if getattr(model, "temperature", 1.0) != 1.0:
        lines.append("Its probabilities are calibrated by a temperature that only Burnish reads.")
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines)])


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


def provenance(record: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]]) -> str:
    """The table of `rows` in Markdown; empty without a training. Takes what `rows` takes."""
    lines = [f"| {name} | {_escape(value)} |" for name, value in rows(record, trainings)]
    told = "What Burnish set this model up with for training. `burnish.json` tells it in full."
    return (
        "\n".join(["## Training provenance", "", told, "", "| Part | What |", "| --- | --- |", *lines]) if lines else ""
    )


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- burnish: {name} -->", f"<!-- burnish: end of {name} -->"


def with_section(card: str, name: str, text: str) -> str:
    """The card with a section in place of an earlier one of that name, or else at its end."""
    first, last = _marks(name)
    section = f"{first}\n{text}\n\n{last}"
    pattern = re.compile(rf"\n*{re.escape(first)}.*?{re.escape(last)}\n*", re.DOTALL)
    found = pattern.search(card)
    if found is None:
        return f"{card.rstrip()}\n\n{section}\n"
    before, after = card[: found.start()], pattern.sub("\n\n", card[found.end() :]).strip("\n")
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
