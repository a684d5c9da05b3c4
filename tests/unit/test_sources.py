from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from burnish.core.errors import DataError
from burnish.core.readers import Row
from burnish.core.sources import open_source, table_rows
from burnish.core.validation import text_fault

PAIRS = {"anchor": ["a", "b", "c"], "positive": ["x", "y", "z"]}
ROWS = [Row(n + 1, {"anchor": PAIRS["anchor"][n], "positive": PAIRS["positive"][n]}) for n in range(3)]

Hub = Callable[[Any], list[tuple[Any, ...]]]


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """A Hub that answers with what it is told, or fails the test: nothing here may go to the network."""
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    calls: list[tuple[Any, ...]] = []
    answers: list[Any] = []

    def load(path: str, name: str | None = None, *, split: str) -> Any:
        calls.append((path, name, split))
        answer = answers.pop()  # an IndexError here is a test that asked the Hub unawares
        if isinstance(answer, Exception):
            raise answer
        return answer

    def answer_with(answer: Any) -> list[tuple[Any, ...]]:
        answers.append(answer)
        return calls

    monkeypatch.setattr(datasets, "load_dataset", load)
    return answer_with


def failure(source: str | Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        list(open_source(source, split).rows(None))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.fix
    return message


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    lines = [json.dumps(row.cells) for row in ROWS]
    csv = ["anchor,positive", "a,x", "b,y", "c,z"]
    for name in ("a.jsonl", "a.ndjson", "a.jsonlines", "a.json-lines", "a.json", "A.JSONL"):
        (tmp_path / name).write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text("\n".join(csv))
    (tmp_path / "a.tsv").write_text("\n".join(csv).replace(",", "\t"))
    pq.write_table(pa.table(PAIRS), tmp_path / "a.parquet")
    datasets.Dataset.from_dict(PAIRS).save_to_disk(tmp_path / "folder")
    for path in tmp_path.iterdir():
        opened = open_source(path)
        texts = opened.textual or path.suffix.lower() in (".jsonl", ".ndjson", ".jsonlines", ".json-lines", ".json")
        rows = list(opened.rows(["anchor", "positive"]))
        assert [row.cells for row in rows if isinstance(row, Row)] == [row.cells for row in ROWS], path
        assert [row.number for row in rows if isinstance(row, Row)] == ([2, 3, 4] if opened.textual else [1, 2, 3])
        assert (opened.names is None) == (texts and not opened.textual)
        assert opened.where == str(path)


def test_parquet_and_datasets_read_only_the_columns_asked_for(tmp_path: Path) -> None:
    table = pa.table({**PAIRS, "vector": [[0.5]] * 3})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    datasets.Dataset(table).save_to_disk(tmp_path / "folder")
    for name in ("a.parquet", "folder"):
        opened = open_source(tmp_path / name)
        assert opened.names == ("anchor", "positive", "vector")
        assert list(opened.rows(["positive"])) == [Row(row.number, {"positive": row.cells["positive"]}) for row in ROWS]
        assert next(opened.rows(None)).cells["vector"] == [0.5]  # type: ignore[union-attr]


def test_strings_of_any_arrow_type_are_strings(tmp_path: Path) -> None:
    texts = pa.array(["a", "b", None])
    types = {"plain": pa.string(), "large": pa.large_string(), "coded": pa.dictionary(pa.int32(), pa.string())}
    pq.write_table(pa.table({name: texts.cast(kind) for name, kind in types.items()}), tmp_path / "a.parquet")
    rows = list(open_source(tmp_path / "a.parquet").rows(None))
    assert rows == [Row(n + 1, dict.fromkeys(types, text)) for n, text in enumerate(["a", "b", None])]


def test_bytes_that_are_not_utf8_keep_their_place_in_parquet(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 5], pa.int32()).buffers()[1], pa.py_buffer(b"acaf\xe9")]
    )
    with pytest.raises(UnicodeDecodeError):  # the array is as bad as it is meant to be
        bad.to_pylist()
    table = pa.table({"bad": bad, "good": ["x", "y"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(open_source(tmp_path / "a.parquet").rows(None))[1] == Row(2, {"bad": "caf\udce9", "good": "y"})
    coded = pa.table({"bad": pa.DictionaryArray.from_arrays(pa.array([0, 1]), bad)})
    assert list(table_rows([table, coded], ["bad"])) == [
        Row(n + 1, {"bad": text}) for n, text in enumerate(["a", "caf\udce9"] * 2)
    ]
    nested = pa.table({"bad": pa.ListArray.from_arrays([0, 2], bad)})
    (row,) = table_rows([nested], ["bad"])
    fault = text_fault(row.cells["bad"])
    assert fault is not None
    assert fault.reason == "cell is not text but ListScalar"


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(PAIRS), path)
    whole = path.read_bytes()
    fix = "Check the file and its permissions, or write it again: it is no Parquet, truncated or damaged"
    for content in (whole[:-20], whole[: len(whole) // 2], b"anchor,positive\na,b\n"):
        path.write_bytes(content)
        message = failure(path)
        assert message.startswith(f"{path}: cannot be read (")
        assert message.endswith(fix)
    path.write_bytes(b"")
    assert failure(path) == f"{path}: file is empty. Write it again, with at least two rows"
    path.write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])  # the pages, while the footer is whole
    assert failure(path).endswith(fix)


def test_unknown_formats_and_splits_of_files(tmp_path: Path) -> None:
    for name in ("a.xlsx", "a.parquet.gz", "a.txt", "noformat"):
        (tmp_path / name).write_text("x")
        message = failure(tmp_path / name)
        assert "is no known format. Use .jsonl, .csv or .tsv (each also .gz), .parquet, a folder" in message
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    message = failure(tmp_path / "a.csv", "test")
    assert message == f"{tmp_path}/a.csv: a file has no split 'test'. Name that split's own file"


def test_folders_of_datasets(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict(PAIRS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "dev": one.select([2])}).save_to_disk(tmp_path / "two")
    assert list(open_source("one").rows(None)) == ROWS
    opened = open_source("two", "dev")
    assert opened.where == "two (dev)"
    assert list(opened.rows(None)) == [Row(1, ROWS[2].cells)]
    assert failure("two", "test") == "two: there is no split 'test'. Choose one of: train, dev"
    assert failure("one", "test") == (
        "one: the folder holds one data set, not a split 'test'. Name the folder of that split"
    )
    (tmp_path / "two" / "dev" / "data-00000-of-00001.arrow").write_bytes(b"half")
    message = failure("two", "dev")
    assert message.startswith("two: folder cannot be loaded (")
    assert message.endswith("Write it again with save_to_disk: it is empty, incomplete or damaged")


def test_shuffled_and_formatted_datasets_give_their_rows_in_order(tmp_path: Path) -> None:
    turned = datasets.Dataset.from_dict(PAIRS).select([2, 0]).with_format("numpy")
    turned.save_to_disk(tmp_path / "turned")
    expected = [Row(1, ROWS[2].cells), Row(2, ROWS[0].cells)]
    assert list(open_source("turned").rows(None)) == expected


def test_folders_of_anything_else(tmp_path: Path) -> None:
    fix = "Name one file in it, or save the data set with Dataset.save_to_disk"
    (tmp_path / "empty").mkdir()
    assert failure("empty") == f"empty: folder was not written by save_to_disk; it holds nothing. {fix}"
    (tmp_path / "files").mkdir()
    for number in range(7):
        (tmp_path / "files" / f"{number}.csv").touch()
    message = failure("files")
    assert message == (
        "files: folder was not written by save_to_disk; it holds 0.csv, 1.csv, 2.csv, 3.csv, 4.csv, …. " + fix
    )


@pytest.mark.parametrize(
    "source",
    (
        *("train.jsonl", "data.csv.gz", "x.parquet", "./train", "../nowhere/train", "/no/such", "~/none-such"),
        *("a/b/c", "a\\b", "here/train"),
    ),
)
def test_what_looks_like_a_path_is_not_asked_of_the_hub(tmp_path: Path, source: str) -> None:
    (tmp_path / "here").mkdir()
    assert failure(source) == f"{source}: there is no such file or folder. Check the path, from {tmp_path}"


def test_near_misses_of_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "train.jsonl").touch()
    assert failure("here/trian.jsonl") == (
        "here/trian.jsonl: there is no such file or folder. Did you mean here/train.jsonl?"
    )
    assert failure("here/train").endswith("Did you mean here/train.jsonl?")


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("squad", ("squad", None, "dev")),
        ("owner/na-me.v1", ("owner/na-me.v1", None, "dev")),
        ("owner/name:con-fig.1", ("owner/name", "con-fig.1", "dev")),
    ],
)
def test_hub_ids(hub: Hub, source: str, call: tuple[Any, ...]) -> None:
    calls = hub(datasets.Dataset.from_dict(PAIRS))
    opened = open_source(source, "dev")
    assert calls == [call]
    assert opened.where == f"{source} (dev)"
    assert list(opened.rows(None)) == ROWS


