"""The model a user holds: Sentence Transformers' own class, prepared for training and able to merge its adapter."""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer as Stock
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule
from torch import nn

from . import saving
from .adapters import adapter_base, freeze_after_pooling, mend_saved, read_adapter
from .errors import ConfigError
from .files import atomic_folder
from .inputs import prompt_notes, texts_as_they_are
from .loading import Decision, Repository, check_length, decide, has_transformer, read_repository
from .options import LoadOptions, model_kwargs_dtype
from .packing import POOLS_PACKED_PROMPTS, padded, pool_packed
from .precision import PrecisionChoice
from .preparation import Preparation, attention_name, describe_pooling, prepare, set_checkpointing
from .provenance import Provenance, write
from .quantised import check_intact, settle
from .recall import recall
from .tables import base_folder, store_tables, undo_tables

if TYPE_CHECKING:
    from typing import Self

# Where `encode` takes, after `self`, what it shall return.
_OUTPUT_VALUE = list(signature(Stock.encode).parameters).index("output_value") - 1
_SENTENCE = "sentence_embedding"


class SentenceTransformer(Stock):
    """`sentence_transformers.SentenceTransformer`, prepared for training: one changed import moves a script.

    Takes what that class takes, plus `options`. Made without options it is loaded for full fine-tuning, in float32
    unless `model_kwargs` says otherwise, which is what a Sentence Transformers script expects of it.

    `trained_with` is what the loaded folder's `burnish.json` says, None where there is none.

    Raises:
        BurnishError: Where something asked for cannot be had; the message says what to do.
    """

    burnish: Preparation | None = None
    trained_with: Provenance | None = None
    _options: LoadOptions
    _asked_device: str
    _pooling_source: str
    _given_prompts: frozenset[str]
    _texts_notes: list[tuple[str, str]]
    _pending: tuple[Repository, Decision] | None

    def __init__(
        self, model_name_or_path: str | None = None, *, options: LoadOptions | None = None, **keywords: Any
    ) -> None:
        # Set around nn.Module's own bookkeeping, which is not there before its __init__ has run.
        object.__setattr__(self, "_options", options or _script_options(keywords.get("model_kwargs")))
        object.__setattr__(self, "_pending", None)
        object.__setattr__(self, "_texts_notes", [])
        object.__setattr__(self, "_pooling_source", "as given")
        object.__setattr__(self, "_given_prompts", frozenset(keywords.get("prompts") or ()))
        if keywords.get("backend", "torch") != "torch":
            fix = "Load it with sentence_transformers.SentenceTransformer, which runs that backend"
            raise ConfigError(f"{keywords['backend']!r} is for inference only", where="backend", fix=fix)
        placement = (keywords.get("model_kwargs") or {}).get("device_map")
        object.__setattr__(self, "_asked_device", _device_name(keywords.get("device"), placement))
        super().__init__(model_name_or_path, **keywords)
        self._prepare()

    def read_checkpoint(self, folder: str | Path) -> Mapping[str, torch.Tensor]:
        """The state dict of a checkpoint of this model, adapter weights under the names they have here."""
        classes = {f"{type(module).__module__}.{type(module).__name__}": type(module) for module in self.modules()}
        options = LoadOptions(purpose="script", packed=False, plugins=self._options.plugins, quiet=True)
        read = type(self)._load_with_module_classes(
            str(folder), classes, options=options, device="cpu", trust_remote_code=self.trust_remote_code
        )
        return read.state_dict()

    @classmethod
    def _load_with_module_classes(cls, model_name_or_path: str, module_classes: Any, **keywords: Any) -> Self:
        # How Sentence Transformers' trainer reads a checkpoint back: nothing of it reaches the user but its weights.
        keywords.setdefault("options", LoadOptions(purpose="script", quiet=True))
        return super()._load_with_module_classes(model_name_or_path, module_classes, **keywords)

    # Sentence Transformers calls the two methods below while it loads: before any weight is read, with the repository's
    # name, revision and token already worked out.

    def _load_modules(self, model_name_or_path: str, *args: Any, **keywords: Any) -> tuple[Any, dict[str, Any]]:
        hub = {key: keywords.get(key) for key in ("token", "cache_folder", "revision", "local_files_only")}
        if not has_transformer(model_name_or_path, **hub):
            loaded: tuple[Any, dict[str, Any]] = super()._load_modules(model_name_or_path, *args, **keywords)
            return loaded
        trust = bool(keywords.get("trust_remote_code"))
        repository = read_repository(
            model_name_or_path,
            config_kwargs=keywords.get("config_kwargs"),
            trust_remote_code=trust,
            plugins=self._options.plugins,
            **hub,
        )
        decision = decide(self._options, repository.config, self._asked_device, repository.base)
        self._pending = (repository, decision)
        self.trained_with = recall(model_name_or_path, decision, **hub)
        self._pooling_source = "modules.json"
        if self._options.pooling_mode is not None and "modules.json" in repository.files:
            fix = "Drop pooling_mode, or load the bare transformer"
            raise ConfigError("the repository's modules.json says how it is pooled", where="pooling_mode", fix=fix)
        keywords["model_kwargs"] = _with_precision(keywords.get("model_kwargs"), decision)
        modules: tuple[Any, dict[str, Any]] = super()._load_modules(model_name_or_path, *args, **keywords)
        if decision.options.purpose != "inference":
            first = modules[0][0] if isinstance(modules[0], list) else next(iter(modules[0].values()))
            settle(first.model, decision.precision, fresh=True)
            hub["cache_dir"] = hub.pop("cache_folder")
            if repository.base is not None:
                read_adapter(first.model, model_name_or_path, **hub)
            if decision.options.embedding_storage is not None:  # before the model goes to its device
                folder = base_folder(repository.config, repository.base, hub["cache_dir"])
                store_tables(first.model, decision, folder)
        return modules

    def _load_default_modules(self, model_name_or_path: str, *args: Any, **keywords: Any) -> tuple[Any, dict[str, Any]]:
        modules, module_kwargs = super()._load_default_modules(model_name_or_path, *args, **keywords)
        stock = self._options.purpose == "inference" and self._options.pooling_mode is None
        if self._pending is None or stock or len(modules) < 2:
            return modules, module_kwargs
        repository, decision = self._pending
        family = decision.family.family
        rule = decision.family.pooling(repository.config, repository.files)
        if self._options.pooling_mode is not None:
            rule = replace(rule, mode=self._options.pooling_mode)  # type: ignore[arg-type]
        asked = "asked for" if self._options.pooling_mode else f"default of family {family.name}"
        self._pooling_source = f"{asked}, no modules.json"
        first: Any = next(iter(modules.values())) if isinstance(modules, OrderedDict) else modules[0]
        object.__setattr__(self, "_texts_notes", texts_as_they_are(first))
        width = first.get_embedding_dimension()
        pooled: list[nn.Module] = [first, PoolingModule(width, rule.mode, include_prompt=rule.include_prompt)]
        return [*pooled, Normalize()] if rule.normalize else pooled, module_kwargs

    def _prepare(self) -> None:
        if (wanted := self.truncate_dim) is not None:
            self.truncate_dim = None  # which the width would answer with otherwise
            _check_width(wanted, self.get_embedding_dimension())
            self.truncate_dim = wanted
        if not isinstance(self[0], Transformer) or self.transformers_model is None:
            return  # a static or custom first module: nothing here to choose, patch or pack
        bare = self._pending is not None and "modules.json" not in self._pending[0].files
        if self._pending is None:
            decision = decide(self._options, self.transformers_model.config, str(self.device))
            given = PrecisionChoice(dtype=self.transformers_model.dtype, reason="as the modules came")
            decision = replace(decision, precision=given)
        else:
            decision = self._pending[1]
        self._pending = None
        options = decision.options
        if options.max_seq_length is not None:
            self.max_seq_length = self.check_max_seq_length(options.max_seq_length)
        self.burnish = prepare(self._first_module(), self.transformers_model, decision)
        self.burnish.pooling = describe_pooling(self, self._pooling_source)
        for module in self.children() if self.burnish.packed else ():
            if isinstance(module, PoolingModule):
                pool_packed(module)
        if options.purpose != "inference":
            if decision.base is not None:
                self.burnish.notes += [("after pooling", line) for line in freeze_after_pooling(self, frozenset())]
            self.burnish.notes += [*self._texts_notes, *prompt_notes(self, self._given_prompts, bare=bare)]
            decision.registry.observers("model_loaded")(model=self)
            if not options.quiet:
                print(f"burnish: {_short_name(self)} is ready to train\n{self.burnish}", file=sys.stderr)

    def check_max_seq_length(self, tokens: int) -> int:
        """`tokens`, if texts may be that long.

        Raises:
            ConfigError: If the model has fewer positions than that.
        """
        first: Any = self._first_module()
        return check_length(tokens, first.config, first._infer_flatten_position_offset())

    def save(
        self,
        path: str | Path,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Save to a folder: the adapter where there is one (with all that is needed to load it again), else the model.

        The folder appears whole or not at all. Burnish and plain Sentence Transformers both load it.

        Raises:
            ConfigError: With `safe_serialization=False`: only safetensors are written. Or if the folder is that of the
                adapter's base model, which the adapter would take the place of.
        """
        if not safe_serialization:
            raise ConfigError("only safetensors are written", where="safe_serialization=False", fix="Drop it")
        base = Path(adapter_base(self.transformers_model) or "")
        if base.name and base.is_dir() and Path(path).is_dir() and base.samefile(path):
            fix = "Save to another folder, or save_pretrained_merged"
            raise ConfigError("the adapter needs the base model in this folder", where=str(path), fix=fix)
        if self.transformers_model is not None:
            check_intact(self.transformers_model)
        with atomic_folder(Path(path)) as staging, warnings.catch_warnings():
            if self._vocabulary_is_the_base_models():
                # PEFT asks the Hub for the base model's, and warns where it gets no answer.
                message = "Could not find a config file in .* vocabulary"
                warnings.filterwarnings("ignore", message=message, category=UserWarning)
            super().save(str(staging), model_name, create_model_card, train_datasets)
            mend_saved(staging)
            write(self, staging)
        # The card's assets go where the model went, not to the staging folder.
        self.model_card_data.save_dir = str(path)
        if self.burnish is not None:
            self.burnish.decision.registry.observers("model_saved")(model=self, folder=Path(path))

    def _vocabulary_is_the_base_models(self) -> bool:
        loaded = self.burnish.decision.config if self.burnish is not None else None
        return self.config is not None and getattr(self.config, "vocab_size", 0) == getattr(loaded, "vocab_size", None)

    def merged(self, save_method: str | None = None) -> Stock:
        """A plain SentenceTransformer with the adapter folded in; this model keeps its adapter and can train on.

        See `save_pretrained_merged` for `save_method`.
        """
        return saving.merged_model(self, save_method)

    def save_pretrained_merged(self, path: str | Path, tokenizer: Any = None, save_method: str | None = None) -> None:
        """Save a full model with the adapter folded in: stock modules that anything loads.

        Args:
            path: The folder; it appears whole or not at all.
            tokenizer: Saved in place of the model's own if given.
            save_method: None for the dtype the weights were loaded in; "merged_16bit" for float16 (bfloat16 where they
                are bfloat16 already or the family refuses float16); "merged_32bit" for float32; "lora" for the adapter.

        Raises:
            ConfigError: For another `save_method`.
        """
        saving.save_merged(self, Path(path), tokenizer, save_method)

    def push_to_hub_merged(
        self,
        repo_id: str,
        tokenizer: Any = None,
        save_method: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        exist_ok: bool = True,
    ) -> str:
        """Push what `save_pretrained_merged` would save; returns the commit's URL.

        `token=None` means the one that `hf auth login` left or `HF_TOKEN` holds.
        """
        return saving.push_merged(
            self, repo_id, tokenizer, save_method, token=token, private=private, commit_message=commit_message,
            revision=revision, create_pr=create_pr, exist_ok=exist_ok,
        )  # fmt: skip

    if not TYPE_CHECKING:  # for a checker the signatures, with their overloads, stay Sentence Transformers' own

        @wraps(Stock.encode)
        def encode(self, *args: Any, **keywords: Any) -> Any:
            asked = args[_OUTPUT_VALUE] if len(args) > _OUTPUT_VALUE else keywords.get("output_value", _SENTENCE)
            # Token embeddings are cut out by the attention mask, which packed input does not have.
            with nullcontext() if asked == _SENTENCE else padded(self._first_module()):
                return super().encode(*args, **keywords)

        @wraps(Stock.forward)
        def forward(self, input: Any, **keywords: Any) -> Any:
            # A loss asks for each column's embeddings; those of a stream are there already (`Trainer.compute_loss`).
            if self.burnish is not None and "sentence_embedding" in input and "input_ids" not in input:
                return dict(input)
            return super().forward(input, **keywords)

        @wraps(Stock.preprocess)
        def preprocess(self, inputs: Any, prompt: str | None = None, **keywords: Any) -> Any:
            unsure = prompt and not POOLS_PACKED_PROMPTS
            leaves_out = unsure and any(not getattr(module, "include_prompt", True) for module in self.children())
            with padded(self._first_module()) if leaves_out else nullcontext():
                return super().preprocess(inputs, prompt, **keywords)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """What a trainer calls for `gradient_checkpointing=True`; one loaded with "selective" or "offload" keeps that.

        Raises:
            ModelError: If this architecture has no checkpointing: Sentence Transformers would log it and go on without.
        """
        if self.burnish is None or self.transformers_model is None:
            super().gradient_checkpointing_enable(dict(activation_checkpointing_kwargs or {}) or None)
            return
        loaded = self.burnish.decision.options.checkpointing
        set_checkpointing(
            self.burnish,
            self.transformers_model,
            "offload" if offload else loaded or True,
            "gradient_checkpointing",
            every_n_layers=every_n_layers,
            torch_keywords=activation_checkpointing_kwargs,
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **keywords: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **keywords)

    def undo_patches(self) -> None:
        """Go back to stock modules and padded input: what `for_inference=True` loads. A table in 8 or 4 bits becomes a
        dense one of the numbers that those stand for."""
        if self.burnish is not None and self.transformers_model is not None:
            self.burnish.plan.undo()
            self.burnish.embeddings = undo_tables(self.transformers_model)
            self.pad_inputs("patches undone")

    def pad_inputs(self, reason: str) -> None:
        """Go back to padded input and stock attention; patches stay."""
        if self.burnish is not None and self.burnish.packed is not None:
            self.burnish.packed.undo()
            self.burnish.packed = None
            self.burnish.decision = replace(self.burnish.decision, packed=False, packed_reason=reason)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # The process that unpickles may not have met this model's attention yet: transformers finds it by name.
        if self.burnish is not None and self.burnish.packed is not None:
            attention_name(self.burnish.decision)


def _script_options(model_kwargs: Mapping[str, Any] | None) -> LoadOptions:
    attention = (model_kwargs or {}).get("attn_implementation")
    quantised = (model_kwargs or {}).get("quantization_config")
    dtype = model_kwargs_dtype(model_kwargs)
    return LoadOptions(purpose="script", dtype=dtype, attention=attention, quantization_config=quantised)


def _device_name(device: Any, placement: Any = None) -> str:
    """Where the model goes: `device`, else the first place of accelerate's `placement`, else the best there is."""
    from sentence_transformers.util import get_device_name

    if isinstance(placement, Mapping):
        placement = next(iter(placement.values()), None)
    if isinstance(placement, int):
        placement = f"{get_device_name()}:{placement}"
    if placement in (None, "auto", "balanced", "balanced_low_0", "sequential"):
        placement = None
    chosen = device if placement is None else placement
    return str(chosen) if chosen is not None else str(get_device_name())


def _with_precision(model_kwargs: Mapping[str, Any] | None, decision: Decision) -> dict[str, Any]:
    """What goes to `AutoModel.from_pretrained`, with the chosen dtype and storage in it."""
    given = dict(model_kwargs or {})
    given.pop("torch_dtype", None)
    if decision.precision.dtype is not None:
        given["dtype"] = decision.precision.dtype
    if decision.precision.quantization_config is not None:
        given["quantization_config"] = decision.precision.quantization_config
    # By itself transformers quantises on the current GPU where there is one, whatever device was asked for.
    if decision.precision.storage is not None and given.get("device_map") is None and decision.device != "cuda":
        given["device_map"] = {"": decision.device}
    return given


def _check_width(wanted: int, width: int | None) -> None:
    if wanted < 1 or (width is not None and wanted > width):
        what = f"{wanted} is not between 1 and the {width} dimensions of the embedding"
        raise ConfigError(what, where="truncate_dim", fix="Leave it out to keep every dimension")


def _short_name(model: SentenceTransformer) -> str:
    base = getattr(model.config, "_name_or_path", "") or "model"
    return Path(base).name or base


__all__ = ["Preparation", "Repository", "SentenceTransformer"]
