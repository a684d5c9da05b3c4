"""What goes wrong in silence downstream, and must not start with what is saved here.

Those of single readers are with them: tests/exports. Those of the layout's words are in tests/unit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer as PlainModel

from burnish import FastSentenceTransformer
from burnish.core.testing.find import sample_config
from burnish.core.testing.subject import quietly

KINDS = ("full", "adapter", "merged")
Saved = Callable[[Path], dict[str, Path]]


@pytest.fixture
def save(tmp_path: Path) -> Saved:
    """A full, an adapter's and a merged folder of a base."""

    def save(base: Path) -> dict[str, Path]:
        found = {kind: tmp_path / "saved" / kind for kind in KINDS}
        with quietly():
            full = FastSentenceTransformer.from_pretrained(
                str(base), full_finetuning=True, device="cpu", prompts={"query": "find: "}
            )
            full.save_pretrained(str(found["full"]))
            adapted = FastSentenceTransformer.from_pretrained(str(base), device="cpu", prompts={"query": "find: "})
            adapted = FastSentenceTransformer.get_peft_model(adapted, r=2)
        adapted.save_pretrained(str(found["adapter"]))
        adapted.save_pretrained_merged(found["merged"])
        return found

    return save


def test_pooling_lies_where_whoever_takes_the_transformer_looks(
    tiny_bert_st: Path, save: Saved, tmp_path: Path
) -> None:
    # llama.cpp's converter, given the folder that modules.json names, finds no pooling beside it and writes none.
    base = tmp_path / "base"
    shutil.copytree(tiny_bert_st, base)
    (base / "0_Transformer").mkdir()
    moved = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json")
    for name in moved:
        (base / name).rename(base / "0_Transformer" / name)
    modules = json.loads((base / "modules.json").read_text())
    assert modules[0]["path"] == ""
    modules[0]["path"] = "0_Transformer"
    (base / "modules.json").write_text(json.dumps(modules))
    expected = PlainModel(str(base), device="cpu").encode("a text")
    for kind, folder in save(base).items():
        paths = [row["path"] for row in json.loads((folder / "modules.json").read_text())]
        assert paths == ["", "1_Pooling", "2_Normalize"] and (folder / "1_Pooling/config.json").exists(), kind
        assert (folder / ("adapter_config.json" if kind == "adapter" else "config.json")).exists(), kind
        np.testing.assert_allclose(PlainModel(str(folder), device="cpu").encode("a text"), expected, atol=1e-6)
        with quietly():  # an adapter names the folder in which its base has a config
            again = FastSentenceTransformer.from_pretrained(str(folder), device="cpu").eval()
        np.testing.assert_allclose(again.encode("a text"), expected, atol=1e-6)


def byte_pairs(folder: Path) -> None:
    """A tokenizer of byte pairs as Qwen's checkpoints have it, with a class that transformers builds anew by itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    parts = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    words = Regex("|".join([*parts, r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]))
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(["which planet is known as the red planet", "a cat sits on the mat, 12 times"], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    found = json.loads((folder / "tokenizer.json").read_text())
    found["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}  # as Qwen's has it, for none
    (folder / "tokenizer.json").write_text(json.dumps(found))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 64}))


def parts(folder: Path) -> Iterator[tuple[str, Any]]:
    """Of a tokenizer.json what makes numbers of a text; that is not what the last call cut and padded."""
    found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for name in ("normalizer", "pre_tokenizer", "post_processor", "model", "added_tokens", "decoder"):
        yield name, found[name]


@pytest.mark.parametrize("sort", ["pieces", "byte pairs"])
def test_a_tokenizer_arrives_as_it_was(sort: str, tiny_bert_st: Path, save: Saved, tmp_path: Path) -> None:
    # llama.cpp's converter knows a tokenizer of byte pairs by a hash of what it makes of a text, and stops at others.
    base = tiny_bert_st
    if sort == "byte pairs":
        from transformers import AutoModel

        base = tmp_path / "base"
        byte_pairs(base)
        config = sample_config("qwen3")
        config.vocab_size = 400
        torch.manual_seed(0)
        kind: Any = AutoModel
        kind.from_config(config).save_pretrained(base)
    wanted = dict(parts(base))
    for name, folder in save(base).items():
        for part, found in parts(folder):
            assert found == wanted[part], (name, part)


def test_only_safetensors_and_json(tiny_bert_st: Path, save: Saved) -> None:
    for kind, folder in save(tiny_bert_st).items():
        endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert endings <= {".safetensors", ".json", ".md", ".txt"}, kind


def test_golden_vectors_tell_a_prompt_from_none(tiny_bert_st: Path, save: Saved) -> None:
    # TEI, vLLM and Sentence Transformers put no prompt before a text unless they are asked to.
    for kind, folder in save(tiny_bert_st).items():
        found = json.loads((folder / "golden.json").read_text())
        rows = list(zip(found["inputs"], found["prompts"], found["outputs"], strict=True))
        both = {prompt: np.array(row) for text, prompt, row in rows if text == rows[4][0]}
        assert set(both) == {None, "query"}, kind
        assert np.abs(both[None] - both["query"]).max() > 1e-3, kind


@pytest.mark.parametrize(
    ("model_type", "older"),
    [
        # vLLM stops without the first; llama.cpp's converter without ModernBERT's layer_norm_eps; TEI without the rest.
        ("bert", {"position_embedding_type"}),
        ("xlm-roberta", {"position_embedding_type"}),
        ("modernbert", {"layer_norm_eps", "global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"}),
        ("gemma3_text", {"rope_theta", "rope_local_base_freq"}),
        ("qwen3", {"rope_theta"}),
    ],
)
def test_keys_that_servers_stop_without(model_type: str, older: set[str]) -> None:
    from burnish.core.layout import older_config
    from burnish.core.registry import registry
    from burnish.core.selection import choose_family

    config = sample_config(model_type)
    said = older_config(config.to_dict(), choose_family(registry(None), config).family)
    assert all(said.get(name) is not None for name in older), said
