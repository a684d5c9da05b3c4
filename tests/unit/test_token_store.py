"""The token store: exact tokens, a name for what made them, whole files, one builder, bounded size."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from datasets import Dataset, concatenate_datasets  # type: ignore[import-untyped]

from burnish.core import token_store
from burnish.core.errors import ConfigError, DataError
from burnish.core.token_store import TokenColumn, content_hash, make_room, store_folder, stores, token_column

TEXTS = ["a b c", "", "é x", "a b c d e f g"] * 5


class Letters:
    """A recipe that stands in for a tokenizer: one token a letter."""

    def __init__(self, key: str = "letters", pause: float = 0.0) -> None:
        self.key, self.name, self.prompt, self.max_length, self.calls, self.pause = key, key, "", None, 0, pause

    def tokenise(self, texts: list[str]) -> tuple[Any, Any]:
        self.calls += 1
        time.sleep(self.pause)
        letters = [ord(letter) for text in texts for letter in text]
        return np.array(letters, np.int32), np.array([len(text) for text in texts], np.int64)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "CHUNK", 8)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def open_column(tmp_path: Path, said: list[str]) -> Callable[..., TokenColumn]:
    def open_column(texts: Any = TEXTS, recipe: Any = None, folder: Path = tmp_path) -> TokenColumn:
        dataset = texts if isinstance(texts, Dataset) else Dataset.from_dict({"text": texts})
        how: Any = recipe or Letters()
        return token_column(dataset, "text", how, folder, said.append)

    return open_column


def test_tokens_by_row_across_chunks(open_column: Any) -> None:
    column = open_column()
    assert len(column) == 20 and column.tokens == sum(map(len, TEXTS))
    assert column.lengths().tolist() == [len(text) for text in TEXTS]
    for row in (0, 1, 7, 8, 15, 19):
        assert "".join(map(chr, column[row])) == TEXTS[row] and column[row].dtype == np.int32
    assert len(column._mapped()) == 3, "one chunk holds all"


def test_what_is_mapped_is_not_pickled(open_column: Any) -> None:
    column = open_column()
    assert column[3].size
    data = pickle.dumps(column)
    assert len(data) < 600 and np.array_equal(pickle.loads(data)[3], column[3])


def test_a_second_run_finds_them_and_another_text_tokenizer_or_order_does_not(open_column: Any) -> None:
    recipe = Letters()
    assert open_column(recipe=recipe).seconds > 0 and recipe.calls == 3
    assert open_column(recipe=recipe).seconds == 0 and recipe.calls == 3
    for texts in ([*TEXTS[:-1], "z"], TEXTS[::-1], TEXTS[:-1]):
        assert open_column(texts, recipe).seconds > 0
    assert open_column(recipe=Letters("others")).seconds > 0


def test_the_hash_is_of_the_texts_however_arrow_holds_them() -> None:
    plain = Dataset.from_dict({"text": TEXTS})
    expected = content_hash(plain, "text")
    pieces = concatenate_datasets([plain.select(range(3)), plain.select(range(3, 20))])
    large = Dataset(pa.table({"text": pa.array(TEXTS, pa.large_string())}))
    shuffled = Dataset.from_dict({"text": TEXTS[::-1]}).select(range(19, -1, -1))
    for other in (pieces, large, shuffled, plain.with_transform(lambda rows: {"text": ["x"]})):
        assert content_hash(other, "text") == expected
    assert content_hash(Dataset.from_dict({"text": ["ab", "c"]}), "text") != content_hash(
        Dataset.from_dict({"text": ["a", "bc"]}), "text"
    )


@pytest.mark.parametrize("damage", ["cut", "one byte", "no tokens", "no note", "odd note"])
def test_damage_is_seen_said_and_mended(damage: str, open_column: Any, said: list[str]) -> None:
    file = open_column().path
    note = file.with_name("about.json")
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-30])
    elif damage == "one byte":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "odd note":
        note.write_text(json.dumps(["no", "note"]))
    else:
        (file if damage == "no tokens" else note).unlink()
    assert not said
    mended = open_column()
    assert mended.seconds > 0 and len(said) == 1 and "is damaged" in said[0]
    assert "".join(map(chr, mended[3])) == TEXTS[3] and open_column().seconds == 0


def test_what_breaks_off_leaves_no_store(open_column: Any, tmp_path: Path) -> None:
    class Breaks(Letters):
        def tokenise(self, texts: list[str]) -> tuple[Any, Any]:
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().tokenise(texts)

    with pytest.raises(KeyboardInterrupt):
        open_column(recipe=Breaks())
    assert not stores(tmp_path) and [path.name for path in tmp_path.iterdir()] == [".locks"]
    assert open_column().seconds > 0


def test_of_processes_that_want_one_store_one_builds_it(tmp_path: Path) -> None:
    # Started afresh: a process that is forked where threads run may wait for ever for a lock that one of them held.
    command = [sys.executable, __file__, str(tmp_path)]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = sorted(json.loads(builder.communicate(timeout=120)[0].splitlines()[-1]) for builder in builders)
    assert [calls for calls, _ in found] == [0, 3] and {tokens for _, tokens in found} == {sum(map(len, TEXTS))}


def test_the_least_recently_used_go_first(open_column: Any, tmp_path: Path, said: list[str]) -> None:
    paths = [open_column([f"{number}" * 50] * 8).path.parent for number in range(4)]
    for age, place in enumerate(paths):
        os.utime(place / "about.json", (age, age))
    open_column(["0" * 50] * 8)  # used now
    size = stores(tmp_path)[0].size
    make_room(tmp_path, keep=paths[1], say=said.append, limit=3 * size + 40)
    assert {store.place for store in stores(tmp_path)} == {paths[0], paths[1], paths[3]}
    assert said == [f"1 of the token stores in {tmp_path} were deleted: together they are kept under 0 GiB"]
    assert np.array_equal(open_column(["1" * 50] * 8)[7], np.full(50, ord("1")))


def test_a_missing_text_is_an_error(open_column: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 9 of column text: there is no text"):
        open_column([*TEXTS[:9], None, "x"])
    assert not stores(tmp_path)


def test_a_folder_that_cannot_be_made(open_column: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written to .* Set BURNISH_CACHE"):
        open_column(folder=tmp_path / "file" / "tokens")


def test_where_stores_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BURNISH_CACHE", "/cache")
    assert store_folder("/mine") == Path("/mine") and store_folder() == Path("/cache/tokens")
    monkeypatch.delenv("BURNISH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert store_folder() == Path("/shared/burnish/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store_folder() == tmp_path / ".cache" / "burnish" / "tokens"


if __name__ == "__main__":  # one of two processes that want the same store
    token_store.CHUNK = 8
    one: Any = Letters(pause=1.0)
    opened = token_column(Dataset.from_dict({"text": TEXTS}), "text", one, Path(sys.argv[1]), print)
    print(json.dumps([one.calls, opened.tokens]))
