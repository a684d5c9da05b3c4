"""What training is fed: tokens and features of the model's own preprocessing, whatever the tokenizer and columns."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformerTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from burnish.core import collating, stream, tokenising
from burnish.core.errors import DataError, ModelError
from burnish.core.feeding import feed, refusal
from burnish.core.packing import POOLS_PACKED_PROMPTS
from burnish.core.tokenising import Recipe

TEXTS = [
    "hello world", "a", "", "  Spaces   AND\ttabs \n", "日本語のテキスト 🙂 ünïcödé", "[CLS] a [SEP] b", "x" * 300,
    "https://example.org/a.png", *(f"{'many ' * number}words, no. {number}" for number in range(0, 200, 9)),
]  # fmt: skip

FAST: Any = PreTrainedTokenizerFast


@pytest.fixture
def load(tiny_bert_st: Path) -> Callable[..., Any]:
    from burnish import FastSentenceTransformer

    def load(**options: Any) -> Any:
        return FastSentenceTransformer.from_pretrained(
            str(tiny_bert_st), device="cpu", full_finetuning=True, packed=options.pop("packed", True), **options
        )

    return load


@pytest.fixture
def model(load: Any) -> Any:
    return load()


def stock(model: Any, **settings: Any) -> Any:
    kind: Any = SentenceTransformerTrainer.data_collator_class
    return kind(preprocess_fn=model.preprocess, **settings)


def fast(inner: Any, trainer: Any, **parts: Any) -> Any:
    tokenizer: Any = Tokenizer(inner)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_level(**settings: Any) -> Any:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer = fast(
        models.BPE(), trainer, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        post_processor=processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)]),
        decoder=decoders.ByteLevel(),
    )  # fmt: skip
    return FAST(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", **settings)


def unigram() -> Any:
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer = fast(
        models.Unigram(), trainer, normalizer=normalizers.NFKC(), pre_tokenizer=pre_tokenizers.Metaspace(),
        post_processor=processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        ),
    )  # fmt: skip
    return FAST(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer that does to a text what its backend does not know of."""

    def __call__(self, text: Any, *args: Any, **keywords: Any) -> Any:
        return super().__call__([one.upper() for one in text], *args, **keywords)


def shouting() -> Any:
    kind: Any = Shouting
    return kind(tokenizer_object=byte_level().backend_tokenizer, pad_token="<pad>", eos_token="<end>")


KINDS: dict[str, Any] = {
    "wordpiece": lambda: None,
    "byte-level BPE": byte_level,
    "cut on the left": lambda: byte_level(truncation_side="left"),
    "unigram": unigram,
    "its own call": shouting,
}


@pytest.mark.parametrize("prompt", [None, "query: "])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_models_own(kind: str, prompt: str | None, model: Any) -> None:
    tokenizer = KINDS[kind]()
    if tokenizer is not None:
        model[0].processor = tokenizer
    model.max_seq_length = 32
    expected = model.preprocess(TEXTS, prompt=prompt)
    lengths = expected["cu_seq_lens_q"].diff().tolist()
    assert max(lengths) == 32 and min(lengths) < 32
    recipe = Recipe(model, prompt)
    before = recipe.key
    values, found = recipe.tokenise(TEXTS)
    assert found.tolist() == lengths and values.tolist() == expected["input_ids"][0].tolist()
    assert values.dtype == np.int32
    agrees = recipe._agrees(TEXTS, *recipe._short(TEXTS))
    assert agrees == (kind != "its own call"), "the short way was not taken, or should not have been"
    model.preprocess(TEXTS)
    assert Recipe(model, prompt).key == before, "the key moves with the tokenizer's last call"


def test_the_key_is_of_all_that_decides_tokens(model: Any) -> None:
    keys = {Recipe(model).key, Recipe(model, "query: ").key}
    model.max_seq_length = 16
    keys.add(Recipe(model).key)
    model[0].processor.truncation_side = "left"
    keys.add(Recipe(model).key)
    model[0].processor.add_tokens(["日本語"])
    keys.add(Recipe(model).key)
    assert len(keys) == 5


