"""A model card's snippets, run as they stand where what they take is installed: each computes the model of the card."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from burnish.core import consumers

from .test_runtimes import burnish

pytestmark = [pytest.mark.exports, pytest.mark.timeout(900)]
Python = Callable[[str], Path]
QUESTION, TEXT = "How long does a refund take?", "Refunds reach your card within five working days."
SCRIPTS = Path(consumers.__file__).parent
_RUN = """
import contextlib, json, os, sys
sys.path.insert(0, sys.argv[1])
code, wanted, answer, name = sys.argv[2:]
names = {"__name__": "__main__"}
with contextlib.ExitStack() as stack:
    if name == "pgvector":
        import postgres
        os.environ["PGHOST"], os.environ["PGUSER"] = stack.enter_context(postgres.server()), "postgres"
    exec(compile(code, name, "exec"), names)
    found = eval(wanted, names)
    if "connection" in names:
        names["connection"].close()
json.dump(found, open(answer, "w"))
"""
# Title on the card: (environment; what of the snippet's names are numbers, as an expression).
VECTORS = {
    "LangChain": ("langchain", f"[embeddings.embed_query({QUESTION!r}), *embeddings.embed_documents([{TEXT!r}])]"),
    "ONNX Runtime": ("exporter", "vectors.tolist()"),
    "OpenVINO": ("exporter", "vectors.tolist()"),
    "FastEmbed": ("fastembed", "[row.tolist() for row in vectors]"),
}
STORES = {
    "FAISS": ("faiss", "float(scores[0, 0])"),
    "pgvector": ("pgvector", "1 - connection.execute('SELECT embedding <=> %s FROM documents', [query]).fetchone()[0]"),
    "Qdrant": ("qdrant", "client.query_points('documents', query=query.tolist(), limit=1).points[0].score"),
}


@pytest.fixture(scope="module")
def model(saved: dict[str, Path]) -> Path:
    """The real MiniLM, an adapter folded in, with a prompt for queries."""
    return saved["minilm merged"]


@pytest.fixture(scope="module")
def wanted(model: Path) -> NDArray[np.float32]:
    """The question's vector and the text's."""
    plain = SentenceTransformer(str(model), device="cpu")
    rows: NDArray[np.float32] = np.stack([plain.encode_query(QUESTION), plain.encode_document(TEXT)])
    assert abs(rows[0] - plain.encode(QUESTION)).max() > 1e-3, "the prompt does nothing here"
    return rows


def blocks(model: Path, title: str) -> dict[str, str]:
    """The blocks under a title by their languages; of a store, with what stands before all of them."""
    card = (model / "README.md").read_text(encoding="utf-8")
    part = re.search(rf"<summary>{re.escape(title)}: [^\n]*</summary>\n(.*?)</details>", card, re.DOTALL)
    assert part is not None, title
    found = dict(re.findall(r"```(\w+)\n(.*?)```", part[1], re.DOTALL))
    if title in STORES:
        (before,) = re.findall(r"\nStores take the vectors.*?```python\n(.*?)```", card, re.DOTALL)
        found["python"] = before + found["python"]
    return {kind: text.replace("sentence_transformers_model_id", str(model)) for kind, text in found.items()}


def run(title: str, environment: str, code: str, expression: str, python: Python, place: Path) -> NDArray[np.float64]:
    name = title.lower()
    command = [str(python(environment)), "-c", _RUN, str(SCRIPTS), code, expression, str(place / "answer"), name]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.asarray(json.loads((place / "answer").read_text()))


def exported(model: Path, title: str, python: Python, place: Path) -> None:
    """The folder `exported`, by the card's own command, with the faster exporter."""
    words = shlex.split(blocks(model, title)["bash"].replace("MODEL_FOLDER", str(model)))
    assert words[:2] == ["burnish", "export"] and "exported" in words
    words = [str(place / "exported") if word == "exported" else word for word in words[1:]]
    done = burnish(python("exporter"), *words, "--option", "exporter=torchscript")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("title", VECTORS)
def test_vectors(title: str, model: Path, wanted: NDArray[np.float32], python: Python, tmp_path: Path) -> None:
    found = blocks(model, title)
    if "bash" in found:
        exported(model, title, python, tmp_path)
    environment, expression = VECTORS[title]
    assert np.allclose(run(title, environment, found["python"], expression, python, tmp_path), wanted, atol=1e-5)


@pytest.mark.parametrize("title", STORES)
def test_stores(title: str, model: Path, wanted: NDArray[np.float32], python: Python, tmp_path: Path) -> None:
    code = blocks(model, title)["python"].replace('url="http://localhost:6333"', '":memory:"')
    environment, expression = STORES[title]
    score = run(title, environment, code, expression, python, tmp_path)
    assert abs(float(score) - float(wanted[0] @ wanted[1])) < 1e-5


def test_transformers_js(model: Path, wanted: NDArray[np.float32], python: Python, tmp_path: Path) -> None:
    exported(model, "transformers.js", python, tmp_path)
    (tmp_path / "node_modules").symlink_to(python("node"), target_is_directory=True)
    code = blocks(model, "transformers.js")["js"] + "\nconsole.log(JSON.stringify(vectors.tolist()));\n"
    (tmp_path / "card.mjs").write_text(code, encoding="utf-8")
    done = subprocess.run(["node", "card.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.allclose(json.loads(done.stdout), wanted[:1], atol=1e-5)
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| `onnx/model_quantized.onnx` \| int8 \| 2\d\.\d \| 0\.9\d{5} \| 9\d\.\d% \|", card)
