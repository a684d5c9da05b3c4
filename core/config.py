"""A training run as one value: what a YAML file and the command line's flags both fill in, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError
from .options import EmbeddingStorage

# The panels that `burnish train --help` groups its flags in.
DATA, MODEL, ADAPTER, TRAINING, MACHINE, RESULTS = "Data", "Model", "Adapter", "Training", "Machine", "Results"


@dataclass(frozen=True, slots=True)
class Option:
    """What the help says of a field, and the bounds of its value.

    Args:
        panel: The group of flags it stands in.
        help: One line.
        at_least, above, below, at_most: Bounds, where the value is a number.
    """

    panel: str
    help: str
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None

    def bounds(self) -> str:
        """The bounds in words: "at least 0 and less than 1"."""
        parts = {
            "at least": self.at_least,
            "more than": self.above,
            "less than": self.below,
            "at most": self.at_most,
        }
        return " and ".join(f"{word} {bound:.10g}" for word, bound in parts.items() if bound is not None) or "finite"

    def allows(self, value: float) -> bool:
        """Whether `value` is a number within the bounds."""
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )


Text = str | None
Count = int | None
DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything about one fine-tuning run. Field names are the YAML keys, and with dashes the flags.

    Raises:
        ConfigError: If a value is of the wrong type or out of range, or two contradict each other.
    """

    train: Annotated[str, Option(DATA, "A .jsonl, .csv or .parquet file, a datasets or retrieval folder, or a Hub id")]
    split: Annotated[str, Option(DATA, "Split of a folder or Hub data set; a single file has only train")] = "train"
    columns: Annotated[
        dict[str, str], Option(DATA, "Your column for a role, as ROLE=COLUMN (in YAML a mapping); repeat for each role")
    ] = field(default_factory=dict)
    on_bad_row: Annotated[
        Literal["stop", "skip"], Option(DATA, "At a bad row: stop and name it, or skip it and count it")
    ] = "stop"
    max_rows: Annotated[Count, Option(DATA, "Read at most this many good rows", at_least=2)] = None
    eval: Annotated[Text, Option(DATA, "Retrieval folder (queries, corpus, qrels), measured before and after")] = None
    eval_split: Annotated[str, Option(DATA, "Which qrels of the retrieval folder to measure on")] = "test"

    model: Annotated[str, Option(MODEL, "Hub id or folder of the model to fine-tune")]
    revision: Annotated[Text, Option(MODEL, "Branch, tag or commit of the model")] = None
    use_prompts: Annotated[
        bool, Option(MODEL, "Put the model's query and document prompts, if it has them, before the texts of pairs")
    ] = True
    trust_remote_code: Annotated[bool, Option(MODEL, "Let the model repository's own Python run")] = False
    max_seq_length: Annotated[Count, Option(MODEL, "Longest text in tokens; left out, the model's own", 1)] = None
    dtype: Annotated[DType | None, Option(MODEL, "Dtype of the weights; left out, the family's policy")] = None
    load_in_4bit: Annotated[bool, Option(MODEL, "Store the frozen base in 4 bits: NF4")] = False
    load_in_8bit: Annotated[bool, Option(MODEL, "Store the frozen base in 8 bits: LLM.int8()")] = False
    embedding_storage: Annotated[
        EmbeddingStorage | None,
        Option(MODEL, "Keep an adapter's frozen embedding tables in 8 or 4 bits or on the host"),
    ] = None

    method: Annotated[Literal["lora", "full"], Option(ADAPTER, "Train an adapter, or every weight")] = "lora"
    rank: Annotated[int, Option(ADAPTER, "LoRA rank", at_least=1)] = 16
    alpha: Annotated[float, Option(ADAPTER, "LoRA alpha: the adapter counts alpha / rank times", above=0)] = 32.0
    lora_dropout: Annotated[float, Option(ADAPTER, "Dropout on the adapter's input", at_least=0, below=1)] = 0.0

    loss: Annotated[Text, Option(TRAINING, "Sentence Transformers loss by name; left out, the columns decide")] = None
    epochs: Annotated[float, Option(TRAINING, "Passes over the training data", above=0)] = 1.0
    max_steps: Annotated[Count, Option(TRAINING, "Stop after this many optimizer steps instead", at_least=1)] = None
    batch_size: Annotated[int, Option(TRAINING, "Pairs in a batch: in-batch negatives come from it", at_least=2)] = 32
    accumulation: Annotated[int, Option(TRAINING, "Batches in an optimizer step (they share no negatives)", 1)] = 1
    learning_rate: Annotated[
        float | None, Option(TRAINING, "Peak learning rate; left out, 1e-3 for lora and 5e-5 for full", above=0)
    ] = None
    warmup: Annotated[float, Option(TRAINING, "Share of the steps over which the rate rises", at_least=0, below=1)] = (
        0.0
    )
    checkpointing: Annotated[
        Literal["off", "on", "selective", "offload"],
        Option(TRAINING, "Recompute activations, all or those that are cheap, or keep them on the host"),
    ] = "off"
    activation_budget: Annotated[
        float | None, Option(TRAINING, "GB of activations to keep; the rest is recomputed", above=0)
    ] = None
    seed: Annotated[int, Option(TRAINING, "Seed of data order, dropout and adapter", at_least=0, at_most=2**32 - 1)] = (
        42
    )

    device: Annotated[Text, Option(MACHINE, "cpu, cuda, cuda:1, mps; left out, the best there is")] = None
    backend: Annotated[str, Option(MACHINE, "How a step is executed: a backend's name, or auto")] = "auto"
    packed: Annotated[bool | None, Option(MACHINE, "Unpadded input; left out, wherever it is exact")] = None
    auto_batch: Annotated[bool, Option(MACHINE, "Cut batches into forwards that fit; negatives stay")] = False
    plugins: Annotated[list[str] | None, Option(MACHINE, "Plugin to use by name, also in place of a built-in")] = None
    eval_batch_size: Annotated[int, Option(MACHINE, "Texts in a batch when encoding for the evaluation", 1)] = 64

    name: Annotated[Text, Option(RESULTS, "Name of the run; its folder is RUNS/NAME. Left out: MODEL-DATA")] = None
    runs: Annotated[str, Option(RESULTS, "Folder that holds the runs")] = "runs"
    overwrite: Annotated[bool, Option(RESULTS, "Replace the results of an earlier run of this name")] = False
    save_steps: Annotated[Count, Option(RESULTS, "Write a checkpoint to resume from every so many steps", 1)] = None
    resume: Annotated[bool, Option(RESULTS, "Go on from the last whole checkpoint of the run of this name")] = False
    log_steps: Annotated[int, Option(RESULTS, "Log the loss every so many steps", at_least=1)] = 10

    def __post_init__(self) -> None:
        for name, (hint, option) in described().items():
            _check(name, hint, option, getattr(self, name))
        if self.method == "full" and (self.load_in_4bit or self.load_in_8bit):
            fix = "Use method lora, or drop load_in_4bit and load_in_8bit"
            raise ConfigError("quantised weights cannot be trained in full", where="method", fix=fix)
        if self.method == "full" and self.embedding_storage is not None:
            fix = "Use method lora, or drop embedding_storage"
            raise ConfigError("tables that are stored otherwise cannot be trained", where="method", fix=fix)
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("both are set", where="load_in_4bit, load_in_8bit", fix="Set one of them")
        if self.activation_budget is not None and self.checkpointing == "selective":
            fix = "Pass on or offload: what becomes of the layers that the budget has no room for"
            raise ConfigError("a budget chooses by itself", where="checkpointing", fix=fix)
        if self.overwrite and self.resume:
            raise ConfigError("both are set", where="overwrite, resume", fix="Set one of them")
        if self.name is not None and (self.name != Path(self.name).name or self.name == ".."):
            raise ConfigError(
                f"{self.name!r} is not the name of one folder", where="name", fix="Put the path into runs"
            )

    @property
    def run_name(self) -> str:
        """The run's name: as given, or from the model and the data."""
        data = self.train.partition(":")[0] if not Path(self.train).exists() else self.train
        model = Path(self.model).name or Path(self.model).resolve().name
        return self.name or f"{model}-{Path(data).name.split('.')[0]}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.run_name

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.learning_rate if self.learning_rate is not None else {"lora": 1e-3, "full": 5e-5}[self.method]


