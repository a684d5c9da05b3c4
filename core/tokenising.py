"""From texts to token ids, exactly as a model's own preprocessing makes them; or the reason why that cannot be said."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.base.modules import Transformer
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

Flat = tuple[NDArray[np.int32], NDArray[np.int64]]
"""(token ids of all texts, one after another; tokens of each text)."""

_PARALLEL = "TOKENIZERS_PARALLELISM"
_LIBRARIES = ("tokenizers", "transformers", "sentence-transformers")
# An Encoding takes some 60 bytes a token beside its ids: two slices of long texts stay within 100 MB.
_SLICE = 512


def why_not(model: Any, *, templates: bool = False) -> str | None:
    """Why a model's texts cannot be tokenised ahead of its own preprocessing; None if they can.

    Args:
        model: Any of Sentence Transformers' kinds of model.
        templates: Whether its preprocessing may put texts into a chat template.
    """
    ours = ("sentence_transformers.", f"{__package__}.")
    preprocess = getattr(type(model), "preprocess", None)
    bound = vars(model).get("preprocess")  # a trainer of ours may have bound one that knows these tokens
    theirs = bound is not None and not type(bound).__module__.startswith(f"{__package__}.")
    if theirs or not getattr(preprocess, "__module__", "").startswith(ours):
        return "the model has a preprocess of its own"
    if any(type(module).__name__ == "Router" for module in model.modules()):
        return "the model routes texts"
    first = model[0]
    if type(first) is not Transformer or "preprocess" in vars(first):
        return f"the model's first module is a {type(first).__name__} of its own kind"
    if not isinstance(first.processor, PreTrainedTokenizerBase):
        return f"the model's {type(first.processor).__name__} reads more than texts"
    if not templates and ("text" not in first.modality_config or "message" in first.modality_config):
        return "the model puts texts into a chat template"
    return None


class Recipe:
    """How the texts of one column become token ids.

    The short way is the tokenizer's backend alone, in parallel, without masks and type ids: 395 against 290 thousand
    tokens a second and core (MiniLM). It is taken for a list of texts only where a sample of them, with the longest
    and the shortest, comes out as from the model's own preprocessing; that is the long way.

    Args:
        model: A SentenceTransformer with packed input that `why_not` lets pass.
        prompt: What stands before each text.
    """

    special_tokens: ClassVar[bool] = True
    """Whether the tokens that stand around a text are among its own."""

    def __init__(self, model: Any, prompt: str | None = None) -> None:
        self.model, self.prompt = model, prompt or ""
        self.max_length = model.max_seq_length

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.model[0].tokenizer

    @property
    def name(self) -> str:
        """The tokenizer's class."""
        return f"{type(self.tokenizer).__module__}.{type(self.tokenizer).__qualname__}"

    @cached_property
    def key(self) -> str:
        """A hash over everything that decides the token ids, beside the texts."""
        digest = hashlib.blake2b(digest_size=16)
        first, tokenizer = self.model[0], self.tokenizer
        named = ("truncation_side", "split_special_tokens", "special_tokens_map")
        settings = [getattr(tokenizer, name, None) for name in named]
        settings += [getattr(first, "do_lower_case", None), getattr(first, "processing_kwargs", None)]
        versions = [f"{name} {version(name)}" for name in _LIBRARIES]
        apart = () if self.special_tokens else ("no special tokens",)
        for part in (self.name, repr(settings), self.prompt, str(self.max_length), *versions, *apart):
            digest.update(f"{len(part)}:{part}".encode())
        if tokenizer.is_fast:
            digest.update(serialised(tokenizer.backend_tokenizer).encode())
        else:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                for file in sorted(Path(folder).rglob("*")):
                    if file.is_file():
                        digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    @cached_property
    def backend(self) -> Any:
        """The tokenizer's backend, to itself: calls of the model's own leave their cutting and padding in theirs.

        None for a tokenizer in Python.
        """
        if not self.tokenizer.is_fast:
            return None
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(serialised(self.tokenizer.backend_tokenizer))
        backend.encode_special_tokens = bool(getattr(self.tokenizer, "split_special_tokens", False))
        if self.max_length is not None and self.max_length < 2**31:  # else the model cuts nothing either
            backend.enable_truncation(self.max_length, direction=self.tokenizer.truncation_side)
        return backend

    def tokenise(self, texts: list[str]) -> Flat:
        """Token ids of any number of texts."""
        if not texts:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        with _threads():
            if self.backend is not None:
                values, lengths = self._short(texts)
                if self._agrees(texts, values, lengths):
                    return values, lengths
            return _joined([self._own(texts[first : first + 256]) for first in range(0, len(texts), 256)])

    def _agrees(self, texts: list[str], values: NDArray[np.int32], lengths: NDArray[np.int64]) -> bool:
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        # On many cores this sample, in Python, takes as long as thousands of texts in the backend.
        sample = sorted({*order[:4], *order[-8:], *range(0, len(texts), max(1, len(texts) // 16))})
        own, own_lengths = self._own([texts[place] for place in sample])
        ends = np.cumsum(lengths)
        found = np.concatenate([values[ends[place] - lengths[place] : ends[place]] for place in sample])
        return np.array_equal(lengths[sample], own_lengths) and np.array_equal(found, own)

    def _short(self, texts: list[str]) -> Flat:
        plain = getattr(self.backend, "encode_batch_fast", self.backend.encode_batch)
        encode = partial(plain, add_special_tokens=self.special_tokens)
        slices = [texts[start : start + _SLICE] for start in range(0, len(texts), _SLICE)]
        if self.prompt:
            slices = [[self.prompt + text for text in part] for part in slices]
        parts = []
        # The backend's cores work on the next slice while Python reads the ids of this one.
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(encode, slices[0])
            for following in [*slices[1:], None]:
                found = ahead.result()
                if following is not None:
                    ahead = pool.submit(encode, following)
                ids = [one.ids for one in found]
                lengths = np.fromiter(map(len, ids), np.int64, len(ids))
                parts.append((np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths))
        return _joined(parts)

    def _own(self, texts: list[str]) -> Flat:
        features = self.model.preprocess(texts, prompt=self.prompt or None)
        bounds = features["cu_seq_lens_q"].numpy().astype(np.int64)
        return features["input_ids"][0].numpy().astype(np.int32), np.diff(bounds)

    def prompt_length(self) -> int | None:
        """Tokens of the prompt, as pooling that leaves it out is told; None without one."""
        if not self.prompt:
            return None
        found = self.model.preprocess(["text"], prompt=self.prompt).get("prompt_length")
        return None if found is None else int(found)


def _joined(parts: list[Flat]) -> Flat:
    return np.concatenate([values for values, _ in parts]), np.concatenate([lengths for _, lengths in parts])


def serialised(backend: Any) -> str:
    """The backend with all its parts, but for the cutting and padding that its last call left there."""
    cut, pad = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        return str(backend.to_str())
    finally:
        if cut is not None:
            backend.enable_truncation(**cut)
        if pad is not None:
            backend.enable_padding(**pad)


@contextmanager
def _threads() -> Iterator[None]:
    """Let tokenizers use every core for the length of a block; it reads the variable at each call.

    Not in a loader's worker: a forked process would wait for threads that it does not have.
    """
    if get_worker_info() is not None:
        yield
        return
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = before
