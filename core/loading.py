"""Everything that is decided about a model before a weight is read: family, dtype, backend, operations, with reasons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contracts import Family, Machine
from .errors import ConfigError, ModelError
from .machine import describe
from .options import LoadOptions
from .precision import PrecisionChoice, choose_precision
from .registry import Registry, registry
from .selection import BackendChoice, FamilyChoice, KernelChoice, choose_backend, choose_family, choose_kernel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The files whose presence decides how a repository is read.
PROBED = ("modules.json", "adapter_config.json", "config.json", "config_sentence_transformers.json", "1_Pooling/config.json")


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
    """What a model gets. `choose_*` filled it in; `burnish doctor` prints it; loading carries it out."""

    options: LoadOptions
    machine: Machine
    registry: Registry
    family: FamilyChoice
    precision: PrecisionChoice
    backend: BackendChoice
    attention: KernelChoice | None
    packed: bool
    packed_reason: str
    notes: tuple[str, ...] = field(default=())


def read_repository(name: str, *, config_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False, **hub: Any) -> Repository:
    """Find a repository's files and read its config, from a folder, the cache or the Hub. No weights.

    Args:
        name: A folder or a Hub id.
        config_kwargs: Overrides for the config, as transformers takes them.
        trust_remote_code: Whether the repository's own Python may run.
        **hub: token, cache_folder, revision, local_files_only.

    Raises:
        ModelError: If there is no config to be read.
    """
    from sentence_transformers.util import load_file_path
    from transformers import AutoConfig

    found = {file: path for file in PROBED if (path := load_file_path(name, file, **hub)) is not None}
    base: str | None = None
    source, keywords = name, {**hub, "cache_dir": hub.get("cache_folder")}
    keywords.pop("cache_folder", None)
    if "adapter_config.json" in found and "config.json" not in found:
        base = source = json.loads(Path(found["adapter_config.json"]).read_text(encoding="utf-8"))["base_model_name_or_path"]
        keywords["revision"] = None  # a revision names a commit of the adapter's repository, not of its base
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **{**keywords, **dict(config_kwargs or {})})
    except (OSError, ValueError) as error:
        owner = f"adapter {name}, base model {base}" if base else f"model {name}"
        fix = "Check the name or path, and the connection if it is on the Hub"
        raise ModelError(f"no usable config.json ({_first_line(error)})", where=owner, fix=fix) from error
    return Repository(name=name, files=frozenset(found), config=config, base=base)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def decide(options: LoadOptions, config: PretrainedConfig, device: str, *, base: str | None = None) -> Decision:
    """Choose family, dtype, backend and input layout for a model with this config on this device.

    Raises:
        PluginError, ConfigError, ModelError: Where something asked for cannot be had; see `selection` and `precision`.
    """
    if base and options.purpose == "full":
        raise ConfigError("the folder holds an adapter", where="full_finetuning", fix="Merge it first (save_pretrained_merged), or train the adapter on")
    machine = describe(device)
    plugins = registry(options.plugins)
    family = choose_family(plugins, config)
    backend = choose_backend(plugins, machine, options.backend)
    attention = choose_kernel(plugins, machine, "packed_attention")
    packed, reason = _packing(options, family.family, attention, machine)
    return Decision(
        options=options, machine=machine, registry=plugins, family=family, backend=backend, attention=attention,
        precision=choose_precision(options, family.family.precision, machine), packed=packed, packed_reason=reason,
        notes=_length_notes(options, config, family.family),
    )  # fmt: skip


def _packing(options: LoadOptions, family: Family, attention: KernelChoice | None, machine: Machine) -> tuple[bool, str]:
    if options.purpose == "inference":
        return False, "inference: stock modules"
    if options.packed is False:
        return False, "asked for"
    obstacle = None
    if family.packing is None:
        obstacle = f"family {family.name} does not say that packed input is exact"
    elif attention is None and family.packing.attention == "interface":
        obstacle = f"no enabled plugin has the operation packed_attention for {machine.device}"
    if obstacle and options.packed:
        raise ConfigError(obstacle, where="packed=True", fix="Pass packed=None or packed=False: padded input is exact too, and slower")
    if obstacle:
        return False, f"{obstacle}; every padding token is computed"
    name = attention.spec.name if attention else "the family's own patches"
    return True, f"no padding is computed; attention: {name}"


def _length_notes(options: LoadOptions, config: PretrainedConfig, family: Family) -> tuple[str, ...]:
    positions = getattr(config, "max_position_embeddings", None)
    wanted = options.max_seq_length
    if wanted is None or not isinstance(positions, int) or positions < 1:
        return ()
    room = positions - (family.packing.position_offset if family.packing else 0)
    if wanted > room:
        raise ConfigError(f"{wanted} is more than the {room} positions this {config.model_type} model has", where="max_seq_length", fix=f"Pass at most {room}")
    return ()
