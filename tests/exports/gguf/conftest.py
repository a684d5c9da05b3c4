"""GGUF files of the real MiniLM under an adapter, and of tiny models, and what reads them: see .ci/environments.py."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from burnish.core.verifying import Verdict, verify

from ..conftest import adapted, tiny
from .models import bare, reranker, saved

Python = Callable[[str], Path]
# What the converter calls the tokenizers of tests, which it has never seen.
LIKE = {"modernbert": "qwen2", "qwen3": "qwen2"}
RUN = "from burnish.core.cli import main; main()"
_KEYS = """
import json, sys
import gguf
fields = gguf.GGUFReader(sys.argv[1]).fields
json.dump({name: field.contents() for name, field in fields.items() if "token" not in name}, sys.stdout)
"""


def run(python: Path, script: str, *arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    # Not in the checkout, whose folders would stand before libraries of the same names.
    return subprocess.run(
        [str(python), "-c", script, *map(str, arguments)], cwd=more.pop("cwd", python.parent), capture_output=True,
        text=True, timeout=1200, check=False, **more,
    )  # fmt: skip


def export(python: Python, source: Path, folder: Path, *options: str, script: str = RUN) -> str:
    """The last line that the command says where it fails, an empty one where it does not."""
    given = [part for option in options for part in ("--option", option)]
    done = run(python("gguf"), script, "export", source, "--to", folder, "--target", "gguf", *given)
    assert done.returncode in (0, 2, 4), done.stderr[-2000:]
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def read_by(python: Python, runtime: str, folder: Path, variant: str | None = None) -> Verdict:
    """What a runtime of an environment of its own makes of a folder."""
    place = {"python": python("llama-cpp")} if runtime == "llama-cpp" else {"node_modules": python(runtime)}
    return verify(folder, runtime, variant=variant, **place)  # type: ignore[arg-type]


def keys(python: Python, file: Path) -> Mapping[str, Any]:
    """What a file says of itself."""
    done = run(python("gguf"), _KEYS, file)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="session")
def adapter(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MiniLM under an adapter that acts, saved as "adapter" and as "merged"."""
    place = tmp_path_factory.mktemp("minilm")
    model = adapted(minilm)
    model.save_pretrained(str(place / "adapter"))
    model.save_pretrained_merged(place / "merged")
    return place / "adapter"


@pytest.fixture(scope="session")
def served(adapter: Path, python: Python, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file of the merged one."""
    folder = tmp_path_factory.mktemp("served") / "served"
    dtypes = ",".join(["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "f32", "bf16"])
    said = export(
        python, adapter.with_name("merged"), folder, f"dtype={dtypes}", f"libllama={python('node-llama-cpp')}"
    )
    assert not said, said
    return folder


@pytest.fixture(scope="session")
def exported(python: Python, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The export of a tiny model of a family, or of a reranker, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            place = tmp_path_factory.mktemp("tiny")
            family = name.removesuffix(" ranker")
            if name.endswith(" ranker"):
                source = reranker(bare(family, place / "base"), place / "model")
            elif family in ("bert", "distilbert"):
                source = saved(tiny(family, minilm, place / "base"), place / "model")
            else:
                source = saved(bare(family, place / "base"), place / "model")
            like = [f"pre_tokenizer={LIKE[family]}"] if family in LIKE else []
            said = export(python, source, place / "served", "dtype=f16,f32", *like)
            assert not said, said
            made[name] = place / "served"
        return made[name]

    return make
