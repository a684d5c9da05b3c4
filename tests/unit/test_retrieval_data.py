from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.core import retrieval_data
from burnish.core.errors import DataError
from burnish.core.retrieval_data import load_retrieval, training_pairs

REAL = Path(retrieval_data.__file__).parent / "quickstart_data"
QUERIES = [{"_id": f"q{number}", "text": f"query {number}"} for number in range(3)]
CORPUS = [{"_id": f"d{number}", "text": f"document {number}"} for number in range(3)]
HEADER = "query-id\tcorpus-id\tscore\n"
QRELS = HEADER + "q0\td0\t1\nq1\td1\t2\nq1\td2\t1\nq2\td0\t0\n"

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a small retrieval folder, with what the test wants to be different."""

    def build(queries: Any = QUERIES, corpus: Any = CORPUS, qrels: str | None = QRELS, packed: bool = False) -> Path:
        folder = tmp_path / "toy"
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        for name, rows in (("queries", queries), ("corpus", corpus)):
            text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            if packed:
                (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
            else:
                (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        if qrels is not None:
            (folder / "qrels" / "train.tsv").write_text(qrels, encoding="utf-8")
        return folder

    return build


def failure(folder: Path, split: str = "train") -> str:
    """The message that both readers agree on, without the path before the folder."""
    with pytest.raises(DataError) as caught:
        load_retrieval(folder, split)
    with pytest.raises(DataError) as other:
        training_pairs(folder, split)
    message = str(caught.value)
    assert message == str(other.value)
    assert "\n" not in message
    assert "--on-bad-row" not in message
    assert caught.value.fix
    return message.removeprefix(f"{folder.parent}/")


@pytest.mark.parametrize(("split", "size"), [("train", 1401), ("dev", 200), ("test", 400)])
def test_the_shipped_data(split: str, size: int) -> None:
    data = load_retrieval(REAL, split)
    assert data.name == f"quickstart_data-{split}"
    assert (len(data.queries), len(data.corpus), len(data.relevant)) == (size, 1057, size)
    assert data.queries.keys() == data.relevant.keys()
    assert all(documents and documents <= data.corpus.keys() for documents in data.relevant.values())


def test_the_shipped_splits_share_no_query() -> None:
    ids = [set(load_retrieval(REAL, split).queries) for split in ("train", "dev", "test")]
    assert len(set.union(*ids)) == sum(map(len, ids)) == 2001


def test_the_shipped_training_pairs() -> None:
    pairs, data = training_pairs(REAL), load_retrieval(REAL, "train")
    assert pairs.column_names == ["anchor", "positive"]
    assert len(pairs) == 1401
    expected = {(data.queries[query], data.corpus[doc]) for query, docs in data.relevant.items() for doc in docs}
    assert {(row["anchor"], row["positive"]) for row in pairs} == expected
    assert pairs[0]["anchor"] == "Barley farming"


@pytest.mark.parametrize("packed", [False, True])
def test_judgements_above_zero_count(make: Make, packed: bool) -> None:
    folder = make(packed=packed)
    data = load_retrieval(folder, "train")
    assert data.name == "toy-train"
    assert data.queries == {"q0": "query 0", "q1": "query 1"}
    assert data.corpus == {f"d{number}": f"document {number}" for number in range(3)}
    assert data.relevant == {"q0": {"d0"}, "q1": {"d1", "d2"}}
    assert training_pairs(folder).to_list() == [
        {"anchor": "query 0", "positive": "document 0"},
        {"anchor": "query 1", "positive": "document 1"},
        {"anchor": "query 1", "positive": "document 2"},
    ]


def test_titles_stand_before_texts(make: Make) -> None:
    corpus = [
        {"_id": "d0", "title": "Title ", "text": "text"},
        {"_id": "d1", "title": "", "text": "no title"},
        {"_id": "d2", "title": "only title", "text": ""},
        {"_id": 3, "title": None, "text": "ids may be numbers"},
    ]
    data = load_retrieval(make(corpus=corpus), "train")
    assert data.corpus == {"d0": "Title text", "d1": "no title", "d2": "only title", "3": "ids may be numbers"}


def changed(rows: list[dict[str, Any]], index: int, **cells: Any) -> list[dict[str, Any]]:
    """The rows with one of them changed; a cell of `...` is removed."""
    row = {name: value for name, value in {**rows[index], **cells}.items() if value is not ...}
    return [*rows[:index], row, *rows[index + 1 :]]


@pytest.mark.parametrize("file", ["queries", "corpus"])
@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"_id": ...}, 'row 2, column _id: row lacks the column. Add "_id"; the row has text'),
        ({"_id": ""}, "row 2, column _id: cell is empty. Fill it in"),
        ({"_id": None}, "row 2, column _id: cell is empty (null). Fill it in"),
        ({"_id": True}, "row 2, column _id: cell is not text but a number (True). Write it as text"),
        ({"text": ...}, 'row 2, column text: row lacks the column. Add "text"; the row has _id'),
        ({"text": " "}, "row 2, column text: cell is empty (only white space). Fill it in"),
        ({"text": 5}, "row 2, column text: cell is not text but a number (5). Write it as text"),
        ({"title": 5}, "row 2, column title: cell is not text but a number (5). Write it as text"),
    ],
)
def test_bad_texts(make: Make, file: str, cells: dict[str, Any], message: str) -> None:
    rows = changed(QUERIES if file == "queries" else CORPUS, 1, **cells)
    assert failure(make(**{file: rows})).startswith(f"toy/{file}.jsonl, {message}")


@pytest.mark.parametrize("file", ["queries", "corpus"])
def test_bad_files_of_texts(make: Make, file: str) -> None:
    rows = QUERIES if file == "queries" else CORPUS
    key = rows[0]["_id"]
    said = failure(make(**{file: changed(rows, 2, _id=key)}))
    assert said == f"toy/{file}.jsonl, row 3, column _id: '{key}' occurs twice. Give every row an _id of its own"
    said = failure(make(**{file: json.dumps(rows[0]) + '\n{"_id": "x'}))
    assert said.startswith(f"toy/{file}.jsonl, row 2: last line is cut off")
    assert failure(make(**{file: ""})).startswith(f"toy/{file}.jsonl: has no rows. Write one {{")
    folder = make(**{file: rows})
    (folder / f"{file}.jsonl.gz").write_bytes(b"")
    said = failure(folder)
    assert said == f"toy/{file}.jsonl: is there twice, also as {file}.jsonl.gz. Remove one of them"
    for path in folder.glob(f"{file}.*"):
        path.unlink()
    assert failure(folder) == f"toy/{file}.jsonl: there is no such file, nor one with .gz. Add {file}.jsonl"


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        (
            HEADER + "q0\td0\t1\nq00\td1\t1\n",
            "row 3, column query-id: id 'q00' is unknown. Did you mean 'q0'? Add it to q",
        ),
        (
            HEADER + "q0\tzzz\t1\n",
            "row 2, column corpus-id: id 'zzz' is unknown. Add it to corpus.jsonl, or remove the row",
        ),
        (HEADER + "q0\td0\tyes\n", "row 2, column score: label is not a number ('yes'). Write a number"),
        (HEADER + "q0\td0\t\n", "row 2, column score: label is empty. Fill it in"),
        (
            HEADER + "q0\td0\n",
            "row 2, column score: fewer cells than the header has (2 of 3). Fill in the missing cells",
        ),
        (
            HEADER + "q0\td0\t1\nq1\td",
            "row 3, column score: last line is cut off: fewer cells than the header has (2 of 3).",
        ),
        (
            HEADER + "q0\td0\t1\nq1\td1\t1\nq0\td0\t0\n",
            "row 4, column corpus-id: the pair 'q0', 'd0' was judged in row 2 alr",
        ),
        (
            "q0\td0\t1\n",
            "row 1, column query-id: there is no such column. The header must hold query-id, corpus-id, score",
        ),
        ("query-id corpus-id score\n", "row 1, column query-id: there is no such column."),
    ],
)
def test_bad_judgements(make: Make, qrels: str, message: str) -> None:
    assert failure(make(qrels=qrels)).startswith(f"toy/qrels/train.tsv, {message}")


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("", ": file is empty. Give it a header"),
        (HEADER, ": has no rows. Add judgements under the header"),
        (HEADER + "q0\td0\t0\n", ", column score: no judgement is above 0. Add relevant pairs"),
    ],
)
def test_judgements_without_any(make: Make, qrels: str, message: str) -> None:
    assert failure(make(qrels=qrels)).startswith(f"toy/qrels/train.tsv{message}")


def test_missing_folders_and_splits(make: Make, tmp_path: Path) -> None:
    said = failure(tmp_path / "absent")
    assert said == "absent: there is no such folder. Name a folder with queries.jsonl, corpus.jsonl and qrels/"
    said = failure(make(), "dev")
    assert said == "toy/qrels/dev.tsv: there are no judgements of split 'dev'. Splits here: train"


def test_a_query_of_another_split_is_a_leak(make: Make) -> None:
    said = failure(make(queries=changed(QUERIES, 1, split="test")))
    assert said == (
        "toy/qrels/train.tsv, row 3, column query-id: 'q1' is a query of split 'test', not 'train'. "
        "Move the row to test.tsv"
    )


def test_a_query_of_this_split_must_be_judged(make: Make) -> None:
    queries = [{**query, "split": "train"} for query in QUERIES]
    assert set(load_retrieval(make(queries=queries), "train").queries) == {"q0", "q1"}
    said = failure(make(queries=queries, qrels=HEADER + "q0\td0\t1\nq2\td1\t1\n"))
    assert said == (
        "toy/queries.jsonl, row 2, column split: 'q1' is of split 'train' but has no judgement. "
        "Judge it in train.tsv, which may be truncated, or change its split"
    )


def test_pairs_that_cannot_be_trained_on(make: Make) -> None:
    with pytest.raises(DataError, match=r"train\.tsv: holds only one relevant pair\. Give it at least two"):
        training_pairs(make(qrels=HEADER + "q0\td0\t1\nq1\td1\t0\n"))
    with pytest.raises(DataError, match=r"train\.tsv, column corpus-id: every judgement is of one document\. Add"):
        training_pairs(make(qrels=HEADER + "q0\td0\t1\nq1\td0\t1\n"))
