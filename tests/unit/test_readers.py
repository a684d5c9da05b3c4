from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.core.errors import DataError
from burnish.core.readers import BadRow, Row, csv_header, csv_rows, jsonl_rows, place

LINE = '{"anchor": "a", "positive": "b"}\n'
HEAD = "anchor,positive\n"
# One folder for all examples of a test is what we want: each writes its file anew.
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(max_size=30)
FILES = pytest.mark.parametrize("suffix", ["", ".gz"])


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def stopped(path: Path) -> str:
    """The message that reading the file to its end raises, or that its first bad row would."""
    with pytest.raises(DataError) as caught:
        for item in jsonl_rows(path) if ".json" in path.name else csv_rows(path, ","):
            if isinstance(item, BadRow):
                raise item.error(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.fix
    return message.removeprefix(f"{path.parent}/")


@FILES
@EXAMPLES
@given(cells=st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.none(), min_size=1), min_size=1, max_size=6))
def test_any_json_comes_back_with_its_line(tmp_path: Path, suffix: str, cells: list[dict[str, Any]]) -> None:
    for ascii_only in (True, False):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in cells]
        path = write(tmp_path / f"a.jsonl{suffix}", "\n".join(lines))
        assert list(jsonl_rows(path)) == [Row(number, row) for number, row in enumerate(cells, start=1)]


@FILES
@EXAMPLES
@given(cells=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6), end=st.sampled_from(["\n", "\r\n"]))
def test_any_csv_comes_back_with_its_line(tmp_path: Path, suffix: str, cells: list[tuple[str, str]], end: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator=end)
    writer.writerow(["x", "y"])
    starts = []
    for row in cells:
        # A line ends at \n, \r\n or a lone \r, also inside a cell.
        starts.append(len(io.StringIO(text.getvalue(), newline="").readlines()) + 1)
        writer.writerow(row)
    path = write(tmp_path / f"a.csv{suffix}", text.getvalue())
    assert list(csv_rows(path, ",")) == [
        Row(start, {"x": x, "y": y}) for start, (x, y) in zip(starts, cells, strict=True)
    ]


def test_blank_lines_byte_order_marks_and_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINE.encode() + b"\r\n  \n" + LINE.strip().encode())
    assert [item.number for item in jsonl_rows(path) if isinstance(item, Row)] == [1, 4]
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbf\r\nx,y\r\n\r\n1,2\r\n3,4")
    assert list(csv_rows(path, ",")) == [Row(4, {"x": "1", "y": "2"}), Row(5, {"x": "3", "y": "4"})]
    path = write(tmp_path / "mac.csv", "x,y\r1,2\r")
    assert list(csv_rows(path, ",")) == [Row(2, {"x": "1", "y": "2"})]


def test_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": "x\u2028y\u0085z\x0c"}\n'.replace("\x0c", "\\f"))
    assert list(jsonl_rows(path)) == [Row(1, {"a": "x\u2028y\u0085z\x0c"})]


SKIP = ", or leave such rows out with --on-bad-row=skip"
CUT = "The file is probably truncated: copy or download it again"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE + '{"anchor": "c", "po', f"row 2: last line is cut off: no valid JSON, no line end. {CUT}{SKIP}"),
        (
            LINE + '{"anchor" "c"}\n' + LINE,
            f"row 2: line is not valid JSON (Expecting ':' delimiter at character 11). Mend the line{SKIP}",
        ),
        (
            LINE + '{"anchor": "c\n',
            f"row 2: line is not valid JSON (Invalid control character at character 14). Mend the line{SKIP}",
        ),
        (LINE + "[" * 100_000 + "\n", "row 2: line is not valid JSON (maximum recursion depth exceeded"),
        (LINE + "1" * 5000 + "\n", "row 2: line is not valid JSON (Exceeds the limit"),
        (
            LINE + '["c", "d"]\n',
            f'row 2: line is not a JSON object (it is a list). Write one {{"column": value, …}} a line{SKIP}',
        ),
        (LINE + "null", "row 2: line is not a JSON object (it is a NoneType)."),
        (
            LINE.encode() + b'{"anchor": "caf\xe9"}\n',
            f"row 2: line is not UTF-8 (byte 0xe9 at position 16). "
            f"Convert the file to UTF-8, e.g. iconv -f LATIN1 -t UTF-8{SKIP}",
        ),
    ],
)
@FILES
def test_bad_json_lines(tmp_path: Path, suffix: str, content: str | bytes, message: str) -> None:
    name = f"a.jsonl{suffix}"
    assert stopped(write(tmp_path / name, content)).startswith(f"{name}, {message}")