def test_no_hub_id_at_all() -> None:
    for source in ("no such thing", "owner/name:a:b", "owner:config/name", ""):
        if source:
            assert failure(source).startswith(f"{source}: is neither a file nor a folder nor a Hub id. Use .jsonl")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed."),
            "o/n: is no file here and no data set that the Hub shows you. Check the spelling; if it is private "
            "or gated, run `hf auth login` and accept its terms",
        ),
        (
            ConnectionError("Couldn't reach 'o/n' on the Hub (ConnectTimeout)"),
            "o/n: the Hub cannot be reached (Couldn't reach 'o/n' on the Hub (ConnectTimeout)). "
            "Check the network, or name a file",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"),
            "o/n: Config name is missing. Please pick one among the available configs: ['a', 'b']. "
            "Pick a configuration as owner/name:config",
        ),
        (
            ValueError("Unknown split \"train\". Should be one of ['test']."),
            "o/n: Unknown split \"train\". Should be one of ['test']. Choose one of the splits that it has",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found n.py"),
            "o/n: cannot be loaded from the Hub (RuntimeError: Dataset scripts are no longer supported, but found n.py)"
            ". Try `datasets.load_dataset` with it by itself, or save it as JSON lines or Parquet and name that file",
        ),
        (KeyError(), "o/n: cannot be loaded from the Hub (KeyError: KeyError). Try"),
        (RuntimeError("x" * 900), f"o/n: cannot be loaded from the Hub (RuntimeError: {'x' * 299}…). Try"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_may_say(hub: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub(error)
    assert failure("o/n").startswith(message)


def test_offline_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub(ConnectionError("Couldn't reach 'o/n' on the Hub (OfflineModeIsEnabled)"))
    assert failure("o/n") == "o/n: is no file here, and HF_HUB_OFFLINE is set. Unset it, or name a file"
