from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from burnish.core.cli import app as program
from burnish.core.cli import run
from burnish.core.config import RunConfig, described
from burnish.core.errors import ModelError
from burnish.core.registry import forget

Install = Callable[..., str]
Cli = Callable[..., tuple[int, str, str]]
COMMANDS = ("quickstart", "train", "eval", "export", "verify", "push", "doctor", "plan", "plugins")
DATA = Path(program.__file__).parents[1] / "quickstart_data"


def one_line(answer: tuple[int, str, str]) -> str:
    """The error of a failed call: one line, and nothing on standard output."""
    _, out, err = answer
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
    return lines[0].removeprefix("error: ")


def test_the_list_of_commands_is_whole(cli: Cli) -> None:
    named = {
        command.name or command.callback.__name__ for command in program.app.registered_commands if command.callback
    }
    assert named | {"plugins"} == set(program.COMMANDS) == set(COMMANDS)


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_starts_with_what_to_do_first(cli: Cli, arguments: tuple[str, ...]) -> None:
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert "Start here: burnish quickstart" in out and "Exit codes: 0 done" in out
    assert all(re.search(rf"^│ {command} ", out, re.MULTILINE) for command in COMMANDS)
    assert "Commands of plugins" not in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: burnish {command}" in out
    blocks = re.split(r"^╭", out, flags=re.MULTILINE)[1:]
    rows = [row for block in blocks for row in re.findall(r"^│ +(--[a-z0-9-]+|[a-z]+) .*$", block, re.MULTILINE)]
    assert "--help" in rows and len(rows) > 1
    bare = re.findall(r"^│ +(?:\* +)?--[\w-]+(?: +--[\w-]+)? +<[^>]+> +│$", out, re.MULTILINE)
    assert bare == [], "an option without a help text"


def test_training_options_stand_in_panels(cli: Cli) -> None:
    out = cli("train", "--help")[1]
    panels = dict(re.findall(r"^╭─ (\w+) ─+╮\n(.*?)^╰", out, re.MULTILINE | re.DOTALL))
    assert list(panels) == ["Arguments", "Options", "Data", "Model", "Adapter", "Training", "Machine", "Results"]
    for name, (_, option) in described().items():
        assert re.search(rf"^│ --{name.replace('_', '-')} ", panels[option.panel], re.MULTILINE), name
    assert panels["Options"].count("--") == 1  # --help alone
    assert "--no-plugins" in panels["Machine"] and "--show-config" in panels["Results"]


def test_version(cli: Cli) -> None:
    from importlib.metadata import version

    assert cli("--version") == (0, f"burnish {version('burnish')}\n", "")


def shown(cli: Cli, *arguments: object) -> dict[str, Any]:
    code, out, err = cli("train", "--show-config", *arguments)
    assert (code, err) == (0, "")
    values: dict[str, Any] = yaml.safe_load(out)
    return values


def test_every_flag_reaches_the_config(cli: Cli) -> None:
    default = shown(cli, "--model", "m", "--train", "t")
    assert default == {name: getattr(RunConfig(model="m", train="t"), name) for name in default}
    for name, (hint, _) in described().items():
        flag, words = f"--{name.replace('_', '-')}", str(hint)
        if name in ("model", "train"):
            continue
        if "bool" in words:
            assert shown(cli, "--model", "m", "--train", "t", flag)[name] is True
            no = shown(cli, "--model", "m", "--train", "t", flag.replace("--", "--no-", 1))
            assert no[name] is False or name == "plugins"
            continue
        known = {"on_bad_row": "skip", "method": "full", "dtype": "bfloat16", "columns": "role=column"}
        known |= {"embedding_storage": "4bit", "checkpointing": "offload"}
        given = known.get(name, "0.5" if name in ("lora_dropout", "warmup") else "7")
        expected: Any = {"columns": {"role": "column"}, "plugins": ["7"]}.get(name)
        if expected is None:
            expected = int(given) if "<class 'int'>" in words or "int |" in words else given
            expected = float(given) if "<class 'float'>" in words or "float |" in words else expected
        assert shown(cli, "--model", "m", "--train", "t", flag, given)[name] == expected, name


