"""README and docs do what they say: their code runs, their commands parse, and their outputs are what comes out.

A page is run in a process and a folder of its own, from top to bottom:

* a block with a title is written to a file of that name, without its last line end;
* a ```python block is executed, in one namespace a page;
* in a ```console block, a `burnish` command with text below it is run and its output compared; one without is only
  parsed, and if it trains, its config is made.

A block under `<!-- not run: reason -->` is left alone. Hub ids are found in a cache that holds what the docs name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Pages whose commands find a plugin of somebody else's.
PLUGINS = {
    "docs/plugins.md": "burnish-electra",
    "docs/replace-a-kernel.md": "burnish-watchful",
    "docs/write-a-backend.md": "burnish-watchful",
}
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
# Run whole, by a shell and in an environment of its own, by tests/plugins/test_guide_walk.py.
WALKED = ["docs/write-a-family.md"]


def load_pages() -> Any:
    """What is shared with other tests of pages: `tests/pages.py`, which no import reaches."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "tests" / "pages.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load_pages()


def parse(command: Any, arguments: list[str]) -> None:
    """Parse a command line as the program would, without running it."""
    context = command.make_context(command.name, list(arguments))
    rest = [*getattr(context, "_protected_args", ()), *context.args]
    if rest and getattr(command, "commands", None):
        parse(command.commands[rest[0]], rest[1:])


def run_command(line: str, wanted: str) -> None:
    """Run a `burnish` command, or parse it where the page shows no output."""
    import typer.main

    from burnish.core.cli import run
    from burnish.core.cli.app import app

    for program, *arguments in (shlex.split(part) for part in line.split("&&")):
        if program != "burnish":
            continue
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            if wanted:
                run(arguments)
            else:
                parse(typer.main.get_command(app), arguments)
                code = run([*arguments, "--show-config"]) if arguments[0] == "train" else 0
        if not wanted:
            assert code == 0, heard.getvalue()
            continue
        got = heard.getvalue()
        assert pages.same(wanted, got), f"the page says\n{wanted}\nand this comes out\n{got}"


def run_page(page: str) -> int:
    """Run the blocks of a page in the current folder; returns how many there were to run."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    count = 0
    for block in pages.blocks(page):
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text.rstrip("\n"), encoding="utf-8")
        if block.skipped or block.kind not in ("python", "console"):
            continue
        count += 1
        try:
            if block.kind == "python":
                exec(compile(block.text, f"block at line {block.line}", "exec"), namespace)
            else:
                for line, output in pages.commands(block.text):
                    run_command(line, output)
        except BaseException as error:
            error.add_note(f"in the {block.kind} block that begins on line {block.line}")
            raise
    return count


@pytest.fixture(scope="session")
def hub_cache(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub cache that holds the models the docs name."""
    home: Path = pages.hub(tmp_path_factory.mktemp("hub"), minilm)
    return home


