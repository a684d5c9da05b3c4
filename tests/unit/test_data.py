from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from burnish.core import data
from burnish.core.data import BadRow, LoadedData, Row, load_dataset, read_rows
from burnish.core.errors import ConfigError, DataError

EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(min_size=1, max_size=30).filter(lambda text: text.strip())
SKIP = ", or leave such rows out with --on-bad-row=skip"

Rows = Sequence[dict[str, Any]]
Write = Callable[[Rows], Path]
KINDS = ("jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "parquet", "folder")


@pytest.fixture(autouse=True)
def quiet_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("the Hub was asked"))


def write(folder: Path, kind: str, rows: Rows) -> Path:
    """The rows as a source of that kind; the columns are those of the first row."""
    import gzip

    path = folder / f"rows.{kind}"
    names = list(rows[0])
    opener = gzip.open if kind.endswith(".gz") else open
    if kind.startswith("jsonl"):
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif kind == "folder":
        datasets.Dataset(pa.Table.from_pylist(list(rows))).save_to_disk(path)
    else:
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, delimiter="\t" if kind == "tsv" else ",", quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    return path


def stopped(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path.parent}/")


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"anchor": f"q{number}", "positive": f"d{number}"} for number in range(count)]


# Sources that do not hold their own line numbers count rows from 1; a CSV file has its header in line 1.
@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(texts=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=2, max_size=6))
def test_any_text_comes_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, kind: str, texts: list[tuple[str, str, str]]
) -> None:
    columns = list(zip(*texts, strict=True))
    assume(all(len(set(column)) > 1 for column in columns) and columns[0] != columns[1])
    names, order = ("negative", "positive", "anchor"), ("anchor", "positive", "negative")
    path = write(tmp_path_factory.mktemp("any"), kind, [dict(zip(names, row[::-1], strict=True)) for row in texts])
    loaded = load_dataset(path)
    assert tuple(loaded.dataset.column_names) == order
    assert loaded.dataset.to_list() == [dict(zip(order, row, strict=True)) for row in texts]
    assert (loaded.source, loaded.columns.kind, loaded.num_skipped) == (str(path), "pairs", 0)


