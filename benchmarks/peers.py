"""Fetch what the Unsloth and 4-bit arms need, slimmed, for a machine that reaches no package index.

    python benchmarks/peers.py FOLDER

On that machine: `for f in FOLDER/*; do python3 -m zipfile -e "$f" SITE; done` and SITE on PYTHONPATH. Unsloth loses its
web studio, and bitsandbytes every library but the one for CUDA 13 and the CPU's: 75 MB become 14.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

PINS = (
    "unsloth==2026.10.9",
    "unsloth_zoo==2026.10.9",
    "trl==1.15.0",
    "datasets==4.8.5",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "bitsandbytes==0.50.2",
)
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)), "manylinux2014_x86_64")
SLIMMED = ("unsloth-*.whl", "bitsandbytes-*.whl")


def wanted(name: str) -> bool:
    """Whether a file of a wheel is needed to train."""
    if name.startswith(("studio/", "unsloth_cli/")):
        return False
    library = name.startswith("bitsandbytes/") and name.endswith(".so")
    return not library or "cuda130" in name or name.endswith("_cpu.so")


def slim(wheel: Path) -> Path:
    """Write the wheel's needed files as a zip beside it, and remove the wheel."""
    small = wheel.with_suffix(".zip")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
        for item in source.infolist():
            if wanted(item.filename):
                target.writestr(item, source.read(item), zipfile.ZIP_DEFLATED)
    wheel.unlink()
    return small


def fetch(folder: Path, python: str) -> None:
    """Download the pinned wheels for that Python on Linux, x86-64."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += [f"--python-version={python}", "--implementation=cp", "-d", str(folder)]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*command, *PINS], check=True)


def main() -> None:
    """Fetch and slim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the other machine's Python")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    fetch(given.folder, given.python)
    for pattern in SLIMMED:
        for wheel in given.folder.glob(pattern):
            slim(wheel)
    for path in sorted(given.folder.iterdir()):
        print(f"{path.stat().st_size / 2**20:6.1f} MiB  {path.name}")


if __name__ == "__main__":
    main()