def plugin_site(name: str, site: Path) -> Path:
    """A distribution of `tests/plugins` as pip would leave it: its modules, and a folder of metadata beside them."""
    import tomllib

    source = ROOT / "tests" / "plugins" / name
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{name.replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    for module in source.glob("*.py"):
        (site / module.name).write_bytes(module.read_bytes())
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    return site


def environment(hub_cache: Path, **changed: str) -> dict[str, str]:
    """This process's environment with that cache and no GPU."""
    return {**os.environ, "HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **changed}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in WALKED])
def test_a_page_does_what_it_says(page: str, hub_cache: Path, tmp_path: Path) -> None:
    path = str(plugin_site(PLUGINS[page], tmp_path / "site")) if page in PLUGINS else ""
    path = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
    changed = {"PYTHONPATH": path, "BURNISH_CONFIG_DIR": str(tmp_path / "config")}
    done = subprocess.run(
        [sys.executable, __file__, str(ROOT / page)],
        cwd=tmp_path,
        env=environment(hub_cache, **changed),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ("```python\nassert 1 + 1 == 3\n```", AssertionError),
        ("```python\nx = 1\n```\n\n```python\nprint(y)\n```", NameError),
        ("```console\n$ burnish doctor --no-such-flag model\n```", Exception),
        ("```console\n$ burnish plugins enabel electra\n```", Exception),
        ('```yaml title="run.yaml"\nmodle: m\n```\n\n```console\n$ burnish train run.yaml\n```', AssertionError),
        ("```console\n$ burnish train --model m --train gone.csv\nerror: gone.csv: all is well\n```", AssertionError),
        ("```\nwhat is this?\n```", AssertionError),
        ("```python\n1\n", AssertionError),
    ],
)
def test_a_page_that_lies_is_seen(
    page: str, fault: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fault):
        run_page(page)


def test_a_page_that_is_right_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (
        '```csv title="a.csv"\nanchor,positive\nq,\n```\n\n'
        "```python\nfrom pathlib import Path\n\nx = Path('a.csv').read_text()\n```\n\n"
        "<!-- not run: it cannot -->\n```python\nraise SystemExit(x)\n```\n\n"
        "```python\nassert x.endswith('q,')\n```\n\n"
        "```console\n$ pip install burnish && burnish plugins --check  # lists them\n"
        "$ burnish train --model m \\\n    --train a.csv\nerror: a.csv, row 2, column positive: cell is empty. ...\n```"
    )
    assert run_page(page) == 3


def test_the_docs_hold_something_to_run() -> None:
    kinds = [block.kind for page in PAGES for block in pages.blocks((ROOT / page).read_text(encoding="utf-8"))]
    assert kinds.count("python") >= 10 and kinds.count("console") >= 15


def run_example(name: str, hub_cache: Path, folder: Path, *arguments: str) -> str:
    """Run a script of docs/examples; returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "examples" / name), *arguments],
        cwd=folder,
        env=environment(hub_cache),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def changed(base: Path, trained: Path) -> bool:
    """Whether plain Sentence Transformers loads `trained`, with other weights than `base`."""
    import torch
    from sentence_transformers import SentenceTransformer

    before, after = (SentenceTransformer(str(folder), device="cpu").state_dict() for folder in (base, trained))
    assert before.keys() == after.keys()
    return any(not torch.equal(before[key], after[key]) for key in before)


def test_the_lora_example(tiny_bert_st: Path, hub_cache: Path, tmp_path: Path) -> None:
    said = run_example(
        "finetune_lora.py", hub_cache, tmp_path, "--model", str(tiny_bert_st), "--steps", "2", "--queries", "4"
    )
    assert re.search(r"nDCG@10 on 4 held-out queries: 0\.\d{4} before, 0\.\d{4} after", said)
    assert changed(tiny_bert_st, tmp_path / "finetuned")
    assert not changed(tiny_bert_st, tiny_bert_st)


def test_the_reranking_example(tiny_bert_st: Path, hub_cache: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    few = ["--steps", "2", "--train-queries", "16", "--test-queries", "4"]
    said = run_example("rerank.py", hub_cache, tmp_path, "--model", str(tiny_bert_st), *few)
    assert re.search(r"trained on 80 pairs of 16 queries; saved to reranker\n", said)
    # BM25's own figures on these four queries, and three techniques with their scores.
    assert re.search(
        r"nDCG@10 0\.\d{3} \(0\.\d{3} to 0\.\d{3}, 4 queries; as they came 0\.750, at best 0\.750\)\n", said
    )
    assert len(re.findall(r"^0\.\d{3}  \w", said, flags=re.MULTILINE)) == 3
    assert CrossEncoder(str(tmp_path / "reranker"), device="cpu").predict([("a", "b")]).shape == (1,)


def test_the_classification_example(hub_cache: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    said = run_example("classify.py", hub_cache, tmp_path, "--steps", "6", "--texts", "96")
    assert re.search(r"temperature \d+\.\d{3} from 96 texts: expected calibration error 0\.\d{4} before", said)
    assert re.search(r"96 texts: accuracy 0\.\d{4} \(0\.\d{4} to 0\.\d{4}\), macro_f1 0\.\d{4}", said)
    classify: Any = pipeline("text-classification", model=str(tmp_path / "classifier"), top_k=None, device="cpu")
    (read,) = classify(["It spread."])
    assert len(read) == 14 and abs(sum(one["score"] for one in read) - 1) < 1e-5
    assert "Which tactic is it?" in (tmp_path / "classifier" / "report.html").read_text(encoding="utf-8")


def test_the_sentence_transformers_example(minilm: Path, hub_cache: Path, tmp_path: Path) -> None:
    said = run_example("from_sentence_transformers.py", hub_cache, tmp_path, "--steps", "2")
    assert "burnish" not in said and "held-out accuracy" in said
    assert changed(minilm, tmp_path / "from-sentence-transformers")


def test_the_sentence_transformers_example_changes_one_import() -> None:
    script = (ROOT / "docs" / "examples" / "from_sentence_transformers.py").read_text(encoding="utf-8")
    code = [line for line in script.splitlines() if not line.startswith(("#", "    python", '"""'))]
    assert [line for line in code if "burnish" in line] == [
        "from burnish import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments"
    ]


if __name__ == "__main__":
    run_page(Path(sys.argv[1]).read_text(encoding="utf-8"))
