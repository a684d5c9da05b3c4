"""The compatible layout: one folder that old and new readers of Sentence Transformers models take for the same model.

Sentence Transformers 6 and transformers 5 write files that their own versions before, TEI, vLLM and llama.cpp's
converter refuse or, worse, read as another model: module types under new paths, poolings without their booleans, no
`max_seq_length`, a tokenizer class and config keys that did not exist. `make_compatible` rewrites such a folder in the
words all of them know. Sentence Transformers 6 and transformers 5 read it to the same bits as their own.

What the older words cannot say keeps the newer ones: a reader that does not know those stops, and computes nothing
wrong. Weights are not touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .contracts import Family

LAYOUTS = ("compatible", "native")

# The modules of Sentence Transformers 3.4, under `sentence_transformers.models`; Router came with 5.0.
_CLASSIC = frozenset(
    {"Asym", "BoW", "CLIPModel", "CNN", "Dense", "Dropout", "LayerNorm", "LSTM", "Normalize", "Pooling", "Router",
     "StaticEmbedding", "Transformer", "WeightedLayerPooling", "WordEmbeddings", "WordWeights"}
)  # fmt: skip
_MODES = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# The order in which several poolings are concatenated where booleans name them.
_CONCATENATED = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_SENTENCE = "sentence_embedding"
# Keys that constructors of before do not take, with the values that mean the same as their absence.
_LATER: dict[str, dict[str, Any]] = {
    "Normalize": {"module_input_name": _SENTENCE, "module_output_name": _SENTENCE},
    "Dense": {"module_input_name": _SENTENCE, "module_output_name": _SENTENCE},
}
_TEXT_ONLY = {"method": "forward", "method_output_name": "last_hidden_state"}
# Of a process, not of the model. FastEmbed takes a `max_length` that some call once had for the model's limit.
_PASSING = ("backend", "is_local", "local_files_only", "name_or_path", "max_length")
# A tokenizer without a limit says 1e30, as an integer of 31 digits; older readers keep it in 64 bits.
_NO_LIMIT = 10**9
# What PEFT 0.14, which Sentence Transformers 3.4 was released with, knows of a LoRA adapter.
_PEFT_0_14 = frozenset(
    {"alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules",
     "fan_in_fan_out", "inference_mode", "init_lora_weights", "layer_replication", "layers_pattern",
     "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "megatron_config",
     "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type",
     "use_dora", "use_rslora"}
)  # fmt: skip


def check_layout(layout: str) -> None:
    """Refuse a layout that there is none of.

    Raises:
        ConfigError: If it is not one of `LAYOUTS`.
    """
    if layout not in LAYOUTS:
        fix = f"Pass {' or '.join(repr(name) for name in LAYOUTS)}"
        raise ConfigError(f"{layout!r} is unknown", where="layout", fix=fix)


def tokenizer_inputs(model: Any) -> list[str] | None:
    """What a model's tokenizer hands it, without what its forward does not take; None for a model without a tokenizer.

    Sentence Transformers 6 leaves the rest out by itself; versions before stop at it.
    """
    transformer, tokenizer = model.transformers_model, model.tokenizer
    if transformer is None or not hasattr(tokenizer, "model_input_names"):
        return None
    takes = signature(type(transformer).forward).parameters
    return [name for name in tokenizer.model_input_names if name in takes]


def make_compatible(folder: Path, family: Family | None = None, inputs: list[str] | None = None) -> None:
    """Rewrite a folder that Sentence Transformers 6 has just saved, in place.

    Args:
        folder: A full model or an adapter, of embeddings, a reranker or a classifier; a staging folder, since files are
            written one after the other.
        family: Whose `Exports.legacy_config` gives the config keys that older readers want; None for a model that
            Burnish knows no family of.
        inputs: From `tokenizer_inputs`; None leaves what the tokenizer says.
    """
    for kind, place in list(_modules(folder)):
        if kind == "Transformer":
            _older_transformer(place, family, inputs)
        elif (config := place / "config.json").exists():
            _older_module(kind, config)
    for name in ("modules.json", "router_config.json"):
        for path in folder.rglob(name):
            _write(path, _older_types(_read(path)))
    if (adapter := folder / "adapter_config.json").exists():
        _write(adapter, _older_adapter(_read(adapter)))


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """(class name, folder) of each stock module of a saved model, those inside a router too."""
    listed = _read(folder / "modules.json") if (folder / "modules.json").exists() else []
    for entry in listed:
        yield from _module(entry["type"], folder / entry.get("path", ""))
    if not listed:  # a bare transformer
        yield "Transformer", folder


def _module(path: str, place: Path) -> Iterator[tuple[str, Path]]:
    kind = _stock(path)
    if kind in ("Router", "Asym") and (place / "router_config.json").exists():
        for name, inner in _read(place / "router_config.json")["types"].items():
            yield from _module(inner, place / name)
    elif kind is not None:
        yield kind, place


def _stock(path: str) -> str | None:
    """The class name of a module of Sentence Transformers that older versions have as well, or None."""
    name = path.rpartition(".")[2]
    return name if path.startswith("sentence_transformers.") and name in _CLASSIC else None


def _older_types(value: Any) -> Any:
    """The same JSON with the types of stock modules under their first path."""
    if isinstance(value, dict):
        return {key: _older_types(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_older_types(item) for item in value]
    name = _stock(value) if isinstance(value, str) else None
    return value if name is None else f"sentence_transformers.models.{name}"


def _older_module(kind: str, path: Path) -> None:
    config = _read(path)
    if kind == "Pooling":
        config = _older_pooling(config)
    else:
        config = {_older_key(kind, key): value for key, value in config.items() if not _says_nothing(kind, key, value)}
    if config or kind != "Normalize":
        _write(path, config)
    else:  # as it was: a place in `modules.json`, and no file
        path.unlink()


def _says_nothing(kind: str, key: str, value: Any) -> bool:
    later = _LATER.get(kind, {})
    return key in later and value == later[key]


def _older_key(kind: str, key: str) -> str:
    """The name that Sentence Transformers itself calls the former one of a module's setting."""
    from sentence_transformers.base import modules as shared
    from sentence_transformers.sentence_transformer import modules as own

    cls = getattr(own, kind, None) or getattr(shared, kind, None)
    renamed: Mapping[str, str] = getattr(cls, "config_key_renames", {})
    return next((old for old, new in renamed.items() if new == key), key)


