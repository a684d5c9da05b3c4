"""The part of a model card that shows how each runtime reads this model, with its prompts, pooling and lengths."""

from __future__ import annotations

import json
import shlex
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import deploy

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

    from .contracts import Exports
    from .prepared import Prepared

CONSUMERS = (
    "sentence-transformers", "transformers", "langchain", "tei", "vllm", "llama.cpp", "onnxruntime",
)  # fmt: skip
TEMPLATE = Path(__file__).parent / "model_card_serving.md.j2"
# Written by `make verify-exports`: {"runs": {consumer: {"FAMILY KIND": {"state", "version", "date"}}}}, where KIND is
# embeddings or scores.
VERIFIED = Path(__file__).parent / "verified_exports.json"

# (N, tokens, hidden) `states` and (N, tokens) `mask` to (N, hidden) `vectors`.
_POOLING = {
    "mean": "vectors = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    "cls": "vectors = states[torch.arange(len(states)), mask.argmax(1)]",
    "lasttoken": (
        "last = mask.shape[1] - 1 - mask.flip(1).argmax(1)\nvectors = states[torch.arange(len(states)), last]"
    ),
    "max": "vectors = states.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)",
}


def section(model: Prepared, served: BaseModel, folder: Path, *, used: bool) -> str:
    """The section in Markdown.

    Args:
        model: The model that the user holds: its family says what it exports to.
        served: The model that was saved.
        folder: Where.
        used: Whether the card shows how Sentence Transformers reads it before this section.
    """
    found = deploy.describe(served, folder)
    family = model.burnish.decision.family.family if model.burnish is not None else None
    problem = getattr(served.config, "problem_type", None) if served.config is not None else None
    classes = found["kind"] == "scores" and (problem or len(found["labels"] or ()) > 1) and problem != "regression"
    modes = found["pooling"]
    whole = "+".join(modes) if isinstance(modes, list) else modes
    prompted = not found["include_prompt"] and any(found["prompts"].values())
    facts = {
        "d": found,
        "name": name_of(served),
        "used": used,
        "served": {consumer: state(consumer, family.name if family else "", found["kind"]) for consumer in CONSUMERS},
        "pooling": whole,
        "pool_code": "" if prompted else _POOLING.get(whole or "", ""),
        "left_out": prompted,
        "only_here": _only_here(found),
        "classes": bool(classes),
        "activated": _activated(found, problem, bool(classes)),
        "refused": dict(family.exports.refused) if family is not None else {},
        "gguf": _gguf(family.exports if family is not None else None, found),
        "onnx": _onnx(family.exports if family is not None else None),
    }
    base = found["adapter_of"]
    facts["base"] = Path(base).name if base and Path(base).is_absolute() else base
    return str(_template().render(facts)).strip()


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment

    # It is Markdown, and torch has jinja2 with it.
    environment = Environment(autoescape=False)
    environment.filters["shell"] = lambda value: shlex.quote(json.dumps(value, ensure_ascii=False))
    environment.filters["python"] = repr
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def name_of(served: BaseModel) -> str:
    """The model's name on the Hub, or what stands for it until it has one."""
    data: Any = served.model_card_data
    return str(data.model_id or served._model_card_model_id_placeholder)


def state(consumer: str, family: str, kind: str) -> str:
    """What is known of a consumer and models of a family, in words."""
    runs = json.loads(VERIFIED.read_text(encoding="utf-8"))["runs"]
    known = runs.get(consumer, {}).get(f"{family} {kind}")
    if known is None:
        return "untested"
    words = {"verified": "verified with", "static": "statically checked against"}[known["state"]]
    return f"{words} {known['version']}, {known['date']}"


def _only_here(found: deploy.Description) -> str | None:
    """Why only Sentence Transformers computes the model, or None."""
    if found["kind"] == "scores" and found["modules"] != ["Transformer"]:
        return f"its scores come from {', '.join(found['modules'][1:])} of Sentence Transformers"
    if found["kind"] == "embeddings" and found["pooling"] is None:
        return "it has no pooling of its own"
    return None


def _activated(found: deploy.Description, problem: str | None, classes: bool) -> str:
    if classes and problem == "multi_label_classification":
        return "logits.sigmoid()"
    if classes:
        return "logits.softmax(dim=1)"
    return "logits.sigmoid()" if (found["activation"] or "").endswith(".Sigmoid") else "logits"


def _gguf(exports: Exports | None, found: deploy.Description) -> bool | str:
    """True, or why llama.cpp does not compute the model."""
    if exports is None or exports.gguf is None:
        return (exports.refused.get("gguf") if exports else None) or "llama.cpp's converter has no architecture for it"
    named = "gguf-reranker" if found["kind"] == "scores" else "gguf"
    return exports.refused.get(named) or exports.refused.get("gguf") or True


def _onnx(exports: Exports | None) -> bool | str:
    if exports is None:
        return "Burnish knows no family for it"
    return exports.refused.get("onnx") or exports.onnx or "its modules do not export"
