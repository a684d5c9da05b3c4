"""A teacher scores a pair once: what names its scores, what finds them again, what is made of damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import CrossEncoder, SentenceTransformer

from burnish.core import teacher_scores
from burnish.core.errors import ConfigError, DataError, ModelError
from burnish.core.teacher_scores import score_column, with_teacher_scores
from burnish.core.teachers import content_of

PAIRS = Dataset.from_dict({"query": ["a", "bb", "a", "c"], "document": ["one", "second", "one", "thirds"]})
TUPLES = Dataset.from_dict(
    {"query": ["a", "bb"], "positive": ["four", "five5"], "negative_1": ["x", "yy"], "negative_2": ["zzz", ""]}
)
LISTS = Dataset.from_dict({"query": ["a", "bb", "c"], "documents": [["one", "three"], [], ["four", "", "s"]]})


class Letters:
    """Letters of the document minus those of the query; counts the pairs that it scores."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, pairs: list[tuple[str, str]]) -> list[int]:
        self.asked += pairs
        return [len(document) - len(query) for query, document in pairs]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def ask(tmp_path: Path, said: list[str]) -> Any:
    def ask(dataset: Any, teacher: Any = None, **settings: Any) -> Any:
        settings = {"identity": "letters", **settings} if teacher is None or isinstance(teacher, Letters) else settings
        teacher = Letters() if teacher is None else teacher
        return with_teacher_scores(dataset, teacher, folder=tmp_path / "kept", say=said.append, **settings)

    return ask


