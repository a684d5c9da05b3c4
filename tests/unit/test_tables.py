"""Embedding tables that are stored otherwise: which, what becomes of a module, what is refused, what a merge gets."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from burnish.core.errors import ConfigError, ModelError
from burnish.core.stored_table import StoredTable, encode
from burnish.core.tables import (
    base_folder,
    check_untouched,
    hidden_size,
    large_tables,
    merged_table,
    store_tables,
    stored_tables,
    undo_tables,
)
from burnish.kernels.rows import gather_rows

KINDS = ("8bit", "4bit", "host")
HEIGHT, WIDTH = 16_000, 64  # 1,024,000 weights: enough to be stored otherwise
IDS = torch.tensor([[1, 0, 15_999], [7, 7, 300]])


class Small(nn.Module):
    """Two tables, one of them large, and a layer: enough of a transformer for what is done to it."""

    device = torch.device("cpu")

    def __init__(self, table: nn.Embedding | None = None) -> None:
        super().__init__()
        self.words: Any = nn.Module()
        self.words.table = table or nn.Embedding(HEIGHT, WIDTH, padding_idx=0)
        self.places = nn.Embedding(10, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.layer(self.words.table(ids))
        return out

    def resize_token_embeddings(self, size: int) -> None:
        raise AssertionError("transformers' own was called")


def decision(kind: Any, device: str = "cuda") -> Any:
    """What `loading.decide` would say; "cuda" since on a CPU a table on the host is left alone."""
    chosen = SimpleNamespace(load=lambda: gather_rows)
    options = SimpleNamespace(embedding_storage=kind)
    return SimpleNamespace(options=options, machine=SimpleNamespace(device=device), device="cpu", tables=chosen)


def store(model: Any, kind: Any, folder: Path | None = None) -> str:
    return store_tables(model, decision(kind), folder)


def table_of(model: Any) -> Any:
    return model.words.table


def close(kind: str, found: Tensor, expected: Tensor) -> bool:
    error = float((found - expected).norm() / expected.norm())
    return {"8bit": 1e-4 < error < 0.02, "4bit": 0.02 < error < 0.2, "host": error == 0}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_large_table_alone_is_stored_and_gives_its_rows(kind: str) -> None:
    model = Small()
    before, rest = table_of(model).weight.detach().clone(), model.places
    assert list(large_tables(model)) == ["words.table"]
    told = store(model, kind)
    table = table_of(model)
    assert isinstance(table, StoredTable) and isinstance(table, nn.Embedding) and table.padding_idx == 0
    assert type(rest) is nn.Embedding and list(stored_tables(model)) == ["words.table"]
    assert close(kind, table(IDS), before[IDS]) and not table(IDS).requires_grad
    assert table(IDS).shape == (2, 3, WIDTH) and table(IDS[0, 0]).shape == (WIDTH,)
    held = {"8bit": HEIGHT * (WIDTH + 4), "4bit": HEIGHT * (WIDTH // 2 + 4) + 64, "host": HEIGHT * WIDTH * 4}[kind]
    assert table.stored.nbytes == held
    amount = f"{held / 1e6:.1f} MB" + (" of pinned host memory" if kind == "host" else "")
    assert told == f"{kind} (1M weights in {amount})" and store(model, kind) == told
    assert not any(parameter.shape == before.shape for parameter in model.parameters())
    assert hidden_size(model) == HEIGHT * WIDTH


def test_nothing_is_done_unasked_nor_for_the_host_on_a_cpu() -> None:
    model: Any = Small()
    assert store(model, None) == "" and not stored_tables(model)
    told = store_tables(model, decision("host", "cpu"))
    assert told.startswith("host (this device is a CPU") and not stored_tables(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_table_keeps_its_scale(kind: str) -> None:
    model = Small(Gemma3TextScaledWordEmbedding(HEIGHT, WIDTH, 0, embed_scale=8.0))
    plain, before = table_of(model).weight.detach()[IDS], table_of(model)(IDS).detach()
    assert torch.equal(before, 8 * plain)
    store(model, kind)
    assert close(kind, table_of(model)(IDS), before)
    assert table_of(model).to(torch.bfloat16)(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_keep_the_stock_keys_and_go_both_ways(kind: str) -> None:
    model, other, dense = Small(), Small(), Small()
    keys = list(model.state_dict())
    store(model, kind)
    store(other, kind)
    state = model.state_dict()
    assert list(state) == keys
    assert state["words.table.weight"].shape == (HEIGHT, WIDTH) and state["words.table.weight"].device.type == "cpu"
    dense.load_state_dict(state)
    assert torch.equal(dense(IDS), model(IDS)) and not torch.equal(other(IDS), model(IDS))
    other.load_state_dict(state)
    torch.testing.assert_close(other(IDS), model(IDS))
    with pytest.raises(RuntimeError, match=r"size mismatch for words\.table\.weight"):
        model.load_state_dict({**state, "words.table.weight": torch.zeros(3, WIDTH)})
    del state["words.table.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*words\.table\.weight"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*words\.table\.other"):
        model.load_state_dict({**model.state_dict(), "words.table.other": torch.zeros(1)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_changes_what_rows_are_given_in_and_no_stored_bit(kind: str) -> None:
    model = Small()
    store(model, kind)
    before, rows = copy.deepcopy(table_of(model).stored), table_of(model)(IDS)
    model.to(torch.bfloat16)
    found = table_of(model)(IDS)
    assert found.dtype == table_of(model).weight.dtype == torch.bfloat16
    assert torch.equal(found, rows.to(torch.bfloat16))
    after = table_of(model).stored
    if kind == "host":
        assert after.data.dtype == torch.bfloat16 and after.nbytes == before.nbytes // 2
    else:
        assert torch.equal(after.data, before.data) and after.scales.dtype == torch.float32
        assert torch.equal(model.float().words.table(IDS), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_move_takes_codes_along_and_leaves_the_host_s_table(kind: str) -> None:
    """The device "meta" stands for a GPU: nothing can be read there, so what is still read was left."""
    model = Small()
    store(model, kind)
    rows = table_of(model)(IDS)
    model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    stored = table_of(model).stored
    if kind == "host":
        assert stored.data.device.type == "cpu" and torch.equal(table_of(model)(IDS), rows)
    else:
        assert stored.data.device.type == stored.scales.device.type == "meta"
        assert table_of(model)(IDS.to("meta")).device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_their_own(kind: str, again: Callable[[Any], Any]) -> None:
    model = Small(Gemma3TextScaledWordEmbedding(HEIGHT, WIDTH, 0, embed_scale=8.0))
    store_tables(model, SimpleNamespace(**{**vars(decision(kind)), "tables": Chosen()}))  # type: ignore[arg-type]
    rows = model(IDS)
    twin = again(model)
    assert torch.equal(twin(IDS), rows) and type(table_of(twin)) is type(table_of(model))
    table_of(twin).stored.data.zero_()
    assert torch.equal(model(IDS), rows) and not torch.equal(twin(IDS), rows)


class Chosen:
    """A choice whose function a pickle finds by its name."""

    def load(self) -> Any:
        return gather_rows


@pytest.mark.parametrize("kind", KINDS)
def test_undone_it_is_the_class_it_was_with_the_numbers_it_stood_for(kind: str) -> None:
    model = Small()
    before = table_of(model).weight.detach().clone()
    store(model, kind)
    rows = table_of(model)(IDS)
    told = undo_tables(model)  # type: ignore[arg-type]
    table = table_of(model)
    assert type(table) is nn.Embedding and isinstance(table.weight, nn.Parameter) and not table.weight.requires_grad
    assert torch.equal(table(IDS), rows) and close(kind, table.weight, before)
    assert told == ("dense again" if kind == "host" else f"dense again, with the numbers of {kind}")
    assert list(model.state_dict()) == list(Small().state_dict())
    assert "resize_token_embeddings" not in vars(model) and undo_tables(model) == ""  # type: ignore[arg-type]


def test_tables_that_share_a_weight_share_what_is_stored() -> None:
    model: Any = Small()
    model.second = nn.Embedding(HEIGHT, WIDTH)
    model.second.weight = table_of(model).weight
    store(model, "8bit")
    assert table_of(model).stored is model.second.stored
    assert hidden_size(model) == HEIGHT * WIDTH
    model.to(torch.bfloat16)
    assert torch.equal(model.second(IDS), table_of(model)(IDS)) and model.second(IDS).dtype == torch.bfloat16


class Reader(nn.Embedding):
    """A table that takes no rows from nn.Embedding."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[input]


