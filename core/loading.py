"""All that is decided about a model before a weight is read: family, dtype, backend, operations, with reasons."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .choices import BackendChoice, FamilyChoice, KernelChoice
from .contracts import Family, FamilySpec, Head, Machine
from .errors import ConfigError, ModelError
from .machine import describe
from .options import LoadOptions
from .precision import PrecisionChoice, choose_precision
from .quantised import stored_as
from .recall import remedy
from .registry import Registry, registry
from .selection import choose_backend, choose_family, choose_kernel

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

EMBED = "feature-extraction"
CLASSIFY, GENERATE = "sequence-classification", "text-generation"
"""Sentence Transformers' names for what a transformer is loaded for: of an embedding model, and of a cross-encoder."""

# The files whose presence decides how a repository is read.
PROBED = (
    "modules.json",
    "adapter_config.json",
    "config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A model repository before its weights: what files it has and the transformer's config.

    Args:
        name: The folder or Hub id, as Sentence Transformers resolved it.
        files: Which of `PROBED` it has.
        config: The transformer's config; for an adapter, its base model's.
        base: The adapter's base model, or None.
    """

    name: str
    files: frozenset[str]
    config: PretrainedConfig
    base: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a model gets. `decide` filled it in; `burnish doctor` prints it; loading carries it out.

    It is a fact about a config on a device, so copies share it, and a pickled one is decided afresh where it is read:
    another process finds the same plugins on its own.
    """

    options: LoadOptions
    config: PretrainedConfig
    device: str
    base: str | None
    machine: Machine
    registry: Registry
    family: FamilyChoice
    precision: PrecisionChoice
    backend: BackendChoice
    attention: KernelChoice | None
    tables: KernelChoice | None
    packed: bool
    packed_reason: str
    task: str

    @property
    def head(self) -> Head | None:
        """How the task's head reads a packed batch; None for embeddings, and where the family does not say."""
        return self.family.family.heads.get(self.task)

    def __deepcopy__(self, memo: dict[int, object]) -> Decision:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        made = {"precision": self.precision, "packed": self.packed, "packed_reason": self.packed_reason}
        return _decide_again, (self.options, self.config, self.device, self.base, self.task, made)


def read_repository(
    name: str,
    *,
    config_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    plugins: Iterable[str] | None = None,
    **hub: Any,
) -> Repository:
    """Find a repository's files and read its config, from a folder, the cache or the Hub. No weights.

    Args:
        name: A folder or a Hub id.
        config_kwargs: Overrides for the config, as transformers takes them.
        trust_remote_code: Whether the repository's own Python may run.
        plugins: Plugins that the run names. One that claims a model type which transformers does not know is asked
            before the config is read: it may bring the encoder's classes.
        **hub: token, cache_folder, revision, local_files_only.

    Raises:
        ModelError: If there is no config to be read.
    """
    from sentence_transformers.util import load_file_path

    found = {file: path for file in PROBED if (path := load_file_path(name, file, **hub)) is not None}
    base: str | None = None
    source, keywords = name, {**hub, "cache_dir": hub.get("cache_folder"), **_subfolder(found)}
    keywords.pop("cache_folder", None)
    if "adapter_config.json" in found and "config.json" not in found:
        base = source = json.loads(Path(found["adapter_config.json"]).read_text(encoding="utf-8"))[
            "base_model_name_or_path"
        ]
        keywords["revision"] = None  # a revision names a commit of the adapter's repository, not of its base
    keywords |= {"trust_remote_code": trust_remote_code, **dict(config_kwargs or {})}
    try:
        config = _read_config(source, keywords, plugins)
    except (OSError, ValueError) as error:
        owner = f"adapter {name}, base model {base}" if base else f"model {name}"
        # A type that transformers does not know may be one that a plugin brought the classes of.
        missed = remedy(name, plugins, **hub) if isinstance(error, ValueError) else None
        fix = missed or "Check the name or path, and the connection if it is on the Hub"
        raise ModelError(f"no usable config.json ({first_line(error)})", where=owner, fix=fix) from error
    return Repository(name=name, files=frozenset(found), config=config, base=base)


def _read_config(source: str, keywords: Mapping[str, Any], plugins: Iterable[str] | None) -> PretrainedConfig:
    """What AutoConfig reads. Where it does not know the model type, the plugins that claim the type are asked first:
    theirs may register classes of their own for it."""
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    def read() -> PretrainedConfig:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, **keywords)
        return config

    try:
        return read()
    except ValueError:
        kind = PretrainedConfig.get_config_dict(source, **keywords)[0].get("model_type")
        known = registry(plugins)
        claimants = known.claimants("model_type", kind) if kind and kind not in CONFIG_MAPPING else ()
        if not known.collect(claimants, "burnish_register_families", FamilySpec):
            raise
        return read()


