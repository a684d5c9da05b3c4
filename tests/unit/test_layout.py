"""The checkout is the package: what that needs to stay true. Every rule is also seen to fail where it is broken."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "backends", "families", "kernels")
LONGEST = 400
HEAVY = ("torch", "transformers", "sentence_transformers", "datasets", "peft")

# How an architecture is named: in configs, in checkpoints' keys, and as transformers' classes (BertModel, …).
MODEL_TYPES = {
    "albert",
    "bert",
    "camembert",
    "deberta_v2",
    "distilbert",
    "electra",
    "gemma3_text",
    "gemma3",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "qwen2",
    "qwen3",
    "roberta",
    "t5",
    "xlm_roberta",
}
MODEL_CLASS = re.compile(
    r"\b(Albert|Bert|Camembert|DebertaV2|DistilBert|Electra|Gemma3(Text)?|ModernBert|MPNet|NomicBert|Qwen[23]|Roberta|"
    r"T5|XLMRoberta)(Model|For[A-Z]\w*|PreTrained\w*|Config|Layer|Encoder|Embeddings|Pooler|\w*Attention)\b"
)


def settings(root: Path) -> dict[str, Any]:
    """pyproject.toml as a table."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def sources(root: Path, *folders: str) -> list[Path]:
    """The Python files of these folders."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def data_files(root: Path) -> list[Path]:
    """What lies in the package beside Python: it reaches no user unless `package-data` names it."""
    found = [root / "py.typed", *(path for folder in FOLDERS for path in (root / folder).rglob("*"))]
    return sorted(
        path
        for path in found
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts and path.name[0] != "."
    )


def unlisted_packages(root: Path) -> list[str]:
    """A folder left out of `packages` would be missing from the wheel; one listed but gone would break the build."""
    listed = set(settings(root)["tool"]["setuptools"]["packages"])
    inits = [init.parent.relative_to(root) for folder in FOLDERS for init in (root / folder).rglob("__init__.py")]
    return sorted(listed ^ {"burnish", *(".".join(("burnish", *path.parts)) for path in inits)})


def folders_without_init(root: Path) -> list[str]:
    """A folder with Python but no `__init__.py` is no package to setuptools, though an editable install imports it."""
    return [str(path) for path in sources(root, *FOLDERS) if not (path.parent / "__init__.py").exists()]


def absolute_imports(root: Path) -> list[str]:
    """`burnish.…` inside the package would give every class a second identity under type checkers."""
    files = [root / "__init__.py", *sources(root, *FOLDERS)]
    pattern = re.compile(r"^\s*(from|import) burnish\b", re.MULTILINE)
    return [str(path) for path in files if pattern.search(path.read_text(encoding="utf-8"))]


def stray_modules(root: Path) -> list[str]:
    """Every Python file at the root ships, as burnish.<name>; a conftest or test package there would be one too."""
    extra = [root / "tests" / "__init__.py"] if (root / "tests" / "__init__.py").exists() else []
    return [str(path) for path in [*root.glob("*.py"), *extra] if path != root / "__init__.py"]


def long_files(root: Path) -> list[str]:
    """A file that does not fit one reading should be two."""
    files = [root / "__init__.py", *sources(root, *FOLDERS)]
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    return [f"{path}: {count} lines" for path, count in lines.items() if count > LONGEST]


def docstrings(tree: ast.AST) -> Iterator[int]:
    """The ids of the nodes that are docstrings, or strings that stand alone as comments do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield id(node.value)


def names_in(source: str) -> set[str]:
    """The architectures that code names: in a string, an import, a name or an attribute; docstrings may name any."""
    tree = ast.parse(source)
    prose = set(docstrings(tree))
    found: set[str] = set()
    for node in ast.walk(tree):
        words: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words = [node.value]
            # An identifier, not a sentence: "bert.encoder.layer", "xlm-roberta", "burnish.families.bert".
            if not re.search(r"\s", node.value):
                parts = {part.lower().replace("-", "_") for part in re.split(r"[./:,*|]", node.value)}
                found |= parts & MODEL_TYPES
        elif isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.alias):
            words = [*node.name.split("."), node.asname or ""]
            found |= set(words) & MODEL_TYPES
        elif isinstance(node, ast.ImportFrom):
            found |= set((node.module or "").split(".")) & MODEL_TYPES
        found |= {match.group() for word in words for match in MODEL_CLASS.finditer(word)}
    return found


