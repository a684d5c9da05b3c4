"""A tokenizer for random-weight models: one token a word, so that a test sets the length of a text by its words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WORDS = 40
"""How many words it knows: "w0" to "w39"."""


def words(count: int, seed: int = 0) -> str:
    """A text of `count` words."""
    return " ".join(f"w{(seed * 7 + place * 5 + place * place) % WORDS}" for place in range(count))


def save_tokenizer(
    folder: Path,
    config: PretrainedConfig,
    *,
    first: bool,
    max_length: int,
    token_types: bool = False,
    more: Sequence[str] = (),
    chat_template: str | None = None,
) -> None:
    """Write a tokenizer whose special tokens have the ids that `config` names.

    Args:
        folder: Where to.
        config: Its `pad_token_id` (0 if there is none) and `vocab_size` (at least 44) are kept to.
        first: Whether a token stands before each text, as encoders have it; one after each text there always is.
        max_length: Longest text in tokens.
        token_types: Whether it gives token types: 1 in the second text of a pair.
        more: Words that it knows beside "w0" to "w39".
        chat_template: As `apply_chat_template` takes it.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pad = int(getattr(config, "pad_token_id", None) or 0)
    names = iter(["[CLS]", "[SEP]", "[UNK]", *(f"w{number}" for number in range(WORDS)), *more])
    vocabulary = {"[PAD]" if place == pad else next(names): place for place in range(WORDS + 4 + len(more))}
    tokenizer: Any = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    start, second = "[CLS] " if first else "", ":1" if token_types else ""
    middle = "[SEP] " if first else ""
    tokenizer.post_processor = TemplateProcessing(
        single=f"{start}$A [SEP]",
        pair=f"{start}$A {middle}$B{second} [SEP]{second}",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    kind: Any = PreTrainedTokenizerFast
    kind(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if token_types else [])],
        **({} if chat_template is None else {"chat_template": chat_template}),
    ).save_pretrained(str(folder))
