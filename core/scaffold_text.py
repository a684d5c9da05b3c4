"""The words that the files of a new plugin are filled with: names, and what was found as Python source."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from .contracts import CONTRACT, Family, Precision
from .discovery import Plugin

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .fitting import Facts, Sizes

WIDTH = 120  # of a line in the files; their pyproject.toml says the same to ruff

# What is written out though it is the default: the first that an author will want to change.
_TOLD = ("mode", "normalize", "position_offset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """The classes that the new family is for, and the arguments of its sample configs.

    Args:
        config: The config class that transformers has: of the type itself, or of the family it is like.
        own: Whether the distribution brings classes of its own, over these.
        sizes: Arguments for the tiny and the base config.
    """

    config: type[PretrainedConfig]
    own: bool
    sizes: dict[str, Sizes]


def plugin_words(name: str, kind: str, encoder: Encoder, owners: Sequence[Plugin]) -> dict[str, str]:
    """What the templates name: distribution, modules, classes.

    Args:
        name: The plugin's name.
        kind: The model type that it takes.
        encoder: What it is for.
        owners: Installed plugins that take the type already.
    """
    import transformers

    stem = name.lower().replace("-", "_")
    module, modeling = f"burnish_{stem}", f"modeling_{stem}"
    config, model, title = _class_names(name, kind, encoder)
    words = {
        "name": name, "stem": stem, "module": module, "model_type": kind, "contract": str(CONTRACT),
        "transformers": transformers.__version__, "title": title, "class_name": _camel(name), "config": config,
        "model": model, "modules": python([module]), "register": "", "modeling_row": "", "plugins": "",
        "when_on": f"Once it is installed it is on, for every model whose config says `model_type: {kind}`.",
    }  # fmt: skip
    if encoder.own:
        like = encoder.config.__name__, _model_class(encoder.config)
        words |= {
            "like_config": like[0], "like_model": like[1], "modules": python([module, modeling]),
            "register": "    register()\n",
            "modeling_imports": _imports([*_from(encoder.config, ["AutoConfig", "AutoModel"], *like)]),
            "modeling_row": f"| `{modeling}.py` | the encoder, and how transformers gets to know it |\n",
        }  # fmt: skip
    if owners:
        whose = _labels(owners)
        about = _comment(f"Without this the run would be about {whose}, which takes the type too.", 4)
        words["plugins"] = f'{about}\n    plugins = ("burnish-{name}",)'
        when = (
            f"Models of type `{kind}` are taken by {whose} too. This plugin takes them where it is named: "
            f'`plugins=["burnish-{name}"]` in Python, `--plugins burnish-{name}` on the command line.'
        )
        words["when_on"] = "\n".join(wrap(when, WIDTH))
    return words


def _labels(owners: Iterable[Plugin]) -> str:
    return " and ".join(sorted({owner.label for owner in owners}))


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in re.split(r"[-_]", name))


def _class_names(name: str, kind: str, encoder: Encoder) -> tuple[str, str, str]:
    """(config class, model class of its own, the architecture's name in prose)."""
    if not encoder.own:
        config = encoder.config.__name__
        return config, "", config.removesuffix("Config")
    import transformers

    stem = _camel(kind)
    # A config class of a name that transformers has already would take that one's place in its tables.
    stem = f"Own{stem}" if hasattr(transformers, f"{stem}Config") else stem
    return f"{stem}Config", f"{stem}Model", _camel(name)


def _model_class(config: type[PretrainedConfig]) -> str:
    from transformers import MODEL_MAPPING

    kind: Any = MODEL_MAPPING[config]
    return str(kind.__name__)


def _from(config: type[PretrainedConfig], names: Sequence[str], *own: str) -> Iterable[tuple[str, list[str]]]:
    """(module, names) of imports: `names`, and `own` from where the architecture has them."""
    import transformers

    if all(hasattr(transformers, name) for name in own):
        yield "transformers", [*names, *own]
    else:
        yield "transformers", [*names]
        package = config.__module__.rpartition(".")[0]
        yield package, [*own]


def _imports(lines: Iterable[tuple[str, Iterable[str]]]) -> str:
    """`from … import …` lines in the order that ruff wants, broken where they are too long."""
    written = []
    for module, names in lines:
        ordered = sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name.lower()))
        line = f"from {module} import {', '.join(ordered)}"
        broken = f"from {module} import (\n" + "".join(f"    {name},\n" for name in ordered) + ")"
        written.append(line if len(line) <= WIDTH else broken)
    return "\n".join(written)


