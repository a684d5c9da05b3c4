"""What README and docs say of the code is what the code says: generated tables, exit codes, targets, links."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

from burnish.core import contracts, errors

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ROOT_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The script that fills in the generated parts."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(path: Path) -> str:
    """A file's text."""
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_what_the_code_says(page: Path, generate: ModuleType) -> None:
    assert text(page) == generate.fresh(text(page)), "run: python docs/generate.py"


def test_every_part_stands_on_a_page_and_drift_is_seen(generate: ModuleType) -> None:
    together = "".join(text(page) for page in PAGES)
    for name in generate.PARTS:
        assert together.count(f"<!-- generated: {name} -->") == 1
    page = text(DOCS / "training.md")
    drifted = page.replace("| `32` | Pairs in a batch", "| `64` | Pairs in a batch")
    assert drifted != page and generate.fresh(drifted) == page


def test_a_part_that_nothing_generates_is_an_error(generate: ModuleType) -> None:
    with pytest.raises(KeyError, match="nonsense"):
        generate.fresh("<!-- generated: nonsense -->\n<!-- end: nonsense -->")


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        ("| `normalize` | `bool` | `False` |", "| `normalize` | `bool` | `True` |"),  # a default
        ("What the user passes as `backend=`.", "Whatever."),  # a field's meaning
        ("burnish_model_saved(model: torch.nn.Module, folder: Path)", "burnish_model_saved(model)"),  # an argument
        ("* **Claim** `exporter.TARGET` for each target.\n", ""),
        ("    window: int | None = None,\n", ""),  # of an operation
        ("| `PatchRule` |", "| `PatchingRule` |"),
        ("| causal order |", "| order |"),  # a check
    ],
)
def test_the_contract_and_its_page_do_not_drift_apart(said: str, instead: str, generate: ModuleType) -> None:
    page = text(DOCS / "contract.md")
    drifted = page.replace(said, instead)
    assert drifted != page and generate.fresh(drifted) == page


def test_every_part_of_the_contract_is_described(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    about = contracts.Packing.__doc__ or ""
    monkeypatch.setattr(contracts.Packing, "__doc__", about.replace("causal: ", "causality: "))
    with pytest.raises(SystemExit, match=r"Packing and its docstring differ in \['causal', 'causality'\]"):
        generate.values()
    monkeypatch.undo()
    rows = re.findall(r"^\| `.*\|$", generate.types(), re.M)
    assert len(rows) > 5 and not [row for row in rows if row.endswith("|  |")]


def test_the_compatibility_page_speaks_of_this_contract() -> None:
    page = text(DOCS / "compatibility.md")
    assert f"this Burnish speaks {contracts.CONTRACT}: install versions that match" in page
    assert contracts.CONTRACT == 1 and "**Today contract 1 is the only one**" in page


def api_names() -> list[tuple[str, list[str]]]:
    """(what the API and the contract's page document, the members they pick)."""
    pages = "".join(text(DOCS / name) for name in ("api.md", "contract.md"))
    parts = re.findall(r"^::: ([\w.]+)(?:\n    options:\n(?:      .*\n)*?      members: \[(.*)\])?", pages, re.M)
    return [(name, [member.strip() for member in members.split(",") if member.strip()]) for name, members in parts]


def test_the_api_page_names_what_there_is() -> None:
    # mkdocstrings leaves out a member that is gone without a word.
    named = api_names()
    assert len(named) > 10 and sum(len(members) for _, members in named) > 8
    for name, members in named:
        owner = pkgutil.resolve_name(name)
        assert [member for member in members if not hasattr(owner, member)] == [], name


def test_exit_codes() -> None:
    told = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", text(DOCS / "cli.md"), re.M)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BurnishError)]
    raised = {kind.exit_code for kind in kinds}
    assert raised | {0, 130} == set(told)
    for kind, word in ((errors.DataError, "data"), (errors.ModelError, "model"), (errors.PluginError, "plugin")):
        assert word in told[kind.exit_code]


def test_readme_opens_with_the_two_commands() -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text(ROOT / "README.md"), re.M | re.S)
    assert [line.split("#")[0].strip() for line in blocks[0][1].splitlines()] == ["$ make quickstart", "$ make test"]
    kind, code = blocks[1]
    assert kind == "python" and len([line for line in code.splitlines() if line]) <= 10


def test_readme_shows_the_plugin_that_the_tests_install() -> None:
    plugin = ROOT / "tests" / "plugins" / "burnish-electra"
    assert f"```python\n{text(plugin / 'burnish_electra.py')}```" in text(ROOT / "README.md")
    lines = sum(len(text(plugin / name).splitlines()) for name in ("burnish_electra.py", "pyproject.toml"))
    assert lines < 40


@pytest.mark.parametrize("page", [*ROOT_PAGES, *PAGES], ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.M))
    assert len(targets) > 5
    assert set(re.findall(r"(?:`|\$ )make ([a-z-]+)", text(page))) <= targets


def dead_links(page: Path) -> list[str]:
    """Links of a page to files that are not there. `mkdocs build --strict` checks those inside the site."""
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text(page))
    return [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", [*ROOT_PAGES, *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](page.md) [b](gone.md#there) [c](https://example.org/gone)")
    assert dead_links(page) == ["gone.md"]


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"^ +- (?:[^:\n]+: )(\S+\.md)$", text(ROOT / "mkdocs.yml"), re.M)
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_site_loads_nothing_from_elsewhere() -> None:
    assert "font: false" in text(ROOT / "mkdocs.yml")
    for page in [*PAGES, *DOCS.glob("*.css"), ROOT / "mkdocs.yml"]:
        assert not re.search(r"!\[[^]]*\]\(https?:|<script|<img|<iframe|@import|url\(https?:", text(page)), page
