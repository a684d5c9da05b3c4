"""A training run as one value: what a YAML file and the command line's flags both fill in, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError


def _option(default: Any, about: str, *, at_least: float | None = None, above: float | None = None) -> Any:
    """A field with its help text (shown by `burnish train --help`) and its lower bound."""
    metadata = {"help": about, "at_least": at_least, "above": above}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything about one fine-tuning run. Field names are the YAML keys, and with dashes the flags."""

    model: str = field(metadata={"help": "Hub id or folder of the model to fine-tune"})
    train: str = field(metadata={"help": "Training data: .jsonl, .csv, .parquet, a datasets folder, a retrieval folder, or a Hub id"})
    split: str = _option("train", "Split of a datasets folder, a retrieval folder or a Hub data set")
    columns: dict[str, str] = _option({}, "Your column for each role, e.g. anchor=question (YAML: a mapping)")
    on_bad_row: Literal["stop", "skip"] = _option("stop", "At a bad row: stop and name it, or skip and count it")
    max_rows: int | None = _option(None, "Read at most this many good rows", at_least=2)
    eval: str | None = _option(None, "Held-out retrieval folder (queries, corpus, qrels), measured before and after")
    eval_split: str = _option("test", "Which qrels of the retrieval folder to measure on")
    name: str | None = _option(None, "Name of the run; its folder is RUNS/NAME")
    runs: str = _option("runs", "Folder that holds the runs")
    overwrite: bool = _option(False, "Replace the results of an earlier run of this name")
    resume: bool = _option(False, "Go on from the last checkpoint of the run of this name")
    method: Literal["lora", "full"] = _option("lora", "Train an adapter, or every weight")
    rank: int = _option(16, "LoRA rank", at_least=1)
    alpha: float = _option(32.0, "LoRA alpha: the adapter counts alpha / rank times", above=0)
    lora_dropout: float = _option(0.0, "Dropout on the adapter's input", at_least=0)
    loss: str | None = _option(None, "Sentence Transformers loss by class name; left out, the columns decide")
    epochs: float = _option(1.0, "Passes over the training data", above=0)
    max_steps: int | None = _option(None, "Stop after this many optimizer steps instead", at_least=1)
    batch_size: int = _option(32, "Pairs in a batch: with in-batch negatives, also their number", at_least=2)
    accumulation: int = _option(1, "Batches per optimizer step (they share no negatives)", at_least=1)
    learning_rate: float | None = _option(None, "Peak learning rate; left out, 1e-3 for lora and 5e-5 for full", above=0)
    warmup: float = _option(0.0, "Share of the steps over which the learning rate rises", at_least=0)
    max_seq_length: int | None = _option(None, "Longest text in tokens; left out, the model's own", at_least=1)
    checkpointing: bool = _option(False, "Recompute activations in the backward pass: less memory, more time")
    save_steps: int | None = _option(None, "Write a checkpoint to resume from every so many steps", at_least=1)
    log_steps: int = _option(10, "Log the loss every so many steps", at_least=1)
    eval_batch_size: int = _option(64, "Texts in a batch when encoding for the evaluation", at_least=1)
    seed: int = _option(42, "Seed of data order, dropout and the adapter", at_least=0)
    dtype: Literal["float32", "bfloat16", "float16"] | None = _option(None, "Dtype of the weights; left out, the family's policy")
    load_in_4bit: bool = _option(False, "Store the frozen base in 4 bits (CUDA)")
    load_in_8bit: bool = _option(False, "Store the frozen base in 8 bits (CUDA)")
    device: str | None = _option(None, "cpu, cuda, cuda:1, mps; left out, the best there is")
    backend: str = _option("auto", "Execution backend by name")
    packed: bool | None = _option(None, "Unpadded input: yes, no, or left out for where it is exact")
    plugins: list[str] | None = field(default=None, metadata={"help": "Plugin to use by name, also in place of a built-in"})
    trust_remote_code: bool = _option(False, "Let the model repository's own Python run")
    revision: str | None = _option(None, "Branch, tag or commit of the model")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            _check(entry, hints[entry.name], getattr(self, entry.name))
        if self.method == "full" and (self.load_in_4bit or self.load_in_8bit):
            raise ConfigError("quantised weights cannot be trained in full", where="method", fix="Use method: lora, or drop load_in_4bit/load_in_8bit")
        if self.overwrite and self.resume:
            raise ConfigError("both are set", where="overwrite, resume", fix="Pass one of them")

    @property
    def run_name(self) -> str:
        """The run's name: as given, or from the model and the data."""
        return self.name or f"{Path(self.model).name}-{Path(self.train.split(':')[0]).stem.split('.')[0]}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.run_name

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.learning_rate if self.learning_rate is not None else {"lora": 1e-3, "full": 5e-5}[self.method]


def field_types() -> dict[str, Any]:
    """The type of every option, resolved."""
    return get_type_hints(RunConfig)


def _check(entry: Field[Any], hint: Any, value: Any) -> None:
    if not _fits(hint, value):
        raise ConfigError(f"{value!r} is not {_words(hint)}", where=entry.name, fix=str(entry.metadata["help"]))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        least, above = entry.metadata.get("at_least"), entry.metadata.get("above")
        if not math.isfinite(value) or (least is not None and value < least) or (above is not None and value <= above):
            bound = f"at least {least:g}" if least is not None else f"more than {above:g}" if above is not None else "finite"
            raise ConfigError(f"{value!r} is out of range", where=entry.name, fix=f"Use a number that is {bound}")


def _fits(hint: Any, value: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(part, value) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint) and not isinstance(value, bool)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
    if origin is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def _words(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(part) for part in get_args(hint) if part is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if origin is dict:
        return "a mapping of text to text"
    return "a list of texts" if origin is list else names.get(hint, str(hint))


def make_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """A config from plain values, as YAML or flags give them.

    Raises:
        ConfigError: For an unknown or missing key, naming `where` it stands and the nearest known one.
    """
    known = [entry.name for entry in fields(RunConfig)]
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            raise ConfigError(f"unknown key {key!r}", where=where, fix=f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}")
    for required in ("model", "train"):
        if values.get(required) is None:
            raise ConfigError(f"{required!r} is missing", where=where, fix=f"Add `{required}: …` to the file, or --{required} to the command")
    return RunConfig(**values)


def read_config(path: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """A config from a YAML file, with `overrides` (the flags given beside it) winning.

    Raises:
        ConfigError: If the file cannot be read or is not a mapping, with the line; or as `make_config`.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read ({error})", where=str(path), fix="Check the path") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"is not YAML ({getattr(error, 'problem', error)})", where=line, fix="Mend that line") from error
    if not isinstance(values, dict):
        raise ConfigError("holds no mapping of keys to values", where=str(path), fix="Write lines such as `model: …`")
    return make_config({**values, **overrides}, str(path))
