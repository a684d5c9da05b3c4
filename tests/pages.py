"""What the tests of README and docs share: a page's blocks and commands, a change shown as a diff, and a Hub that holds
the models which the pages name.

Loaded by path (`importlib.util`), by tests and by the scripts that they start.
"""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?$")
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")


@dataclass(frozen=True)
class Block:
    """One fenced block: its kind, the file it is, its text, the line it begins on, and whether it is left alone."""

    kind: str
    title: str | None
    text: str
    line: int
    skipped: bool


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, with the files that snippets name in their place."""
    lines = page.splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start = number
        elif start is not None and line == "```":
            match = FENCE.fullmatch(lines[start])
            assert match, f"line {start + 1}: a block without a language, or with more than a title"
            text = "\n".join(lines[start + 1 : number])
            if snippet := re.fullmatch(r"--8<--\n(\S+)\n--8<--", text):
                text = (ROOT / snippet[1]).read_text(encoding="utf-8")
            yield Block(match["kind"], match["title"], text, start + 1, bool(NOT_RUN.fullmatch(lines[start - 1])))
            start = None
    assert start is None, f"line {start}: a block that does not end"


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(command, the output under it) of a ```console block."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.replace("\\\n", " ").partition("\n")
        yield re.sub(r"\s#.*", "", command), output


def same(wanted: str, got: str) -> bool:
    """Whether an output is what a page shows.

    `...` stands for anything, alone on a line for any lines or none. Amounts of white space do not matter.
    """
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    # Without the line ends beside it, since doctest would have a space there also where it stands for nothing.
    wanted = re.sub(r"(^|\n)\.\.\.(\n|$)", "...", wanted)
    return doctest.OutputChecker().check_output(wanted, got, flags)


def changed(text: str, diff: str) -> str:
    """A file's text with a change made that is shown as lines which stay (" "), go ("-") and come ("+").

    Parts that are not next to each other have a line `@@` between them.
    """
    for part in re.split(r"^@@.*\n?", diff, flags=re.MULTILINE):
        lines = [line or " " for line in part.splitlines()]
        odd = [line for line in lines if line[0] not in " -+"]
        assert not odd, f"a line of a diff begins with ' ', '-' or '+', not as {odd[0]!r} does"
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert old != new and text.count(old) == 1, f"what changes is there {text.count(old)} times, not once:\n{old}"
        text = text.replace(old, new)
    return text


def hub(home: Path, minilm: Path) -> Path:
    """Make a Hub cache that holds the models the docs name: the real MiniLM, and an ELECTRA of real depth, but narrow.

    Args:
        home: An empty folder, for HF_HOME.
        minilm: The folder of the real all-MiniLM-L6-v2.

    Returns:
        `home`.
    """
    from transformers import AutoTokenizer, ElectraConfig, ElectraModel

    electra = home / "electra"
    tokenizer = AutoTokenizer.from_pretrained(str(minilm))
    config = ElectraConfig(
        vocab_size=len(tokenizer),
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    ElectraModel(config).save_pretrained(electra)
    tokenizer.save_pretrained(electra)
    known = {"sentence-transformers/all-MiniLM-L6-v2": minilm, "google/electra-small-discriminator": electra}
    for name, source in known.items():
        folder = home / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots").mkdir()
        (folder / "snapshots" / ("0" * 40)).symlink_to(source, target_is_directory=True)
    return home
