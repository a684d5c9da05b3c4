"""`burnish plugins new`, `check` and `bench`: what is handed on, what is printed, and how it ends."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.core.cli import run
from burnish.core.cli.plugins import plugins
from burnish.core.testing import bench, report

Cli = Callable[..., tuple[int, str, str]]
Install = Callable[..., str]
ROWS = [
    ("family bert", "equals stock", "passed", "float64 1e-15"),
    ("family bert", "padding side", "not applicable", "the pooling is mean"),
]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the program in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    # The program's terminal is its own; this process is shared.
    monkeypatch.setattr("burnish.core.cli.quiet.quiet", lambda: None)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("word", ["plugin", "plugins"])
def test_a_plugin_is_started_and_everything_written_is_named(word: str, cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli(word, "new", "electra", "--like", "bert", "--folder", tmp_path)
    assert (code, err) == (0, "")
    root = tmp_path / "burnish-electra"
    lines = out.splitlines()
    assert lines[0] == "burnish-electra, like bert"
    found = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in lines[2:7]}
    assert found["architecture"] == "electra: Electra of transformers"
    assert found["pooling"] == "mean, as family bert says" and found["input"].startswith("packed")
    written = {line for line in lines if line.startswith(str(root))}
    assert written == {str(path) for path in root.rglob("*") if path.is_file()} and len(written) == 7
    assert lines[-1] == f"Next: cd {root} && pip install -e '.[test]' && pytest"


def test_a_place_with_a_space_can_be_pasted(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "my plugins"
    assert (
        f"cd '{folder / 'burnish-electra'}' &&"
        in cli("plugin", "new", "electra", "--like", "bert", "--folder", folder)[1]
    )


def test_the_model_type_may_be_another(cli: Cli, tmp_path: Path) -> None:
    arguments = ("plugin", "new", "mine", "--like", "bert", "--model-type", "electra", "--folder", tmp_path)
    assert cli(*arguments)[0] == 0
    assert '"model_type.electra"' in (tmp_path / "burnish-mine" / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("new", "x"), "Missing option '--like'. Try `burnish plugins new --help`"),
        (("new", "--like", "bert"), "missing argument 'name'. try `burnish plugins new --help`"),
        (("new", "a b", "--like", "bert"), "NAME: 'a b' is no name for a plugin."),
        (("new", "acme", "--like", "brt"), "--like: no family is called 'brt'. Did you mean 'bert'?"),
        (("check",), "missing argument 'dist'. try `burnish plugins check --help`"),
        (("bench", "bert", "--size", "huge"), "invalid value for '--size': "),
        (("bench", "bert", "--steps", "0"), "invalid value for '--steps': "),
        (("bogus",), "No such command 'bogus'. Try `burnish plugins --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_use_is_one_line(arguments: tuple[str, ...], message: str, cli: Cli) -> None:
    code, out, err = cli("plugin", *arguments)
    assert (code, out) == (2, "") and len(err.strip().splitlines()) == 1
    assert err.lower().startswith(f"error: {message.lower()}")  # versions of typer differ in capitals


def test_a_taken_folder_is_found_out_before_the_work_begins(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "burnish-electra").mkdir()
    (tmp_path / "burnish-electra" / "mine").touch()
    monkeypatch.setattr("burnish.core.scaffold.plan_plugin", lambda *arguments: pytest.fail("it began"))
    code, _, err = cli("plugin", "new", "electra", "--like", "bert", "--folder", tmp_path)
    assert code == 2 and "is there already and not empty" in err


def test_check_prints_a_table(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def check(name: str, **settings: Any) -> list[tuple[str, ...]]:
        asked.append((name, settings))
        return list(ROWS)

    monkeypatch.setattr(report, "check_distribution", check)
    code, out, err = cli("plugins", "check", "bert", "--only", "equals stock", "--only", "padding side")
    assert (code, err) == (0, "")
    assert asked == [("bert", {"backend": "auto", "only": ["equals stock", "padding side"]})]
    title, headings, *rows = out.splitlines()
    assert title == "Conformance of bert" and headings.split() == ["what", "check", "result", "measured"]
    assert [tuple(part.strip() for part in row.split("  ") if part.strip()) for row in rows] == ROWS
    cli("plugins", "check", "bert", "--backend", "reference")
    assert asked[1] == ("bert", {"backend": "reference", "only": ()})


def test_a_check_that_fails_is_exit_code_5(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*ROWS, ("family bert", "LoRA reach", "failed", "pooler.dense gets an adapter and no gradient")]
    monkeypatch.setattr(report, "check_distribution", lambda name, **settings: rows)
    code, out, _ = cli("plugins", "check", "bert")
    assert code == 5 and "pooler.dense gets an adapter and no gradient" in out


DEAD = """
from transformers import BertConfig
from burnish.core.contracts import LoraTargets

