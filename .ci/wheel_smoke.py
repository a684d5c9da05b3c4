"""Builds sdist and wheel, looks into both, installs the wheel in an environment of its own, and tries it there.

Run by `make wheel-smoke`, with the development environment's Python, in the repository's root.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("core", "backends", "families", "kernels")
# Beside the package's files: what the build needs or adds.
SDIST_EXTRAS = {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
# Looked for by name, so that this check does not rest on the checkout alone.
INDISPENSABLE = {
    "__init__.py",
    "py.typed",
    "core/quickstart_data/LICENSE.md",
    "core/quickstart_data/corpus.jsonl.gz",
    "core/quickstart_data/qrels/test.tsv",
    "core/report_template.html.j2",
    "core/scaffold_files/family.py.tmpl",
}
HEAVY = ("torch", "transformers", "sentence_transformers", "datasets", "peft")


def run(*command: str | Path, cwd: Path) -> str:
    """What the command printed; ends the program, with all of it, if the command failed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nwheel-smoke: failed with {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def expected() -> set[str]:
    """Every file of the package, as the checkout has it."""
    found = {ROOT / "__init__.py", ROOT / "py.typed", *(p for name in FOLDERS for p in (ROOT / name).rglob("*"))}
    return {
        path.relative_to(ROOT).as_posix()
        for path in found
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def compare(what: str, held: set[str], wanted: set[str]) -> None:
    """Ends the program unless the archive holds just what it should."""
    if held != wanted:
        sys.exit(f"wheel-smoke: {what} lacks {sorted(wanted - held)} and should not hold {sorted(held - wanted)}")
    print(f"{what}: {len(held)} files, as they should be")


def check_contents(sdist: Path, wheel: Path) -> None:
    """The wheel holds the package and nothing else; the sdist, that and what building it takes."""
    wanted = expected()
    if not wanted >= INDISPENSABLE:
        sys.exit(f"wheel-smoke: the checkout lacks {sorted(INDISPENSABLE - wanted)}")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    compare(wheel.name, names, {f"burnish/{name}" for name in wanted})
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    compare(sdist.name, {name for name in names if not name.startswith("burnish.egg-info/")}, wanted | SDIST_EXTRAS)


def try_it(python: Path, folder: Path) -> None:
    """What a user meets first works, without the checkout in reach."""
    heavy = f"import burnish, sys; print(burnish.__file__, [name for name in {HEAVY!r} if name in sys.modules])"
    where, _, loaded = run(python, "-c", heavy, cwd=folder).strip().partition(" ")
    if loaded != "[]" or not Path(where).is_relative_to(python.parents[1].resolve()):
        sys.exit(f"wheel-smoke: `import burnish` came from {where} and loaded {loaded}")
    command = python.with_name("burnish")
    for arguments, word in (("--help", "quickstart"), ("plugins", "bert")):
        if word not in run(command, arguments, cwd=folder):
            sys.exit(f"wheel-smoke: `burnish {arguments}` does not name {word}")
    print("import burnish, burnish --help, burnish plugins: work, and importing loads nothing heavy")


def main() -> None:
    """Build, look, install, try."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="burnish-wheel-") as name:
        folder = Path(name).resolve()
        # The wheel is built from the sdist, so that an sdist that lacks something is found out as well.
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
        (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
        check_contents(sdist, wheel)
        venv.create(folder / "venv", with_pip=True, symlinks=True)
        python = folder / "venv" / "bin" / "python"
        install = (python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
        run(*install, "torch", cwd=folder)
        run(*install, f"{wheel}[cli]", cwd=folder)
        run(python, "-m", "pip", "check", cwd=folder)
        try_it(python, folder)
    print(f"wheel-smoke: passed in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