LABELLED: dict[str, tuple[str, list[Any], str, list[Any]]] = {
    "scored": ("score", [0, 3, 1], "float64", [0.0, 3.0, 1.0]),
    "scored by type": ("label", [0.0, 0.25, 1.0], "float64", [0.0, 0.25, 1.0]),
    "labelled-pairs": ("labels", [0, 1, 1], "int64", [0, 1, 1]),
    "labelled-pairs, bool": ("label", [True, False, True], "int64", [1, 0, 1]),
    "classes": ("label", [7, 0, 7], "int64", [7, 0, 7]),
    "classes, float": ("label", [7.0, 0.0, 7.0], "int64", [7, 0, 7]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", LABELLED)
def test_labels_come_last_and_in_one_type(tmp_path: Path, kind: str, case: str) -> None:
    label, values, dtype, expected = LABELLED[case]
    texts = ["text"] if case.startswith("classes") else ["sentence1", "sentence2"]
    rows = [{label: value, **{name: f"{name} {n}" for name in texts}} for n, value in enumerate(values)]
    loaded = load_dataset(write(tmp_path, kind, rows))
    assert loaded.columns.kind == case.split(",")[0].removesuffix(" by type")
    assert loaded.dataset.column_names == [*texts, label]
    assert loaded.dataset.features[label].dtype == dtype
    assert loaded.dataset[label][:] == expected
    assert loaded.dataset[texts[0]][:] == [f"{texts[0]} {n}" for n in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_chooses_and_renames(tmp_path: Path, kind: str) -> None:
    rows = [{"gold": n % 2, "positive": f"q{n}", "lang": "en", "id": f"d{n}"} for n in range(4)]
    path = write(tmp_path, kind, rows)
    loaded = load_dataset(path, columns={"label": "gold", "positive": "id", "anchor": "positive"})
    assert loaded.dataset.to_list() == [{"anchor": f"q{n}", "positive": f"d{n}", "label": n % 2} for n in range(4)]
    assert loaded.columns.ignored == ("lang",)
    assert stopped(path, columns={"anchor": "positive", "positive": "idd"}).startswith(
        f"{path.name}, column idd: there is no such column, though the mapping takes 'positive' from it. "
        "Did you mean 'id'? The columns are: gold, positive, lang, id"
    )


BAD = {"anchor": "q", "positive": ""}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_row_stops_with_its_place(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [*pairs(3), BAD, *pairs(2)])
    row = 5 if kind[:3] in ("csv", "tsv") else 4
    assert stopped(path) == f"{path.name}, row {row}, column positive: cell is empty. Fill it in{SKIP}"


@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows_are_skipped_and_counted(tmp_path: Path, kind: str) -> None:
    blank = {"anchor": "  ", "positive": "d"}
    path = write(tmp_path, kind, [BAD, *pairs(2), BAD, blank, {"anchor": "q", "positive": "d"}])
    loaded = load_dataset(path, on_bad_row="skip")
    assert loaded.dataset["anchor"][:] == ["q0", "q1", "q"]
    first = 2 if kind[:3] in ("csv", "tsv") else 1
    assert [(bad.row, bad.column, bad.reason) for bad in loaded.skipped] == [
        (first, "positive", "cell is empty"),
        (first + 3, "positive", "cell is empty"),
        (first + 4, "anchor", "cell is empty"),
    ]
    assert loaded.skipped_counts == (("cell is empty (positive)", 2), ("cell is empty (anchor)", 1))
    assert loaded.num_skipped == 3
    assert loaded.summary() == (
        f"{path}: 3 rows of anchor, positive (pairs); rows skipped: 3 "
        "(2 × cell is empty (positive), 1 × cell is empty (anchor))"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_labels_out_of_range_are_found_when_the_kind_is_known(tmp_path: Path, kind: str) -> None:
    rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "label": label} for n, label in enumerate([0, 2, 1, -1, 1])]
    path = write(tmp_path, kind, rows)
    row = 3 if kind[:3] in ("csv", "tsv") else 2
    assert stopped(path) == (
        f"{path.name}, row {row}, column label: label is out of range (2). Use 0 (different) and 1 (alike); "
        f"if it is a degree, call the column 'score'{SKIP}"
    )
    loaded = load_dataset(path, on_bad_row="skip")
    assert loaded.dataset.to_list() == [rows[0], rows[2], rows[4]]
    assert [(bad.row, bad.detail) for bad in loaded.skipped] == [(row, "2"), (row + 2, "-1")]
    constant = write(tmp_path, kind, [row for row in rows if row["label"] != 0])
    assert stopped(constant, on_bad_row="skip").startswith(f"{path.name}, column label: every label is 1.")


@pytest.mark.parametrize("kind", KINDS)
def test_at_least_two_rows_must_remain(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, pairs(1))
    assert stopped(path) == f"{path.name}: has only one row. Give it at least two rows"
    path = write(tmp_path, kind, [*pairs(1), BAD, BAD])
    row = 3 if kind[:3] in ("csv", "tsv") else 2
    assert stopped(path, on_bad_row="skip") == (
        f"{path.name}, row {row}, column positive: only 1 of 3 rows can be used; this is the first that cannot: "
        "cell is empty. Fill it in"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_at_fault_is_refused_even_with_skip(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [{"anchor": f"q{n}", "positive": "same"} for n in range(3)])
    for choice in ("stop", "skip"):
        message = stopped(path, on_bad_row=choice)
        assert message.startswith(f"{path.name}, column positive: every row has the same text, 'same'. Check that")


@pytest.mark.parametrize("kind", KINDS)
def test_reading_stops_after_max_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [BAD, *pairs(4), BAD])
    loaded = load_dataset(path, on_bad_row="skip", max_rows=3)
    assert loaded.dataset["anchor"][:] == ["q0", "q1", "q2"]
    assert loaded.num_skipped == 1
    path = write(tmp_path, kind, pairs(4))
    assert load_dataset(path, max_rows=2).dataset.to_list() == pairs(2)
    assert load_dataset(path, max_rows=9).dataset.to_list() == pairs(4)


def test_lines_that_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps(row) for row in pairs(2)]
    path.write_text("\n".join(["oops", *good, '{"anchor": "q']))
    assert stopped(path).startswith("a.jsonl, row 1: line is not valid JSON (Expecting value at character 1). Mend the")
    loaded = load_dataset(path, on_bad_row="skip")
    assert loaded.dataset.to_list() == pairs(2)
    assert [bad.row for bad in loaded.skipped] == [1, 4]
    path.write_text("oops\n[]\n")
    assert stopped(path, on_bad_row="skip") == (
        "a.jsonl, row 1: only 0 of 2 rows can be used; this is the first that cannot: line is not valid JSON. "
        "Mend the line"
    )
    path.write_text("\n".join([*good, json.dumps({**pairs(1)[0], "negative": "n"})]))
    assert stopped(path).startswith("a.jsonl, row 3, column negative: the first row has no such column.")
    assert len(load_dataset(path, columns={"anchor": "anchor", "positive": "positive"}).dataset) == 3
    path.write_text("\n".join([*good, json.dumps({"anchor": "q"})]))
    assert stopped(path).startswith("a.jsonl, row 3, column positive: row lacks the column (it has anchor). Add it")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_sources_without_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"anchor": pa.array([], pa.string()), "positive": pa.array([], pa.string())}), path)
    else:
        path.write_text("anchor,positive\n" if name == "a.csv" else "\n")
    for choice in ("stop", "skip"):
        assert stopped(path, on_bad_row=choice) == f"{name}: is empty: it has no rows. Give it at least two rows"