def _older_pooling(config: dict[str, Any]) -> dict[str, Any]:
    """Booleans for the pooling mode, unless it is a concatenation in an order that booleans do not have."""
    mode = config.get("pooling_mode", "mean")
    modes = [mode] if isinstance(mode, str) else list(mode)
    if modes != [name for name in _CONCATENATED if name in modes]:
        return config
    width = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    flags = {flag: name in modes for name, flag in _MODES.items()}
    rest = {key: value for key, value in config.items() if key not in ("embedding_dimension", "pooling_mode")}
    return {"word_embedding_dimension": width, **flags, **rest}


def _older_transformer(place: Path, family: Family | None, inputs: list[str] | None) -> None:
    if (tokenizer := place / "tokenizer_config.json").exists():
        _older_tokenizer(place, tokenizer, inputs)
    if (path := place / "sentence_bert_config.json").exists():
        _write(path, _older_length(_read(path), _longest(place)))
    if (path := place / "config.json").exists():
        _write(path, older_config(_read(path), family, activation=_activation(place)))


def _older_length(config: dict[str, Any], longest: int | None) -> dict[str, Any]:
    """`max_seq_length`, and of the newer keys those that do not say what is meant without them."""
    if config.get("transformer_task") == "feature-extraction":
        modalities = config.get("modality_config", {})
        if modalities.get("text") == _TEXT_ONLY and config.get("module_output_name") == "token_embeddings":
            config = {key: value for key, value in config.items() if key not in _FEATURES}
    # How attention is computed, and decided anew by every reader, is no property of the model.
    kept = {key: value for key, value in config.items() if key != "unpad_inputs"}
    return {"max_seq_length": longest, "do_lower_case": False, **kept}


_FEATURES = ("transformer_task", "modality_config", "module_output_name")


def _longest(place: Path) -> int | None:
    """Tokens that a text is cut to: the tokenizer's limit, or where it has none, the model's."""
    limits = [_read(place / "tokenizer_config.json").get("model_max_length")] if _has(place, "tokenizer_config") else []
    limits += [_read(place / "config.json").get("max_position_embeddings")] if _has(place, "config") else []
    return next((int(limit) for limit in limits if limit is not None and limit < _NO_LIMIT), None)


