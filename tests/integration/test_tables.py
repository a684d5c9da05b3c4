"""Adapters over stored embedding tables: what they learn, what is held in memory, what is saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor

from burnish import FastSentenceTransformer, Trainer, TrainingArguments
from burnish.core import loading
from burnish.core.config import RunConfig
from burnish.core.errors import ConfigError
from burnish.core.machine import describe
from burnish.core.registry import registry
from burnish.core.runs import _load
from burnish.core.selection import choose_kernel
from burnish.core.stored_table import BLOCK
from burnish.core.tables import store_tables, stored_tables
from burnish.core.testing.find import sample_config
from burnish.core.testing.subject import GPU, Subject, backward, compare_gradients
from burnish.core.testing.tokenizer import words

Make = Callable[..., Any]
TYPES = ("bert", "gemma3_text", "qwen3")
HEIGHT, WIDTH = 16_000, 64
BYTES = {"8bit": HEIGHT * (WIDTH + 4), "4bit": HEIGHT * (WIDTH // 2 + 4) + 64, "host": HEIGHT * WIDTH * 4}
TEXTS = [words(count, seed) for seed, count in enumerate((9, 1, 17, 30, 2))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with random weights of an architecture, and a table of a million."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            config: Any = copy.deepcopy(sample_config(model_type))
            config.vocab_size, config.hidden_size = HEIGHT, WIDTH
            made[model_type] = Subject(config=config, folder=tmp_path_factory.mktemp(model_type)).repository
        return made[model_type]

    return folder


@pytest.fixture
def model(folder: Callable[[str], Path], load: Make) -> Make:
    """A model with an adapter that is not nothing, the same in each; "host" as a GPU would have it."""

    def model(model_type: str, kind: str | None = None, **options: Any) -> Any:
        asked = None if kind == "host" else kind
        made = load(folder(model_type), embedding_storage=asked, **options)
        if kind == "host":
            on_host(made)
        FastSentenceTransformer.get_peft_model(made, r=4, lora_alpha=8)
        draw = torch.Generator().manual_seed(1)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
        return made

    return model


def on_host(model: Any) -> None:
    """Store the tables on the host, which on a CPU nobody is asked to do."""
    decision = model.burnish.decision
    choice = choose_kernel(registry(None), describe("cpu"), "gather_rows")
    options = replace(decision.options, embedding_storage="host")
    model.burnish.embeddings = store_tables(
        model.transformers_model, replace(decision, options=options, machine=GPU, tables=choice)
    )


def table_of(model: Any) -> Any:
    (table,) = stored_tables(model.transformers_model).values()
    return table


def with_table(model: Any, table: Tensor) -> Any:
    """The model with other numbers in its dense table."""
    with torch.no_grad():
        model.transformers_model.get_input_embeddings().weight.copy_(table)
    return model


def noisy(dense: Tensor, stored: Any) -> Tensor:
    """The table with noise as large as what storing it lost, block by block, for a measure of what that may do."""
    lost = (stored.dense() - dense).view(HEIGHT, -1, BLOCK).square().mean(-1, keepdim=True).sqrt()
    noise = torch.randn(HEIGHT, WIDTH // BLOCK, BLOCK, generator=torch.Generator().manual_seed(2))
    made: Tensor = dense + (noise * lost).view(HEIGHT, WIDTH)
    return made


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The error of all gradients together, as a share of them."""
    error = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    return float((error / sum(float(value.square().sum()) for value in expected.values())) ** 0.5)


@pytest.mark.parametrize("kind", ["8bit", "4bit", "host"])
@pytest.mark.parametrize("model_type", TYPES)
def test_an_adapter_s_gradients_are_the_dense_table_s(model: Make, model_type: str, kind: str) -> None:
    """Of the dense table with the stored numbers they are the same; of the base's own they are as far as noise of that
    size takes them."""
    ours, dense = model(model_type, kind), model(model_type)
    table = table_of(ours)
    exact = dense.transformers_model.get_input_embeddings().weight.detach().clone()
    found, theirs = backward(ours, TEXTS), backward(dense, TEXTS)
    assert all("lora" in name for name in found[1])
    if kind == "host":
        assert torch.equal(found[0], theirs[0])
        assert all(torch.equal(found[1][name], value) for name, value in theirs[1].items())
        return
    same = backward(with_table(dense, table.dense()), TEXTS)
    compare_gradients(found[1], same[1], 1e-5)
    torch.testing.assert_close(found[0], same[0], rtol=1e-5, atol=1e-6)
    measure = backward(with_table(dense, noisy(exact, table)), TEXTS)
    error, allowed = far(found[1], theirs[1]), far(measure[1], theirs[1])
    assert 1e-4 < error < 3 * allowed, f"{error:.4f} where noise of that size makes {allowed:.4f}"