def test_the_users_variable_is_put_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    own = Recipe._short

    def short(self: Recipe, texts: list[str]) -> Any:
        seen.append(os.environ["TOKENIZERS_PARALLELISM"])
        return own(self, texts)

    monkeypatch.setattr(Recipe, "_short", short)
    for value in ("false", None):
        if value is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM")
        Recipe(model).tokenise(TEXTS)
        assert seen.pop() == "true" and os.environ.get("TOKENIZERS_PARALLELISM") == value


def pairs(**more: Any) -> Dataset:
    return Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1], **more})


def fed(model: Any, dataset: Any, folder: Path, *, joint: bool, collator: Any = None, **settings: Any) -> Any:
    collator = collator or stock(model, **settings)
    assert refusal(model, dataset, collator) is None
    return feed(model, dataset, collator, folder=str(folder), joint=joint, say=lambda line: None)


def same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else bool(first == second)


@pytest.mark.parametrize("labels", [{}, {"score": [n / 7 for n in range(31)]}, {"label": list(range(31))}])
@pytest.mark.parametrize("prompts", [None, "say: ", {"positive": "passage: "}])
def test_columns_are_those_of_the_stock_collator(labels: Any, prompts: Any, model: Any, tmp_path: Path) -> None:
    assert len(TEXTS) == 31
    dataset = pairs(**labels).select(range(30, -1, -1))
    collator = stock(model, prompts=prompts)
    rows = [3, 30, 7, 7, 0]
    found = fed(model, dataset, tmp_path, joint=False, collator=collator).collator(rows)
    expected = collator([dataset[row] for row in rows])
    assert found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    assert [key for key in found if key.endswith("input_ids")] == ["anchor_input_ids", "positive_input_ids"]
    joint = fed(model, dataset, tmp_path, joint=True, collator=collator).collator(rows)
    both = torch.cat([expected["anchor_input_ids"], expected["positive_input_ids"]], dim=1)
    assert torch.equal(joint[stream.IDS], both) and joint[stream.COLUMNS] == (5, 5)
    assert ("label" in joint) == bool(labels) and (not labels or same(joint["label"], expected["label"]))


def test_lists_of_labels_and_hard_negatives(model: Any, tmp_path: Path) -> None:
    dataset = pairs(negative=TEXTS[3:] + TEXTS[:3], label=[[n, n + 0.5] for n in range(31)])
    batch = fed(model, dataset, tmp_path, joint=True).collator([4, 9])
    assert batch[stream.COLUMNS] == (2, 2, 2) and batch["label"].tolist() == [[4, 4.5], [9, 9.5]]


def test_several_data_sets(model: Any, tmp_path: Path) -> None:
    kind: Any = SentenceTransformerTrainer
    data = DatasetDict({"one": pairs(), "two": Dataset.from_dict({"a": TEXTS, "score": [0.5] * 31})})
    kind.add_dataset_name_column(kind.__new__(kind), data)
    found = fed(model, data, tmp_path, joint=True)
    assert len(found.rows) == 62 and found.texts == 93
    first, second = found.collator([0, 30]), found.collator([31, 61])
    assert first["dataset_name"] == "one" and first[stream.COLUMNS] == (2, 2) and "label" not in first
    assert second["dataset_name"] == "two" and second[stream.COLUMNS] == (2,) and second["label"].tolist() == [0.5, 0.5]
    with pytest.raises(DataError, match="a batch mixes data sets"):
        found.collator([30, 31])


def test_a_users_sampler_may_mix_data_sets_with_the_same_columns(model: Any, tmp_path: Path) -> None:
    scores = [[n / 31 for n in range(31)], [n / 62 for n in range(31)]]
    data = DatasetDict({name: pairs(score=score) for name, score in zip("ab", scores, strict=True)})
    batch = fed(model, data, tmp_path, joint=False).collator([1, 33, 2])
    expected = stock(model)([data["a"][1], data["b"][2], data["a"][2]])
    assert all(same(batch[key], expected[key]) for key in expected) and batch["label"][1] == pytest.approx(2 / 62)