def _has(place: Path, name: str) -> bool:
    return (place / f"{name}.json").exists()


def _activation(place: Path) -> str | None:
    """The path of what a reranker's score goes through, where the folder is one's."""
    path = place / "config_sentence_transformers.json"
    return _read(path).get("activation_fn") if path.exists() else None


def older_config(config: dict[str, Any], family: Family | None, activation: str | None = None) -> dict[str, Any]:
    """A transformer's config with the keys that readers of before look for, beside its own.

    Args:
        config: What transformers 5 wrote.
        family: As in `make_compatible`.
        activation: The path of a reranker's activation, where Sentence Transformers 3.4 and 4 look for it.
    """
    older = dict(config)
    if (dtype := config.get("dtype")) is not None:
        older["torch_dtype"] = dtype
    older |= _older_rotary(config.get("rope_parameters"))
    if any(name.endswith("Classification") for name in config.get("architectures") or ()):
        # transformers leaves its own default out: two labels without a name.
        names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        older |= {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
    if activation is not None:
        older |= {
            "sbert_ce_default_activation_function": activation,
            "sentence_transformers": {**config.get("sentence_transformers", {}), "activation_fn": activation},
        }
    return older | (dict(family.exports.legacy_config(config)) if family is not None else {})


def _older_rotary(parameters: Any) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` for one set of rotary parameters; families name those of several."""
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return {}
    apart = ("rope_theta", "partial_rotary_factor")
    older = {key: parameters[key] for key in apart if key in parameters}
    scaling = {key: value for key, value in parameters.items() if key not in apart}
    return older if scaling.get("rope_type", "default") == "default" else {**older, "rope_scaling": scaling}


def _older_tokenizer(place: Path, path: Path, inputs: list[str] | None) -> None:
    config = {key: value for key, value in _read(path).items() if key not in _PASSING}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if inputs is not None:
        config["model_input_names"] = inputs
    # transformers 4 takes a mapping here, and a list for the other name, which 5 reads too.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if (place / "adapter_config.json").exists():
        # Sentence Transformers 5.4 to 5.7 ask AutoProcessor, which without this looks for a config.json of its own and
        # guesses from the folder's name where there is none (transformers 4.57).
        config.setdefault("processor_class", "AutoTokenizer")
    _write(path, config)
    special = {
        key: value
        for key, value in config.items()
        if (key.endswith("_token") and isinstance(value, str | dict)) or key == "additional_special_tokens"
    }
    _write(place / "special_tokens_map.json", _bare(special))
    if (whole := place / "tokenizer.json").exists():
        _forget_last_call(whole)
    if (vocabulary := _word_pieces(place)) is not None:
        (place / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocabulary), encoding="utf-8")


def _forget_last_call(path: Path) -> None:
    """Take out how the last call before the save cut and padded, which readers without transformers go on doing."""
    value = _read(path)
    if any(value.get(name) is not None for name in ("truncation", "padding")):
        path.write_text(json.dumps(value | {"truncation": None, "padding": None}, ensure_ascii=False), encoding="utf-8")


def _bare(tokens: Any) -> Any:
    """Special tokens without what older readers set themselves and would be given twice."""
    if isinstance(tokens, list):
        return [_bare(token) for token in tokens]
    if isinstance(tokens, dict):
        return {key: _bare(value) for key, value in tokens.items() if key not in ("__type", "special")}
    return tokens


def _word_pieces(place: Path) -> list[str] | None:
    """The pieces of a WordPiece tokenizer, in the order of their numbers; None where a list cannot hold them."""
    path = place / "tokenizer.json"
    model = _read(path)["model"] if path.exists() else {}
    if model.get("type") != "WordPiece":
        return None
    ranked = sorted(model["vocab"].items(), key=lambda item: item[1])
    whole = [number for _, number in ranked] == list(range(len(ranked)))
    return [piece for piece, _ in ranked] if whole and not any("\n" in piece for piece, _ in ranked) else None


def _older_adapter(config: dict[str, Any]) -> dict[str, Any]:
    """A LoRA adapter's settings without those that say nothing and that PEFT of before stops at."""
    if config.get("peft_type") != "LORA":
        return config
    from peft import LoraConfig

    usual: Callable[..., Any] = LoraConfig
    default = usual().to_dict()
    return {key: value for key, value in config.items() if key in _PEFT_0_14 or value != default.get(key)}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