def has_transformer(name: str, **hub: Any) -> bool:
    """Whether the repository's first module is a transformer; a static embedding or a custom module has no config."""
    from sentence_transformers.util import load_file_path

    path = load_file_path(name, "modules.json", **hub)
    return path is None or str(_first_module(path)["type"]).rpartition(".")[2] == "Transformer"


def skeleton(repository: Repository, task: str, trust_remote_code: bool) -> PreTrainedModel:
    """The transformer on the meta device, with its head: every module and name, no weight."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    kinds: dict[str, Any] = {
        CLASSIFY: AutoModelForSequenceClassification,
        GENERATE: AutoModelForCausalLM,
    }
    with torch.device("meta"):
        model: PreTrainedModel = kinds.get(task, AutoModel).from_config(
            repository.config, trust_remote_code=trust_remote_code
        )
    return model


def task_of(repository: Repository) -> str:
    """What a repository's transformer is for, as far as its files say: a head that is saved is meant to be read."""
    architecture = (repository.config.architectures or [""])[0]
    if "modules.json" in repository.files:
        return saved_task(repository.name)
    return CLASSIFY if architecture.endswith("ForSequenceClassification") else EMBED


def saved_task(name: str, **hub: Any) -> str:
    """What a repository with a `modules.json` loads its transformer for."""
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.util import load_file_path

    path = load_file_path(name, "modules.json", **hub)
    assert path is not None
    first = _first_module(path)
    settings = Transformer.load_config(name, subfolder=str(first.get("path", "")), **hub)
    return str(settings.get("transformer_task", EMBED))


def settings_of_base(name: str, given: Mapping[str, Any] | None, **hub: Any) -> dict[str, Any]:
    """What an adapter's folder, and whoever loads it, say of its base model's config, for `from_pretrained` of a model.

    Sentence Transformers before 6.2 hands none of it on: a base without a head would get one of two labels. Nothing
    from that version on, and of a folder that is no adapter's.
    """
    import sentence_transformers
    from packaging.version import Version
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.util import load_file_path

    handed_on = Version(sentence_transformers.__version__) >= Version("6.2")
    if handed_on or load_file_path(name, "adapter_config.json", **hub) is None:
        return {}
    return {**Transformer.load_config(name, **hub).get("config_kwargs", {}), **(given or {})}


def _first_module(modules_json: str) -> dict[str, Any]:
    first: dict[str, Any] = json.loads(Path(modules_json).read_text(encoding="utf-8"))[0]
    return first


def _subfolder(found: Mapping[str, str]) -> dict[str, str]:
    """Where the transformer lies: at the root, or in the folder that `modules.json` gives its first module."""
    if "modules.json" not in found or "config.json" in found or "adapter_config.json" in found:
        return {}
    return {"subfolder": str(_first_module(found["modules.json"]).get("path", ""))}


