"""Scripts of other runtimes are run where their packages are; what is missing is said in one line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from burnish.core import consumer_runs
from burnish.core.consumer_runs import Environment, run_script
from burnish.core.errors import ConfigError, ModelError
from burnish.core.runtimes import RUNTIMES

REQUEST = {"folder": "a folder", "deploy": {}, "inputs": ["é"]}
# Stands for node: notes what it was started with, and does what the test says.
NODE = """#!{python}
import json, os, sys
script, asked, answered = sys.argv[1:]
here = os.path.dirname(script)
packages = os.listdir(os.path.join(here, "node_modules"))
found = {{"files": sorted(os.listdir(here)), "asked": json.load(open(asked)), "packages": packages}}
{act}
"""
ANSWER = 'json.dump({"versions": {}, "outputs": [], "token_ids": None, "found": found}, open(answered, "w"))'
THROWN = """{0}

Error: {1}
    at file:///x.mjs:3:1
  code: 1

Node.js v20.20.2
"""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for node, in the only folder of the path; and a folder with packages, where we are."""
    place = tmp_path / "bin"
    place.mkdir()
    (tmp_path / "project" / "node_modules" / "left-pad").mkdir(parents=True)
    (tmp_path / "project" / "src").mkdir()
    monkeypatch.chdir(tmp_path / "project" / "src")
    monkeypatch.setenv("PATH", str(place))
    return place / "node"


def acts(node: Path, act: str) -> None:
    node.write_text(NODE.format(python=sys.executable, act=act))
    node.chmod(0o755)


def says(node: Path, said: str) -> None:
    acts(node, f"sys.stderr.write({said!r}); sys.exit(1)")


def test_a_script_of_javascript_lies_beside_its_packages(node: Path) -> None:
    acts(node, ANSWER)
    found = run_script("transformers-js", REQUEST, Environment())["found"]
    assert found["packages"] == ["left-pad"] and found["asked"] == REQUEST
    scripts = Path(consumer_runs.__file__).parent / "consumers"
    assert {"exchange.mjs", "with_transformers_js.mjs", "node_modules"} <= set(found["files"])
    assert {path.name for path in scripts.glob("*.mjs")} <= set(found["files"])


def test_the_packages_that_are_named(node: Path, tmp_path: Path) -> None:
    acts(node, ANSWER)
    (tmp_path / "elsewhere" / "right-pad").mkdir(parents=True)
    named = Environment(node_modules=tmp_path / "elsewhere")
    assert run_script("transformers-js", REQUEST, named)["found"]["packages"] == ["right-pad"]


def test_what_is_missing(node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"^--runtime transformers-js: there is no node\. Install Node\.js 18 or newer"
    ):
        run_script("transformers-js", REQUEST, Environment())
    lost = "Error [ERR_MODULE_NOT_FOUND]: Cannot find package '@huggingface/transformers' imported from /x.mjs"
    says(node, f"node:internal:1\n  throw new Error\n\n{lost}\n    at x\n\nNode.js v20.20.2\n")
    line = r"there is no package @huggingface/transformers\. npm install @huggingface/transformers there, or name"
    with pytest.raises(ConfigError, match=f"^--runtime transformers-js: {line}"):
        run_script("transformers-js", REQUEST, Environment())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"^--node-modules {tmp_path / 'empty'}: {line}"):
        run_script("transformers-js", REQUEST, Environment(node_modules=tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"^--node-modules gone: there is no such folder\. Name the folder"):
        run_script("transformers-js", REQUEST, Environment(node_modules=Path("gone")))
    shutil.rmtree(tmp_path / "project" / "node_modules")
    if not any((folder / "node_modules").is_dir() for folder in Path.cwd().parents):
        with pytest.raises(ConfigError, match=r"there is no node_modules here or above\. npm install @huggingface"):
            run_script("transformers-js", REQUEST, Environment())


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (THROWN.format("file:///x.mjs:3", "Could not locate file"), "Error: Could not locate file"),
        ("it looks for a.onnx, not for b\n", "it looks for a.onnx, not for b"),
        ("", "it said nothing"),
    ],
)
def test_what_a_script_says_at_its_end(said: str, line: str, node: Path) -> None:
    says(node, said)
    with pytest.raises(ModelError) as caught:
        run_script("transformers-js", REQUEST, Environment())
    fix = "Run it by hand to see the rest"
    assert str(caught.value) == f"a folder: transformers-js does not read it: {line}. {fix}"


def test_an_answer_that_was_not_written(node: Path) -> None:
    acts(node, "")
    with pytest.raises(ModelError, match="it said nothing"):
        run_script("transformers-js", REQUEST, Environment())


def test_a_runtime_that_does_not_end(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acts(node, "import time; time.sleep(20)")
    monkeypatch.setattr(consumer_runs, "_SECONDS", 0.2)
    with pytest.raises(ModelError, match=r"^a folder: transformers-js gave no answer in 0\.2 s"):
        run_script("transformers-js", REQUEST, Environment())


def test_a_python_that_lacks_the_runtime(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'fastembed'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(ConfigError, match=rf"^--python {python}: No module named 'fastembed'\. pip install fastembed "):
        run_script("fastembed", REQUEST, Environment(python=python))
    with pytest.raises(ConfigError, match=r"^--python: cannot be run \("):
        run_script("fastembed", REQUEST, Environment(python=tmp_path / "none"))


def test_a_python_of_its_own_gets_no_paths_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "ours")
    python, seen = tmp_path / "python", tmp_path / "seen"
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH" >{seen}\necho \'{json.dumps({"outputs": []})}\' >"$3"\n')
    python.chmod(0o755)
    assert run_script("fastembed", REQUEST, Environment(python=python)) == {"outputs": []}
    assert seen.read_text() == "\n" and os.environ["PYTHONPATH"] == "ours"


def test_a_place_that_none_of_the_runtimes_is_looked_for_in() -> None:
    environment = Environment(python=Path("p"), node_modules=Path("n"))
    environment.check(["onnxruntime", "transformers-js"])
    assert environment.of("onnxruntime") == Environment(python=Path("p"))
    assert environment.of("transformers-js") == Environment(node_modules=Path("n"))
    with pytest.raises(ConfigError, match=r"^--python p: transformers-js is not run by python\. Leave it out"):
        environment.check(["transformers-js"])
    with pytest.raises(ConfigError, match=r"^--node-modules n: onnxruntime, openvino is not run by node\. "):
        environment.check(["onnxruntime", "openvino"])


def test_every_runtime_has_its_script() -> None:
    for name, runtime in RUNTIMES.items():
        assert runtime.path.is_file(), name
        assert runtime.program == ("node" if runtime.script.endswith(".mjs") else "python")
