from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.columns import LABELS, Columns, default_loss, detect_columns, refine_kind
from burnish.core.errors import ConfigError, DataError

KNOWN_SETS = [
    ("anchor", "positive"),
    ("anchor", "positive", "negative"),
    ("anchor", "positive", "negative_1", "negative_2", "negative_3"),
    ("query", "document"),
    ("query", "positive", "negative"),
    ("query", "answer"),
    ("query", "response"),
    ("query", "passage", "hard_negative"),
    ("question", "answer"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("hypothesis", "entailment", "contradiction"),
]


@pytest.mark.parametrize("names", KNOWN_SETS, ids="-".join)
def test_known_names_are_put_into_the_order_the_losses_expect(names: tuple[str, ...]) -> None:
    for shuffled in permutations(names):
        assert detect_columns(shuffled, "data.csv").texts == names


def test_negatives_are_ordered_by_number_not_by_spelling() -> None:
    names = [f"negative_{number}" for number in range(12, 0, -1)]
    found = detect_columns([*names, "positive", "anchor"], "data.csv")
    assert found.texts == ("anchor", "positive", *reversed(names))


@given(st.lists(st.from_regex(r"\A[a-z]{3,8}_x\Z"), min_size=2, max_size=5, unique=True))
def test_unknown_names_keep_their_order_as_in_sentence_transformers(names: list[str]) -> None:
    found = detect_columns(names, "data.csv")
    assert (found.texts, found.label, found.kind, found.ignored) == (tuple(names), None, "pairs", ())


@pytest.mark.parametrize("label", LABELS)
def test_the_label_is_found_wherever_it_stands(label: str) -> None:
    for names in permutations(("a", "b", label)):
        found = detect_columns(names, "data.csv")
        assert found.label == label
        assert found.texts == tuple(name for name in names if name != label)
        assert found.kind == "scored"
        assert found.names == (*found.texts, label)


def test_the_label_names_are_those_of_sentence_transformers() -> None:
    # Read, not imported: the import takes 9 s on a busy machine.
    spec = find_spec("sentence_transformers")
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "base" / "data_collator.py").read_text(encoding="utf-8"))
    values = {
        node.target.id: node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
    }
    assert ast.literal_eval(values["DEFAULT_LABEL_COLUMNS"]) == LABELS


def test_the_first_label_name_wins_and_the_others_are_no_texts() -> None:
    found = detect_columns(["scores", "a", "score", "label", "b"], "data.csv")
    assert (found.texts, found.label, found.ignored) == (("a", "b"), "label", ("scores", "score"))


@pytest.mark.parametrize(
    "name",
    (
        *("id", "_id", "ID", "ids", "query_id", "query-id", "doc_ids", "pair_idx", "idx"),
        *("dataset_name", "__index_level_0__", "Unnamed: 0", ""),
    ),
)
def test_ids_and_row_numbers_are_left_out_and_reported(name: str) -> None:
    found = detect_columns(["anchor", name, "positive"], "data.csv")
    assert (found.texts, found.ignored) == (("anchor", "positive"), (name,))


