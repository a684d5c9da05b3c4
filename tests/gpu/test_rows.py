"""Stored embedding tables on a GPU: rows by Triton, out of pinned host memory too, in CUDA graphs and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer as PlainModel
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor

from burnish import FastSentenceTransformer, Trainer, TrainingArguments
from burnish.core.stored_table import BLOCK, Stored, encode
from burnish.core.tables import stored_tables
from burnish.core.testing.operations import check_operation
from burnish.kernels.rows import gather_rows, triton_gather_rows

pytestmark = pytest.mark.gpu

KINDS: tuple[Any, ...] = ("8bit", "4bit", "host")
HEIGHT = 4000


def stored(kind: Any, width: int, dtype: torch.dtype) -> Stored:
    return encode(torch.randn(HEIGHT, width, device="cuda").to(dtype), kind)


def rows(operation: Any, ids: Tensor, table: Stored) -> Tensor:
    found: Tensor = operation(ids, table.data, table.scales, table.code, dtype=table.dtype, block=BLOCK)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [32, 96, 384, 768, 2560])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_plain_version_s_bit_for_bit(kind: Any, width: int, dtype: torch.dtype) -> None:
    table = stored(kind, width, dtype)
    assert table.data.device.type == ("cpu" if kind == "host" else "cuda")
    assert kind != "host" or table.data.is_pinned()
    for count in (1, 7, 129, 20_000):
        ids = torch.randint(0, HEIGHT, (count,), device="cuda")
        found = rows(triton_gather_rows, ids, table)
        assert found.is_cuda and torch.equal(found, rows(gather_rows, ids, table)) and found.any()


def test_it_passes_the_check_for_authors() -> None:
    check_operation("gather_rows", "triton", dtype=torch.float32, device="cuda", tolerance=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_row_s_number_is_nan(kind: Any) -> None:
    ids = torch.tensor([HEIGHT, -1, 3], device="cuda")
    found = rows(triton_gather_rows, ids, stored(kind, 96, torch.float32))
    assert found[:2].isnan().all() and found[2].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_reads_the_rows_of_the_ids_it_is_given(kind: Any) -> None:
    table = stored(kind, 768, torch.bfloat16)
    ids = torch.arange(100, device="cuda")
    rows(triton_gather_rows, ids, table)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = rows(triton_gather_rows, ids, table)
    for seed in range(3):
        other = torch.randint(0, HEIGHT, (100,), generator=torch.Generator().manual_seed(seed))
        ids.copy_(other)
        graph.replay()
        assert torch.equal(found, rows(gather_rows, other.cuda(), table))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_under_the_compiler(kind: Any) -> None:
    table = stored(kind, 384, torch.bfloat16)

    def read(ids: Tensor) -> Tensor:
        return rows(triton_gather_rows, ids, table).float() * 2

    compiled = torch.compile(read, fullgraph=True)
    for count in (40, 41):
        ids = torch.randint(0, HEIGHT, (count,), device="cuda")
        assert torch.equal(compiled(ids), read(ids))


def test_a_table_that_is_not_pinned_takes_the_plain_way() -> None:
    table = torch.randn(HEIGHT, 64)
    ids = torch.tensor([5, 1], device="cuda")
    assert torch.equal(triton_gather_rows(ids, table, dtype=torch.float32).cpu(), table[[5, 1]])


def train(model: Any, folder: Path) -> tuple[list[float], Any]:
    texts = [f"what is in place number {row}?" for row in range(64)]
    pairs = Dataset.from_dict({"anchor": texts, "positive": [f"in {text}" for text in texts]})
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=16, max_steps=24, learning_rate=1e-3, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_replays_graphs_and_holds_what_is_promised(
    minilm: Path, tmp_path: Path, kind: Any, options: dict[str, Any]
) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = FastSentenceTransformer.from_pretrained(str(minilm), embedding_storage=kind, **options)
    assert model.transformers_model is not None
    (table,) = stored_tables(model.transformers_model).values()
    size = table.num_embeddings * table.embedding_dim
    held = sum(parameter.nbytes for parameter in model.parameters())
    on_device = 0 if kind == "host" else table.stored.nbytes
    peak = torch.cuda.max_memory_allocated() - free
    if not options:  # the dense table was never on the device
        assert peak < held + on_device + 2 * size
    assert torch.cuda.memory_allocated() - free < 1.3 * (held + on_device) + 1e6
    assert (kind == "host") == (table.stored.data.device.type == "cpu") == table.stored.data.is_pinned()
    FastSentenceTransformer.get_peft_model(model, r=8)
    assert model.burnish is not None and model.burnish.decision.tables is not None
    assert model.burnish.decision.tables.spec.name == "triton"
    losses, trainer = train(model, tmp_path / "run")
    assert sum(losses[-4:]) < sum(losses[:4])
    assert trainer.engine.counts["replayed"] > 0
    texts = ["what is in place number 3?", "another one"]
    live = model.encode(texts, convert_to_tensor=True).float()
    model.save_pretrained_merged(tmp_path / "merged", save_method="merged_32bit")
    merged = PlainModel(str(tmp_path / "merged"), device="cuda").encode(texts, convert_to_tensor=True)
    # The merged model has the base's exact table; 4 bits are 9% off it, and random weights have no order to keep.
    assert torch.nn.functional.cosine_similarity(live, merged).min() > (0.95 if kind == "4bit" else 0.99)


def test_a_table_on_the_host_trains_as_the_dense_one(minilm: Path, tmp_path: Path) -> None:
    found = []
    for kind in (None, "host"):
        options: dict[str, Any] = {"embedding_storage": kind, "dtype": "float32"}
        model = FastSentenceTransformer.from_pretrained(str(minilm), **options)
        FastSentenceTransformer.get_peft_model(model, r=8)
        found.append(train(model, tmp_path / str(kind))[0])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