def fit(model: Any, place: Path, steps: int = 12, **settings: Any) -> list[float]:
    """The losses of training on pairs of which a row's two texts share their words."""
    from datasets import Dataset  # type: ignore[import-untyped]

    texts = [words(3 + row % 9, row) for row in range(32)]
    pairs = Dataset.from_dict({"anchor": texts, "positive": [f"{text} w1" for text in texts]})
    resume = settings.pop("resume", None)
    arguments = TrainingArguments(
        str(place), per_device_train_batch_size=8, max_steps=steps, learning_rate=2e-3, logging_steps=1,
        lr_scheduler_type="constant", report_to="none", disable_tqdm=True, use_cpu=True,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))
    trainer.train(resume_from_checkpoint=resume)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", ["8bit", "4bit", "host"])
@pytest.mark.parametrize("model_type", TYPES)
def test_training_learns_and_leaves_the_table_alone(model: Make, model_type: str, kind: str, tmp_path: Path) -> None:
    ours = model(model_type, kind)
    stored = table_of(ours).stored
    before = stored.data.clone()
    losses = fit(ours, tmp_path / "run")
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert table_of(ours).stored is stored and torch.equal(stored.data, before)
    assert stored.nbytes == BYTES[kind]
    assert dict(ours.burnish.rows())["embeddings"].startswith(f"{kind} (1M weights in {BYTES[kind] / 1e6:.1f} MB")
    held = sum(parameter.nbytes for parameter in ours.parameters() if not parameter.requires_grad)
    rest = sum(parameter.nbytes for parameter in model(model_type).parameters() if not parameter.requires_grad)
    assert held == rest - HEIGHT * WIDTH * 4
    if kind == "host":  # bit for bit the table, so the run is the dense one's
        assert losses == fit(model(model_type), tmp_path / "dense")


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_merged_model_has_the_base_s_table(
    model: Make, plain: Make, model_type: str, kind: str, tmp_path: Path, capsys: Any
) -> None:
    ours, dense = model(model_type, kind), model(model_type)
    exact = dense.transformers_model.get_input_embeddings().weight.detach().clone()
    ours.save_pretrained_merged(tmp_path / "merged")
    dense.save_pretrained_merged(tmp_path / "dense")
    assert "is merged with" not in capsys.readouterr().err
    merged, wanted = plain(tmp_path / "merged"), plain(tmp_path / "dense")
    state = wanted.state_dict()
    assert merged.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in merged.state_dict().items())
    # The live model differs from it in what storing the table lost, and in nothing else.
    live, found = torch.tensor(ours.encode(TEXTS)), torch.tensor(merged.encode(TEXTS))
    table = merged[0].model.get_input_embeddings().weight
    with torch.no_grad():
        table.copy_(table_of(ours).dense())
        same = torch.tensor(merged.encode(TEXTS))
        table.copy_(noisy(exact, table_of(ours)))
        measure = torch.tensor(merged.encode(TEXTS))
    torch.testing.assert_close(live, same, rtol=1e-4, atol=1e-5)
    error, allowed = float((live - found).norm()), float((measure - found).norm())
    assert 1e-4 * float(found.norm()) < error < 3 * allowed


def test_a_merge_without_the_base_says_what_it_has(
    model: Make, plain: Make, folder: Callable[[str], Path], load: Make, tmp_path: Path, capsys: Any
) -> None:
    import shutil

    moved = shutil.copytree(folder("bert"), tmp_path / "base")
    ours = load(moved, embedding_storage="8bit")
    FastSentenceTransformer.get_peft_model(ours, r=4)
    shutil.rmtree(moved)
    ours.save_pretrained_merged(tmp_path / "merged")
    assert "embeddings.word_embeddings is merged with the numbers of its 8bit storage" in capsys.readouterr().err
    error = abs(plain(tmp_path / "merged").encode(TEXTS) - ours.encode(TEXTS)).max()
    assert error < 1e-5


