"""Retrieval folders: queries, a corpus and judgements of which document answers which query, in BEIR's layout.

* queries.jsonl[.gz]: {"_id": "q0", "text": "…", "split": "train"}, where split is optional;
* corpus.jsonl[.gz]: {"_id": "d0", "text": "…", "title": "…"}, where title is optional;
* qrels/<split>.tsv: query-id, corpus-id and score under a header of these names; a score above 0 means relevant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DataError
from .readers import BadRow, Row, csv_header, csv_rows, jsonl_rows, place
from .validation import Fault, label_value, text_fault

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

_JUDGEMENT = ("query-id", "corpus-id", "score")


@dataclass(frozen=True, slots=True)
class RetrievalData:
    """One split of a retrieval folder, ready for an evaluator.

    Args:
        name: The folder's name and the split, e.g. `quickstart_data-test`.
        queries: {id: text} of the queries that have a relevant document in this split.
        corpus: {id: text} of all documents; a title stands before the text, with a space between.
        relevant: {query id: ids of its relevant documents}, with the keys of `queries`.
    """

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, set[str]]


def load_retrieval(folder: Path, split: str) -> RetrievalData:
    """Read and check one split of a retrieval folder.

    Args:
        folder: Holds `queries.jsonl`, `corpus.jsonl` (each also .gz) and `qrels/<split>.tsv`.
        split: Which judgements to use. Queries whose judgements are all 0 have nothing to be found and are left out.

    Raises:
        DataError: A file is missing or unreadable, a row is bad, an id occurs twice or is unknown, a query of another
            split is judged, or a query marked as of this split is not.
    """
    queries, corpus, judged = _read(folder, split)
    relevant: dict[str, set[str]] = {}
    for query, document in judged:
        relevant.setdefault(query, set()).add(document)
    return RetrievalData(
        name=f"{folder.absolute().name}-{split}",
        queries={query: queries[query] for query in relevant},
        corpus=corpus,
        relevant=relevant,
    )


def training_pairs(folder: Path, split: str = "train") -> datasets.Dataset:
    """One row for each relevant judgement of `split`, in its file's order, with columns `anchor` and `positive`.

    Raises:
        DataError: As `load_retrieval`; also for fewer than two pairs, or one document as every positive.
    """
    from datasets import Dataset

    queries, corpus, judged = _read(folder, split)
    where = str(folder / "qrels" / f"{split}.tsv")
    if len(judged) < 2:
        raise DataError("holds only one relevant pair", where=where, fix="Give it at least two")
    if len({document for _, document in judged}) == 1:
        fix = "Add judgements of other documents: each query's document is a negative to all other queries"
        raise DataError("every judgement is of one document", where=place(where, column="corpus-id"), fix=fix)
    pairs = {
        "anchor": [queries[query] for query, _ in judged],
        "positive": [corpus[document] for _, document in judged],
    }
    return Dataset.from_dict(pairs)


def _read(folder: Path, split: str) -> tuple[dict[str, str], dict[str, str], list[tuple[str, str]]]:
    """Texts of all queries and documents, and the relevant (query id, document id) of the split."""
    if not folder.is_dir():
        fix = "Name a folder with queries.jsonl, corpus.jsonl and qrels/"
        raise DataError("there is no such folder", where=str(folder), fix=fix)
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        others = ", ".join(sorted(file.stem for file in path.parent.glob("*.tsv"))) or "none"
        raise DataError(f"there are no judgements of split '{split}'", where=str(path), fix=f"Splits here: {others}")
    queries_path, corpus_path = texts_file(folder, "queries"), texts_file(folder, "corpus")
    queries: dict[str, str] = {}
    split_of: dict[str, tuple[int, str]] = {}
    for row, key in identified_rows(queries_path, queries):
        queries[key] = text_of(row, queries_path)
        if row.cells.get("split") is not None:
            split_of[key] = (row.number, string_cell(row, "split", queries_path))
    corpus: dict[str, str] = {}
    for row, key in identified_rows(corpus_path, corpus):
        corpus[key] = text_of(row, corpus_path)
    judged = _judgements(path, queries, corpus)
    _check_splits(split_of, split, queries_path, judged, path)
    relevant = [pair for pair, (_, score) in judged.items() if score > 0]
    if not relevant:
        raise DataError("no judgement is above 0", where=place(str(path), column="score"), fix="Add relevant pairs")
    return queries, corpus, relevant


def texts_file(folder: Path, name: str) -> Path:
    plain, packed = folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"
    if plain.exists() and packed.exists():
        raise DataError(f"is there twice, also as {packed.name}", where=str(plain), fix="Remove one of them")
    if not (plain.exists() or packed.exists()):
        raise DataError("there is no such file, nor one with .gz", where=str(plain), fix=f"Add {plain.name}")
    return plain if plain.exists() else packed


def identified_rows(path: Path, known: dict[str, str]) -> Iterator[tuple[Row, str]]:
    """The rows with their ids, which must not be among `known` (the caller adds each as it goes)."""
    empty = True
    for item in jsonl_rows(path):
        row, empty = checked_row(item, path), False
        key = row.cells.get("_id")
        key = str(key) if isinstance(key, int) and not isinstance(key, bool) else string_cell(row, "_id", path)
        if key in known:
            fix = "Give every row an _id of its own"
            raise DataError(f"'{key}' occurs twice", where=place(str(path), row.number, "_id"), fix=fix)
        yield row, key
    if empty:
        raise DataError("has no rows", where=str(path), fix='Write one {"_id": …, "text": …} a line')


def checked_row(item: Row | BadRow, path: Path) -> Row:
    if isinstance(item, BadRow):
        raise item.error(str(path), skippable=False)
    return item


def string_cell(row: Row, column: str, path: Path) -> str:
    if column not in row.cells:
        fix = f'Add "{column}"; the row has {", ".join(row.cells) or "no columns"}'
        raise DataError("row lacks the column", where=place(str(path), row.number, column), fix=fix)
    value = row.cells[column]
    fault = text_fault(value)
    if fault is not None:
        raise fault.at(row.number, column).error(str(path), skippable=False)
    return str(value)


def text_of(row: Row, path: Path) -> str:
    """The row's text after its title, if it has one; a document of a title alone is a document too."""
    title = row.cells.get("title")
    if not isinstance(title, str) or not title.strip():
        if title is not None and not isinstance(title, str):
            string_cell(row, "title", path)
        return string_cell(row, "text", path)
    title = string_cell(row, "title", path).strip()
    return title if row.cells.get("text") == "" else f"{title} {string_cell(row, 'text', path)}"


