"""Who scores pairs for a student: a reranker, an embedding model or a function, each with a key for its scores.

The key holds everything that decides a score beside the texts. A named teacher is known by its files, without loading
it; a loaded one by its weights as they are now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import xxhash

from .errors import ConfigError, ModelError
from .tokenising import serialised

Pairs: TypeAlias = "list[tuple[str, str]]"
# Parameters of loading that say in which numbers a teacher computes, and those that do not change its scores.
_DTYPES = {"dtype", "load_in_4bit", "load_in_8bit", "load_in_16bit"}
_WHERE = {"backend", "cache_dir", "cache_folder", "device", "device_map", "local_files_only", "token"}


@dataclass(slots=True, kw_only=True)
class Teacher:
    """A teacher: what people call it, a hash of everything that decides its scores, and how it scores."""

    name: str
    key: str
    score: Callable[[Pairs], Any]


def find_teacher(
    teacher: Any,
    *,
    identity: str | None,
    prompt: str | None,
    raw: bool,
    batch_size: int,
    load: Mapping[str, Any] | None,
) -> Teacher:
    """The teacher that `with_teacher_scores` was given; its parameters and what they raise are described there."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    named = isinstance(teacher, str | os.PathLike)
    if load and not named:
        raise ConfigError("the teacher is loaded already", where="load", fix="Drop it, or pass the teacher's name")
    if named:
        given = dict(load or {})
        if not _DTYPES & given.keys():
            given["dtype"] = "float32"  # whatever the device, for a score is kept for all of them
        lazy = _Lazy(os.fspath(teacher), given, prompt, raw, batch_size)
        deciding = sorted((key, str(value)) for key, value in given.items() if key not in _WHERE)
        settings = repr((deciding, prompt, raw))
        return Teacher(name=lazy.name, key=f"{identity or lazy.content} {settings}", score=lazy.score)
    if isinstance(teacher, CrossEncoder):
        key = f"{identity or content_of(teacher)} {prompt!r} {raw} {teacher.activation_fn}"
        return Teacher(name=_called(teacher), key=key, score=_Reranker(teacher, prompt, raw, batch_size).score)
    if isinstance(teacher, SentenceTransformer):
        if prompt is not None:
            fix = "Drop it: an embedding model puts its own query and document prompts"
            raise ConfigError("a prompt is for cross-encoders", where="prompt", fix=fix)
        key = f"{identity or content_of(teacher)} {teacher.similarity_fn_name}"
        return Teacher(name=_called(teacher), key=key, score=_BiEncoder(teacher, batch_size).score)
    if not callable(teacher):
        fix = "Pass a CrossEncoder, a SentenceTransformer, a function or a name"
        raise ConfigError(f"a {type(teacher).__name__} cannot score pairs", where="teacher", fix=fix)
    if not identity:
        fix = "Pass identity='NAME-1', and another when the function changes"
        raise ConfigError("scores of a function have no name to be found by", where="identity", fix=fix)
    if prompt is not None or not raw:
        raise ConfigError("a function scores pairs as it likes", where="prompt and raw", fix="Drop them")
    return Teacher(name=identity, key=f"function {identity}", score=teacher)


def _called(model: Any) -> str:
    found = getattr(model.transformers_model, "name_or_path", None) or type(model).__name__
    return Path(found).name if Path(found).is_dir() else str(found)


@dataclass(frozen=True, slots=True)
class _Reranker:
    model: Any
    prompt: str | None
    raw: bool
    batch_size: int

    def score(self, pairs: Pairs) -> Any:
        import torch

        activation = torch.nn.Identity() if self.raw else None
        return self.model.predict(
            pairs, prompt=self.prompt, activation_fn=activation, batch_size=self.batch_size, show_progress_bar=False
        )


@dataclass(frozen=True, slots=True)
class _BiEncoder:
    model: Any
    batch_size: int

    def score(self, pairs: Pairs) -> Any:
        queries, documents = zip(*pairs, strict=True)
        sides = [
            self._encoded(self.model.encode_query, queries),
            self._encoded(self.model.encode_document, documents),
        ]
        return self.model.similarity_pairwise(*sides).float().cpu().numpy()

    def _encoded(self, encode: Callable[..., Any], texts: Sequence[str]) -> Any:
        known = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        found = encode(list(known), batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False)
        return found[[known[text] for text in texts]]


@dataclass
class _Lazy:
    """A teacher that was named: known by its files, and loaded once something is to be scored."""

    name: str
    load: dict[str, Any]
    prompt: str | None
    raw: bool
    batch_size: int

    @cached_property
    def content(self) -> str:
        """A digest of a folder's files, or a Hub id with the commit that its branch or tag stands for."""
        names = ("revision", "token", "local_files_only", "trust_remote_code")
        hub = {name: self.load[name] for name in names if name in self.load}
        folder = self.load.get("cache_folder") or self.load.get("cache_dir")
        return _content_of_files(self.name, **hub, **({"cache_dir": folder} if folder else {}))

    @cached_property
    def reranker(self) -> _Reranker:
        from .reranking import load_reranker

        return _Reranker(load_reranker(self.name, **self.load), self.prompt, self.raw, self.batch_size)

    def score(self, pairs: Pairs) -> Any:
        return self.reranker.score(pairs)


def _content_of_files(name: str, **hub: Any) -> str:
    """What a model's files are, without reading them where the Hub says it; an adapter's with its base model's."""
    if os.path.isdir(name):
        digest, about = _folder_digest(Path(name)), Path(name) / "adapter_config.json"
        if not about.is_file():
            return digest
        adapter = json.loads(about.read_text(encoding="utf-8"))
        hub = {**hub, "revision": adapter.get("revision")}
        return f"{digest} {_content_of_files(adapter['base_model_name_or_path'], **hub)}"
    from transformers import AutoConfig

    where, fix = f"teacher {name}", "Check the name, or load the teacher yourself and pass that"
    try:
        commit = getattr(AutoConfig.from_pretrained(name, **hub), "_commit_hash", None)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be found ({' '.join(str(error).split())})", where=where, fix=fix) from error
    if commit is None:
        raise ModelError("the Hub names no commit of it", where=where, fix=fix)
    return f"{name} {commit}"


def _folder_digest(folder: Path) -> str:
    """A digest of a model folder's files and their names; a card may change."""
    digest = xxhash.xxh3_128()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and file.name != "README.md" and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()} {file.stat().st_size} ".encode())
            with file.open("rb") as handle:
                while block := handle.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def content_of(model: Any) -> str:
    """A digest of a loaded model as it is now: modules, weights, config, tokenizer, prompts, longest text.

    A model that has been trained on since it was loaded has another one. 1 GB of weights takes about a second.
    """
    import torch

    digest = xxhash.xxh3_128()
    for name, module in model.named_modules():
        # Settings of modules that hold no weights (a pooling's mode, an activation) show in their representation.
        about = module.extra_repr() if not hasattr(module, "get_config_dict") else repr(module.get_config_dict())
        digest.update(f"{name} {type(module).__name__} {about}\n".encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} ".encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            data = value.detach().cpu().contiguous().reshape(-1)
            digest.update(data.view(torch.uint8).numpy().data)
    config = model.transformers_model.config.to_dict() if model.transformers_model is not None else {}
    settings = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    words = repr(sorted(model.tokenizer.get_vocab().items())) if backend is None else serialised(backend)
    for part in (
        repr(settings),
        words,
        repr(model.prompts),
        repr(model.default_prompt_name),
        repr(model.max_seq_length),
    ):
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


__all__ = ["Pairs", "Teacher", "content_of", "find_teacher"]
