"""The frozen embedding tables of a model under an adapter: which lie elsewhere, and how they are saved.

Under an adapter nobody trains the token embeddings, and a batch reads a few thousand of their rows: 201 of
EmbeddingGemma's 303 million weights lie still. Here they lie in fewer bits or in the host's memory (`stored_table`),
and the operation `gather_rows` makes the rows of a batch out of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import ConfigError, ModelError
from .options import EmbeddingStorage
from .stored_table import Stored, StoredTable, chunks, codes, encode, refuse, stored_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .loading import Decision

SMALLEST = 1_000_000
"""Weights from which on a table is stored otherwise: positions and token types of most models have fewer."""


def large_tables(transformer: nn.Module) -> dict[str, nn.Embedding]:
    """The embedding tables that are worth it, by name: every kind of `nn.Embedding` of `SMALLEST` weights or more."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings * module.embedding_dim >= SMALLEST
    }


def stored_tables(transformer: nn.Module) -> dict[str, StoredTable]:
    """The tables that are stored otherwise, by name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, StoredTable)}


def store_tables(transformer: PreTrainedModel, decision: Decision, folder: Path | None = None) -> str:
    """Store a model's large embedding tables as its options ask for; a second call finds nothing left to do.

    A model that is not on its device yet has its tables encoded there part by part, and they never lie there in full.
    What bitsandbytes loads is on the device already: there the dense table is freed here.

    Args:
        transformer: The model.
        decision: With the storage and the implementation of `gather_rows`.
        folder: Where the base model's weights lie, if that is known: merged models get the exact table from there.

    Returns:
        What was done, in words; nothing where nothing was asked for.

    Raises:
        ConfigError: If there is no such table, or one that cannot be stored otherwise.
    """
    kind = decision.options.embedding_storage
    if kind is None:
        return ""
    if kind == "host" and decision.machine.device == "cpu":
        return "host (this device is a CPU: they are there already, nothing changes)"
    assert decision.tables is not None
    operation = decision.tables.load()
    at = decision.device if decision.machine.device == "cuda" else None
    tables = large_tables(transformer)
    if not tables:
        what = f"this model has no embedding table of {SMALLEST:,} weights or more"
        raise ConfigError(what, where="embedding_storage", fix="Drop embedding_storage")
    dense = {name: table for name, table in tables.items() if not isinstance(table, StoredTable)}
    for name, table in dense.items():
        _check(transformer, name, table, kind)
    # Tables that share a weight share what is stored.
    made: dict[int, Stored] = {}
    for name, table in dense.items():
        key = id(table.weight)
        if key not in made:
            made[key] = encode(table.weight, kind, folder, at)
        _swap(name, table, made[key], operation)
    if dense:
        if transformer.device.type == "cuda":
            torch.cuda.empty_cache()  # what the dense tables held
        model: Any = transformer
        model.resize_token_embeddings = partial(_refuse_resize, kind)
    return _describe(transformer, kind)


def _swap(name: str, table: nn.Embedding, stored: Stored, operation: Callable[..., Tensor]) -> None:
    module: Any = table
    own: Any = type(table)
    weight: Any = table.weight
    module.weight = nn.Parameter(weight.new_empty(0, weight.shape[1]), requires_grad=False)
    module.stored, module.own_class = stored, own
    module.__class__ = stored_class(own)
    asked: list[Tensor] = []

    def watched(ids: Tensor, *stored: Any, **settings: Any) -> Tensor:
        asked.append(ids)
        return operation(ids, *stored, **settings)

    module.operation = watched
    with torch.no_grad():
        module(torch.empty(0, dtype=torch.int64, device=weight.device))  # of no rows, which nobody can read wrong
    module.operation = operation
    if not asked:
        _restore(module, weight)
        refuse(f"{name} is a {own.__name__}, which does not take its rows from nn.Embedding")


def _restore(module: Any, weight: nn.Parameter) -> None:
    module.__class__ = module.own_class
    del module.stored, module.operation, module.own_class
    module.weight = weight


def undo_tables(transformer: PreTrainedModel) -> str:
    """Give every table back to `nn.Embedding`, frozen, as the numbers that it stands for; what was done, in words."""
    tables, device = stored_tables(transformer), transformer.device
    dense: dict[int, tuple[Stored, nn.Parameter]] = {}
    for table in tables.values():
        if id(table.stored) not in dense:
            weight = nn.Parameter(table.dense().to(device, copy=True), requires_grad=False)
            dense[id(table.stored)] = table.stored, weight
    for table in tables.values():
        _restore(table, dense[id(table.stored)][1])
    if not tables:
        return ""
    del transformer.__dict__["resize_token_embeddings"]
    kinds = {table.kind for table, _ in dense.values()}
    return "dense again" if kinds == {"host"} else f"dense again, with the numbers of {kinds.pop()}"


def _check(transformer: nn.Module, name: str, table: nn.Embedding, kind: EmbeddingStorage) -> None:
    """Refuse a table that is more than rows to be read."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    above = [transformer.get_submodule(".".join(name.split(".")[:depth])) for depth in range(name.count(".") + 1)]
    if any(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in above):
        refuse(f"the adapter trains {name}")
    if table.max_norm is not None:
        refuse(f"{name} scales its rows to a norm of at most {table.max_norm} in place")
    if "forward" in vars(table):
        refuse(f"something has bound a forward of its own to {name}")
    if kind == "4bit" and table.embedding_dim % 2:
        refuse(f"rows of {name} have {table.embedding_dim} numbers, and 4 bits are stored in pairs")
    for other, module in transformer.named_modules():
        owned = any(weight is table.weight for weight in module._parameters.values())
        if owned and not isinstance(module, nn.Embedding):
            refuse(f"{other} shares the weight of {name}")


