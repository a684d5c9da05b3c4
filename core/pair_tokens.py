"""Pairs of texts that are tokenised already, put together in numpy as the tokenizer would put them together.

A cross-encoder reads [prefix] A [middle] B [suffix]. A fast tokenizer tokenises A and B each by itself, cuts them and
puts its special tokens round them, so that a text is tokenised once however many pairs it is in. How it puts them
together is found by trying, and looked at again on texts of the run before anything rests on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import stream
from .pair_cuts import Lengths, cut_lengths, cuts_each
from .stream import Tokens
from .tokenising import Flat, Recipe

# What the features of packed input hold beside settings that are the same in every batch.
_PACKED = frozenset({"input_ids", "position_ids", "token_type_ids", "cu_seq_lens_q", "cu_seq_lens_k"})
_LONGEST = frozenset({"max_length_q", "max_length_k"})
# Texts that tokenizers have been seen to treat in a way of their own.
_ODD = ("", " ", "a", "\n a\tb ", "[SEP] </s> <|endoftext|>", "é ß 漢字 🙂", "UPPER lower", "x" * 300)


class TokenisedText(str):
    """A text that carries its tokens, so that any loss may handle it as the `str` it is.

    Args:
        text: The text.
        tokens: (length,) int32 token ids of `prompt` and text, none of them special, not cut.
        prompt: What stands before the text where it was tokenised.
        partner: The first text of a pair whose second is this one. `tokens` are then those of the whole pair, as the
            model reads it; with "" those of this text alone.
    """

    __slots__ = ("partner", "prompt", "tokens")

    tokens: Tokens
    prompt: str
    partner: str | None

    def __new__(cls, text: str, tokens: Tokens, prompt: str = "", partner: str | None = None) -> Self:
        made = super().__new__(cls, text)
        made.tokens, made.prompt, made.partner = tokens, prompt, partner
        return made

    def __reduce__(
        self,
    ) -> tuple[Any, ...]:  # from a loader's worker: the tokens, not the file that they are mapped from
        return type(self), (str(self), np.array(self.tokens), self.prompt, self.partner)


class TextRecipe(Recipe):
    """How texts become token ids for pairs: each by itself, without special tokens, as long as it is."""

    special_tokens: ClassVar[bool] = False

    def __init__(self, model: Any, prompt: str | None = None) -> None:
        super().__init__(model, prompt)
        self.max_length = None

    def _own(self, texts: list[str]) -> Flat:
        asked = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
        found = self.tokenizer([self.prompt + text for text in texts], **asked)["input_ids"]
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        flat = [np.asarray(ids, np.int32) for ids in found]
        return np.concatenate([np.zeros(0, np.int32), *flat]), lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Where a tokenizer puts texts, one or two: pieces[0] text pieces[1], or pieces[0] A pieces[1] B pieces[2].

    Args:
        pieces: Special tokens before, between and after the texts.
        piece_types: Their token types.
        text_types: The token type of each text.
    """

    pieces: tuple[Tokens, ...]
    piece_types: tuple[Tokens, ...]
    text_types: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many special tokens there are."""
        return sum(map(len, self.pieces))

    def types(self, lengths: Lengths) -> Lengths:
        """(tokens,) token types of texts one after another, of (texts, parts) `lengths`."""
        kinds, sizes = list[NDArray[Any]](), list[Lengths]()
        one = np.ones((len(lengths), 1), np.int64)
        for place, piece in enumerate(self.piece_types):
            kinds.append(piece)
            sizes.append(np.repeat(one, len(piece), axis=1))
            if place < len(self.text_types):
                kinds.append(np.asarray([self.text_types[place]], np.int32))
                sizes.append(lengths[:, place : place + 1])
        pattern = np.concatenate(kinds).astype(np.int64)
        return np.repeat(np.tile(pattern, len(lengths)), np.concatenate(sizes, axis=1).ravel())


def find_template(backend: Any, *texts: str) -> Template | None:
    """The template of a tokenizer's backend that neither cuts nor pads, by trying; None if it has another form."""
    found = backend.encode(*texts)
    pieces, types, kinds = [list[int]()], [list[int]()], list[set[int]]()
    for token, kind, of in zip(found.ids, found.type_ids, found.sequence_ids, strict=True):
        if of is None:
            pieces[-1].append(token)
            types[-1].append(kind)
        elif of == len(kinds):
            kinds.append({kind})
            pieces.append([])
            types.append([])
        elif of == len(kinds) - 1 and not pieces[-1]:
            kinds[-1].add(kind)
        else:
            return None
    if len(kinds) != len(texts) or any(len(kind) != 1 for kind in kinds):
        return None
    return Template(
        pieces=tuple(np.asarray(piece, np.int32) for piece in pieces),
        piece_types=tuple(np.asarray(piece, np.int32) for piece in types),
        text_types=tuple(kind.pop() for kind in kinds),
    )