def named_architectures(root: Path) -> list[str]:
    """Everything that knows an architecture is a family; the core and the backends know none."""
    named = {path: names_in(path.read_text(encoding="utf-8")) for path in sources(root, "core", "backends")}
    return [f"{path}: {', '.join(sorted(names))}" for path, names in named.items() if names]


def bad_links(root: Path) -> list[str]:
    """Type checkers read the package through .dev/burnish; a link that is gone or leads elsewhere hides a folder."""
    folder = root / ".dev" / "burnish"
    wanted = {name: root / name for name in ("__init__.py", "py.typed", *FOLDERS)}
    links = {path.name: path for path in folder.iterdir()}
    wrong = [name for name, link in links.items() if not link.is_symlink() or link.resolve() != wanted.get(name)]
    relative = [name for name, link in links.items() if link.is_symlink() and link.readlink().is_absolute()]
    return sorted({*wrong, *relative, *(wanted.keys() - links.keys())})


def module_file(root: Path, module: str) -> Path | None:
    """Where a module of ours lies, or None."""
    path = root.joinpath(*module.split(".")[1:])
    candidates = [path / "__init__.py"] if path.is_dir() else [path.with_suffix(".py")]
    return next((file for file in candidates if module.split(".")[0] == "burnish" and file.is_file()), None)


def dead_entry_points(root: Path) -> list[str]:
    """A plugin or command that names no file of ours, or a function that the file does not hold."""
    project = settings(root)["project"]
    groups: dict[str, dict[str, str]] = {"scripts": project["scripts"], **project["entry-points"]}
    dead = []
    for group, entries in groups.items():
        for name, value in entries.items():
            module, _, attribute = value.partition(":")
            file = module_file(root, module)
            if file is None:
                dead.append(f"{group}.{name} = {value}: no such module")
            elif attribute and attribute not in top_level_names(file):
                dead.append(f"{group}.{name} = {value}: {file.name} has no {attribute}")
    return dead