def build(config):
    return Family(name="zeta", lora=LoraTargets(names=("query", "pooler.dense")))

def sample(size):
    return BertConfig(vocab_size=250, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)

@hookimpl
def burnish_register_families():
    return [FamilySpec(name="zeta", model_types=("bert",), build=build, sample=sample)]
"""


def test_check_examines_what_is_installed(cli: Cli, install: Install) -> None:
    code, out, _ = cli("plugins", "check", "bert", "--only", "LoRA reach")
    assert code == 0 and re.search(r"^family bert +LoRA reach +passed +12 layers", out, re.M)
    install("zeta-plugin", "model_type.bert", code=DEAD)
    code, out, _ = cli("plugins", "check", "zeta-plugin", "--only", "LoRA reach")
    assert code == 5 and re.search(r"^family zeta +LoRA reach +failed .*pooler.dense", out, re.M)


def test_bench_hands_on_what_it_is_given_and_prints_a_table(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def time(name: str, **settings: Any) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        asked.append((name, settings))
        return ("family", "ms a step"), [("bert", "12.5")]

    monkeypatch.setattr(bench, "bench_distribution", time)
    code, out, err = cli("plugins", "bench", "bert")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()[1:]] == [["family", "ms", "a", "step"], ["bert", "12.5"]]
    given = {"model": "m", "device": "cpu", "size": "tiny", "lora": 0, "batch": 2, "length": 16, "steps": 3}
    flags = [part for key, value in given.items() for part in (f"--{key}", value)]
    assert cli("plugin", "bench", "bert", *flags, "--no-packed")[0] == 0
    assert asked[1] == ("bert", {**given, "packed": False})
    defaults = {"model": None, "device": None, "size": "base", "lora": 16, "batch": 32, "length": 128, "steps": 10}
    assert asked[0] == ("bert", {**defaults, "packed": True})


@pytest.mark.parametrize("command", ["check", "bench"])
def test_an_unknown_plugin_is_told_before_anything_is_loaded(command: str) -> None:
    code = (
        f"import sys; from burnish.core.cli import run; code = run(['plugins', {command!r}, 'brt'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "5 False\n" and done.stderr.startswith("error: no plugin called 'brt' is installed. Did you")


def test_the_help_lists_every_command_of_the_group(cli: Cli) -> None:
    code, out, _ = cli("plugins", "--help")
    named = {command.name or getattr(command.callback, "__name__", "") for command in plugins.registered_commands}
    assert named == {"new", "check", "bench", "disable", "enable"}
    assert code == 0 and all(f" {name} " in out for name in named)
    assert cli("plugin", "--help")[1] == out


def test_the_short_name_is_hidden(cli: Cli) -> None:
    listed = re.findall(r"^│ +(\w+)  ", cli("--help")[1], re.M)
    assert "plugins" in listed and "plugin" not in listed
    assert cli("plugin")[1] == cli("plugins")[1] != ""