def test_flags_repeat_and_win_over_the_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ntrain: t\nrank: 4\npacked: true\ncolumns: {anchor: a}\nplugins: [x]\n")
    assert shown(cli, file)["rank"] == 4
    values = shown(cli, file, "--rank", "8", "--no-packed", "--columns", "anchor=q", "--columns", "positive=a=b")
    assert (values["rank"], values["packed"], values["plugins"]) == (8, False, ["x"])
    assert values["columns"] == {"anchor": "q", "positive": "a=b"}
    assert shown(cli, file, "--no-plugins")["plugins"] == []
    assert shown(cli, file, "--plugins", "y", "--plugins", "z")["plugins"] == ["y", "z"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "the command line: 'model' is missing."),
        (("train", "nowhere.yaml"), "nowhere.yaml: cannot be read (No such file or directory)."),
        (("train", "--bogus"), "No such option: --bogus"),
        (("train", "--rank", "x"), "Invalid value for '--rank':"),
        (("train", "--rank"), "Option '--rank' requires an argument. Try `burnish train --help`"),
        (("train", "--model", "m", "--train", "t", "--rank", "0"), "rank: 0 is out of range."),
        (("train", "--model", "m", "--train", "t", "--method", "x"), "method: 'x' is not one of lora, full."),
        (("train", "--columns", "anchor"), "--columns: 'anchor' is not ROLE=COLUMN."),
        (("train", "--columns", "anchor="), "--columns: 'anchor=' is not ROLE=COLUMN."),
        (("train", "--columns", "a=x", "--columns", "a=y"), "--columns: the role 'a' is given twice"),
        (("train", "--plugins", "a", "--no-plugins"), "--plugins, --no-plugins: both are given."),
        (("doctor",), "Missing argument"),
        (("doctor", "m", "--plugin", "a", "--no-plugins"), "--plugin, --no-plugins: both are given."),
        (("eval", "m", "--data", "d", "--batch-size", "0"), "Invalid value for '--batch-size':"),
        (("quickstart", "surplus"), "Got unexpected extra argument"),
        (("export", "nowhere", "--to", "x"), "nowhere: is not a folder."),
        (
            ("export", "nowhere", "--to", "x", "--target", "merge"),
            "--target: no enabled plugin exports to 'merge'. Did",
        ),
        (("plugins", "bogus"), "No such command 'bogus'."),
        (("quickstrat",), "there is no command 'quickstrat', nor a plugin's. Did you mean `burnish quickstart`?"),
        (("--bogus",), "No such option: --bogus"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    answer = cli(*arguments)
    assert answer[0] == 2
    assert one_line(answer).startswith(message)


def test_bad_data_is_one_line_and_exit_code_3(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"anchor": "a", "positive": "b"}\n{"anchor": "c", "positive": ""}\n')
    answer = cli("train", "--model", "m", "--train", file, "--runs", tmp_path / "runs")
    assert answer[0] == 3
    assert one_line(answer).startswith(f"{file}, row 2, column positive: cell is empty. Fill it in, or leave such rows")
    assert not (tmp_path / "runs").exists(), "a run that never began left a folder"
    missing = cli("eval", "m", "--data", tmp_path)
    assert missing[0] == 3 and "there are no judgements of split 'test'" in one_line(missing)
    unsplit = cli("train", "--model", "m", "--train", file, "--split", "dev", "--runs", tmp_path / "runs")
    assert unsplit[0] == 3 and "a file has no split 'dev'. Name that split's own file" in one_line(unsplit)


@pytest.mark.parametrize("arguments", [("doctor", "no-one/nothing"), ("eval", "no-one/nothing", "--data", str(DATA))])
def test_a_model_that_is_not_to_be_had_is_one_line_and_exit_code_4(cli: Cli, arguments: tuple[str, ...]) -> None:
    answer = cli(*arguments)
    assert answer[0] == 4
    assert one_line(answer).startswith("model no-one/nothing: no usable config.json (")


def test_training_a_model_that_is_not_to_be_had(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("train", "--model", "no-one/nothing", "--train", DATA, "--runs", tmp_path / "runs")
    first, *_, last = err.splitlines()
    assert (code, out) == (4, "")
    assert first.endswith("1,401 pairs of split train")
    assert last.startswith("error: model no-one/nothing: no usable config.json (")
    assert not (tmp_path / "runs").exists()


def test_what_a_bug_raises_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(**_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("burnish.core.quickstart.quickstart", boom)
    with pytest.raises(RuntimeError, match="a bug"):
        run(["quickstart"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "runs/x"), 1, "error: runs/x: No space left on device. Mend the cause"),
        (ModelError("too big", where="m", fix="Buy more"), 4, "error: m: too big. Buy more"),
    ],
)
def test_ends_that_are_no_bugs(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def end(**_: object) -> None:
        raise error

    monkeypatch.setattr("burnish.core.quickstart.quickstart", end)
    answer = cli("quickstart")
    assert answer[0] == code and answer[2].startswith(line) and answer[2].count("\n") == 1
    if code == 4:
        monkeypatch.setenv("BURNISH_DEBUG", "1")
        with pytest.raises(ModelError):
            run(["quickstart"])


def rows(out: str) -> dict[str, str]:
    """What `burnish plugins` prints, by plugin."""
    return {line.split()[0]: line for line in out.splitlines()[2:] if line.strip()}


def test_plugins_are_listed_without_being_imported(cli: Cli, install: Install) -> None:
    install("zeta-plugin", "model_type.zeta", "exporter.zip", code="raise RuntimeError('imported')")
    code, out, err = cli("plugins")
    assert (code, err) == (0, "")
    assert re.search(r"family for zeta; exporter zip +zeta-plugin +1\.0 +1 +on", rows(out)["zeta-plugin"])
    assert {"bert", "generic", "merged", "reference"} <= set(rows(out))
    assert "zeta_plugin" not in sys.modules


def test_a_broken_plugin_fails_the_check_alone(cli: Cli, install: Install) -> None:
    assert cli("plugins", "--check")[0] == 0
    install("zeta-plugin", "model_type.zeta", code="1 / 0")
    code, out, _ = cli("plugins", "--check")
    assert code == 5
    assert "broken: ZeroDivisionError: division by zero" in rows(out)["zeta-plugin"]
    assert rows(out)["bert"].split()[-1] == "healthy"


def test_a_plugin_for_another_contract_is_shown_as_refused(cli: Cli, install: Install) -> None:
    install("zeta-plugin", "model_type.zeta", contract="99")
    code, out, _ = cli("plugins")
    assert code == 5 and "refused: is written for contract 99" in rows(out)["zeta-plugin"]


def test_plugins_are_switched_off_and_on_for_good(cli: Cli, install: Install, own_config: Path) -> None:
    install("zeta-plugin", "model_type.zeta")
    code, out, err = cli("plugins", "disable", "zeta-plugin")
    assert (code, err) == (0, "") and out.startswith("zeta-plugin is disabled (")
    written = list(own_config.iterdir())
    assert len(written) == 1 and str(written[0]) in out
    assert json.loads(written[0].read_text()) == {"disabled": ["zeta-plugin"]}
    assert "off: disabled by" in rows(cli("plugins")[1])["zeta-plugin"]
    assert cli("plugins", "disable", "zeta-plugin")[1] == "zeta-plugin is disabled already\n"
    assert cli("plugins", "enable", "zeta-plugin")[1].startswith("zeta-plugin is enabled")
    assert rows(cli("plugins")[1])["zeta-plugin"].split()[-1] == "on"
    answer = cli("plugins", "disable", "zeta-plugn")
    assert answer[0] == 5 and "Did you mean 'zeta-plugin'?" in one_line(answer)


COMMAND = """
def greet(arguments):
    print("hello", *arguments)
    return 7 if "fail" in arguments else 1 // ("crash" not in arguments) - 1

@hookimpl
def burnish_register_commands():
    return [CommandSpec(name="greet", summary="say hello", run=greet)]
"""


def test_a_plugin_brings_a_command(cli: Cli, install: Install) -> None:
    module = install("greeter", "command.greet", code=COMMAND)
    assert "Commands of plugins: greet (greeter)" in " ".join(cli("--help")[1].split())
    assert module not in sys.modules, "help imported a plugin"
    assert cli("greet", "you", "--all") == (0, "hello you --all\n", "")
    assert cli("greet", "fail")[0] == 7


def test_a_plugins_command_that_fails_is_the_plugins_fault(cli: Cli, install: Install) -> None:
    install("greeter", "command.greet", code=COMMAND)
    code, _, err = cli("greet", "crash")
    assert code == 5
    assert err.startswith("error: plugin greeter (greeter 1.0): ZeroDivisionError") and err.count("\n") == 1


def test_commands_that_cannot_be_had_say_why(cli: Cli, install: Install) -> None:
    install("greeter", "command.greet", code=COMMAND)
    install("liar", "command.lie")
    answer = cli("lie")
    assert answer[0] == 5 and one_line(answer).startswith("plugin liar (liar 1.0): claims command.lie")
    cli("plugins", "disable", "greeter")
    answer = cli("greet")
    assert answer[0] == 5
    assert "offers the command 'greet', but it is off (disabled by" in one_line(answer)
    assert "greet (greeter)" not in cli("--help")[1]
    cli("plugins", "enable", "greeter")
    install("greeter-two", "command.greet", code=COMMAND)
    answer = cli("greet")
    assert answer[0] == 5 and "both offer the command 'greet'" in one_line(answer)


def test_a_command_that_cannot_be_imported(cli: Cli, install: Install) -> None:
    install("greeter", "command.greet", code="import nowhere_to_be_found")
    answer = cli("greet")
    assert answer[0] == 5 and "No module named 'nowhere_to_be_found'" in one_line(answer)


def test_help_opens_with_a_wrong_allow_list(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_PLUGINS", "nowhere")
    code, out, _ = cli("--help")
    assert code == 0 and "cannot be listed: " in out
    answer = cli("plugins")
    assert answer[0] == 5 and "no plugin called 'nowhere' is installed" in one_line(answer)


def test_a_plugin_that_is_left_out_is_one_line_too(install: Install, tmp_path: Path) -> None:
    """In the program's own process; the tests make errors of warnings."""
    install("packer", "exporter.zip", code="1 / 0")
    script = (
        "import sys\nfrom burnish.core.cli import main\n"
        f"main(['export', {str(tmp_path)!r}, '--to', 'x', '--target', 'merged', '--option', 'bad=1'])\n"
    )
    done = python(script, PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 2
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: plugin packer (packer 1.0) is left out: ZeroDivisionError")
    assert error.startswith("error: --option: bad=1 is not understood.")


EXPORTER = """
from pathlib import Path

def outside(request):
    return [Path("/elsewhere")]

def breaks(request):
    (request.output / "half").write_text("x")
    raise KeyError("lost")

def tells(request):
    file = request.output / "told"
    file.write_text(repr(dict(request.options)))
    return [file]

@hookimpl
def burnish_register_exporters():
    runs = {"outside": outside, "breaks": breaks, "tells": tells}
    return [ExporterSpec(target=name, summary="x", run=run) for name, run in runs.items()]
"""


def test_exporters_of_plugins(cli: Cli, install: Install, tmp_path: Path) -> None:
    install("packer", "exporter.outside", "exporter.breaks", "exporter.tells", code=EXPORTER)
    source, to = tmp_path / "source", tmp_path / "to"
    source.mkdir()
    for target in ("outside", "breaks"):
        forget()  # a plugin that failed once is left alone for the rest of the process
        answer = cli("export", source, "--to", to, "--target", target)
        assert answer[0] == 5 and one_line(answer).startswith("plugin packer (packer 1.0): "), answer
        assert not to.exists()
    forget()
    told = cli("export", source, "--to", to, "--target", "tells", "--option", "a=b=c", "--option", "d=e")
    assert told == (0, f"{to / 'told'}\n", "")
    assert (to / "told").read_text() == "{'a': 'b=c', 'd': 'e'}"
    assert one_line(cli("export", source, "--to", to, "--target", "tells", "--option", "a")).startswith("--option: 'a'")
    assert one_line(cli("export", source, "--to", source, "--target", "tells")).startswith(f"--to {source}: is also")


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **variables}, timeout=120
    )


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["plugins"]])
def test_help_and_plugins_import_nothing_heavy(arguments: list[str]) -> None:
    heavy = ["torch", "transformers", "sentence_transformers", "datasets", "peft", "matplotlib"]
    done = python(
        "import sys\nfrom burnish.core.cli import run\n"
        f"code = run({arguments!r})\n"
        f"print('loaded:', [name for name in {heavy!r} if name in sys.modules], code)\n"
    )
    assert done.stdout.endswith("loaded: [] 0\n"), done.stdout + done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich", "yaml"])
def test_without_the_extra_one_line_names_it(missing: str) -> None:
    done = python(f"import sys\nsys.modules[{missing!r}] = None\nfrom burnish.core.cli import main\nmain(['--help'])\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: the command line needs {missing}. Run: pip install 'burnish[cli]'\n"


def test_the_program_itself_answers() -> None:
    script = Path(sys.executable).with_name("burnish")
    done = subprocess.run([script, "doctor"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: Missing argument")
