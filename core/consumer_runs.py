"""Runs a script of `consumers` in a process of its own, by the Python or by node, and reads what it answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, ModelError
from .runtimes import RUNTIMES, Runtime

if TYPE_CHECKING:
    from collections.abc import Sequence

_SECONDS = 1800
# Node prints the line of the source first and its version last; what went wrong stands between.
_NODE_ERROR = re.compile(r"^(?:Uncaught )?\w*Error\b")
_NODE_MISSING = re.compile(r"Cannot find (?:package|module) '([^']+)'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where runtimes are installed.

    Args:
        python: The Python of those in Python; None for this one.
        node_modules: The folder `node_modules` of those in JavaScript; None for the one that npm would use here.
    """

    python: Path | None = None
    node_modules: Path | None = None

    def check(self, names: Sequence[str]) -> None:
        """Refuse a place that none of the named runtimes is looked for in.

        Raises:
            ConfigError: With the flag that is of no use.
        """
        programs = {RUNTIMES[name].program for name in names}
        flags = (("--python", self.python, "python"), ("--node-modules", self.node_modules, "node"))
        for flag, value, program in flags:
            if value is not None and program not in programs:
                what = f"{', '.join(names)} is not run by {program}"
                raise ConfigError(what, where=f"{flag} {value}", fix="Leave it out, or name another --runtime")

    def of(self, name: str) -> Environment:
        """What of it concerns one runtime."""
        node = RUNTIMES[name].program == "node"
        return Environment(python=None if node else self.python, node_modules=self.node_modules if node else None)


def run_script(name: str, request: dict[str, Any], environment: Environment) -> dict[str, Any]:
    """What a runtime answers to a request: see `consumers`.

    Raises:
        ConfigError: If the runtime is not installed there.
        ModelError: If it does not read the folder.
    """
    runtime = RUNTIMES[name]
    with tempfile.TemporaryDirectory(prefix="burnish-verify-") as folder:
        place = Path(folder)
        asked, answered = place / "request.json", place / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        node = runtime.program == "node"
        start = _node(name, runtime, environment, place) if node else _python(runtime, environment)
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        own = node or environment.python is None
        kept = {key: value for key, value in os.environ.items() if own or not key.startswith("PYTHON")}
        try:
            done = subprocess.run(
                [*start, str(asked), str(answered)], cwd=place, env=kept | quiet, capture_output=True, text=True,
                timeout=_SECONDS, check=False,
            )  # fmt: skip
        except OSError as error:
            where, fix = ("node", "Install it again") if node else ("--python", "Name a Python")
            raise ConfigError(f"cannot be run ({error.strerror})", where=where, fix=fix) from error
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"{name} gave no answer in {_SECONDS} s", where=request["folder"]) from error
        if done.returncode == 0 and answered.exists():
            found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
            return found
    raise _failure(name, request["folder"], done.stderr, environment)


def _python(runtime: Runtime, environment: Environment) -> list[str]:
    return [str(environment.python or sys.executable), str(runtime.path)]


def _node(name: str, runtime: Runtime, environment: Environment, place: Path) -> list[str]:
    """The command; node looks for packages beside the script, so scripts and packages are brought together."""
    node = shutil.which("node")
    if node is None:
        fix = "Install Node.js 18 or newer, with npm, so that `node` is on the path"
        raise ConfigError("there is no node", where=f"--runtime {name}", fix=fix)
    (place / "node_modules").symlink_to(_node_modules(name, runtime, environment), target_is_directory=True)
    for script in runtime.path.parent.glob("*.mjs"):
        shutil.copy(script, place)
    return [node, str(place / runtime.script)]


def _node_modules(name: str, runtime: Runtime, environment: Environment) -> Path:
    asked = environment.node_modules
    if asked is not None:
        if not asked.is_dir():
            fix = "Name the folder node_modules that npm filled"
            raise ConfigError("there is no such folder", where=f"--node-modules {asked}", fix=fix)
        return asked.absolute()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "node_modules").is_dir():
            return folder / "node_modules"
    fix = f"npm install {runtime.install}, or name the folder that has it with --node-modules"
    raise ConfigError("there is no node_modules here or above", where=f"--runtime {name}", fix=fix)


def _failure(name: str, folder: str, said: str, environment: Environment) -> ConfigError | ModelError:
    runtime = RUNTIMES[name]
    lines = [line for line in said.strip().splitlines() if line.strip()] or ["it said nothing"]
    line = lines[-1]
    if runtime.program == "node":
        line = next((one for one in lines if _NODE_ERROR.match(one)), line)
        if missing := _NODE_MISSING.search(line):
            place = environment.node_modules
            where = f"--runtime {name}" if place is None else f"--node-modules {place}"
            fix = f"npm install {runtime.install} there, or name the folder that has it with --node-modules"
            return ConfigError(f"there is no package {missing[1]}", where=where, fix=fix)
    elif line.startswith("ModuleNotFoundError"):
        where = f"--runtime {name}" if environment.python is None else f"--python {environment.python}"
        fix = f"pip install {runtime.install} there, or name a Python that has it with --python"
        return ConfigError(line.partition(": ")[2], where=where, fix=fix)
    return ModelError(f"{name} does not read it: {line[:300]}", where=folder, fix="Run it by hand to see the rest")
