"""What text-embeddings-inference would make of a saved folder, by reading the files that it reads. Nothing runs.

It stops at a field that it misses, which is plain; worse is what it skips, such as a Dense layer whose type it does not
know, and computes another model. `tei_rules.json` holds what it was found to read, by the commit of its sources.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import deploy

RULES = Path(__file__).with_name("tei_rules.json")
_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,), "number": (int, float), "boolean": (bool,), "string": (str,),
}  # fmt: skip
_CLASSIC = "sentence_transformers.models."
_POOLING = "1_Pooling"  # it opens this folder, whatever modules.json says
_CLASSIFIES = "Classification"
_GRAPHS = ("model.onnx", "onnx/model.onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticCheck:
    """What is known of a runtime and a folder without running it.

    Args:
        runtime: Its name.
        version: Of the sources that the rules were read in.
        read: When they were read.
        faults: Why it would not start, or would compute another model; one line each.
        notes: What else has to be known, one line each.
    """

    runtime: str
    version: str
    read: str
    faults: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether nothing was found. That is not to say that it computes the model."""
        return not self.faults

    @property
    def state(self) -> str:
        """ "statically checked", or "wrong"."""
        return "statically checked" if self.good else "wrong"


@lru_cache(maxsize=1)
def rules() -> dict[str, Any]:
    """What TEI was found to read."""
    found: dict[str, Any] = json.loads(RULES.read_text(encoding="utf-8"))
    return found


def check(folder: Path) -> StaticCheck:
    """Read a folder that Burnish saved as TEI would.

    Raises:
        ModelError: If the folder has no description.
    """
    described = deploy.read(folder)
    reader = _Reader(folder, described)
    faults = [*deploy.changed(folder, described), *reader.faults()]
    return StaticCheck(
        runtime="tei", version=rules()["version"], read=rules()["read"], faults=tuple(faults),
        notes=tuple(reader.notes()),
    )  # fmt: skip


