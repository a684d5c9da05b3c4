"""An outsider's walk through "Write a family plugin", repeated to the letter.

The page is walked in an environment of its own, from top to bottom, in one terminal:

* each command of a ```console block is run by a shell, in the folder that the last one left, and what it prints is
  compared with what the page shows (`...` stands for anything). It may fail just where the page shows an error or a
  check that failed; a command with nothing below it must end well;
* a block with a title is written to a file of that name; a ```diff block changes the file;
* a ```python block without a title is run by the environment's Python.

Only what stands under `<!-- not run: reason -->` is left out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "write-a-family.md"
# What pip would write beside Python: name to module and function.
PROGRAMS = {"burnish": "burnish.core.cli:main", "pip": "pip._internal.cli.main:main", "pytest": "pytest:main"}


def load_pages() -> Any:
    """What is shared with other tests of pages: `tests/pages.py`, which no import reaches."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "tests" / "pages.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load_pages()


class Terminal:
    """Somebody at work in a folder, with the variables of one environment."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder, self.variables, self.note = folder, variables, folder.parent / "where"

    def run(self, command: str) -> tuple[int, str]:
        """(exit code, everything it printed) of a command, by a shell."""
        line = f"{command}\ncode=$?; pwd > '{self.note}'; exit $code"
        done = subprocess.run(
            ["sh", "-c", line], cwd=self.folder, env=self.variables, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.folder = Path(self.note.read_text(encoding="utf-8").strip())
        return done.returncode, done.stdout

    def command(self, command: str, wanted: str) -> None:
        """Run a command of the page and hold it to what the page shows."""
        code, got = self.run(command)
        fails = re.search(r"^error: |\bfailed\b", wanted, re.MULTILINE) is not None
        assert (code != 0) == fails, f"`{command}` ended with {code}:\n{got[-4000:]}"
        assert not wanted or pages.same(wanted, got), f"`{command}`: the page says\n{wanted}\nand this comes out\n{got}"

    def block(self, block: Any) -> None:
        """Do what a block of the page says."""
        path = self.folder / (block.title or "")
        if block.kind == "diff":
            path.write_text(pages.changed(path.read_text(encoding="utf-8"), block.text), encoding="utf-8")
        elif block.title:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{block.text}\n", encoding="utf-8")
        elif block.kind == "python":
            (self.folder.parent / "block.py").write_text(block.text, encoding="utf-8")
            self.command(f"python '{self.folder.parent / 'block.py'}'", "")
        elif block.kind == "console":
            for command, wanted in pages.commands(block.text):
                self.command(command, wanted)

    def walk(self, page: str) -> int:
        """Walk through a page; returns how many of its blocks there were to do."""
        count = 0
        for block in pages.blocks(page):
            if block.skipped or not (block.title or block.kind in ("python", "console")):
                continue
            count += 1
            try:
                self.block(block)
            except BaseException as error:
                error.add_note(f"in the {block.kind} block that begins on line {block.line}")
                raise
        return count


@pytest.fixture
def author(own_environment: Any, minilm: Path, tmp_path: Path) -> Terminal:
    """A terminal in an empty folder, with Burnish installed and no network."""
    site, variables = own_environment
    programs = site.python.parent
    for name, place in PROGRAMS.items():
        module, _, function = place.partition(":")
        script = f"#!{site.python}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        (programs / name).write_text(script, encoding="utf-8")
        (programs / name).chmod(0o755)
    work, home = tmp_path / "work", tmp_path / "hub"
    work.mkdir()
    home.mkdir()
    changes = {
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        "HF_HOME": str(pages.hub(home, minilm)),
        "BURNISH_CONFIG_DIR": str(tmp_path / "config"),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of "no isolation": what a build needs cannot be fetched
        "PIP_QUIET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return Terminal(work, {**variables, **changes})


def test_the_guide_leads_where_it_says(author: Terminal) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert author.walk(text) >= 15
    wheel, sdist = author.folder / "dist" / "burnish_electra-0.1.0-py3-none-any.whl", "burnish_electra-0.1.0.tar.gz"
    assert wheel.is_file() and (author.folder / "dist" / sdist).is_file()


def test_the_guide_runs_all_but_what_needs_the_world() -> None:
    found = list(pages.blocks(GUIDE.read_text(encoding="utf-8")))
    run = [command for block in found if not block.skipped for command, _ in pages.commands(block.text)]
    for start in (
        "burnish plugin new",
        "pip install",
        "pytest",
        "burnish doctor",
        "burnish train",
        "burnish plugins b",
    ):
        assert any(command.startswith(start) for command in run), start
    # A whole conformance run, not only chosen checks.
    assert "burnish plugins check burnish-electra" in run
    left_out = [command for block in found if block.skipped for command, _ in pages.commands(block.text)]
    assert 0 < len(left_out) <= 5 and all(re.match(r"(pip install|twine upload) ", command) for command in left_out)


@pytest.fixture
def anyone(tmp_path: Path) -> Terminal:
    """A terminal in an empty folder of this environment."""
    work = tmp_path / "work"
    work.mkdir()
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return Terminal(work, {**os.environ, "PATH": programs})


FILE = '```text title="notes.txt"\none\ntwo\nthree\n```\n\n'


@pytest.mark.parametrize(
    "page",
    [
        "```console\n$ false\n```",
        "```console\n$ no-such-program\n```",
        "```console\n$ echo one\ntwo\n```",
        "```console\n$ printf 'one\\ntwo\\n'\none\n...\nthree\n```",
        "```console\n$ echo one\none\n$ echo one; exit 3\none\n```",
        "```console\n$ echo 'error: gone'\nerror: gone\n```",
        "```console\n$ printf 'family  patches  passed'; exit 5\nfamily  patches  failed\n```",
        "```python\nassert 1 + 1 == 3\n```",
        f"{FILE}```console\n$ cat notes.txt\none\ntwo\n```",
        f'{FILE}```diff title="notes.txt"\n one\n-too\n+2\n```',
        f'{FILE}```diff title="notes.txt"\n one\n two\n```',
        '```diff title="gone.txt"\n-one\n+two\n```',
        "```\nwhat is this?\n```",
    ],
)
def test_a_page_that_lies_is_seen(page: str, anyone: Terminal) -> None:
    with pytest.raises((AssertionError, FileNotFoundError)):
        anyone.walk(page)


def test_a_page_that_is_right_passes(anyone: Terminal) -> None:
    page = (
        f'{FILE}```diff title="notes.txt"\n one\n-two\n+2\n+2.5\n@@\n-three\n+3\n```\n\n'
        "```console\n$ cat notes.txt\n...\none\n2\n...\n3\n...\n"
        "$ mkdir sub && cd sub\n$ cat ../notes.txt | wc -l  # lines\n4\n"
        "$ cat \\\n    gone.txt; echo 'error: no   gone.txt' && exit 2\n...\nerror: no gone.txt\n```\n\n"
        "```python\nfrom pathlib import Path\n\nPath('made').touch()\n```\n\n"
        "```console\n$ ls\nmade\n```\n\n<!-- not run: it would go too far -->\n```console\n$ rm made\n```\n"
    )
    assert anyone.walk(page) == 5
    assert (anyone.folder / "made").exists() and anyone.folder.name == "sub"