@pytest.mark.parametrize("name", ["identity", "valid", "guide", "paid", "candid"])
def test_a_text_column_that_only_sounds_like_an_id_stays(name: str) -> None:
    assert detect_columns(["some_text", name], "data.csv").texts == ("some_text", name)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("a", "b"), "pairs"),
        (("a", "b", "c"), "pairs"),
        (("a", "b", "score"), "scored"),
        (("text", "label"), "classes"),
    ],
)
def test_kinds(names: tuple[str, ...], kind: str) -> None:
    assert detect_columns(names, "data.csv").kind == kind


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ((), ("data.csv: no column holds text.", "(none)")),
        (
            ("query_id", "doc_id"),
            (
                "data.csv: no column holds text.",
                "--columns anchor=my_q --columns positive=my_doc (in a config file, columns: {anchor: my_q",
                "query_id, doc_id",
            ),
        ),
        (("text",), ("data.csv: 'text' is the only text column and there is no label.", "Add a second text")),
        (
            ("a", "b", "c", "label"),
            ("data.csv: 3 text columns and the label 'label' together fit no loss.", "Name those"),
        ),
        (("a", "b", "a"), ("data.csv: column 'a' occurs twice.", "name of its own")),
        (("a", "\ud800"), ("data.csv: column name '\\ud800' holds half a character.", "Mend the name")),
    ],
)
def test_columns_that_fit_no_loss(names: tuple[str, ...], parts: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        detect_columns(names, "data.csv")
    for part in parts:
        assert part in str(caught.value)


def test_metadata_beside_known_names_is_not_taken_for_negatives() -> None:
    with pytest.raises(DataError) as caught:
        detect_columns(["source", "positive", "anchor"], "data.csv")
    assert str(caught.value) == (
        "data.csv, column source: cannot tell what it is for beside 'anchor' and 'positive': a loss would take it for "
        "a negative. Remove it, or name the columns to use, e.g. --columns anchor=anchor --columns positive=positive "
        "(in a config file, columns: {anchor: anchor, positive: positive})"
    )


def test_a_mapping_names_and_orders_the_columns() -> None:
    names = ["my_doc", "lang", "my_q", "gold"]
    found = detect_columns(names, "data.csv", {"positive": "my_doc", "score": "gold", "anchor": "my_q"})
    assert (found.texts, found.label, found.kind) == (("anchor", "positive"), "score", "scored")
    assert found.ignored == ("lang",)
    assert [found.source(name) for name in found.names] == ["my_q", "my_doc", "gold"]


def test_a_mapping_may_use_ids_swap_names_and_keep_strange_roles() -> None:
    found = detect_columns(["id", "positive"], "data.csv", {"anchor": "positive", "positive": "id"})
    assert [found.source(name) for name in found.texts] == ["positive", "id"]
    found = detect_columns(["b", "a", "c"], "data.csv", {"topic": "c", "positive": "a", "anchor": "b"})
    assert found.texts == ("anchor", "positive", "topic")


def test_an_empty_mapping_is_no_mapping() -> None:
    assert detect_columns(["positive", "anchor"], "data.csv", {}) == detect_columns(["anchor", "positive"], "data.csv")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"anchor": "quesion", "positive": "answer"},
            "data.csv, column quesion: there is no such column, though the mapping takes 'anchor' from it. "
            "Did you mean 'question'? The columns are: question, answer, gold",
        ),
        (
            {"anchor": "zzz", "positive": "answer"},
            "data.csv, column zzz: there is no such column, though the mapping takes 'anchor' from it. "
            "The columns are: question, answer, gold",
        ),
        (
            {"anchor": "answer", "positive": "answer"},
            "data.csv, column answer: the mapping takes both 'anchor' and 'positive' from it. "
            "Give each its own column. The columns are: question, answer, gold",
        ),
        (
            {"text": "answer", "label": "gold", "score": "question"},
            "data.csv: the mapping names two labels, 'label' and 'score'. Keep one",
        ),
    ],
)
def test_bad_mappings(mapping: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_columns(["question", "answer", "gold"], "data.csv", mapping)
    assert str(caught.value) == message


def test_refining_by_type_and_name() -> None:
    label = Columns(texts=("a", "b"), label="label", kind="scored")
    assert refine_kind(label, [0, 1, 1]).kind == "labelled-pairs"
    assert refine_kind(label, [True, False]).kind == "labelled-pairs"
    assert refine_kind(label, [0, 1, 0.5]).kind == "scored"
    assert refine_kind(label, [0.0, 1.0]).kind == "scored"
    score = Columns(texts=("a", "b"), label="score", kind="scored")
    assert refine_kind(score, [0, 1, 5]).kind == "scored"
    classes = Columns(texts=("text",), label="label", kind="classes")
    assert refine_kind(classes, [0, 1]) is classes


def test_default_losses_exist_in_sentence_transformers() -> None:
    losses = [default_loss(kind) for kind in ("pairs", "scored", "labelled-pairs", "classes")]
    assert losses == ["MultipleNegativesRankingLoss", "CoSENTLoss", "OnlineContrastiveLoss", "BatchAllTripletLoss"]
    with pytest.raises(ConfigError, match=r"'triples' is not a kind of data\. Use one of pairs, scored"):
        default_loss("triples")


def test_the_data_modules_import_nothing_heavy() -> None:
    modules = ("columns", "data", "readers", "retrieval_data", "sources", "validation")
    code = (
        f"import sys, importlib\nfor name in {modules}: importlib.import_module('burnish.core.' + name)\n"
        "print([m for m in ('torch', 'transformers', 'sentence_transformers', 'datasets', 'pyarrow', 'numpy') "
        "if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
