"""Labels in every form become what a loss takes; what cannot is one line that names file, row and column."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, List  # type: ignore[import-untyped]

from burnish.core.class_data import Classes, load_classes, prepare
from burnish.core.class_losses import MULTI, REGRESSION, SINGLE
from burnish.core.errors import ConfigError, DataError
from burnish.core.validation import Fault

PETS = Classes(("bird", "cat", "dog"), SINGLE)
TAGS = Classes(("bird", "cat", "dog"), MULTI)
SCORE = Classes(("score",), REGRESSION)
TWO = Classes(("warm", "wet"), REGRESSION)
STARS = Classes(("1", "2", "3"), SINGLE)


@pytest.mark.parametrize(
    ("classes", "cell", "wanted"),
    [
        (PETS, "cat", 1),
        (PETS, 2, 2),
        (PETS, 2.0, 2),
        (PETS, True, 1),
        (STARS, 1, 0),  # a number is a name where all names are numbers
        (STARS, "3", 2),
        (TAGS, ["dog", "bird"], [1.0, 0.0, 1.0]),
        (TAGS, [], [0.0, 0.0, 0.0]),
        (TAGS, [0, 1, 1], [0.0, 1.0, 1.0]),
        (TAGS, [False, True, 1.0], [0.0, 1.0, 1.0]),
        (SCORE, 0.5, 0.5),
        (SCORE, "0.5", 0.5),
        (SCORE, [3], 3.0),
        (TWO, [1, 2.5], [1.0, 2.5]),
    ],
)
def test_a_label_in_every_form(classes: Classes, cell: object, wanted: object) -> None:
    found = classes.label(cell)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("classes", "cell", "reason", "fix"),
    [
        (PETS, None, "label is empty", "Fill it in"),
        (PETS, "  ", "label is empty", "Fill it in"),
        (PETS, "cats", "none of the 3 classes", "Did you mean 'cat'?"),
        (PETS, "horse", "none of the 3 classes", "bird, cat, dog"),
        (PETS, 3, "out of range", "0 to 2"),
        (PETS, -1, "out of range", "0 to 2"),
        (PETS, 0.5, "not a class", "name or number"),
        (PETS, [1], "label is a list", "multi_label_classification"),
        (STARS, 4, "none of the 3 classes", "1, 2, 3"),
        (TAGS, "dog", "not a list", "list of names"),
        (TAGS, ["horse"], "none of the", "bird, cat, dog"),
        (TAGS, [0, 1], "another length", "each of the 3 labels"),
        (TAGS, [0, 1, 2], "other than 0 and 1", "Write 0 or 1"),
        (SCORE, "high", "not a finite number", "Write a number"),
        (SCORE, float("nan"), "not a finite number", "Write a number"),
        (TWO, [1.0], "list of 2 numbers", "each output"),
        (TWO, [1.0, None], "not a finite number", "Write a number"),
    ],
)
def test_a_label_that_is_none(classes: Classes, cell: object, reason: str, fix: str) -> None:
    found = classes.label(cell)
    assert isinstance(found, Fault)
    assert reason in found.reason and fix in found.fix


def test_a_data_sets_own_names_win_over_its_numbers() -> None:
    data = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    data = data.cast_column("label", ClassLabel(names=["dog", "cat"]))
    assert list(prepare(data, PETS, "train_dataset")["label"]) == [2, 1]
    # A model without names of its own counts as the data does.
    bare = Classes(("LABEL_0", "LABEL_1"), SINGLE)
    assert list(prepare(data, bare, "train_dataset")["label"]) == [0, 1]


def test_lists_of_named_numbers() -> None:
    data = Dataset.from_dict({"text": ["a", "b"], "label": [[0], [0, 1]]})
    data = data.cast_column("label", List(ClassLabel(names=["dog", "bird"])))
    assert list(prepare(data, TAGS, "train_dataset")["label"]) == [[0, 0, 1], [1, 0, 1]]


def test_pairs_and_what_is_left_out() -> None:
    said: list[str] = []
    data = Dataset.from_dict({"idx": [7], "one": ["a"], "two": ["b"], "year": [1999], "label": ["cat"]})
    found = prepare(data, PETS, "train_dataset", said.append)
    assert found.column_names == ["one", "two", "label"]
    assert said == ["train_dataset: columns left out: idx, year"]
    assert found[0] == {"one": "a", "two": "b", "label": 1}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": ["a", " "], "label": [0, 1]}, "train_dataset, row 2, column text: cell is empty"),
        ({"text": ["a", None], "label": [0, 1]}, "train_dataset, row 2, column text: cell is empty"),
        ({"text": ["a", "b"], "label": ["cat", "cow"]}, "train_dataset, row 2, column label: label is none of"),
        ({"text": ["a"], "class": [0]}, "train_dataset: there is no label column. Call it one of label, labels"),
        ({"number": [1], "label": [0]}, "train_dataset: 0 text columns. Keep one text column"),
        ({"a": ["1"], "b": ["2"], "c": ["3"], "label": [0]}, "train_dataset: 3 text columns: a, b, c"),
    ],
)
def test_a_bad_row_is_one_line(columns: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as raised:
        prepare(Dataset.from_dict(columns), PETS, "train_dataset")
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)


def test_a_file_of_names(tmp_path: Path) -> None:
    file = tmp_path / "pets.jsonl.gz"
    rows = [{"text": "woof", "label": "dog"}, {"text": "miaow", "label": "cat"}, {"text": "wuff", "label": "dog"}]
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    found = load_classes(file)
    assert found.features["label"].names == ["cat", "dog"]
    assert list(found["label"]) == [1, 0, 1]
    assert load_classes(file, labels=["dog", "cat"])[1] == {"text": "miaow", "label": 1}
    with pytest.raises(DataError, match=r"pets\.jsonl\.gz, row 2, column label: .*'cat'"):
        load_classes(file, labels=["dog", "bird"])


def test_a_file_of_numbers_and_one_of_lists(tmp_path: Path) -> None:
    scores = tmp_path / "scores.csv"
    scores.write_text("one,two,score\na,b,0.25\nc,d,1\n")
    found = load_classes(scores, problem_type=REGRESSION)
    assert found.column_names == ["one", "two", "label"] and list(found["label"]) == [0.25, 1.0]
    stars = tmp_path / "stars.csv"
    stars.write_text("text,label\na,5\nb,1\n")
    assert load_classes(stars).features["label"].names == ["1", "5"]
    tags = tmp_path / "tags.jsonl"
    tags.write_text('{"text": "a", "label": ["wet", "cold"]}\n{"text": "b", "label": []}\n')
    several = load_classes(tags, problem_type=MULTI)
    assert several.features["label"].feature.names == ["cold", "wet"]
    assert list(prepare(several, Classes(("wet", "cold"), MULTI), "it")["label"]) == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"text": "a", "label": "x"}\n{"text": "", "label": "y"}\n', "row 2, column text: cell is empty"),
        ('{"text": "a", "label": "x"}\n{"text": "b"}\n', "row 2, column label: label is empty"),
        ('{"text": "a", "label": "x"}\nnonsense\n', "row 2"),
        ("", "no rows"),
    ],
)
def test_a_bad_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(DataError) as raised:
        load_classes(file)
    assert str(file) in str(raised.value) and said in str(raised.value) and "\n" not in str(raised.value)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a", "label": [0, 1]}\n')
    with pytest.raises(ConfigError, match="problem_type: 'binary' is unknown"):
        load_classes(file, problem_type="binary")
    with pytest.raises(ConfigError, match="labels: 'x' occurs twice"):
        load_classes(file, labels=["x", "y", "x"])
    with pytest.raises(DataError, match="numbers without names"):
        load_classes(file, problem_type=MULTI)