def test_a_folder_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    datasets.Dataset.from_dict({"anchor": [], "positive": []}).save_to_disk(path)  # datasets cannot load it again
    message = stopped(path)
    assert message.startswith("folder: folder cannot be loaded (")
    assert message.endswith("Write it again with save_to_disk: it is empty, incomplete or damaged")


def test_options_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, "csv", pairs(2))
    with pytest.raises(ConfigError, match=r"on_bad_row: 'warn' is not a way to go on\. Use stop or skip"):
        load_dataset(path, on_bad_row="warn")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"max_rows: 1 rows are too few\. Use 2 or more, or leave it out"):
        load_dataset(path, max_rows=1)
    with pytest.raises(DataError, match=r"rows\.csv: a file has no split 'test'\. Name that split's own file"):
        load_dataset(path, split="test")


def test_the_splits_of_a_folder(tmp_path: Path) -> None:
    both = {"train": datasets.Dataset.from_list(pairs(3)), "dev": datasets.Dataset.from_list(pairs(2))}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    assert load_dataset(tmp_path / "both").dataset.to_list() == pairs(3)
    assert load_dataset(tmp_path / "both", split="dev").dataset.to_list() == pairs(2)
    assert stopped(tmp_path / "both", split="test").endswith("no split 'test'. Choose one of: train, dev")


def test_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"label": labels, **dict.fromkeys(("a", "b"), datasets.Value("string"))})
    rows = {"label": [0, 1, -1], "a": ["x", "y", "z"], "b": ["1", "2", "3"]}
    held = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: held)
    loaded = load_dataset("owner/name", on_bad_row="skip")
    assert loaded.dataset.to_list() == [{"a": "x", "b": "1", "label": 0}, {"a": "y", "b": "2", "label": 1}]
    assert (loaded.columns.kind, loaded.num_skipped) == ("labelled-pairs", 1)
    with pytest.raises(DataError, match=r"owner/name \(train\), row 3, column label: label is out of range \(-1\)\."):
        load_dataset("owner/name")


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", pairs(3))
    before, again = load_dataset(path), load_dataset(path)
    times = path.stat()
    changed = path.read_text().replace("d1", "D1")
    path.write_text(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same name, size and time: only the content differs
    after = load_dataset(path)
    assert after.dataset["positive"][:] == ["d0", "D1", "d2"]
    assert before.dataset._fingerprint == again.dataset._fingerprint != after.dataset._fingerprint
    assert after.dataset.cache_files == []


def test_large_files_are_cut_into_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**row, "score": n / 100} for n, row in enumerate(pairs(100))]
    path = write(tmp_path, "jsonl", rows)
    whole = load_dataset(path).dataset
    for limit in ("BATCH_ROWS", "BATCH_CHARS"):
        with monkeypatch.context() as patch:
            patch.setattr(data, limit, 7)
            cut = load_dataset(path).dataset
        assert len(cut.data.column("anchor").chunks) > 10 > len(whole.data.column("anchor").chunks)
        assert cut.to_list() == whole.to_list() == rows


def test_a_folder_stays_on_disk(tmp_path: Path) -> None:
    rows = [{"label": float(n % 2), "text": f"t{n}"} for n in range(9)]
    path = write(tmp_path, "folder", rows)
    dataset = load_dataset(path).dataset
    assert isinstance(dataset.features["label"], datasets.Value)
    assert [Path(file["filename"]).parent for file in dataset.cache_files] == [path]


def test_only_some_bad_rows_are_kept_but_all_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "KEPT_BAD_ROWS", 2)
    loaded = load_dataset(write(tmp_path, "jsonl", [*pairs(2), *[BAD] * 5]), on_bad_row="skip")
    assert [bad.row for bad in loaded.skipped] == [3, 4]
    assert loaded.num_skipped == 5


def test_unchecked_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n[]\n{"b": null}\n')
    rows = list(read_rows(path))
    assert rows[::2] == [Row(1, {"a": 1}), Row(3, {"b": None})]
    assert isinstance(rows[1], BadRow)


def test_loaded_data_is_frozen(tmp_path: Path) -> None:
    loaded = load_dataset(write(tmp_path, "csv", [{"": n, **row} for n, row in enumerate(pairs(2))]))
    assert isinstance(loaded, LoadedData)
    assert loaded.summary().endswith("2 rows of anchor, positive (pairs); columns left out: (no name)")
    with pytest.raises(AttributeError):
        loaded.source = "other"  # type: ignore[misc]
