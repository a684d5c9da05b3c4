"""A run's texts, tokenised once: which runs can have that, and their loader in place of Sentence Transformers' own.

The loader's data set yields row numbers; texts are read once, when they are tokenised. A data set that is streamed has
no store: a buffer of its rows is tokenised ahead of use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from .collating import AHEAD, Labels, Part, Rows, StreamCollator, StreamedRows
from .errors import DataError, ModelError
from .packing import POOLS_PACKED_PROMPTS
from .token_store import store_folder, token_column
from .tokenising import Recipe, why_not


def refusal(model: Any, dataset: Any, collator: Any) -> str | None:
    """Why a run's texts cannot be tokenised ahead; None if they can.

    Args:
        model: A SentenceTransformer.
        dataset: What the run trains on.
        collator: The run's collator.
    """
    from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]
    from datasets import IterableDataset as Streamed
    from sentence_transformers import SentenceTransformerTrainer

    if getattr(model, "burnish", None) is None or model.burnish.packed is None:
        return "the input is padded"
    own: type[Any] = SentenceTransformerTrainer.data_collator_class
    kind: type[Any] = type(collator)
    if kind is not own or collator.preprocess_fn != model.preprocess:
        return "a data collator was given"
    if collator.router_mapping or getattr(collator, "max_length", None):
        return "columns are routed, or cut to lengths of their own"
    if not POOLS_PACKED_PROMPTS and collator.prompts and _Recipes(model).leaves_out:
        return "pooling leaves its prompt out, for which Sentence Transformers before 6.2 takes padded input"
    if reason := why_not(model):
        return reason
    if isinstance(dataset, Streamed):
        return _streaming_refusal(dataset, collator)
    parts = dataset.values() if isinstance(dataset, DatasetDict) else [dataset]
    for part in parts:
        if not isinstance(part, Dataset):
            return f"the data set is a {type(part).__name__}"
        if (reason := format_refusal(part)) or (reason := _column_refusal(part, collator)):
            return reason
    return None


def format_refusal(dataset: Any) -> str | None:
    """Why the rows of a `datasets.Dataset` are not simply what it holds; None if they are."""
    how = dataset.format
    if how["type"] in (None, "torch"):
        return None
    if how["type"] == "custom":
        transform = how["format_kwargs"].get("transform")
        # Sentence Transformers' own, which adds the data set's name; it wraps the user's where there is one.
        if isinstance(transform, partial) and getattr(transform.func, "__name__", "") == "add_dataset_name_transform":
            return "the data set has a transform" if transform.keywords.get("transform") else None
        return "the data set has a transform"
    return f"the data set has the format {how['type']}"


def _column_refusal(dataset: Any, collator: Any) -> str | None:
    for name in text_columns(dataset, collator):
        if getattr(dataset.features[name], "dtype", None) not in ("string", "large_string"):
            return f"column {name} holds no plain texts"
    return None


def _streaming_refusal(dataset: Any, collator: Any) -> str | None:
    from accelerate import PartialState  # type: ignore[import-untyped]

    if PartialState().num_processes > 1:  # accelerate then cuts batches of rows in pieces, and a stream is one row
        return "the data set is streamed to several processes"
    if dataset.features is None:
        return "the streamed data set has no features"
    return _column_refusal(dataset, collator)


def _visible(dataset: Any) -> list[str]:
    formatted = getattr(dataset, "format", None)
    columns = formatted["columns"] if formatted else dataset.column_names
    return [name for name in dataset.column_names if name in columns]


def text_columns(dataset: Any, collator: Any) -> list[str]:
    """The columns of texts, in their order."""
    label = label_column(dataset, collator)
    return [name for name in _visible(dataset) if name not in ("dataset_name", label)]


def label_column(dataset: Any, collator: Any) -> str | None:
    """The column that Sentence Transformers' collator takes for the labels."""
    columns = _visible(dataset)
    return next((name for name in collator.valid_label_columns if name in columns), None)