@pytest.fixture(scope="module")
def reranker(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder with random weights."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("reranker") / "tiny-reranker"
    CrossEncoder(str(tiny_bert), num_labels=1, device="cpu").save_pretrained(str(folder))
    return folder


def test_labels_are_what_the_losses_want(ask: Any) -> None:
    assert ask(PAIRS)["label"] == [2, 4, 2, 5]
    assert ask(TUPLES)["label"] == [[3, 1], [3, 5]]
    assert ask(TUPLES, margins=False)["label"] == [[3, 0, 2], [3, 0, -2]]
    assert ask(TUPLES.remove_columns("negative_2"))["label"] == [3, 3]
    scored = ask(LISTS)
    assert scored["labels"] == [[2, 4], [], [3, -1, 0]] and scored.column_names == ["query", "documents", "labels"]
    assert "float" in str(scored.features["labels"]) and "float32" in str(ask(PAIRS).features["label"])


def test_a_second_run_asks_nothing_and_changed_texts_are_asked_again(ask: Any, said: list[str]) -> None:
    first, again = Letters(), Letters()
    assert ask(PAIRS, first)["label"] == ask(PAIRS, again)["label"]
    assert first.asked == [("a", "one"), ("bb", "second"), ("c", "thirds")], "equal pairs are scored once"
    assert not again.asked and "found scored" in said[-1] and "3 of them" not in said[-1]
    for changed in (PAIRS.select([1, 0, 2, 3]), PAIRS.select(range(3))):
        other = Letters()
        assert ask(changed, other)["label"] == [len(r["document"]) - len(r["query"]) for r in changed] and other.asked
    other = Letters()
    ask(PAIRS, other, identity="letters 2")
    assert other.asked


def test_where_one_text_ends_and_the_next_begins_counts(ask: Any) -> None:
    ask(Dataset.from_dict({"query": ["ab", "c"], "document": ["x", "y"]}))
    other = Letters()
    ask(Dataset.from_dict({"query": ["a", "c"], "document": ["bx", "y"]}), other)
    assert other.asked


def test_rows_that_are_added_cost_only_themselves(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_scores, "PART", 2)
    ask(PAIRS)
    longer = Dataset.from_dict({"query": [*PAIRS["query"], "new"], "document": [*PAIRS["document"], "d"]})
    teacher = Letters()
    assert ask(longer, teacher)["label"] == [2, 4, 2, 5, -2] and teacher.asked == [("new", "d")]


def test_an_interrupted_run_goes_on(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_scores, "PART", 2)

    class Stops(Letters):
        def __call__(self, pairs: list[tuple[str, str]]) -> list[int]:
            if self.asked:
                raise KeyboardInterrupt
            return super().__call__(pairs)

    with pytest.raises(KeyboardInterrupt):
        ask(PAIRS, Stops())
    teacher = Letters()
    assert ask(PAIRS, teacher)["label"] == [2, 4, 2, 5] and teacher.asked == [("a", "one"), ("c", "thirds")]


@pytest.mark.parametrize("harm", ["cut", "other bytes", "no note", "bad note"])
def test_a_damaged_file_is_made_again_and_told(harm: str, ask: Any, said: list[str], tmp_path: Path) -> None:
    ask(PAIRS)
    (file,) = (tmp_path / "kept").glob("*/scores.npy")
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif harm == "other bytes":
        file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    elif harm == "no note":
        (file.parent / "about.json").unlink()
    else:
        (file.parent / "about.json").write_text("{")
    said.clear()
    teacher = Letters()
    assert ask(PAIRS, teacher)["label"] == [2, 4, 2, 5] and teacher.asked
    assert said[0] == f"{file.parent} is damaged: its pairs are scored again" and len(said) == 2
    assert json.loads((file.parent / "about.json").read_text())["pairs"] == 4


def test_a_cross_encoder_gives_its_logits_or_its_activation(reranker: Path, ask: Any) -> None:
    model = CrossEncoder(str(reranker), device="cpu")
    pairs = list(zip(PAIRS["query"], PAIRS["document"], strict=True))
    plain = model.predict(pairs)
    assert ask(PAIRS, model, raw=False)["label"] == pytest.approx(plain.tolist(), abs=1e-6)
    logits = np.asarray(ask(PAIRS, model)["label"])
    assert 1 / (1 + np.exp(-logits)) == pytest.approx(plain, abs=1e-6)
    assert np.abs(logits - plain).max() > 0.1, "the two cannot be told apart"


def test_a_named_teacher_is_loaded_only_if_something_is_missing(
    reranker: Path, ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from burnish.core.fast_cross_encoder import FastCrossEncoder

    first = ask(PAIRS, str(reranker), load={"device": "cpu"})["label"]
    loaded = ask(PAIRS, CrossEncoder(str(reranker), device="cpu"))["label"]
    assert first == pytest.approx(loaded, abs=1e-5)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the teacher was loaded")

    moved = tmp_path / "moved"
    shutil.copytree(reranker, moved)
    with monkeypatch.context() as patched:
        patched.setattr(FastCrossEncoder, "from_pretrained", never)
        assert ask(PAIRS, moved)["label"] == first, "known by its files, wherever it lies and whatever device"
        with pytest.raises(AssertionError, match="was loaded"):
            ask(PAIRS, moved, load={"dtype": "bfloat16"})
        (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")
        with pytest.raises(AssertionError, match="was loaded"):
            ask(PAIRS, moved)
    with pytest.raises(ModelError, match="teacher nobody/nothing: cannot be found"):
        ask(PAIRS, "nobody/nothing")


def test_an_adapter_is_known_with_its_base(reranker: Path, ask: Any, tmp_path: Path) -> None:
    from burnish.core.fast_cross_encoder import FastCrossEncoder

    base = tmp_path / "base"
    shutil.copytree(reranker, base)
    model = FastCrossEncoder.from_pretrained(str(base), device="cpu")
    FastCrossEncoder.get_peft_model(model, r=2).save_pretrained(str(tmp_path / "adapter"))
    before = ask(PAIRS, tmp_path / "adapter", load={"device": "cpu"})["label"]
    assert before == pytest.approx(ask(PAIRS, str(reranker), load={"device": "cpu"})["label"], abs=1e-5)
    other = CrossEncoder(str(base), device="cpu")
    for parameter in other.parameters():
        parameter.data *= 1.5
    other.save_pretrained(str(base))
    assert ask(PAIRS, tmp_path / "adapter", load={"device": "cpu"})["label"] != before


def test_a_model_that_was_trained_on_is_another_teacher(reranker: Path) -> None:
    model = CrossEncoder(str(reranker), device="cpu")
    before = content_of(model)
    model.predict([("a", "b")])
    assert content_of(model) == before == content_of(CrossEncoder(str(reranker), device="cpu"))
    with torch.no_grad():
        model.transformers_model.classifier.bias += 1e-3
    assert content_of(model) != before
    other = CrossEncoder(str(reranker), device="cpu", max_length=16)
    assert content_of(other) != before


def test_an_embedding_model_teaches_by_its_similarity(tiny_bert_st: Path, ask: Any) -> None:
    model = SentenceTransformer(str(tiny_bert_st), device="cpu")
    sides = (model.encode_query(PAIRS["query"]), model.encode_document(PAIRS["document"]))
    assert ask(PAIRS, model)["label"] == pytest.approx(model.similarity_pairwise(*sides).tolist(), abs=1e-6)
    with pytest.raises(ConfigError, match="a prompt is for cross-encoders"):
        ask(PAIRS, model, prompt="query: ")


def test_a_prompt_and_an_activation_have_scores_of_their_own(reranker: Path, tmp_path: Path) -> None:
    model = CrossEncoder(str(reranker), device="cpu")
    found = [
        score_column(PAIRS, "query", "document", model, folder=tmp_path, say=lambda line: None, **settings)
        for settings in ({}, {"prompt": "query: "}, {"raw": False})
    ]  # fmt: skip
    assert len(list(tmp_path.glob("*/scores.npy"))) == 3 and not np.allclose(found[0], found[1])


def test_a_teacher_that_gives_no_scores(ask: Any, reranker: Path, tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match="not finite"):
        ask(PAIRS, lambda pairs: [float("nan")] * len(pairs), identity="nan")
    with pytest.raises(ModelError, match=r"gives \(1,\) numbers for 3 pairs"):
        ask(PAIRS, lambda pairs: [1.0], identity="one")
    with pytest.raises(ModelError, match=r"gives \(3, 3\) numbers"):
        ask(PAIRS, CrossEncoder(str(tiny_bert), num_labels=3, device="cpu"))


@pytest.mark.parametrize(
    ("dataset", "teacher", "settings", "fault"),
    [
        (PAIRS, len, {}, "identity: scores of a function have no name"),
        (PAIRS, len, {"identity": "x", "raw": False}, "a function scores pairs as it likes"),
        (PAIRS, 3, {}, "teacher: a int cannot score pairs"),
        (PAIRS, len, {"identity": "x", "load": {"device": "cpu"}}, "load: the teacher is loaded already"),
        (PAIRS.add_column("score", [1.0] * 4), len, {"identity": "x"}, "has a label already: score"),
        (PAIRS.remove_columns("document"), len, {"identity": "x"}, "two columns"),
        (LISTS.add_column("more", ["a", "b", "c"]), Letters(), {}, "documents holds lists beside other documents"),
    ],
)
def test_what_cannot_be_scored_is_refused(dataset: Any, teacher: Any, settings: Any, fault: str, ask: Any) -> None:
    with pytest.raises(ConfigError, match=fault):
        ask(dataset, teacher, **settings)


def test_a_missing_text_is_named(ask: Any) -> None:
    with pytest.raises(DataError, match="row 1 of column query: there is no text"):
        ask(Dataset.from_dict({"query": ["a", None], "document": ["b", "c"]}))
    with pytest.raises(DataError, match="row 1 of column document: there is no text"):
        ask(Dataset.from_dict({"query": ["a", "b"], "document": ["b", None]}))