def spoilt(what: str) -> Any:
    model: Any = Small()
    if what == "norm":
        model.words.table = nn.Embedding(HEIGHT, WIDTH, max_norm=1.0)
    elif what == "bound":
        model.words.table.forward = lambda ids: ids
    elif what == "odd":
        model.words.table = nn.Embedding(HEIGHT, 65)
    elif what == "head":
        model.layer = nn.Linear(WIDTH, HEIGHT, bias=False)
        model.layer.weight = model.words.table.weight
    elif what == "reader":
        model.words.table = Reader(HEIGHT, WIDTH)
    elif what == "saved":
        import peft.utils

        wrapper: Any = peft.utils.ModulesToSaveWrapper
        model.words.table = wrapper(model.words.table, "default")
    else:
        model.words.table = nn.Embedding(100, WIDTH)
    return model


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("norm", r"words\.table scales its rows to a norm of at most 1\.0"),
        ("bound", r"something has bound a forward of its own to words\.table"),
        ("odd", r"rows of words\.table have 65 numbers"),
        ("head", r"layer shares the weight of words\.table"),
        ("reader", r"words\.table is a Reader, which does not take its rows from nn\.Embedding"),
        ("saved", r"the adapter trains words\.table"),
        ("none", r"this model has no embedding table of 1,000,000 weights"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_left_as_it_was(what: str, message: str) -> None:
    model = spoilt(what)
    kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(ConfigError, match=rf"^embedding_storage: {message}.*Drop embedding_storage$") as caught:
        store(model, "4bit")
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds and list(model.state_dict()) == keys
    assert "resize_token_embeddings" not in vars(model)


def test_odd_rows_fit_8_bits_and_a_head_without_the_weight_is_no_matter() -> None:
    model = spoilt("odd")
    store(model, "8bit")
    assert table_of(model)(IDS).shape == (2, 3, 65)


def test_neither_training_nor_another_vocabulary() -> None:
    model: Any = Small()
    store(model, "8bit")
    with pytest.raises(ConfigError, match=r"^resize_token_embeddings: a table in 8bit storage cannot be resized"):
        model.resize_token_embeddings(7)
    with pytest.raises(ConfigError, match="stays frozen"):
        table_of(model).requires_grad_(True)
    assert table_of(model).requires_grad_(False) is table_of(model)
    with pytest.raises(ConfigError, match="takes no other weight"):
        table_of(model).weight = nn.Parameter(torch.zeros(HEIGHT, WIDTH))


@pytest.mark.parametrize("named", [["table"], ["words.table"], ["words"], r".*table", r"words\..*"])
def test_naming_a_table_for_training_is_refused(named: Any) -> None:
    model = Small()
    check_untouched(model, named, "modules_to_save")  # dense tables train
    store(model, "4bit")
    with pytest.raises(ConfigError, match=r"^modules_to_save: it names words\.table, which embedding_storage='4bit'"):
        check_untouched(model, named, "modules_to_save")
    for other in ([], ["layer", "able"], ["able"], "table", "layer|places", "("):
        check_untouched(model, other, "target_modules")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_a_merge_gets_the_base_s_own_table(kind: str, place: str, tmp_path: Path, capsys: Any) -> None:
    model = Small()
    exact = table_of(model).weight.detach().clone()
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    # Another table of the same shape, and another name than the module's: it is the bits that are compared.
    save_file({"a": exact + 0.1, "b.c": exact, "d": exact[:5].clone()}, folder / "model.safetensors")
    store(model, kind, tmp_path)
    assert torch.equal(merged_table("words.table", table_of(model)), exact)
    assert capsys.readouterr().err == ""


def test_a_base_in_more_bits_is_merged_as_it_was_read(tmp_path: Path) -> None:
    model = Small().to(torch.bfloat16)
    exact = torch.randn(HEIGHT, WIDTH)
    with torch.no_grad():
        table_of(model).weight.copy_(exact)
    save_file({"table": exact}, tmp_path / "model.safetensors")
    store(model, "8bit", tmp_path)
    model.float()
    found = merged_table("words.table", table_of(model))
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.to(torch.bfloat16))