def _refuse_resize(kind: str, *sizes: Any, **settings: Any) -> NoReturn:
    fix = "Drop embedding_storage, or resize the base model and save it first"
    raise ConfigError(f"a table in {kind} storage cannot be resized", where="resize_token_embeddings", fix=fix)


def check_untouched(transformer: nn.Module, named: Iterable[str] | str, where: str) -> None:
    """Refuse to train a table that is stored otherwise, or a module around one.

    Args:
        transformer: The model.
        named: Modules by name, or by the end of their names; or a regular expression over whole names.
        where: The parameter that names them.

    Raises:
        ConfigError: If one of them is or holds such a table.
    """
    for path, table in stored_tables(transformer).items():
        parts = path.split(".")
        around = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        if isinstance(named, str):
            hit = _matches(named, path)
        else:
            hit = any(one == name or one.endswith(f".{name}") for name in named for one in around)
        if hit:
            what = f"it names {path}, which embedding_storage={table.stored.kind!r} keeps frozen"
            raise ConfigError(what, where=where, fix="Drop embedding_storage, or leave the table out")


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:  # `adapters` says so
        return False


def hidden_size(transformer: nn.Module) -> int:
    """Weights in tables that are stored otherwise, which are none of the model's parameters."""
    tables = {id(table.stored): table for table in stored_tables(transformer).values()}
    return sum(table.num_embeddings * table.embedding_dim for table in tables.values())


def _describe(transformer: nn.Module, kind: EmbeddingStorage) -> str:
    tables = {id(table.stored): table.stored for table in stored_tables(transformer).values()}
    held = sum(table.nbytes for table in tables.values())
    memory = " of pinned host memory" if kind == "host" else ""
    amount = f"{held / 1e9:.1f} GB" if held >= 5e7 else f"{held / 1e6:.1f} MB"
    return f"{kind} ({hidden_size(transformer) / 1e6:.0f}M weights in {amount}{memory})"


def base_folder(config: Any, base: str | None, cache_folder: str | None = None) -> Path | None:
    """Where the weights of a base model that was just loaded lie: its folder, or its snapshot in the Hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name = base or config._name_or_path
    if Path(name).is_dir():
        return Path(name).resolve()
    try:
        commit = getattr(config, "_commit_hash", None)
        return Path(snapshot_download(name, revision=commit, cache_dir=cache_folder, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def merged_table(name: str, table: StoredTable) -> Tensor:
    """A table for a merged model, in host memory.

    The base model's own where its weights are still there and, encoded again, are bit for bit what is stored here: this
    proves that it is the table that the adapter was trained over, whatever its name is in the file. Where it is not
    found, the merged model gets the numbers that the adapter was trained over, and one line says so.
    """
    stored = table.stored
    if stored.kind == "host":
        return stored.data
    for found in _candidates(stored.folder, (table.num_embeddings, table.embedding_dim)):
        exact = found.to(stored.source)
        if _is(exact, stored):
            return exact
    line = f"{name} is merged with the numbers of its {stored.kind} storage: the base model's own were not found again"
    print(f"burnish: {line}", file=sys.stderr)
    return table.dense()


def _candidates(folder: Path | None, shape: tuple[int, int]) -> Iterable[Tensor]:
    """Every tensor of that shape in the safetensors of a folder and of those in it."""
    from safetensors import SafetensorError, safe_open

    files = [] if folder is None else sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")])
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if tuple(opened.get_slice(key).get_shape()) == shape:
                        yield opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot be read ({error})", where=str(file), fix="Restore the base model") from error


def _is(exact: Tensor, stored: Stored) -> bool:
    assert stored.scales is not None
    for rows in chunks(*exact.shape):
        data, scales = codes(exact[rows].to(stored.data.device), stored.kind)
        if not (torch.equal(data, stored.data[rows]) and torch.equal(scales, stored.scales[rows])):
            return False
    return True