class PairRecipe:
    """How a model's tokenizer puts together pairs, and single texts, that are tokenised already.

    Args:
        model: A CrossEncoder with packed input whose preprocessing `tokenising.why_not` lets pass.
        fit, fit_longest: Of `stream.flatten`; None where batches may have any shape.
    """

    def __init__(self, model: Any, fit: stream.Fit | None = None, fit_longest: stream.Fit | None = None) -> None:
        self.model, self.fit, self.fit_longest = model, fit, fit_longest
        self._settled: dict[str, dict[str, Any]] = {}  # by prompt, what every batch's features hold beside tokens

    @cached_property
    def plain(self) -> TextRecipe:
        """How texts are tokenised that no prompt stands before."""
        return TextRecipe(self.model)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the model passes to its tokenizer for texts beside Sentence Transformers' own settings."""
        given: dict[str, Any] = dict((getattr(self.model[0], "processing_kwargs", None) or {}).get("text") or {})
        return {"truncation": "longest_first", **given}

    @property
    def max_length(self) -> int | None:
        """The longest pair in tokens; None where nothing is cut."""
        found = self.settings.get("max_length") or self.model.max_seq_length
        return None if found is None or found >= 2**31 else int(found)

    @property
    def strategy(self) -> str:
        """How pairs are cut: as `cut_lengths` takes it, or another word, for which there is no short way."""
        asked = self.settings["truncation"]
        return "longest_first" if asked is True else str(asked)

    @cached_property
    def templates(self) -> dict[int, Template]:
        """By how many texts: one or two. What the tokenizer puts together otherwise is left out."""
        backend = self.plain.backend
        if backend is None:
            return {}
        found = {1: find_template(backend, "first"), 2: find_template(backend, "first", "second")}
        return {parts: template for parts, template in found.items() if template is not None}

    @cached_property
    def _cuts_each(self) -> bool:
        return self.strategy == "longest_first" and cuts_each(self.plain.backend, self.templates[2].size)

    def why_not(self) -> str | None:
        """Why pairs cannot be put together here, as far as it is known without texts; None if they can."""
        if not getattr(self.model[0].tokenizer, "is_fast", False):
            return f"{type(self.model[0].tokenizer).__name__} is a tokenizer in Python"
        if 2 not in self.templates:
            return "the tokenizer puts pairs together in a way of its own"
        if self.strategy not in ("longest_first", "only_first", "only_second"):
            return f"pairs are cut in another way: truncation={self.settings['truncation']!r}"
        if self.max_length is not None and self.max_length <= self.templates[2].size:
            return f"max_seq_length={self.max_length} leaves no token to a pair"
        return None

    def features(self, inputs: Sequence[Any], prompt: str | None = None) -> dict[str, Any] | None:
        """What the model's own `preprocess` would return, filled up to few shapes where the recipe has a `fit`.

        Args:
            inputs: Texts, or pairs of them.
            prompt: What stands before the first text of each.

        Returns:
            (1, T) input_ids, position_ids and, where the tokenizer gives them, token_type_ids; (N + M + 1,) bounds; and
            "texts", the N that are not there to fill. None where a text carries no tokens, or others.
        """
        settled = self._settled.get(prompt or "")
        if settled is None or not inputs:
            return None
        if (whole := _whole(inputs, prompt or "")) is not None:
            return self._flattened(whole, settled, self.fit, self.fit_longest)
        parts = _parts(inputs, prompt or "")
        if parts is None or len(parts[0]) not in self.templates:
            return None
        return self._put_together(parts, settled, self.fit, self.fit_longest)

    def _put_together(
        self,
        parts: list[tuple[Tokens, ...]],
        settled: Mapping[str, Any],
        fit: stream.Fit | None,
        fit_longest: stream.Fit | None,
    ) -> dict[str, Any] | None:
        template = self.templates[len(parts[0])]
        lengths = np.asarray([[len(part) for part in each] for each in parts], np.int64)
        kept: Lengths | None = lengths
        if self.max_length is not None:
            counted = np.minimum(lengths, self.max_length) if self._cuts_each else lengths
            kept = cut_lengths(counted, self.max_length - template.size, self.strategy)
        if kept is None:
            return None
        right = self.model[0].tokenizer.truncation_side == "right"
        texts = []
        for each, sizes in zip(parts, kept.tolist(), strict=True):
            pieces = [template.pieces[0]]
            for part, size, piece in zip(each, sizes, template.pieces[1:], strict=True):
                pieces += [part[:size] if right else part[len(part) - size :], piece]
            texts.append(np.concatenate(pieces))
        features = self._flattened(texts, settled, fit, fit_longest)
        if "token_type_ids" in settled:
            types = np.zeros(features["input_ids"].shape[1], np.int64)
            given = template.types(kept)
            types[: len(given)] = given
            features["token_type_ids"] = torch.from_numpy(types)[None]
        return features

    def _flattened(
        self,
        texts: Sequence[Tokens],
        settled: Mapping[str, Any],
        fit: stream.Fit | None,
        fit_longest: stream.Fit | None,
    ) -> dict[str, Any]:
        packing = self.model.burnish.decision.family.family.packing
        filler = self.model[0].tokenizer.pad_token_id or 0
        batch = stream.flatten(
            [texts], position_offset=packing.position_offset, filler=filler, fit=fit, fit_longest=fit_longest
        )
        return {**stream.model_inputs(batch), **settled, "texts": len(texts)}

    def settle_whole(self, samples: Sequence[Any], prompt: str = "") -> str | None:
        """As `settle`, for samples that carry the tokens of whole pairs, or of texts as the model reads them."""
        own = self.model.preprocess([_plain(text) for text in samples], prompt=prompt or None)
        if "token_type_ids" in own:
            return "the model gives token types in a way of its own"
        whole = _whole(samples, prompt)
        if whole is None:
            return "texts carry other tokens"
        settled = {key: value for key, value in own.items() if key not in _PACKED | _LONGEST}
        if reason := _differ(own, self._flattened(whole, settled, None, None)):
            return reason
        self._settled[prompt] = settled
        return None

    def settle(self, samples: Sequence[Any], recipes: Mapping[str, TextRecipe], prompt: str = "") -> str | None:
        """Compare with the model's own preprocessing; `features` works for a prompt once nothing speaks against it.

        Args:
            samples: Texts or pairs that carry their tokens, all of one kind.
            recipes: By prompt, how they were tokenised: that of `prompt`, and that of "".
            prompt: What stands before the first text of each.

        Returns:
            What differs; None if nothing does.
        """
        single = isinstance(samples[0], str)
        if single and 1 not in self.templates:
            return "the tokenizer puts texts together in a way of its own"
        for chosen in (list(samples), self._odd(recipes, prompt, single=single)):
            own = self.model.preprocess([_plain(text) for text in chosen], prompt=prompt or None)
            settled = {key: value for key, value in own.items() if key not in _PACKED | _LONGEST or "type" in key}
            parts = _parts(chosen, prompt)
            if parts is None:
                return "texts carry other tokens"
            ours = self._put_together(parts, settled, None, None)
            if ours is None:
                return "the tokenizer refuses to cut them so"
            if reason := _differ(own, ours):
                return reason
        self._settled[prompt] = settled
        return None

    def _odd(self, recipes: Mapping[str, TextRecipe], prompt: str, *, single: bool) -> list[Any]:
        """Odd texts, and some around the length at which pairs are cut, in all combinations."""
        longest = min(self.max_length or 64, 8_192)
        words = [" ".join(["word"] * count) for count in (longest // 2 - 1, longest // 2, longest + 1, longest + 2)]
        texts = [*_ODD, *words]
        first, second = (tokenised(recipes[name], texts) for name in (prompt, ""))
        return first if single else [(one, other) for one in first for other in second]


def tokenised(recipe: Recipe, texts: list[str]) -> list[TokenisedText]:
    """Texts with their tokens."""
    values, lengths = recipe.tokenise(texts)
    tokens = np.split(values, np.cumsum(lengths)[:-1])
    return [TokenisedText(text, found, recipe.prompt) for text, found in zip(texts, tokens, strict=True)]


def _parts(inputs: Sequence[Any], prompt: str) -> list[tuple[Tokens, ...]] | None:
    """The tokens of each input's texts; None where one has none, or was tokenised after another prompt."""
    found, sizes = list[tuple[Tokens, ...]](), set[int]()
    for each in inputs:
        texts: Sequence[Any] = (each,) if isinstance(each, str) else each
        for place, text in enumerate(texts):
            if not isinstance(text, TokenisedText) or text.prompt != ("" if place else prompt):
                return None
            if text.partner is not None:
                return None
        found.append(tuple(text.tokens for text in texts))
        sizes.add(len(texts))
    return found if len(sizes) == 1 and sizes <= {1, 2} else None


def _whole(inputs: Sequence[Any], prompt: str) -> list[Tokens] | None:
    """The tokens of each pair, or text, that the model reads; None where one is not in the store as a whole."""
    found = list[Tokens]()
    for each in inputs:
        first, last = ("", each) if isinstance(each, str) else (each[0], each[-1])
        if not isinstance(last, TokenisedText) or last.partner is None:
            return None
        if last.prompt != prompt or last.partner != first or (not isinstance(each, str) and len(each) != 2):
            return None
        found.append(last.tokens)
    return found


def _plain(text: Any) -> Any:
    return str(text) if isinstance(text, str) else tuple(str(part) for part in text)


def _differ(own: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """What the model's own features have otherwise."""
    for key in sorted({*own, *ours} - {"texts"}):
        theirs, found = own.get(key), ours.get(key)
        if isinstance(theirs, Tensor) and isinstance(found, Tensor):
            same = key in _PACKED and torch.equal(theirs, found.to(theirs.dtype))
        else:
            same = not isinstance(theirs, Tensor) and theirs == found
        if not same:
            return f"the model makes another {key} of a pair"
    return None