def top_level_names(file: Path) -> set[str]:
    """What a module defines or imports, read without running it."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def unshipped_data(root: Path) -> list[str]:
    """Package-data patterns that match nothing, and files in the package that no pattern matches."""
    patterns = settings(root)["tool"]["setuptools"]["package-data"]
    shipped: set[Path] = set()
    idle = []
    for package, globs in patterns.items():
        folder = root.joinpath(*package.split(".")[1:])
        for glob in globs:
            matches = {path for path in folder.glob(glob) if path.is_file()}
            shipped |= matches
            idle += [] if matches else [f"{package}: {glob} matches nothing"]
    return [*idle, *(f"{path} is in no pattern" for path in data_files(root) if path not in shipped)]


def torch_pins(root: Path) -> list[str]:
    """One torch for all three sets, and neither triton nor CUDA's packages, which torch itself must choose."""
    pins: dict[str, list[str]] = {}
    faults = []
    for file in sorted(root.glob("constraints*.txt")):
        lines = [line.split("==")[0] for line in file.read_text(encoding="utf-8").splitlines() if "==" in line]
        faults += [f"{file}: {name}" for name in lines if re.match(r"triton|nvidia|cuda", name)]
        pins[file.name] = re.findall(r"^torch==(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    if len(pins) != 3 or len({tuple(found) for found in pins.values()}) != 1:
        faults.append(f"torch is pinned as {pins}")
    return faults


RULES: tuple[Callable[[Path], list[str]], ...] = (
    unlisted_packages,
    folders_without_init,
    absolute_imports,
    stray_modules,
    long_files,
    named_architectures,
    bad_links,
    dead_entry_points,
    unshipped_data,
    torch_pins,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small house in which every rule holds."""
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(f'"""{folder}: knows nothing of a BertModel."""\n')
    (tmp_path / "__init__.py").write_text("from .core import cli\n")
    (tmp_path / "py.typed").touch()
    (tmp_path / "core" / "cli.py").write_text("def main() -> None: ...\n")
    (tmp_path / "core" / "page.html").write_text("<p>\n")
    (tmp_path / "families" / "bert.py").write_text('model_types = ("bert",)\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text(
        """
        [project]
        scripts.burnish = "burnish.core.cli:main"
        entry-points."burnish" = { bert = "burnish.families.bert" }
        [tool.setuptools]
        packages = ["burnish", "burnish.core", "burnish.backends", "burnish.families", "burnish.kernels"]
        package-data = { "burnish" = ["py.typed"], "burnish.core" = ["*.html"] }
        """
    )
    for kind in ("", "-floor", "-newest"):
        (tmp_path / f"constraints{kind}.txt").write_text("torch==2.13.0\nnumpy==2.4.6\n")
    links = tmp_path / ".dev" / "burnish"
    links.mkdir(parents=True)
    for name in ("__init__.py", "py.typed", *FOLDERS):
        (links / name).symlink_to(Path("..", "..", name))
    return tmp_path


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_small_house_keeps(rule: Callable[[Path], list[str]], house: Path) -> None:
    assert rule(house) == []


@pytest.mark.parametrize(
    ("rule", "file", "text"),
    [
        (unlisted_packages, "core/new/__init__.py", ""),
        (folders_without_init, "core/new/part.py", ""),
        (absolute_imports, "core/cli.py", "def f():\n    from burnish.core import errors\n"),
        (stray_modules, "conftest.py", ""),
        (stray_modules, "tests/__init__.py", ""),
        (long_files, "kernels/long.py", "x = 1\n" * (LONGEST + 1)),
        (named_architectures, "core/cli.py", 'if config.model_type == "xlm-roberta": ...\n'),
        (named_architectures, "core/cli.py", 'head = state["bert.pooler.weight"]\n'),
        (named_architectures, "core/cli.py", "from transformers.models.mpnet import modeling\n"),
        (named_architectures, "backends/fast.py", "from transformers import BertModel as Trunk\n"),
        (named_architectures, "backends/fast.py", "layer = transformers.Qwen3ForCausalLM\n"),
        (named_architectures, "backends/fast.py", 'raise ValueError("only a DistilBertModel will do")\n'),
        (dead_entry_points, "core/cli.py", "def other() -> None: ...\n"),
        (unshipped_data, "core/data/rows.csv", "1\n"),
        (torch_pins, "constraints.txt", "torch==2.12.0\n"),
        (torch_pins, "constraints.txt", "torch==2.13.0\ntriton==3.7.1\n"),
    ],
)
def test_a_broken_house_is_seen(rule: Callable[[Path], list[str]], file: str, text: str, house: Path) -> None:
    (house / file).parent.mkdir(exist_ok=True)
    (house / file).write_text(text)
    assert len(rule(house)) == 1


@pytest.mark.parametrize(
    ("rule", "gone"),
    [
        (bad_links, ".dev/burnish/kernels"),
        (dead_entry_points, "families/bert.py"),
        (unshipped_data, "core/page.html"),
        (torch_pins, "constraints-floor.txt"),
    ],
)
def test_what_is_gone_is_missed(rule: Callable[[Path], list[str]], gone: str, house: Path) -> None:
    (house / gone).unlink()
    assert len(rule(house)) == 1


def test_a_link_that_leads_elsewhere_is_seen(house: Path) -> None:
    link = house / ".dev" / "burnish" / "core"
    link.unlink()
    link.symlink_to(Path("..", "..", "families"))
    assert bad_links(house) == ["core"]
    link.unlink()
    link.symlink_to(house / "core")
    assert bad_links(house) == ["core"]


def heavy_modules(code: str, folder: Path, path: str = "") -> list[str]:
    """The heavy modules in `sys.modules` after `code` has run in a fresh interpreter."""
    code = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    loaded: list[str] = json.loads(done.stdout)
    return loaded


def test_importing_burnish_loads_nothing_heavy(tmp_path: Path) -> None:
    assert heavy_modules("import burnish\ndir(burnish)", tmp_path) == []


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "torch.py").touch()
    assert heavy_modules("import burnish\nimport torch", tmp_path, str(tmp_path)) == ["torch"]
