"""The part of a model card that shows how each consumer reads this model, with its prompts, pooling and lengths."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import deploy

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

    from .contracts import Exports
    from .prepared import Prepared

CONSUMERS = (
    "sentence-transformers", "transformers", "langchain", "tei", "vllm", "llama.cpp", "ollama", "onnxruntime",
    "openvino", "transformers.js", "fastembed", "faiss", "pgvector", "qdrant", "weaviate",
)  # fmt: skip
# They are given vectors, and know nothing of what computed them: what is known of one family is of all.
STORES = ("faiss", "pgvector", "qdrant", "weaviate")
GRAPHS = ("onnxruntime", "openvino", "transformers.js", "fastembed")
TEMPLATE = Path(__file__).parent / "model_card_serving.md.j2"
# Written by benchmarks/exports.py from the logs of `make verify-exports`: {"runs": {consumer: {"FAMILY KIND": {"state",
# "versions", "date", "reasons", …}}}}, where KIND is embeddings or scores.
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
# What each store calls a similarity, and what FastEmbed and transformers.js call a pooling.
_DISTANCES = {
    "cosine": {"faiss": "METRIC_INNER_PRODUCT", "pgvector": "<=>", "qdrant": "COSINE", "weaviate": "COSINE"},
    "dot": {"faiss": "METRIC_INNER_PRODUCT", "pgvector": "<#>", "qdrant": "DOT", "weaviate": "DOT"},
    "euclidean": {"faiss": "METRIC_L2", "pgvector": "<->", "qdrant": "EUCLID", "weaviate": "L2_SQUARED"},
    "manhattan": {"faiss": "METRIC_L1", "pgvector": "<+>", "qdrant": "MANHATTAN", "weaviate": "MANHATTAN"},
}
_FASTEMBED = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST_TOKEN"}
_JAVASCRIPT = {"mean": "mean", "cls": "cls", "lasttoken": "last_token"}


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
    code = "" if prompted else _POOLING.get(whole or "", "")
    name, exports = (family.name, family.exports) if family is not None else ("", None)
    facts = {
        "d": found,
        "name": name_of(served),
        "used": used,
        "served": {consumer: state(consumer, name, found["kind"]) for consumer in CONSUMERS},
        "obstacle": obstacles(found, name, exports, pooling=whole, code=code, classes=bool(classes)),
        "pooling": whole,
        "pool_code": code,
        "left_out": prompted,
        "only_here": _only_here(found),
        "classes": bool(classes),
        "activated": _activated(found, problem, bool(classes)),
        "named": _named(found["prompts"]),
        "distance": _DISTANCES.get(found["similarity"] or "", _DISTANCES["cosine"]),
        "fastembed_pooling": _FASTEMBED.get(whole or ""),
        "javascript_pooling": _JAVASCRIPT.get(whole or ""),
    }
    base = found["adapter_of"]
    facts["base"] = Path(base).name if base and Path(base).is_absolute() else base
    return re.sub(r"\n{3,}", "\n\n", _template().render(facts)).strip()


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader

    # It is Markdown, and torch has jinja2 with it.
    environment = Environment(autoescape=False, loader=FileSystemLoader(TEMPLATE.parent, encoding="utf-8"))
    environment.filters["shell"] = lambda value: shlex.quote(json.dumps(value, ensure_ascii=False))
    environment.filters["python"] = repr
    return environment.get_template(TEMPLATE.name)


def name_of(served: BaseModel) -> str:
    """The model's name on the Hub, or what stands for it until it has one."""
    data: Any = served.model_card_data
    return str(data.model_id or served._model_card_model_id_placeholder)


def known(consumer: str, family: str, kind: str) -> Mapping[str, Any] | None:
    """What the runs say of a consumer and models of a family; of a store, of models of any."""
    runs: dict[str, Any] = json.loads(VERIFIED.read_text(encoding="utf-8"))["runs"].get(consumer, {})
    if consumer in STORES and kind == "embeddings":
        return next((run for name, run in sorted(runs.items()) if name.endswith(kind)), None)
    found: Mapping[str, Any] | None = runs.get(f"{family} {kind}")
    return found


def state(consumer: str, family: str, kind: str) -> str:
    """What is known of a consumer and models of a family, in words."""
    run = known(consumer, family, kind)
    if run is None:
        return "untested"
    words = {"verified": "verified with", "static": "statically checked against", "refused": "not read by",
             "wrong": "computed wrongly by"}[run["state"]]  # fmt: skip
    *first, last = run["versions"] or ["it"]
    versions = f"{', '.join(first)} and {last}" if first else last
    but = f" ({'; '.join(run['reasons'])})" if run["reasons"] and run["state"] == "verified" else ""
    return f"{words} {versions}, {run['date']}{but}"


def obstacles(
    found: deploy.Description, family: str, exports: Exports | None, *, pooling: str | None, code: str, classes: bool
) -> dict[str, str]:
    """Consumer to why it does not compute the model, for those that do not."""
    refused = dict(exports.refused) if exports is not None else {}
    gguf, onnx = _gguf(exports, found), _onnx(exports)
    dense, scores = bool(found["dense"]), found["kind"] == "scores"
    three = not scores and pooling not in _FASTEMBED
    after = "it computes no layers after the pooling"
    alone = f"alone it does not pool like this ({pooling}{'' if found['include_prompt'] else ', without the prompt'})"
    reasons: dict[str, str | bool | None] = {
        "transformers": (dense and after) or (not scores and not code and alone),
        "langchain": classes and "it has no interface for classifiers",
        "tei": refused.get("tei") or (dense and after) or (three and f"it has no pooling {pooling}"),
        "vllm": refused.get("vllm"),
        "llama.cpp": (gguf if isinstance(gguf, str) else None)
        or (classes and "its server tells one score, and these are several")
        or (three and f"it has no pooling {pooling}"),
        **{consumer: onnx if isinstance(onnx, str) else None for consumer in GRAPHS},
    }
    reasons["ollama"] = (scores and "it has no rerankers and no classifiers") or reasons["llama.cpp"]
    reasons["fastembed"] = (
        reasons["fastembed"]
        or (dense and after)
        or (three and f"it has no pooling {pooling}")
        or (classes and "it has no interface for classifiers")
    )
    for consumer in CONSUMERS:
        run = known(consumer, family, found["kind"])
        if run is not None and run["state"] in ("refused", "wrong"):
            reasons[consumer] = reasons.get(consumer) or "; ".join(run["reasons"])
    return {consumer: str(reason) for consumer, reason in reasons.items() if reason}


def _named(prompts: Mapping[str, str]) -> dict[str, str]:
    """Names of the prompts of queries and documents, as Sentence Transformers looks for them; empty where none is."""
    document = next((name for name in ("document", "passage", "corpus") if name in prompts), "")
    return {"query": "query" if "query" in prompts else "", "document": document}


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