@dataclass(slots=True, kw_only=True)
class Feed:
    """A run's rows and how to collate them; `texts`, `tokens` and `seconds` say what tokenising did.

    `prompts` says why columns are embedded one by one though the loss takes a stream; None where they are not.
    """

    rows: Rows | StreamedRows
    collator: StreamCollator
    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    spent: float = 0.0
    folder: str = ""
    prompts: str | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether the rows come one after another, from a data set without numbers."""
        return isinstance(self.rows, StreamedRows)

    def said(self) -> str:
        """One line on what was tokenised, and where it is."""
        if self.is_streamed:
            return f"texts are streamed: tokenised {AHEAD:,} rows ahead, kept nowhere"
        return f"{self.texts:,} texts, {self.tokens:,} tokens, {said_of_store(self.seconds, self.folder, self.spent)}"

    def loader(self, stock: DataLoader[Any]) -> DataLoader[Any]:
        """A loader of these rows, in the order and with the workers of Sentence Transformers' own."""
        if isinstance(self.rows, StreamedRows):
            settings = worker_settings(stock)
            return DataLoader(
                self.rows, batch_size=stock.batch_size, drop_last=stock.drop_last, collate_fn=self.collator, **settings
            )
        return loader_like(stock, self.rows, self.collator)


def worker_settings(stock: DataLoader[Any]) -> dict[str, Any]:
    """How many processes a loader has, and how they hand batches over."""
    names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
    return {name: getattr(stock, name) for name in names}


def loader_like(stock: DataLoader[Any], rows: Any, collator: Any) -> DataLoader[Any]:
    """A loader of other rows in the order and with the workers of Sentence Transformers' own."""
    return DataLoader(rows, batch_sampler=stock.batch_sampler, collate_fn=collator, **worker_settings(stock))


def said_of_store(seconds: float, folder: str, spent: float) -> str:
    """The end of the line on what was tokenised: how long that took, where the tokens are, when all was ready."""
    how = f"tokenised in {seconds:.1f} s into" if seconds else "found tokenised in"
    return f"{how} {folder} (ready in {spent:.1f} s)"


def name_of(dataset: Any) -> str | None:
    """What Sentence Transformers calls a data set among several, which it has a transform add to each row."""
    transform = dataset.format["format_kwargs"].get("transform")
    return None if transform is None else transform.keywords.get("dataset_name")


def feed(
    model: Any, dataset: Any, stock: Any, *, folder: str | None = None, joint: bool, say: Callable[[str], None]
) -> Feed:
    """Tokenise a run's texts, or find them tokenised.

    Args:
        model: A packed SentenceTransformer.
        dataset: What `refusal` lets pass: a `Dataset`, a `DatasetDict`, or an `IterableDataset`.
        stock: The run's collator: its prompts and label columns hold.
        folder: Of the token stores; None for the user's cache.
        joint: Whether all columns make one stream. Columns with a prompt that pooling leaves out never do.
        say: Told, in one line, what is worth knowing.

    Raises:
        BurnishError: If the stores cannot be written.
        DataError: If a text or a label is missing.
        ModelError: If a store's tokens are not what the model's preprocessing makes of the texts.
    """
    from datasets import IterableDataset as Streamed

    started = time.perf_counter()
    recipes = _Recipes(model)
    named = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    place = store_folder(folder)
    is_streamed = isinstance(dataset, Streamed)
    if is_streamed:
        parts, sizes = [_streamed_part(dataset, stock, recipes)], [0]
    else:
        parts = [_stored_part(data, stock, recipes, place, say) for data in named]
        sizes = [len(data) for data in named]
    prompts = recipes.leaves_out and any(part.prompt_lengths for part in parts)
    packing = model.burnish.decision.family.family.packing
    collator = StreamCollator(
        parts=parts, starts=[0, *accumulate(sizes)][: len(sizes)], joint=joint and not prompts,
        position_offset=packing.position_offset, filler=model.tokenizer.pad_token_id or 0,
        valid_label_columns=tuple(stock.valid_label_columns),
    )  # fmt: skip
    why = "pooling leaves its prompt out" if joint and prompts else None
    if is_streamed:
        rows = StreamedRows(dataset, parts[0].columns, label_column(dataset, stock))
        return Feed(rows=rows, collator=collator, prompts=why)
    for number, data in enumerate(named):
        _check(collator, number, data, stock)
    columns = [column for part in parts for column in part.columns.values()]
    return Feed(
        rows=Rows(sum(sizes)), collator=collator, texts=sum(len(column) for column in columns),
        tokens=sum(column.tokens for column in columns), seconds=sum(column.seconds for column in columns),
        spent=time.perf_counter() - started, folder=str(place), prompts=why,
    )  # fmt: skip


