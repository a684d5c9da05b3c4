"""`deploy.json`: what a server has to know of a saved model, at its root, with the checksums of its files.

It says nothing that tells two saves of one model apart: no time, no path. `golden.json` beside it (see `golden`) holds
what a server's answers are compared with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from . import dimensions
from .environment import versions
from .errors import ModelError

if TYPE_CHECKING:
    from torch import nn

Description: TypeAlias = dict[str, Any]

FILE = "deploy.json"
SCHEMA = 1
# The card may be written again after the save; the others say what they are themselves.
_UNCHECKED = frozenset({FILE, "README.md"})
_between_steps: ContextVar[bool] = ContextVar("between_steps", default=False)


@contextmanager
def checkpoint() -> Iterator[None]:
    """What is saved within the block is a trainer's checkpoint: nobody serves it, so nothing is computed for it."""
    token = _between_steps.set(True)
    try:
        yield
    finally:
        _between_steps.reset(token)


def write(model: Any, folder: Path, *, rounded: str | None = None, **more: Any) -> None:
    """Describe a model that was just saved, golden vectors included; nothing is done for a trainer's checkpoint.

    Args:
        model: The model as Sentence Transformers holds it, plain or Burnish's.
        folder: Where it was saved, in the state in which it will be found.
        rounded: As in `golden.write_golden`.
        **more: Facts to add, such as what an exporter did.
    """
    if _between_steps.get():
        return
    from . import golden  # imports torch, which reading a description does without

    reason = golden.write_golden(model, folder, rounded=rounded)
    file = golden.FILE if reason is None else None
    write_description(folder, describe(model, folder) | {"golden": file, "golden_reason": reason} | more)


def write_description(folder: Path, found: Mapping[str, Any]) -> None:
    """Write `deploy.json` with the checksums of what is in the folder now."""
    whole = {**found, "files": checksums(folder), "versions": versions()}
    (folder / FILE).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(model: Any, folder: Path) -> Description:
    """The facts that serving takes, without checksums."""
    from sentence_transformers import CrossEncoder

    config = model.config if model.transformers_model is not None else None
    scores = isinstance(model, CrossEncoder)
    activation = _path(model.activation_fn) if scores else None
    return {
        "schema": SCHEMA,
        "kind": "scores" if scores else "embeddings",
        "architecture": (list(getattr(config, "architectures", None) or ()) or [None])[0],
        "model_type": getattr(config, "model_type", None),
        "adapter_of": _base(folder),
        "modules": [type(module).__name__ for module in model.children()],
        **_after_the_transformer(model),
        "activation": activation,
        "labels": _labels(config) if scores else None,
        "prompts": dict(model.prompts),
        "default_prompt": model.default_prompt_name,
        "similarity": None if scores else str(model.similarity_fn_name),
        "max_seq_length": longest_of(model),
        "dimensions": None if scores else _width(model),
        "truncate_dim": getattr(model, "truncate_dim", None),
        dimensions.KEY: dimensions.of_config(config),
        "dtype": _dtype(model, folder),
    }


def _path(function: Any) -> str:
    return f"{type(function).__module__}.{type(function).__name__}"


def _base(folder: Path) -> str | None:
    path = folder / "adapter_config.json"
    if not path.exists():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])


def _after_the_transformer(model: nn.Module) -> Description:
    """Pooling, layers and normalisation, by what their modules say."""
    found: Description = {"pooling": None, "include_prompt": True, "normalize": False, "dense": []}
    for module in list(model.children())[1:]:
        name = type(module).__name__
        if hasattr(module, "pooling_mode"):
            mode: Any = module.pooling_mode
            found |= {"pooling": mode if isinstance(mode, str) else list(mode), "include_prompt": module.include_prompt}
        elif name == "Dense":
            dense: Any = module
            shape = {"in": dense.in_features, "out": dense.out_features, "bias": bool(dense.bias)}
            found["dense"] = [*found["dense"], {**shape, "activation": _path(dense.activation_function)}]
        found["normalize"] = name == "Normalize"  # of unit length only where that is what comes last
    return found


def _labels(config: Any) -> list[str] | None:
    names = getattr(config, "id2label", None)
    return [str(names[place]) for place in sorted(names)] if names else None


def longest_of(model: Any) -> int | None:
    """The most tokens of a text that a model takes; None where it has no limit."""
    longest = model.max_seq_length
    return int(longest) if longest is not None and longest < 10**9 else None


def _width(model: Any) -> int | None:
    """Dimensions of the whole embedding, whatever the model is told to cut it to."""
    with model.truncate_embeddings(None):
        width = model.get_embedding_dimension()
    return None if width is None else int(width)


def _dtype(model: nn.Module, folder: Path) -> str:
    """What the saved weights are in: an adapter's own dtype is not that of its base."""
    path = folder / "config.json"
    said = json.loads(path.read_text(encoding="utf-8")).get("dtype") if path.exists() else None
    if not path.exists() and (transformer := getattr(model, "transformers_model", None)) is not None:
        said = transformer.dtype
    held = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    named = str(said).removeprefix("torch.") if said else " and ".join(sorted(held))
    return named or "float32"


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of each file, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: _sha256(path) for name, path in named.items() if name not in _UNCHECKED}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path) -> Description:
    """A folder's description.

    Raises:
        ModelError: If it has none, or one of another schema.
    """
    path = folder / FILE
    if not path.exists():
        fix = "Save the model with Burnish (save_pretrained_merged, or `burnish export`), which writes it"
        raise ModelError(f"there is no {FILE}", where=str(folder), fix=fix)
    try:
        found: Description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"is not JSON ({error})", where=str(path), fix="Save the model again") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        fix = "Save the model again with this Burnish"
        raise ModelError(f"is not of the schema {SCHEMA} that this Burnish reads", where=str(path), fix=fix)
    return found


def changed(folder: Path, found: Description) -> list[str]:
    """Files that are not, or no longer, what the description says, in words."""
    odd = []
    for name, digest in sorted(found["files"].items()):
        path = folder / name
        if not path.exists():
            odd.append(f"{name} is missing")
        elif _sha256(path) != digest:
            odd.append(f"{name} has changed")
    return odd