class _Reader:
    """One folder, file by file."""

    def __init__(self, folder: Path, described: deploy.Description) -> None:
        self.folder, self.described = folder, described
        self.config = self._json("config.json") or {}
        self.kind = _kind(self.config.get("model_type"))
        self.scores = described["kind"] == "scores"

    def _json(self, name: str) -> Any:
        """What a file holds; None where it is not there or no JSON, which `faults` tells."""
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def faults(self) -> Iterator[str]:
        """All that is wrong, in the order in which TEI would meet it."""
        if (self.folder / "adapter_config.json").exists():
            yield "it is an adapter, which TEI does not read: save it merged"
            return
        if not self.config:
            yield "config.json is missing, or no JSON"
            return
        yield from self._type()
        yield from self._head()
        yield from self._files()
        yield from self._length()
        if not self.scores:
            yield from self._pooling()
        yield from self._modules()

    def _type(self) -> Iterator[str]:
        """config.json: the model's type, its fields, and values that are not computed."""
        name = self.config.get("model_type")
        if self.kind is None:
            yield f"TEI knows no model type {name!r}"
            return
        for field, wanted in self.kind.get("fields", {}).items():
            yield from _field(self.config, "config.json", field, wanted)
        for field, allowed in self.kind.get("values", {}).items():
            if self.config.get(field) not in allowed:
                said = json.dumps(self.config.get(field))
                yield f"config.json has {field} {said}, and TEI computes {json.dumps(allowed[0])} alone"
        acts = rules()["activations"]
        field = self.kind.get("activation")
        if field is not None and self.config.get(field) not in acts:
            yield f"config.json has {field} {json.dumps(self.config.get(field))}, and TEI knows {', '.join(acts)}"
        if self.kind.get("unscaled") and (scaled := _scaled(self.config)):
            yield f"config.json scales its rotary positions ({scaled}), which TEI does not"

    def _head(self) -> Iterator[str]:
        """Whether TEI takes the model for what it is."""
        architectures = self.config.get("architectures")
        if not isinstance(architectures, list) or not architectures:
            yield "config.json has no list of architectures"
            return
        classifies = any(str(one).endswith(_CLASSIFIES) for one in architectures)
        if classifies and not self.scores:
            yield f"its architecture is {architectures[0]}, which TEI takes for a classifier"
        if not self.scores:
            return
        if not classifies:
            yield f"its architecture is {architectures[0]}, which TEI takes for a model of embeddings"
        elif self.kind is not None and self.kind.get("classifies") is False:
            yield f"TEI has no rerankers or classifiers of model type {self.config['model_type']}"
        for field in ("id2label", "label2id"):
            if not isinstance(self.config.get(field), dict):
                yield f"config.json has no {field}"
        labels = len(self.described["labels"] or ())
        count = (self.kind or {}).get("labels")
        if count is not None and labels > 1 and self.config.get(count) != labels:
            yield f"config.json has {labels} labels and no {count}, without which TEI takes them for 1"

    def _files(self) -> Iterator[str]:
        """Tokenizer and weights."""
        if self._json("tokenizer.json") is None:
            yield "tokenizer.json is missing, or no JSON: TEI has fast tokenizers only"
        if (self.folder / "model.safetensors").exists() or (self.folder / "pytorch_model.bin").exists():
            return
        index = self._json("model.safetensors.index.json")
        parts = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(parts, dict) and any((self.folder / name).exists() for name in _GRAPHS):
            yield "it has an ONNX graph and no safetensors: only TEI's images for ONNX Runtime read it, unchecked"
            return
        if not isinstance(parts, dict):
            yield "there are no weights: TEI wants model.safetensors, or model.safetensors.index.json"
            return
        for name in sorted(set(map(str, parts.values()))):
            if not (self.folder / name).exists():
                yield f"{name} is missing, which model.safetensors.index.json names"

    def _length(self) -> Iterator[str]:
        """sentence_bert_config.json, which need not be there."""
        name = "sentence_bert_config.json"
        if not (self.folder / name).exists():
            return
        found = self._json(name)
        if not isinstance(found, dict):
            yield f"{name} is no JSON object"
            return
        yield from _field(found, name, "max_seq_length", "integer")
        if found.get("do_lower_case"):
            yield f"{name} lowers the case of texts, which TEI does not"

    def _pooling(self) -> Iterator[str]:
        found = self._json(f"{_POOLING}/config.json")
        if not isinstance(found, dict):
            yield f"{_POOLING}/config.json is missing, or no JSON: TEI reads the pooling there and nowhere else"
            return
        flags = [f"pooling_mode_{name}" for name in ("cls_token", "mean_tokens")]
        absent = [flag for flag in flags if not isinstance(found.get(flag), bool)]
        if absent:
            yield f"{_POOLING}/config.json has no {' and no '.join(absent)}"
            return
        modes = self.described["pooling"]
        whole = "+".join(modes) if isinstance(modes, list) else modes
        able = (self.kind or {}).get("poolings", rules()["poolings"])
        if whole not in able:
            yield f"it pools by {whole}, and TEI by {' or '.join(able)}"
        elif _first(found) != whole:
            yield f"{_POOLING}/config.json says {_first(found)}, and the model pools by {whole}"
        if self.described["include_prompt"] is False and any(self.described["prompts"].values()):
            yield "it leaves its prompts out of the pooling, which TEI does not"

    def _modules(self) -> Iterator[str]:
        """modules.json: where one type is unknown, TEI goes on without any Dense layer."""
        found = self._json("modules.json")
        listed = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
        kinds = [str(row.get("type")) for row in listed]
        known = [f"{_CLASSIC}{name}" for name in rules()["modules"]]
        dense = [row for row in listed if str(row.get("type")).endswith(".Dense")]
        for kind in kinds:
            if kind not in known:
                lost = ", and therefore skips the Dense layers" if dense else ""
                yield f"modules.json has {kind}, which TEI does not know{lost}"
        names = [kind.rpartition(".")[2] for kind in kinds]
        if self.scores and len(names) > 1:
            yield f"its scores come from {', '.join(names[1:])} too, which TEI does not compute"
        for row, name in zip(listed, names, strict=True):
            path = str(row.get("path", ""))
            if name == "Pooling" and path != _POOLING:
                yield f"modules.json has the pooling in {path!r}, and TEI reads {_POOLING}"
            if name == "Transformer" and path not in ("", "."):
                yield f"modules.json has the transformer in {path!r}, and TEI reads the folder itself"
        if "Normalize" in names and "Dense" in names[names.index("Normalize") :]:
            yield "it normalises before a Dense layer, and TEI after them"
        for row in dense:
            yield from self._dense(str(row.get("path", "")))

    def _dense(self, path: str) -> Iterator[str]:
        name = f"{path}/config.json"
        found = self._json(name)
        if not isinstance(found, dict):
            yield f"{name} is missing, or no JSON"
            return
        for field, wanted in {"in_features": "integer", "out_features": "integer", "bias": "boolean"}.items():
            yield from _field(found, name, field, wanted)
        act, able = found.get("activation_function"), rules()["dense_activations"]
        if act is not None and act not in able:
            yield f"{name} has the activation {act}, and TEI knows {' and '.join(able)}"
        if not any((self.folder / path / weights).exists() for weights in ("model.safetensors", "pytorch_model.bin")):
            yield f"{path} has no weights"

    def notes(self) -> Iterator[str]:
        """What is right, and still not as Sentence Transformers does it."""
        kind = self.kind or {}
        if self.kind is not None and not kind.get("fields"):
            yield f"the fields that TEI wants of model type {self.config['model_type']} are not checked"
        if kind.get("cuda"):
            yield "TEI runs this model type on CUDA only"
        if kind.get("dtype"):
            yield f"TEI runs this model type in {kind['dtype']} only: start it with --dtype {kind['dtype']}"
        else:
            yield "on a GPU TEI rounds to float16 unless it is started with --dtype float32"
        if self.config.get(kind.get("activation", "")) == "gelu":
            yield "TEI computes gelu by its tanh form, which moves vectors a little"
        if any(self.described["prompts"].values()):
            yield "TEI puts no prompt before a text unless a request has prompt_name, or it has --default-prompt-name"
        if not self.scores and not self.described["normalize"]:
            yield "TEI normalises, which the model does not: ask /embed with normalize false"
        if self.scores and self.config.get("problem_type") == "multi_label_classification":
            yield "TEI takes a softmax over labels that the model decides one by one: ask with raw_scores true"