@pytest.mark.parametrize("what", ["changed", "gone", "unknown"])
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_without_the_base_a_merge_gets_the_stored_numbers_and_says_so(
    kind: str, what: str, tmp_path: Path, capsys: Any
) -> None:
    model = Small()
    exact = table_of(model).weight.detach().clone()
    store(model, kind, None if what == "unknown" else tmp_path)
    if what == "changed":
        exact[-1, -1] += 0.5
        save_file({"words.table.weight": exact}, tmp_path / "model.safetensors")
    found = merged_table("words.table", table_of(model))
    assert torch.equal(found[IDS], table_of(model)(IDS)) and not torch.equal(found, exact)
    line = f"burnish: words.table is merged with the numbers of its {kind} storage: the base model's own were not found"
    assert capsys.readouterr().err.startswith(line)


def test_a_base_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    model = Small()
    store(model, "8bit", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read .*Restore the base model"):
        merged_table("words.table", table_of(model))


def test_where_the_base_lies(tmp_path: Path) -> None:
    config = SimpleNamespace(_name_or_path=str(tmp_path))
    assert base_folder(config, None) == tmp_path.resolve()
    assert base_folder(SimpleNamespace(_name_or_path="x"), str(tmp_path)) == tmp_path.resolve()
    assert base_folder(SimpleNamespace(_name_or_path="org/absent"), None, str(tmp_path)) is None
    assert base_folder(SimpleNamespace(_name_or_path="/no/such/folder"), None) is None


def test_a_large_table_is_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(1000, 96)
    kinds: tuple[Any, ...] = ("8bit", "4bit")
    whole = {kind: encode(weights, kind) for kind in kinds}
    monkeypatch.setattr("burnish.core.stored_table.CHUNK", 96 * 7)
    for kind, stored in whole.items():
        assert stored.scales is not None
        parts = encode(weights, kind)
        assert (
            parts.scales is not None
            and torch.equal(parts.data, stored.data)
            and torch.equal(parts.scales, stored.scales)
        )