@pytest.mark.parametrize(
    "content", ['[{"a": "b"}, {"a": "c"}]', '[\n{"a": "b"}\n]', '[{"a": "b"},\n{"a": "c"}]', '{\n"a": 1}\n']
)
def test_json_that_is_not_lines(tmp_path: Path, content: str) -> None:
    message = stopped(write(tmp_path / "a.json", content))
    assert message.startswith("a.json: holds ")
    assert message.endswith("Write one object a line, e.g. jq -c '.[]' old.json > new.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            HEAD + "a,b\nc",
            f"row 3, column positive: last line is cut off: fewer cells than the header has (1 of 2). {CUT}{SKIP}",
        ),
        (
            HEAD + "a,b\nc\nd,e\n",
            f"row 3, column positive: fewer cells than the header has (1 of 2). Fill in the missing cells{SKIP}",
        ),
        (
            HEAD + "a,b,c\n",
            "row 2, column positive: more cells than the header has (3 of 2). "
            f"Put cells that hold the delimiter in double quotes{SKIP}",
        ),
        (
            HEAD + '"a\nb",x\n"c",d"\n"e" f,g\n',
            f"""row 5: quotes are wrong (',' expected after '"'). Write a quote inside a cell as ""{SKIP}""",
        ),
        (
            HEAD + 'a,b\nc,"d\ne,f\ng,h\n',
            'row 3, column positive: a quote is never closed. Close it and write quotes inside cells as ""; '
            "if the file ends there, it is truncated: copy it again",
        ),
        (
            HEAD + 'a,b\n"c\nd","e\ng,h\n',
            "row 3, column positive: a quote is never closed.",
        ),
        (
            HEAD + 'a,b\nc,"d\ne,"f\ng,h\n',
            'row 3: quotes are wrong somewhere down to line 4. Write a quote inside a cell as ""',
        ),
        (
            HEAD + 'a,b\n"c,d\n' + "e,f\n" * 40_000,
            "row 3, column anchor: cell is longer than 131072 characters. "
            "Close the quote that opens it; if the text is that long, use JSON lines or Parquet",
        ),
        ("", "file is empty. Give it a header line and at least two rows"),
        ("\n\n", "file is empty."),
        (
            "a,b,a\n1,2,3\n",
            "row 1, column a: column name occurs twice in the header. Give every column a name of its own",
        ),
        ('"a,b\n', "row 1: header cannot be read. Mend the quotes of the header (unexpected end of data)"),
        ("a;b\n1;2\n", "row 1: cells seem to be separated by ';', not ','. Separate the cells by commas (.csv)"),
        ("a\tb\n1\t2\n", "row 1: cells seem to be separated by '\\t', not ','."),
        ("a,é\n".encode("latin1"), "row 1, column ?: column name is not UTF-8. Convert the file to UTF-8"),
    ],
)
@FILES
def test_bad_csv(tmp_path: Path, suffix: str, content: str | bytes, message: str) -> None:
    name = f"a.csv{suffix}"
    between = ": " if message.startswith("file") else ", "
    assert stopped(write(tmp_path / name, content)).startswith(f"{name}{between}{message}")


def test_reading_goes_on_after_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", HEAD + '"a" b,c\nd\ne,f\n')
    kinds = [
        (type(item).__name__, item.row if isinstance(item, BadRow) else item.number) for item in csv_rows(path, ",")
    ]
    assert kinds == [("BadRow", 2), ("BadRow", 3), ("Row", 4)]
    path = write(tmp_path / "a.jsonl", "{\n}\n" + LINE)
    assert [type(item).__name__ for item in list(jsonl_rows(write(path, LINE + "}\n[]\n" + LINE)))] == [
        "Row", "BadRow", "BadRow", "Row",
    ]  # fmt: skip


def test_a_byte_that_is_not_utf8_keeps_its_place_in_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", HEAD.encode() + b"a,caf\xe9\n")
    assert list(csv_rows(path, ",")) == [Row(2, {"anchor": "a", "positive": "caf\udce9"})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_files_that_are_not_what_they_are_called(tmp_path: Path, name: str) -> None:
    content = (LINE if "json" in name else HEAD + "a,b\n") * 3000
    packed = gzip.compress(content.encode())

    def case(suffix: str, data: bytes) -> str:
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(data)
        return stopped(path)

    assert case("", packed) == f"{name}: is compressed with gzip. Call it {name}.gz"
    assert case(".gz", content.encode()) == f"{name}.gz: is not a gzip file. Call it {name}, or compress it"
    utf16 = f"{name}: is UTF-16, not UTF-8. Convert it to UTF-8, e.g. iconv -f UTF-16 -t UTF-8"
    assert case("", content.encode("utf-16")) == utf16
    cut = case(".gz", packed[:-30])
    assert cut.startswith(f"{name}.gz, row ")
    assert cut.endswith(f": compressed file ends in the middle. {CUT}")
    wrong_sum, no_block = packed[:-8] + bytes(8), packed[:10] + b"\xff" * 50
    for data, kind in ((wrong_sum, gzip.BadGzipFile), (no_block, zlib.error)):
        with pytest.raises(kind):  # the damage is what it is meant to be
            gzip.decompress(data)
        damaged = case(".gz", data)
        assert ": cannot be read (" in damaged
        assert damaged.endswith("Check the file and its permissions, or copy it again")


def test_a_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", LINE)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert stopped(path) == (
        "a.jsonl: cannot be opened (Permission denied). Check the file and its permissions, or copy it again"
    )


def test_files_are_closed_when_reading_stops_early(tmp_path: Path) -> None:
    for path in (write(tmp_path / "a.jsonl", LINE * 9), write(tmp_path / "a.csv", HEAD + "a,b\n" * 9)):
        rows = jsonl_rows(path) if path.suffix == ".jsonl" else csv_rows(path, ",")
        next(rows)
        rows.close()
        if sys.platform == "linux":
            held = [link.resolve() for link in Path("/proc/self/fd").iterdir() if link.exists()]
            assert path.resolve() not in held


def test_places() -> None:
    assert place("f") == "f"
    assert place("f", 0, "c") == "f, row 0, column c"
    assert place("f", column="") == "f, column "


def test_the_header_alone(tmp_path: Path) -> None:
    assert csv_header(write(tmp_path / "a.tsv", "a\tb,c\n"), "\t") == ("a", "b,c")
