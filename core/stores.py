"""Files that take long to make, kept in the user's cache under a hash of what decides them, and found by later runs.

A store is a folder with one such file and `about.json`, which holds the file's digest: what is not whole is made again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from .errors import ConfigError
from .files import atomic_folder, discard
from .settings import user_folder

LIMIT = 50 * 2**30
"""Bytes of all stores of a kind; beyond them the least recently used go."""
_ABOUT, _LOCKS = "about.json", ".locks"


def cache_folder(kind: str, part: str, asked: str | os.PathLike[str] | None = None) -> Path:
    """`asked`, else `part` in `$BURNISH_CACHE`, `$XDG_CACHE_HOME/burnish` or `~/.cache/burnish`.

    Raises:
        ConfigError: If there is no home folder to put it in; `kind` is how the error calls it.
    """
    return Path(asked) if asked else user_folder(kind, "BURNISH_CACHE", "XDG_CACHE_HOME", ".cache") / part


def kept(
    folder: Path,
    key: str,
    file: str,
    make: Callable[[Path], dict[str, Any]],
    *,
    say: Callable[[str], None],
    kind: str,
    again: str,
) -> tuple[Path, float]:
    """The store of a key: as it is where it is whole, else made now.

    Of several processes that want one store at once, one makes it and the others wait.

    Args:
        folder: Of all stores of the kind.
        key: What this one is called: a hash of everything that decides its content.
        file: The name of the file in it.
        make: Writes the file to a path, and returns what `about.json` tells people of it.
        say: Told, in one line, of a damaged store or of deleted ones.
        kind: What the stores are called: "token stores".
        again: What happens to a damaged one: "its texts are tokenised again".

    Returns:
        The file, and the seconds that it took to make; 0.0 where it was there.

    Raises:
        ConfigError: If the folder cannot be written to.
        BurnishError: If the disk is full.
    """
    from filelock import FileLock

    place = folder / key
    if _whole(place, file, lambda: say(f"{place} is damaged: {again}")):
        return place / file, 0.0
    lock = FileLock(folder / _LOCKS / key)
    try:
        (folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        fix = "Set BURNISH_CACHE to a folder that you may write to"
        raise ConfigError(f"cannot be written to ({error.strerror or error})", where=str(folder), fix=fix) from error
    try:
        if _whole(place, file, lambda: None):  # another process made it while this one waited; damage is told already
            return place / file, 0.0
        started = time.perf_counter()
        with atomic_folder(place) as staging:
            about = make(staging / file)
            text = json.dumps({"digest": _digest(staging / file), **about}, indent=2, ensure_ascii=False)
            (staging / _ABOUT).write_text(text, encoding="utf-8")
        seconds = time.perf_counter() - started
    finally:
        lock.release()
    make_room(folder, keep=place, say=say, kind=kind)
    return place / file, seconds


def _digest(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as handle:
        while block := handle.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _whole(place: Path, file: str, damaged: Callable[[], None]) -> bool:
    """Whether a store is there with every byte that was written; it counts as used now."""
    try:
        about = json.loads((place / _ABOUT).read_text(encoding="utf-8"))
        whole = bool(_digest(place / file) == about["digest"])
    except (FileNotFoundError, NotADirectoryError):
        if not place.exists():
            return False
        whole = False
    except (ValueError, KeyError, TypeError):  # not the JSON that was written
        whole = False
    if not whole:
        damaged()
        return False
    if os.access(place / _ABOUT, os.W_OK):  # another user's store keeps its own time
        os.utime(place / _ABOUT)
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A store: its folder, its size in bytes, and when it was last used, in seconds since 1970."""

    place: Path
    size: int
    used: float


def stores(folder: Path) -> list[Stored]:
    """The stores in a folder, the least recently used first."""
    found = []
    for about in folder.glob(f"*/{_ABOUT}"):
        try:
            size = sum(file.stat().st_size for file in about.parent.iterdir())
            found.append(Stored(place=about.parent, size=size, used=about.stat().st_mtime))
        except FileNotFoundError:  # another process has just deleted it
            continue
    return sorted(found, key=lambda store: store.used)


def make_room(
    folder: Path, *, keep: Path, say: Callable[[str], None], kind: str = "token stores", limit: int | None = None
) -> None:
    """Delete the least recently used stores until all take at most `limit` bytes (None: `LIMIT`), but never `keep`."""
    bound = LIMIT if limit is None else limit
    found, gone = stores(folder), 0
    size = sum(store.size for store in found)
    for store in found:
        if size > bound and store.place != keep:
            try:
                discard(store.place)
            except OSError as error:
                say(f"{store.place} cannot be deleted ({error.strerror or error})")
                continue
            (folder / _LOCKS / store.place.name).unlink(missing_ok=True)
            size, gone = size - store.size, gone + 1
    if gone:
        say(f"{gone} of the {kind} in {folder} were deleted: together they are kept under {bound / 2**30:.0f} GiB")
