"""Real installs: distributions built and installed by pip, offline, each where nothing else sees it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Their own tests run where they are installed, in a process of their own.
collect_ignore_glob = ["burnish-*"]


@dataclass(frozen=True)
class Site:
    """A Python that sees this environment and, on top of it, what was installed for a test."""

    python: Path
    folder: Path

    def run(self, *arguments: str | Path, cwd: Path) -> str:
        """What this Python prints when it is run with these arguments, which must end well."""
        path = {} if self.python != Path(sys.executable) else {"PYTHONPATH": str(self.folder)}
        command = [str(self.python), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment() | path)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    def report(self, script: str, *arguments: str | Path) -> dict[str, Any]:
        """The JSON in the last line of what a script beside this file prints, run away from the checkout."""
        runs = self.folder.parent / f"runs-{script}"
        runs.mkdir(exist_ok=True)
        found: dict[str, Any] = json.loads(self.run(HERE / script, *arguments, cwd=runs).splitlines()[-1])
        return found

    def journey(self, model: Path, module: str, *more: str) -> dict[str, Any]:
        """What `journey.py` reports of `model` with a plugin's module watched."""
        return self.report("journey.py", model, module, *more)


def environment() -> dict[str, str]:
    """This process's, with pip kept from the network, from its user's settings and from talking."""
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }


def pip(*arguments: str | Path, python: str | Path = sys.executable) -> None:
    """Run pip; `--no-build-isolation` uses this environment's setuptools, as nothing can be fetched."""
    command = [sys.executable, "-m", "pip", "--python", str(python), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr


def copied(source: Path, folder: Path) -> Path:
    """A copy to build in: setuptools leaves files beside its sources."""
    return Path(shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__")))


def from_wheel(source: Path, folder: Path) -> Site:
    """A wheel, installed into a folder."""
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", source)
    (wheel,) = (folder / "dist").glob("*.whl")
    pip("install", "--no-deps", "--target", folder / "site", wheel)
    return Site(Path(sys.executable), folder / "site")


def from_sdist(source: Path, folder: Path) -> Site:
    """A source distribution, built again by pip and installed into a folder."""
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(folder / 'dist')!r})"
    (folder / "dist").mkdir()
    subprocess.run([sys.executable, "-c", make], cwd=source, check=True, capture_output=True)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    pip("install", "--no-deps", "--no-build-isolation", "--target", folder / "site", sdist)
    return Site(Path(sys.executable), folder / "site")


def layered(folder: Path) -> Site:
    """An environment of its own below `folder` that sees, beside its own, what is installed in this one."""
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    # addsitedir, unlike a plain line, also reads the .pth files of what is installed in this environment.
    lines = [f"import site; site.addsitedir({sysconfig.get_path(name)!r})" for name in ("purelib", "platlib")]
    (Path(purelib) / "layer.pth").write_text("\n".join(lines) + "\n")
    return Site(python, Path(purelib))


def editable(source: Path, folder: Path) -> Site:
    """`pip install -e` in an environment of its own that is layered on this one."""
    site = layered(folder)
    pip("install", "--no-deps", "--no-build-isolation", "--editable", source, python=site.python)
    return site


WAYS: dict[str, Callable[[Path, Path], Site]] = {"wheel": from_wheel, "sdist": from_sdist, "editable": editable}


@pytest.fixture(scope="session", params=WAYS)
def electra(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The example plugin, installed in each of the ways that there are."""
    folder = tmp_path_factory.mktemp(f"electra-{request.param}")
    return WAYS[request.param](copied(HERE / "burnish-electra", folder), folder)


def together(sources: Iterable[Path], folder: Path) -> Site:
    """Several sources, installed at once into a folder."""
    pip("install", "--no-deps", "--no-build-isolation", "--target", folder / "site", *sources)
    return Site(Path(sys.executable), folder / "site")


@pytest.fixture(scope="session")
def install_together() -> Callable[[Iterable[Path], Path], Site]:
    """`together`, for tests that make their own distributions."""
    return together


@pytest.fixture(scope="session")
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, dict[str, str]]:
    """An environment with Burnish that can be installed into, and a process's variables to work in it."""
    site = layered(tmp_path_factory.mktemp("own"))
    return site, environment()


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Every distribution in `hostile/`, installed at once."""
    folder = tmp_path_factory.mktemp("hostile")
    sources = [copied(source, folder) for source in sorted((HERE / "hostile").iterdir()) if source.is_dir()]
    return together(sources, folder)


@pytest.fixture(scope="session")
def nomic(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The full family distribution, installed from its wheel; its sources lie beside the site."""
    folder = tmp_path_factory.mktemp("nomic")
    return from_wheel(copied(HERE / "burnish-nomic", folder), folder)


@pytest.fixture(scope="session")
def tiny_nomic(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain transformers folder: NomicBERT with random weights (hidden 32, 2 layers) and MiniLM's real tokenizer."""
    import torch
    from transformers import AutoTokenizer, NomicBertConfig, NomicBertModel

    tokenizer = AutoTokenizer.from_pretrained(str(minilm))
    config = NomicBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-nomic") / "tiny-nomic"
    NomicBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_electra(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain transformers folder: ELECTRA with random weights (hidden 32, 2 layers) and MiniLM's real tokenizer."""
    import torch
    from transformers import AutoTokenizer, ElectraConfig, ElectraModel

    tokenizer = AutoTokenizer.from_pretrained(str(minilm))
    config = ElectraConfig(
        vocab_size=len(tokenizer),
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-electra") / "tiny-electra"
    ElectraModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def watchful(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The distribution with a backend and a kernel, installed from its wheel; its sources lie beside the site."""
    folder = tmp_path_factory.mktemp("watchful")
    return from_wheel(copied(HERE / "burnish-watchful", folder), folder)
