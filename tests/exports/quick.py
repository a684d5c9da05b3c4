"""What `make test-exports` runs, the real MiniLM with every consumer at least, and what is left to long scripts."""

from __future__ import annotations

import pytest

# Beginnings of tests' names. Those that read older releases read every family.
QUICK = (
    "test_readers.py::test_sentence_transformers",
    "test_readers.py::test_transformers_alone",
    "test_readers.py::test_each_of_the_older_keys_counts",
    "test_heads.py::test_sentence_transformers",
    "test_runtimes.py::test_onnx[minilm merged]",
    "test_runtimes.py::test_openvino[minilm merged]",
    "test_runtimes.py::test_fastembed[minilm merged]",
    "test_transformers_js.py::test_embeddings[minilm]",
    "test_stores.py::test_a_store_finds_the_golden_neighbours[faiss-minilm]",
    "test_stores.py::test_a_store_finds_the_golden_neighbours[pgvector-minilm]",
    "test_stores.py::test_a_store_finds_the_golden_neighbours[qdrant-minilm]",
    "test_stores.py::test_langchain_reads_every_family",
)
# Folders whose tests convert, quantise and serve: `make verify-exports-long`.
LONG = ("exports/gguf/",)


def mark(items: list[pytest.Item], config: pytest.Config) -> None:
    """Give the tests of `QUICK` the marker `quick`, and those of `LONG` the marker `long`.

    Raises:
        pytest.UsageError: Where a run of all of them has none for a name: it would go unseen.
    """
    found = set()
    for item in items:
        if any(folder in item.nodeid for folder in LONG):
            item.add_marker(pytest.mark.long)
        for name in QUICK:
            if item.nodeid.rpartition("/")[2].startswith(name):
                item.add_marker(pytest.mark.quick)
                found.add(name)
    everything = "quick" in config.option.markexpr and not config.option.keyword
    if everything and (missing := [name for name in QUICK if name not in found]):
        raise pytest.UsageError(f"tests/exports/quick.py: nothing is called {', '.join(missing)}")