def test_an_adapter_folder_is_as_ever_and_goes_on_over_a_stored_table(
    model: Make, folder: Callable[[str], Path], load: Make, tmp_path: Path
) -> None:
    ours = model("gemma3_text", "8bit")
    ours.save_pretrained(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 200_000
    again = load(tmp_path / "adapter", embedding_storage="8bit")
    torch.testing.assert_close(torch.tensor(again.encode(TEXTS)), torch.tensor(ours.encode(TEXTS)))
    assert table_of(again).stored.folder == folder("gemma3_text").resolve()
    record = json.loads((tmp_path / "adapter" / "burnish.json").read_text())
    assert [kernel["operation"] for kernel in record["kernels"]] == ["packed_attention", "gather_rows"]
    assert record["precision"]["reason"] == "adapters on cpu, embedding tables in 8 bits"
    assert stored_tables(load(tmp_path / "adapter").transformers_model) == {}


def test_a_resumed_run_equals_an_uninterrupted_one(model: Make, tmp_path: Path) -> None:
    whole = fit(model("bert", "4bit"), tmp_path / "whole")
    first = fit(model("bert", "4bit"), tmp_path / "cut", 6, save_strategy="steps", save_steps=6)
    ours = model("bert", "4bit")
    assert fit(ours, tmp_path / "cut", 12, resume=str(tmp_path / "cut" / "checkpoint-6"))[-6:] == whole[-6:]
    assert first == whole[:6] and table_of(ours).stored.nbytes == BYTES["4bit"]


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("model_type", ["bert", "qwen3"])
def test_over_a_quantised_base(model: Make, plain: Make, model_type: str, flag: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    ours = model(model_type, "8bit", dtype="bfloat16", **{flag: True})
    assert table_of(ours)(torch.tensor([3])).dtype == torch.bfloat16
    found = backward(ours, TEXTS)
    assert all(value.abs().max() > 0 for name, value in found[1].items())
    ours.save_pretrained_merged(tmp_path / "merged")
    merged = plain(tmp_path / "merged")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    cosine = torch.nn.functional.cosine_similarity(
        found[0].float(), torch.tensor(merged.encode(TEXTS, convert_to_numpy=True)).float()
    )
    assert cosine.min() > 0.95


def test_checkpointing_changes_nothing(model: Make) -> None:
    plainly = backward(model("qwen3", "8bit"), TEXTS)
    again = backward(model("qwen3", "8bit", use_gradient_checkpointing=True), TEXTS)
    compare_gradients(again[1], plainly[1], 1e-5)


def test_what_would_train_a_table_is_refused(folder: Callable[[str], Path], load: Make, tmp_path: Path) -> None:
    ours = load(folder("bert"), embedding_storage="8bit")
    refused: tuple[tuple[str, Any], ...] = (
        ("modules_to_save", ["word_embeddings"]),
        ("modules_to_save", ["embeddings"]),
        ("target_modules", ["query", "word_embeddings"]),
        ("target_modules", r".*(query|word_embeddings)"),
    )
    for where, named in refused:
        asked: dict[str, Any] = {where: named}
        with pytest.raises(ConfigError, match=rf"^{where}: it names embeddings\.word_embeddings"):
            FastSentenceTransformer.get_peft_model(ours, **asked)
    with pytest.raises(ConfigError, match="cannot be resized"):
        ours.transformers_model.resize_token_embeddings(HEIGHT + 8)
    trained = FastSentenceTransformer.get_peft_model(load(folder("bert")), modules_to_save=["word_embeddings"])
    trained.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"^embedding_storage: the adapter trains embeddings\.word_embeddings"):
        load(tmp_path / "adapter", embedding_storage="8bit")


def test_on_a_cpu_the_host_changes_nothing(folder: Callable[[str], Path], load: Make, capsys: Any) -> None:
    ours = load(folder("bert"), embedding_storage="host")
    assert (
        "embeddings   host (this device is a CPU: they are there already, nothing changes)" in capsys.readouterr().err
    )
    assert not stored_tables(ours.transformers_model)


def test_without_an_operation_it_is_refused(
    folder: Callable[[str], Path], load: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(plugins: Any, machine: Any, operation: str) -> Any:
        return None if operation == "gather_rows" else choose_kernel(plugins, machine, operation)

    monkeypatch.setattr(loading, "choose_kernel", choose)
    load(folder("bert"))
    with pytest.raises(
        ConfigError, match=r"^embedding_storage: no enabled plugin has the operation gather_rows for cpu"
    ):
        load(folder("bert"), embedding_storage="8bit")


def test_without_patches_it_is_stock(folder: Callable[[str], Path], load: Make) -> None:
    ours = load(folder("gemma3_text"), embedding_storage="4bit")
    before = ours.encode(TEXTS)
    ours.undo_patches()
    assert [type(module) for module in ours[0].modules()] == [
        type(module) for module in load(folder("gemma3_text"), for_inference=True)[0].modules()
    ]
    assert abs(ours.encode(TEXTS) - before).max() < 1e-6
    assert dict(ours.burnish.rows())["embeddings"] == "dense again, with the numbers of 4bit"


def test_a_run_takes_it(folder: Callable[[str], Path]) -> None:
    config = RunConfig(model=str(folder("bert")), train="pairs.jsonl", device="cpu", embedding_storage="4bit")
    assert _load(config).burnish.embeddings.startswith("4bit (1M weights")  # type: ignore[union-attr]