def _kind(name: Any) -> dict[str, Any] | None:
    """The rules of a model type, or None."""
    types = rules()["types"]
    found = types.get(name) if isinstance(name, str) else None
    if found is None or found.get("template"):
        return None
    kind: dict[str, Any] = types[found["like"]] if "like" in found else found
    return kind


def _field(found: Mapping[str, Any], file: str, field: str, wanted: str) -> Iterator[str]:
    value = found.get(field)
    good = isinstance(value, _TYPES[wanted]) and (wanted == "boolean" or not isinstance(value, bool))
    if field not in found:
        yield f"{file} has no {field}"
    elif not good:
        yield f"{file} has {field} {json.dumps(value)}, and TEI wants {'an' if wanted == 'integer' else 'a'} {wanted}"


def _first(pooling: Mapping[str, Any]) -> str:
    """The pooling that TEI takes: the first that is true."""
    flags = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "lasttoken": "pooling_mode_lasttoken"}
    return next((name for name, flag in flags.items() if pooling.get(flag)), "none that it knows")


def _scaled(config: Mapping[str, Any]) -> str:
    """The kind of scaling of rotary positions, or ""."""
    found = [config.get("rope_scaling"), config.get("rope_parameters")]
    rows = [row for one in found if isinstance(one, dict) for row in (one, *one.values()) if isinstance(row, dict)]
    kinds = {str(row.get("rope_type", row.get("type", "default"))) for row in rows}
    return ", ".join(sorted(kinds - {"default"}))
