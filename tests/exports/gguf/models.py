"""Tiny models whose tokenizers are of the kinds that llama.cpp's converter takes: those of other tests all have
MiniLM's, which is a BERT's."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from burnish import FastCrossEncoder, FastSentenceTransformer
from burnish.core import golden
from burnish.core.testing.subject import quietly

from ..random_models import random_model

ROOT = Path(__file__).parents[3]
LONGEST = 64
PROMPTS = {"query": "find this: ", "document": ""}


def words() -> Iterable[str]:
    """What tokenizers are trained on: a page of English, and letters of the scripts that golden texts are in."""
    yield from (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    yield from golden.TEXTS


def byte_pairs(first: str | None, last: str, pad: str) -> Any:
    """A tokenizer of pairs of bytes that puts one token before a text, or none, and one behind it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE())
    # The pattern of Qwen2, which llama.cpp knows by that name.
    word = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern = word + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    made.decoder = decoders.ByteLevel()
    special = [token for token in (pad, first, last, "[UNK]", "[MASK]") if token is not None]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(words(), trainer)
    named = [(token, made.token_to_id(token)) for token in (first, last) if token is not None]
    before = f"{first} " if first is not None else ""
    made.post_processor = processors.TemplateProcessing(
        single=f"{before}$A {last}", pair=f"{before}$A {last} $B {last}", special_tokens=named
    )
    more = {"cls_token": first, "sep_token": last, "bos_token": first} if first is not None else {}
    kind: Any = PreTrainedTokenizerFast
    return kind(
        tokenizer_object=made, pad_token=pad, eos_token=last, unk_token="[UNK]", mask_token="[MASK]",
        model_max_length=LONGEST, **more,
    )  # fmt: skip


def pieces() -> Any:
    """XLM-R's tokenizer with few pieces, and a table of characters in which each stands for itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import XLMRobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    made: Any = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(words(), trainer)
    vocabulary = [tuple(row) for row in json.loads(made.to_str())["model"]["vocab"]]
    table = struct.pack("<I", 1024) + bytes(1025)
    kind: Any = XLMRobertaTokenizer
    return kind(vocab=[*vocabulary, ("<mask>", 0.0)], _spm_precompiled_charsmap=table, model_max_length=LONGEST)


def letters() -> Any:
    """Gemma's tokenizer with few pairs: no letter is unknown, for its bytes are known."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    made: Any = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    made.train_from_iterator(words(), trainer)
    model = json.loads(made.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    kind: Any = GemmaTokenizer
    return kind(vocab=model["vocab"], merges=merges, model_max_length=LONGEST, add_bos_token=True, add_eos_token=True)


TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "gemma": letters,
    "modernbert": lambda: byte_pairs("[CLS]", "[SEP]", "[PAD]"),
    "qwen3": lambda: byte_pairs(None, "<|endoftext|>", "<|pad|>"),
    "xlm_roberta": pieces,
}


# llama.cpp's layers of Gemma see all tokens in every sixth, whatever a config says.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "gemma": {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
}


def bare(family: str, folder: Path) -> Path:
    """A transformers folder of one family: random weights, and a tokenizer of its kind."""
    tokenizer = TOKENIZERS[family]()
    config = import_module(f"burnish.families.{family}").sample("tiny")
    named = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    return random_model(folder, config, tokenizer, {**named, **SETTINGS.get(family, {})})


def saved(base: Path, folder: Path) -> Path:
    """The folder of an embedding model over a transformers folder."""
    with quietly():
        model = FastSentenceTransformer.from_pretrained(str(base), full_finetuning=True, device="cpu", prompts=PROMPTS)
    model.save_pretrained(str(folder))
    return folder


def reranker(base: Path, folder: Path) -> Path:
    """The folder of a reranker over a transformers folder, with a head drawn at random."""
    torch.manual_seed(3)
    with quietly():
        model: Any = FastCrossEncoder.from_pretrained(str(base), full_finetuning=True, device="cpu", num_labels=1)
    for parameter in model[0].model.classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(folder))
    return folder