def first_line(error: Exception) -> str:
    """What an exception says, up to its first line break."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def decide(
    options: LoadOptions, config: PretrainedConfig, device: str, base: str | None = None, task: str = EMBED
) -> Decision:
    """Choose family, dtype, backend and input layout for a model with this config on this device.

    Args:
        options: What was asked for.
        config: The transformer's config.
        device: Where the model goes, such as "cpu" or "cuda:1".
        base: The base model's name if the repository holds an adapter.
        task: What the transformer is loaded for, by Sentence Transformers' name.

    Raises:
        PluginError, ConfigError, ModelError: Where something asked for cannot be had; see `selection` and `precision`.
    """
    stored = stored_as(config)
    options = options.resolved(base, stored)
    if base and options.purpose == "full":
        fix = "Merge it first (save_pretrained_merged), or train the adapter on"
        raise ConfigError("the folder holds an adapter", where="full_finetuning", fix=fix)
    machine = _machine(device)
    plugins = registry(options.plugins)
    family = choose_family(plugins, config)
    backend = choose_backend(plugins, machine, options.backend)
    attention = choose_kernel(plugins, machine, "packed_attention")
    tables = None if options.embedding_storage is None else choose_kernel(plugins, machine, "gather_rows")
    packed, reason = _packing(options, family.family, attention, machine, task)
    offset = family.family.packing.position_offset if family.family.packing else 0
    if options.max_seq_length is not None:
        check_length(options.max_seq_length, config, offset)
    precision = choose_precision(
        options, family.family.precision, machine, checkpoint=_config_dtype(config), stored=stored
    )
    if options.embedding_storage is not None:
        if tables is None:
            what = f"no enabled plugin has the operation gather_rows for {machine.device}"
            raise ConfigError(what, where="embedding_storage", fix="Drop it, or enable the plugin reference")
        lie = {"8bit": "8 bits", "4bit": "4 bits", "host": "host memory"}[options.embedding_storage]
        precision = replace(precision, reason=f"{precision.reason}, embedding tables in {lie}")
    return Decision(
        options=options, config=config, device=device, base=base, machine=machine, registry=plugins, family=family,
        precision=precision, backend=backend, attention=attention, tables=tables, packed=packed, packed_reason=reason,
        task=task,
    )  # fmt: skip


def _machine(device: str) -> Machine:
    try:
        return describe(device)
    except (RuntimeError, AssertionError) as error:  # torch's words for no such device, and for none of its kind here
        fix = 'Pass "cpu", "cuda", "cuda:1" or "mps", or leave it out for the best there is'
        raise ConfigError(f"{device!r} cannot be used ({first_line(error)})", where="device", fix=fix) from error


def _config_dtype(config: PretrainedConfig) -> torch.dtype | None:
    import torch

    named = config.dtype
    return getattr(torch, named.removeprefix("torch.")) if isinstance(named, str) else named


def _decide_again(
    options: LoadOptions, config: PretrainedConfig, device: str, base: str | None, task: str, made: dict[str, Any]
) -> Decision:
    """A pickled decision in the process that reads it; `made` is what has become of the model since."""
    return replace(decide(options, config, device, base, task), **made)


def _packing(
    options: LoadOptions, family: Family, attention: KernelChoice | None, machine: Machine, task: str
) -> tuple[bool, str]:
    if options.purpose == "inference":
        return False, "inference: stock modules"
    if options.packed is False:
        return False, "asked for"
    if options.attention is not None:
        return False, f"model_kwargs asks for the attention {options.attention}"
    obstacle = None
    if family.packing is None:
        obstacle = f"family {family.name} does not say that packed input is exact"
    elif task != EMBED and task not in family.heads:
        obstacle = f"family {family.name} does not say how a head for {task} reads packed input"
    elif attention is None:
        obstacle = f"no enabled plugin has the operation packed_attention for {machine.device}"
    if obstacle and options.packed:
        fix = "Pass packed=None or packed=False: padded input is exact too, and slower"
        raise ConfigError(obstacle, where="packed=True", fix=fix)
    if obstacle:
        return False, f"{obstacle}; every padding token is computed"
    assert attention is not None
    return True, f"no padding is computed; attention: {attention.spec.name}"


def room_of(config: PretrainedConfig, offset: int) -> int | None:
    """The tokens that a model has positions for, after the `offset` that it never uses; None if it names no number."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions - offset if isinstance(positions, int) and positions > 0 else None


def check_length(wanted: int, config: PretrainedConfig, offset: int) -> int:
    """`wanted`, if the model has positions for that many tokens after the `offset` that it never uses.

    Raises:
        ConfigError: If it has not, or `wanted` is not positive.
    """
    room = room_of(config, offset)
    if wanted < 1 or (room is not None and wanted > room):
        what = f"{wanted} is not between 1 and the {room or 'unlimited'} positions of this {config.model_type} model"
        raise ConfigError(what, where="max_seq_length", fix="Leave it out to keep the model's own")
    return wanted
