"""Saved folders of every family, and the environments in which others read them: see .ci/environments.py.

What the tests find out is noted: see noting.py.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import FastSentenceTransformer
from burnish.core import consumers, deploy, verifying
from burnish.core.testing.subject import quietly
from burnish.core.verifying import Verdict

from .noting import PROPERTY, lines, noting, write_logs
from .quick import mark
from .random_models import SPECIAL, random_model

ROOT = Path(__file__).parents[2]
FAMILIES = ("bert", "distilbert", "gemma", "modernbert", "mpnet", "qwen3", "xlm_roberta")
# Other than the defaults, so that a reader that misses a key computes another model.
UNUSUAL: Mapping[str, Mapping[str, Any]] = {
    "gemma": {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
    }},
    "modernbert": {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 900.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
    }},
    "qwen3": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0}},
}  # fmt: skip
PROMPTS = {"query": "find this: ", "document": ""}
_MANY = """
import json, sys, traceback
sys.path.insert(0, sys.argv[1])
consumer, pairs = __import__(sys.argv[2]), json.loads(sys.argv[3])
for asked, answered in pairs:
    sys.argv = ["", asked, answered]
    try:
        consumer.main()
    except BaseException as error:
        json.dump({"failed": f"{type(error).__name__}: {error}"}, open(answered, "w"))
"""
# Where read_all runs a consumer in the Python that runs the tests, in place of an environment.
HERE = "here"
_rows: list[dict[str, Any]] = []
_ran: set[str] = set()


def loaded(script: Path) -> Any:
    """A script of this repository as a module."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(name: str, minilm: Path, folder: Path) -> Path:
    """A bare transformers folder of one family: random weights, and MiniLM's tokenizer cut at 64 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(minilm), model_max_length=64)
    config = import_module(f"burnish.families.{name}").sample("tiny")
    return random_model(folder, config, tokenizer, {**SPECIAL, **UNUSUAL.get(name, {})})


def adapted(base: Path) -> Any:
    """A model with an adapter that acts."""
    with quietly():
        model = FastSentenceTransformer.from_pretrained(str(base), device="cpu", prompts=PROMPTS)
        model = FastSentenceTransformer.get_peft_model(model, r=4)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="session")
def saved(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "FAMILY full", "FAMILY adapter" and "FAMILY merged" folders of every family, and of the real MiniLM."""
    found: dict[str, Path] = {}
    for name in (*FAMILIES, "minilm"):
        # No folder is called after an architecture: some readers guess by that.
        place = tmp_path_factory.mktemp("saved") / "model"
        base = tiny(name, minilm, place / "base") if name != "minilm" else minilm
        with quietly():
            model = FastSentenceTransformer.from_pretrained(
                str(base), full_finetuning=True, device="cpu", prompts=PROMPTS
            )
        model.save_pretrained(str(place / "full"))
        other = adapted(place / "full")
        other.save_pretrained(str(place / "adapter"))
        other.save_pretrained_merged(place / "merged")
        found |= {f"{name} {kind}": place / kind for kind in ("full", "adapter", "merged")}
    return found


@pytest.fixture(scope="session")
def python() -> Callable[[str], Path]:
    """The Python of an environment, made if need be."""
    module = loaded(ROOT / ".ci" / "environments.py")
    return lambda name: Path(sys.executable if name == HERE else module.make(ROOT / ".venv-exports", name))


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes a row of the table of consumers and families: `note(consumer, family, verdict)`; see noting.py."""
    return noting(request.node.user_properties)


@pytest.fixture(scope="session")
def read_all(
    python: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Verdict | str]]:
    """What one runtime of one environment makes of many folders, in one process: a verdict each, or why it failed."""

    def run(environment: str, runtime: str, folders: Mapping[str, Path]) -> dict[str, Verdict | str]:
        place, pairs = tmp_path_factory.mktemp("answers"), []
        for number, folder in enumerate(folders.values()):
            described = deploy.read(folder)
            reference = json.loads((folder / described["golden"]).read_text(encoding="utf-8"))
            request = {"folder": str(folder), "deploy": described, "variant": None, **reference}
            asked, answered = place / f"{number}.request", place / f"{number}.answer"
            asked.write_text(json.dumps(request))
            pairs.append((str(asked), str(answered)))
        scripts = str(Path(consumers.__file__).parent)
        script = f"with_{runtime.replace('-', '_')}"
        command = [str(python(environment)), "-c", _MANY, scripts, script, json.dumps(pairs)]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, Verdict | str] = {}
        for (name, folder), (asked_at, answered_at) in zip(folders.items(), pairs, strict=True):
            answer, reference = json.loads(Path(answered_at).read_text()), json.loads(Path(asked_at).read_text())
            if "failed" in answer:
                found[name] = answer["failed"]
            else:
                faults = deploy.changed(folder, reference["deploy"])
                found[name] = verifying._compare(runtime, reference, answer, verifying.COSINE, faults)
        return found

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    """An option for the dated log."""
    parser.addoption("--write-log", action="store_true", help="write the rows to benchmarks/results")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what CI runs."""
    mark(items, config)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Rows come with the report of the test that noted them, whichever process ran it."""
    test = report.nodeid.rpartition("/")[2]
    _ran.add(test)
    if report.when == "call":
        told = {"test": test, "passed": report.passed, "long": "long" in report.keywords}
        for name, row in report.user_properties:
            if name == PROPERTY:
                assert isinstance(row, dict)
                _rows.append({**row, **told})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was read by what, folder by folder, and the table of consumers and families."""
    if not _rows:
        return
    table = loaded(ROOT / "benchmarks" / "exports.py")
    terminalreporter.section("exports")
    written = write_logs(_rows, _ran, ROOT / "benchmarks" / "results") if config.getoption("--write-log", False) else []
    known = [{**row, "date": date.today().isoformat()} for row in _rows]
    ran = {row["long"] for row in _rows}
    others = [path for path in table.newest() if ("long" in path.name) not in ran]
    known += [row for path in others for row in table.rows(path)]
    notes = [*(f"with what {path.name} has" for path in others), *(f"written: {path}" for path in written)]
    for line in [*lines(_rows), "", *table.plain(table.summary(known)), *notes]:
        terminalreporter.write_line(line)
