"""What exporters share: the model behind a saved folder in stock modules, and the files around its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contracts import ExportRequest, Family
from ..errors import ConfigError, ModelError
from ..layout import make_compatible, tokenizer_inputs

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel


def read_model(request: ExportRequest) -> tuple[BaseModel, Family]:
    """The saved model in float32, an adapter folded in, and its family.

    Raises:
        ModelError: If the folder holds no model that a transformer is in.
    """
    from ..cross_encoder import CrossEncoder
    from ..fast import FastSentenceTransformer
    from ..fast_cross_encoder import FastCrossEncoder

    kind: Any = FastCrossEncoder if _scores(request.source) else FastSentenceTransformer
    model = kind.from_pretrained(str(request.source), for_inference=True, device="cpu", dtype="float32")
    if model.burnish is None:
        what = "has no transformer, which is what is exported"
        raise ModelError(what, where=str(request.source), fix="Serve it with Sentence Transformers")
    if isinstance(model, CrossEncoder) and model[0].transformer_task != "sequence-classification":
        what = "scores by words of its vocabulary, and only heads that classify are exported"
        raise ModelError(what, where=str(request.source), fix="Serve it with Sentence Transformers or vLLM")
    return model.merged("merged_32bit"), model.burnish.decision.family.family


def _scores(source: Path) -> bool:
    path = source / "config_sentence_transformers.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return said.get("model_type") == "CrossEncoder" or "activation_fn" in said


def check_target(target: str, family: Family, source: Path) -> None:
    """Refuse a target that a family knows to come out wrong.

    Raises:
        ModelError: With the family's reason.
    """
    if (reason := family.exports.refused.get(target)) is not None:
        raise ModelError(reason, where=f"--target {target}, model {source}", fix="Choose another target")


def check_options(target: str, given: Mapping[str, str], known: Mapping[str, tuple[str, ...] | None]) -> None:
    """Refuse options that a target does not take; None stands for any value.

    Raises:
        ConfigError: For one that is unknown or has another value.
    """
    for key, value in given.items():
        if key not in known:
            fix = f"The target {target} takes {', '.join(sorted(known)) or 'none'}"
            raise ConfigError(f"{key!r} is unknown", where="--option", fix=fix)
        allowed = known[key]
        odd = [part for part in value.split(",") if allowed is not None and part not in allowed]
        if odd and allowed is not None:
            raise ConfigError(f"{odd[0]!r} is unknown", where=f"--option {key}", fix=f"Pass {', '.join(allowed)}")


def write_around(model: BaseModel, family: Family, folder: Path) -> None:
    """All of a model's files in the compatible layout but its weights."""
    model.save(str(folder))
    make_compatible(folder, family, tokenizer_inputs(model))
    for weights in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        weights.unlink()


def written(folder: Path) -> list[Path]:
    """What an exporter returns: the files it made."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