def test_prompts_that_pooling_leaves_out_keep_columns_apart(model: Any, tmp_path: Path) -> None:
    assert fed(model, pairs(), tmp_path, joint=True, prompts="say: ").collator.joint
    model[1].include_prompt = False
    assert fed(model, pairs(), tmp_path, joint=True).collator.joint, "there is no prompt to leave out"
    if not POOLS_PACKED_PROMPTS:
        assert "before 6.2 takes padded input" in str(refusal(model, pairs(), stock(model, prompts="say: ")))
        return
    apart = fed(model, pairs(), tmp_path, joint=True, prompts="say: ")
    assert not apart.collator.joint and apart.prompts == "pooling leaves its prompt out"
    assert apart.collator([0])["anchor_prompt_length"] > 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_map_the_store_themselves(method: str, model: Any, tmp_path: Path) -> None:
    found = fed(model, pairs(score=[float(n) for n in range(31)]), tmp_path, joint=True)
    assert len(pickle.dumps(found.collator)) < 4000, "tokens are pickled"
    plain = DataLoader(found.rows, batch_size=8, collate_fn=found.collator)
    working = DataLoader(
        found.rows, batch_size=8, collate_fn=found.collator, num_workers=1, multiprocessing_context=method,
        persistent_workers=True,
    )  # fmt: skip
    for _ in range(2):
        batches = list(working)
        assert len(batches) == 4
        assert all(same(a[key], b[key]) for a, b in zip(batches, plain, strict=True) for key in b)
    del working


def test_a_stale_store_is_refused(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed(model, pairs(), tmp_path, joint=True)
    monkeypatch.setattr(Recipe, "key", "always the same")
    fed(model, pairs(), tmp_path, joint=True)
    model[0].processor = byte_level()
    with pytest.raises(ModelError, match=r"the first row's .* Pass TrainingArguments\(token_store=False\)"):
        fed(model, pairs(), tmp_path, joint=True)


def test_a_missing_label_is_an_error(model: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column score: 1 labels are missing"):
        fed(model, pairs(score=[None, *([1.0] * 30)]), tmp_path, joint=True)


def test_what_is_refused(model: Any, load: Any) -> None:
    collator = stock(model)

    def why(dataset: Any, model: Any = model, collator: Any = collator) -> str:
        return refusal(model, dataset, collator) or "fine"

    assert why(pairs()) == "fine" and why(pairs().with_format("torch")) == "fine"
    assert why(pairs().to_iterable_dataset()) == "fine"
    assert "padded" in why(pairs(), load(packed=False))
    assert "a data collator was given" in why(pairs(), collator=lambda rows: rows)
    assert "a data collator was given" in why(pairs(), collator=stock(load()))
    assert "routed" in why(pairs(), collator=stock(model, router_mapping={"anchor": "query"}))
    assert "transform" in why(pairs().with_transform(dict)) and "numpy" in why(pairs().with_format("numpy"))
    assert "column positive holds no plain texts" in why(Dataset.from_dict({"anchor": ["a"], "positive": [["b", "c"]]}))
    assert "column score2 holds no plain texts" in why(pairs(score2=[1.0] * 31))
    assert "a dict" in why({"one": pairs()})
    model[0].modality_config = {**model[0].modality_config, "message": {}}
    assert "chat template" in why(pairs())
    del model[0].modality_config["message"]
    model[0].preprocess = lambda *args, **keywords: {}
    assert "of its own kind" in why(pairs())
    del model[0].preprocess
    model.preprocess = lambda *args, **keywords: {}
    assert "preprocess of its own" in str(tokenising.why_not(model))


def test_rows_are_tokenised_ahead_where_they_are_streamed(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(collating, "AHEAD", 4)
    dataset = pairs(score=[float(n) for n in range(31)])
    calls = []
    own = Recipe.tokenise

    def tokenise(self: Recipe, texts: list[str]) -> Any:
        calls.append(len(texts))
        return own(self, texts)

    monkeypatch.setattr(Recipe, "tokenise", tokenise)
    found = fed(model, dataset.to_iterable_dataset(), tmp_path, joint=True)
    assert found.is_streamed and not calls and found.seconds == 0 and "streamed" in found.said()
    rows = iter(found.rows)
    batch = found.collator([next(rows) for _ in range(6)])
    assert calls == [4, 4, 4, 4], "two columns, two buffers"
    expected = fed(model, dataset, tmp_path, joint=True).collator(list(range(6)))
    assert batch.keys() == expected.keys() and all(same(batch[key], expected[key]) for key in expected)