class _Recipes:
    """A recipe for each prompt, so that the tokenizer is hashed once."""

    def __init__(self, model: Any) -> None:
        self.model, self._made = model, dict[str, Recipe]()
        self.leaves_out = any(not getattr(module, "include_prompt", True) for module in model.children())

    def of(self, columns: Sequence[str], stock: Any, name: str | None) -> dict[str, Recipe]:
        prompts = stock._resolve_prompts({} if name is None else {"dataset_name": name})
        found = {}
        for column in columns:
            prompt = stock._get_prompt_for_column(prompts, column) or ""
            found[column] = self._made.setdefault(prompt, Recipe(self.model, prompt))
        return found

    def prompt_lengths(self, recipes: Mapping[str, Recipe]) -> dict[str, int]:
        """Of each column that has a prompt."""
        lengths = {column: recipe.prompt_length() for column, recipe in recipes.items()}
        return {column: length for column, length in lengths.items() if length is not None}


def _streamed_part(dataset: Any, stock: Any, recipes: _Recipes) -> Part:
    columns = recipes.of(text_columns(dataset, stock), stock, None)
    return Part(columns=columns, prompt_lengths=recipes.prompt_lengths(columns))


def _stored_part(dataset: Any, stock: Any, recipes: _Recipes, place: Any, say: Callable[[str], None]) -> Part:
    name = name_of(dataset)
    how = recipes.of(text_columns(dataset, stock), stock, name)
    columns = {column: token_column(dataset, column, recipe, place, say) for column, recipe in how.items()}
    label = label_column(dataset, stock)
    labels = None if label is None else _read_labels(dataset, label)
    return Part(columns=columns, labels=labels, prompt_lengths=recipes.prompt_lengths(how), name=name)


def _read_labels(dataset: Any, label: str) -> Labels:
    """The labels, as `torch.tensor` would have a list of them: int64, float32 or bool; lists stay lists."""
    found = dataset.with_format("arrow", columns=[label])[:].column(0)
    if found.null_count:
        fix = "Leave those rows out"
        raise DataError(f"{found.null_count} labels are missing", where=f"column {label}", fix=fix)
    kinds = ((pa.types.is_integer, np.int64), (pa.types.is_floating, np.float32), (pa.types.is_boolean, np.bool_))
    for fits, dtype in kinds:
        if fits(found.type):
            values: NDArray[Any] = found.to_numpy()
            return values.astype(dtype)
    listed: list[Any] = found.to_pylist()
    return listed


def _check(collator: StreamCollator, number: int, dataset: Any, stock: Any) -> None:
    """The first row, as it comes out of the store, against the stock collator, which warns of odd columns here too."""
    if not len(dataset):
        return
    expected = stock([dataset[0]])
    apart = StreamCollator(
        parts=collator.parts, starts=collator.starts, joint=False, position_offset=collator.position_offset
    )
    found = apart([collator.starts[number]])
    for key in {*expected, *found}:
        theirs, ours = expected.get(key), found.get(key)
        same = torch.equal(theirs, ours) if isinstance(theirs, Tensor) and isinstance(ours, Tensor) else theirs == ours
        if not same:
            what = f"the first row's {key} is not what the model's own preprocessing makes of it"
            raise ModelError(what, where="token store", fix="Pass TrainingArguments(token_store=False)")


__all__ = ["Feed", "Part", "Rows", "StreamCollator", "StreamedRows", "feed", "refusal"]