def _judgements(
    path: Path, queries: dict[str, str], corpus: dict[str, str]
) -> dict[tuple[str, str], tuple[int, int | float]]:
    """{(query id, document id): (row, score)} in the file's order."""
    where, header = str(path), csv_header(path, "\t")
    for column in _JUDGEMENT:
        if column not in header:
            fix = f"The header must hold {', '.join(_JUDGEMENT)} between tabs; it holds {', '.join(header)}"
            raise DataError("there is no such column", where=place(where, 1, column), fix=fix)
    judged: dict[tuple[str, str], tuple[int, int | float]] = {}
    for item in csv_rows(path, "\t"):
        row = checked_row(item, path)
        pair = row.cells["query-id"], row.cells["corpus-id"]
        for column, key, known in zip(_JUDGEMENT, pair, (queries, corpus), strict=False):
            if key not in known:
                close = get_close_matches(key, known, n=1) if len(known) < 10_000 else []
                hint = f"Did you mean '{close[0]}'? " if close else ""
                file = "queries.jsonl" if known is queries else "corpus.jsonl"
                fix = f"{hint}Add it to {file}, or remove the row"
                raise DataError(f"id '{key}' is unknown", where=place(where, row.number, column), fix=fix)
        score = label_value(row.cells["score"], kind="scored", textual=True)
        if isinstance(score, Fault):
            raise score.at(row.number, "score").error(where, skippable=False)
        if pair in judged:
            what = f"the pair '{pair[0]}', '{pair[1]}' was judged in row {judged[pair][0]} already"
            raise DataError(what, where=place(where, row.number, "corpus-id"), fix="Remove one of the rows")
        judged[pair] = (row.number, score)
    if not judged:
        raise DataError("has no rows", where=where, fix="Add judgements under the header")
    return judged


def _check_splits(
    split_of: dict[str, tuple[int, str]],
    split: str,
    queries_path: Path,
    judged: dict[tuple[str, str], tuple[int, int | float]],
    path: Path,
) -> None:
    """Queries that say which split they are of must be judged there, and nowhere else (a leak)."""
    for (query, _), (number, _) in judged.items():
        if query in split_of and split_of[query][1] != split:
            what = f"'{query}' is a query of split '{split_of[query][1]}', not '{split}'"
            where = place(str(path), number, "query-id")
            raise DataError(what, where=where, fix=f"Move the row to {split_of[query][1]}.tsv")
    seen = {query for query, _ in judged}
    for query, (number, own) in split_of.items():
        if own == split and query not in seen:
            fix = f"Judge it in {path.name}, which may be truncated, or change its split"
            where = place(str(queries_path), number, "split")
            raise DataError(f"'{query}' is of split '{split}' but has no judgement", where=where, fix=fix)
