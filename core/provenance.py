"""How a saved model came about: `burnish.json`, written at the root of every saved folder and read with it.

It holds what was decided when the model was loaded and what has become of it since, nothing that tells two saves of one
model apart: no time, no path of this machine. Plain Sentence Transformers does not read the file and does not need it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .contracts import CONTRACT
from .discovery import OWN, Plugin
from .environment import versions
from .model_card import rows
from .patching import PatchPlan

if TYPE_CHECKING:
    from .prepared import Prepared
    from .registry import Registry

Record: TypeAlias = dict[str, Any]

FILE = "burnish.json"
SCHEMA = 1
# Former records that a file keeps, the newest ones.
KEPT = 5

_PART = {"name": str, "plugin": str, "distribution": str, "version": str}
_PATCH = {"old": str, "new": str, "modules": int, "owner": str, "state": str, "why": str}
_ADAPTER = {"type": str, "r": (int, None), "lora_alpha": (int, float, None), "target_modules": (str, [str], None),
            "use_rslora": bool, "use_dora": bool, "merged": bool}  # fmt: skip
# What is read back must have this shape: a type, one of several in a tuple, a list of one kind, the keys of a mapping.
_SHAPE: dict[str, Any] = {
    "schema": int, "burnish": str, "contract": int, "purpose": str, "family": (_PART, None), "backend": (_PART, None),
    "kernels": [{"operation": str, **_PART}], "patches": [_PATCH], "input": {"layout": str, "reason": str},
    "precision": {"dtype": str, "quantization": (str, None), "reason": str}, "checkpointing": str, "pooling": str,
    "adapter": (_ADAPTER, None), "left_out": [{"plugin": str, "distribution": str, "version": str, "reason": str}],
    "versions": {str: str},
}  # fmt: skip
# The keys that say how a model was trained; records that agree in them tell of one set-up.
_SET_UP = ("burnish", "contract", "purpose", "family", "backend", "kernels", "patches", "checkpointing", "versions")
# An absolute path of two parts or more, or one on a Windows drive. What a plugin raised may name the user's folders.
_PATH = re.compile(
    r"""(?<![\w:/.<~])(?:[A-Za-z]:[\\/]|/(?=[^\s/'"]+/[^\s/'"]))(?:[^\s/\\'":,;()]+[/\\])*([^\s/\\'":,;()]+)"""
)
_QUOTED_PATH = re.compile(r"""(['"])(?:[A-Za-z]:)?[\\/][^'"]*[\\/]([^'"\\/]+)\1""")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What the `burnish.json` of a loaded model says, kept on it as `model.trained_with`; print it to read it.

    Args:
        text: The file's content, checked and in one form.
    """

    text: str

    @property
    def record(self) -> Record:
        """The whole record, a fresh copy at each call; its fields stand in docs/training.md."""
        record: Record = json.loads(self.text)
        return record

    @property
    def trainings(self) -> list[Record]:
        """Every record of a load for training, oldest first, each without its own `trained_with`."""
        return trainings_of(self.record)

    def __str__(self) -> str:
        return "\n".join(f"  {name.lower():12} {value}" for name, value in rows(self.record, self.trainings))


def record(model: Prepared, *, merged: bool = False) -> Record | None:
    """What is known of how a model was set up for training, as plain values; None for one Burnish did not prepare.

    Args:
        model: As it is now: patches that were undone and input that was padded since are told so.
        merged: Whether the folder it is for holds the adapter folded into the weights.
    """
    from .tables import stored_tables

    preparation = model.burnish
    if preparation is None:
        return None
    decision, options = preparation.decision, preparation.decision.options
    trains, packed = options.purpose != "inference", preparation.packed is not None
    family, backend, attention = decision.family, decision.backend, decision.attention
    dtype = decision.precision.dtype or model.dtype
    tables = model.transformers_model is not None and stored_tables(model.transformers_model)
    used = [attention if packed else None, decision.tables if tables else None]
    # For inference nothing of what was chosen is used: the modules are stock.
    made: Record = {
        "schema": SCHEMA,
        "burnish": versions()[OWN],
        "contract": CONTRACT,
        "purpose": options.purpose,
        "family": _part(family.family.name, family.plugin) if trains else None,
        "backend": _part(backend.spec.name, backend.plugin) if trains else None,
        "kernels": [_kernel(choice.spec.operation, choice.spec.name, choice.plugin) for choice in used if choice],
        "patches": _patches(preparation.plan),
        "input": {"layout": "packed" if packed else "padded", "reason": decision.packed_reason},
        "precision": {
            "dtype": str(dtype).removeprefix("torch."),
            "quantization": decision.precision.storage,
            "reason": decision.precision.reason,
        },
        "checkpointing": preparation.checkpointing,
        "pooling": preparation.pooling,
        "adapter": _adapter(model, merged),
        "left_out": _left_out(decision.registry),
        "versions": versions(),
    }
    made = _plain(made, paths=False)
    former = model.trained_with.trainings if model.trained_with is not None else []
    return {**made, "trained_with": [one for one in former if _set_up(one) != _set_up(made)][-KEPT:]}


def write(model: Prepared, folder: Path, *, merged: bool = False) -> Record | None:
    """Write a model's record into a folder it was just saved to.

    Args:
        model: The model; nothing is written for one that Burnish did not prepare.
        folder: Where it was saved.
        merged: As in `record`.

    Returns:
        The record, None where there is none.
    """
    made = record(model, merged=merged)
    if made is not None:
        (folder / FILE).write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return made


def parse(text: str) -> Provenance:
    """A file's content, checked.

    Raises:
        ValueError: If it is not JSON, of another schema, or not of the shape that `record` makes.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if not isinstance(schema, int):
        raise ValueError("it names no schema")
    if schema != SCHEMA:
        raise ValueError(f"it is of schema {schema}, this Burnish reads {SCHEMA}")
    if fault := next(_faults(found, {**_SHAPE, "trained_with": [_SHAPE]}), None):
        raise ValueError(fault)
    return Provenance(json.dumps(_plain(found), ensure_ascii=False))


def trainings_of(made: Record) -> list[Record]:
    """Every record of a load for training in one, oldest first, each without its own `trained_with`."""
    former: list[Record] = list(made["trained_with"])
    own = {key: value for key, value in made.items() if key != "trained_with"}
    return [*former, own] if made["purpose"] != "inference" else former


def _set_up(made: Record) -> tuple[Any, ...]:
    adapter = {**(made["adapter"] or {}), "merged": None}
    precision = (made["precision"]["dtype"], made["precision"]["quantization"])
    return (*(made[key] for key in _SET_UP), made["input"]["layout"], precision, adapter)


def _part(name: str, plugin: Plugin) -> dict[str, str]:
    return {"name": name, "plugin": plugin.name, "distribution": plugin.distribution, "version": plugin.version}


def _kernel(operation: str, name: str, plugin: Plugin) -> dict[str, str]:
    return {"operation": operation, **_part(name, plugin)}


def _patches(plan: PatchPlan) -> list[Record]:
    """The plan's entries, those that differ in nothing but the module taken together, in the order of the plan."""
    groups = Counter(
        (_class(entry.claim.patch.old), _class(entry.claim.patch.new), entry.claim.owner, entry.state,
         entry.reason or entry.claim.patch.why)
        for entry in plan.entries
    )  # fmt: skip
    return [
        {"old": old, "new": new, "modules": modules, "owner": owner, "state": state, "why": why}
        for (old, new, owner, state, why), modules in groups.items()
    ]


def _class(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _adapter(model: Prepared, merged: bool) -> Record | None:
    transformer = model.transformers_model
    if transformer is None or not getattr(transformer, "_hf_peft_config_loaded", False):
        return None
    config = transformer.peft_config[transformer.active_adapters()[0]]
    kind, targets = config.peft_type, getattr(config, "target_modules", None)
    return {
        "type": str(getattr(kind, "value", kind)),
        "r": getattr(config, "r", None),
        "lora_alpha": getattr(config, "lora_alpha", None),
        "target_modules": targets if targets is None or isinstance(targets, str) else sorted(targets),
        "use_rslora": bool(getattr(config, "use_rslora", False)),
        "use_dora": bool(getattr(config, "use_dora", False)),
        "merged": merged,
    }


def _left_out(registry: Registry) -> list[Record]:
    """The plugins that were on and failed in this process."""
    failures = [failure for _, failure in sorted(registry.failures.items()) if failure.plugin.state == "on"]
    return [
        {"plugin": one.plugin.name, "distribution": one.plugin.distribution, "version": one.plugin.version,
         "reason": one.reason}
        for one in failures
    ]  # fmt: skip


def _plain(value: Any, *, paths: bool = True) -> Any:
    """The same with every text in one printable line; with `paths=False`, absolute paths are cut to their last part."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item, paths=paths) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, paths=paths) for item in value]
    if isinstance(value, str):
        line = "".join(letter if letter.isprintable() else " " for letter in value)
        line = line if paths else _PATH.sub(r"\1", _QUOTED_PATH.sub(r"\1\2\1", line))
        return " ".join(line.split())
    return value


def _faults(value: Any, shape: Any, where: str = "it") -> Iterator[str]:
    """Where a value is not of its shape; see `_SHAPE`."""
    if isinstance(shape, tuple):
        if all(any(_faults(value, one, where)) for one in shape):
            yield f"{where} is a {type(value).__name__}, or not complete"
    elif shape is None or isinstance(shape, type):
        if not isinstance(value, type(None) if shape is None else shape) or (shape is int and isinstance(value, bool)):
            yield f"{where} is a {type(value).__name__}"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{where} is a {type(value).__name__}, not a list"
        else:
            for item in value:
                yield from _faults(item, shape[0], f"an item of {where}")
    elif not isinstance(value, dict):
        yield f"{where} is a {type(value).__name__}, not a mapping"
    elif str in shape:
        for key, item in value.items():
            yield from _faults(item, shape[str], f"{key!r} of {where}")
    else:
        for key, part in shape.items():
            if key not in value:
                yield f"{where} has no {key!r}"
            else:
                yield from _faults(value[key], part, repr(key))