def family_words(family: Family, facts: Facts, encoder: Encoder, words: Mapping[str, str]) -> dict[str, str]:
    """What the templates say of the architecture.

    Args:
        family: The one it is like.
        facts: What was found.
        encoder: What it was found on.
        words: From `plugin_words`.
    """
    contract = ["Family", "FamilySpec", "LoraTargets", "Machine", "Patch", "Pooling"]
    contract += ["Packing"] if facts.packing else []
    contract += ["Precision"] if facts.precision != Precision() else []
    classes = ["PretrainedConfig", "PreTrainedModel"]
    lines = [("burnish.core.contracts", contract), ("burnish.core.hookspecs", ["hookimpl"])]
    lines += _from(encoder.config, classes, *([] if encoder.own else [words["config"]]))
    own = f"\n\nfrom modeling_{words['stem']} import {words['config']}, register" if encoder.own else ""
    return {
        "like": family.name,
        "sizes": python(encoder.sizes),
        "imports": _imports(lines) + own,
        "pooling": python(facts.pooling, 8),
        "lora": python(facts.lora, 8),
        "lora_comment": _comment(_lora_words(facts)),
        "packing": python(facts.packing, 8),
        "packing_comment": _comment(_packing_words(facts, family)),
        "precision": _precision(facts.precision),
        "checkpointing": _comment(_checkpointing_words(facts)),
        "leaves": python(_leaves(facts), 8),
    }


def _comment(text: str, indent: int = 8) -> str:
    margin = " " * indent + "# "
    return "\n".join(wrap(text, WIDTH, initial_indent=margin, subsequent_indent=margin))


def _lora_words(facts: Facts) -> str:
    left = f" Nothing reads the output of {_and(facts.dead)}." if facts.dead else ""
    if facts.lora.names:
        return f"The linear layers that LoRA adapts, by the ends of their paths: all that there are.{left}"
    return f"LoRA adapts every linear layer{' else' if left else ''}: {_and(facts.layers)}.{left}"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _packing_words(facts: Facts, family: Family) -> str:
    if facts.packing is not None:
        return f"How all texts of a batch stand in one row, without padding. Tried: {facts.packing_reason}."
    ours = ""
    if family.packing is not None and family.packing.attention == "patch":
        ours = f" Family {family.name} packs by patches of its own, which are not part of this plugin."
    return f"Padded input only. Tried without padding: {facts.packing_reason}.{ours}"


def _precision(precision: Precision) -> str:
    if precision != Precision():
        about = _comment("The dtypes it may be in: under adapters, in full fine-tuning, and never.")
        return f"{about}\n        precision={python(precision, 8)},"
    about = 'Any dtype. If one overflows: precision=Precision(refused={"float16": "why, in a line that users read"}).'
    return _comment(about)


def _checkpointing_words(facts: Facts) -> str:
    if facts.checkpointing:
        return (
            "Gradient checkpointing is transformers' own. If that is wrong here: checkpointing=, a function as patches."
        )
    return "transformers has no gradient checkpointing for it. To bring one: checkpointing=, a function as patches."


def _leaves(facts: Facts) -> tuple[str, ...]:
    lines = ["no patches: attention, norms and activations are transformers' own"]
    lines += [] if facts.packing else ["input stays padded: every padding token is computed in every layer"]
    return (*lines, *([] if facts.checkpointing else ["no gradient checkpointing"]))


def found(
    kind: str, encoder: Encoder, family: Family, facts: Facts, owners: Sequence[Plugin]
) -> Iterable[tuple[str, str]]:
    """(what, value) of all that was found, for the author to read; the arguments are those of the functions above."""
    classes = encoder.config.__name__.removesuffix("Config")
    place = "until yours takes its place (transformers does not know the type)" if encoder.own else "of transformers"
    yield "architecture", f"{kind}: {classes} {place}"
    yield "pooling", f"{facts.pooling.mode}, as family {family.name} says"
    left = f"; not {_and(facts.dead)}, which nothing reads" if facts.dead else ""
    yield "LoRA", f"{_and(facts.layers)}{left}"
    yield "input", f"{'packed' if facts.packing else 'padded'}: {facts.packing_reason}"
    yield "checkpointing", "transformers' own" if facts.checkpointing else "none in transformers"
    if owners:
        yield "note", f"{_labels(owners)} takes {kind} too: users of this plugin must name it"


def python(value: Any, indent: int = 0) -> str:
    """A value as Python source the way ruff formats it: on one line if it fits, else one entry a line."""
    pad = " " * (indent + 4)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        entries = [f"{python(key)}: {python(item, indent + 4)}" for key, item in value.items()]
        return "{\n" + "".join(f"{pad}{entry},\n" for entry in entries) + " " * indent + "}" if entries else "{}"
    if isinstance(value, tuple | list):
        opening, closing = "()" if isinstance(value, tuple) else "[]"
        entries = [python(item, indent + 4) for item in value]
        comma = "," if isinstance(value, tuple) and len(entries) == 1 else ""
        line = f"{opening}{', '.join(entries)}{comma}{closing}"
    elif hasattr(value, "__dataclass_fields__"):
        opening, closing = f"{type(value).__name__}(", ")"
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        told = {name: part for name, part in parts.items() if name in _TOLD or part != getattr(type(value)(), name)}
        entries = [f"{name}={python(part, indent + 4)}" for name, part in told.items()]
        line = f"{opening}{', '.join(entries)}{closing}"
    else:
        return repr(value)
    if "\n" not in line and indent + len(line) <= WIDTH - 20:
        return line
    return opening + "\n" + "".join(f"{pad}{entry},\n" for entry in entries) + " " * indent + closing