def described() -> dict[str, tuple[Any, Option]]:
    """{field: (its type, its `Option`)} of every field of `RunConfig`, in order."""
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in _hints().items()}


def _hints() -> dict[str, Any]:
    return get_type_hints(RunConfig, include_extras=True)


def _check(name: str, hint: Any, option: Option, value: Any) -> None:
    if not _fits(hint, value):
        raise ConfigError(f"{value!r} is not {_words(hint)}", where=name, fix=f"What it is: {option.help}")
    if isinstance(value, str) and not value.strip():
        raise ConfigError("is empty", where=name, fix=f"What it is: {option.help}")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not option.allows(value):
        raise ConfigError(f"{value!r} is out of range", where=name, fix=f"Use a number that is {option.bounds()}")


def _fits(hint: Any, value: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(part, value) for part in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
    if origin is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(part) for part in get_args(hint) if part is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if origin is dict:
        return "a mapping of text to text"
    return "a list of texts" if origin is list else names[hint]


def make_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """A config from plain values, as YAML or flags give them.

    Raises:
        ConfigError: For an unknown or missing key, naming `where` it stands and the nearest known one.
    """
    known = [entry.name for entry in fields(RunConfig)]
    for key in values:
        if key not in known:
            near = get_close_matches(str(key).replace("-", "_"), known, 1)
            fix = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}"
            raise ConfigError(f"unknown key {key!r}", where=where, fix=fix)
    for required in ("model", "train"):
        if values.get(required) is None:
            fix = f"Add `{required}: …` to the file, or --{required} to the command"
            raise ConfigError(f"{required!r} is missing", where=where, fix=fix)
    if isinstance(switch := values.get("checkpointing"), bool):  # what YAML makes of on and off
        values = {**values, "checkpointing": "on" if switch else "off"}
    return RunConfig(**values)


def read_config(path: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """A config from a YAML file, with `overrides` (the flags given beside it) winning.

    Raises:
        ConfigError: If the file cannot be read or is not a mapping, with the line; or as `make_config`.
    """
    try:
        import yaml
    except ImportError as error:
        fix = "pip install 'burnish[cli]'"
        raise ConfigError("reading a config file needs PyYAML, which is not installed", fix=fix) from error
    from .yaml_config import Loader

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot be read ({reason})", where=str(path), fix="Check the path and the file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"is not valid YAML ({problem})", where=line, fix="Mend that line") from error
    if not isinstance(values, dict):
        raise ConfigError("holds no mapping of keys to values", where=str(path), fix="Write lines such as `model: …`")
    return make_config({**values, **overrides}, str(path))
