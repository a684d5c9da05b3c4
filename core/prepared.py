"""What every kind of model that Burnish prepares for training has in common, whatever stands behind its transformer."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer

from . import saving
from .adapters import adapter_base, mend_saved, read_adapter, reads_saved_modules, split_saved
from .errors import ConfigError
from .files import atomic_folder
from .hub import push_as_stock
from .layout import check_layout
from .loading import EMBED, Decision, Repository, check_length, decide, has_transformer, read_repository
from .model_card import adopt
from .options import LoadOptions, model_kwargs_dtype
from .precision import PrecisionChoice
from .preparation import Preparation, attention_name, prepare, set_checkpointing
from .provenance import Provenance
from .quantised import check_intact, settle
from .recall import recall
from .tables import base_folder, store_tables, undo_tables
from .walks import Walked

if TYPE_CHECKING:
    from typing import Self

    from .card_facts import CardFacts


class Prepared(Walked, BaseModel):
    """Goes before a model class of Sentence Transformers among the bases of a class of ours.

    `burnish` is what was done to the model, None where there was nothing to do. `trained_with` is what the loaded
    folder's `burnish.json` says, None where there is none.
    """

    burnish: Preparation | None = None
    trained_with: Provenance | None = None
    stock: ClassVar[type[BaseModel]]
    """The class that plain Sentence Transformers has for this kind of model."""
    card: CardFacts
    _options: LoadOptions
    _asked_device: str
    _given_prompts: frozenset[str]
    _pending: tuple[Repository, Decision] | None

    def __init__(
        self, model_name_or_path: str | None = None, *, options: LoadOptions | None = None, **keywords: Any
    ) -> None:
        # Set around nn.Module's own bookkeeping, which is not there before its __init__ has run.
        object.__setattr__(self, "_options", options or _script_options(keywords.get("model_kwargs")))
        object.__setattr__(self, "_pending", None)
        object.__setattr__(self, "_given_prompts", frozenset(keywords.get("prompts") or ()))
        if keywords.get("backend", "torch") != "torch":
            fix = f"Load it with sentence_transformers.{self.stock.__name__}, which runs that backend"
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

    # Sentence Transformers calls this while it loads: before any weight is read, with the repository's name, revision
    # and token already worked out.

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
        task = self._task_of(repository, hub)
        decision = decide(self._options, repository.config, self._asked_device, repository.base, task)
        self._pending = (repository, decision)
        self.trained_with = recall(model_name_or_path, decision, **hub)
        keywords["model_kwargs"] = _with_precision(keywords.get("model_kwargs"), decision)
        if settings := keywords["model_kwargs"].get("quantization_config"):
            keywords["model_kwargs"]["quantization_config"] = self._spare_head(settings, repository, task, trust)
        modules: tuple[Any, dict[str, Any]] = super()._load_modules(model_name_or_path, *args, **keywords)
        trains = decision.options.purpose != "inference"
        first = modules[0][0] if isinstance(modules[0], list) else next(iter(modules[0].values()))
        hub["cache_dir"] = hub.pop("cache_folder")
        if trains:
            self._meet(first)
            settle(first.model, decision.precision, fresh=True)
        if repository.base is not None and (trains or not reads_saved_modules()):
            read_adapter(first.model, model_name_or_path, **hub)
        if trains and decision.options.embedding_storage is not None:  # before the model goes to its device
            folder = base_folder(repository.config, repository.base, hub["cache_dir"])
            store_tables(first.model, decision, folder)
        return modules

    def _task_of(self, repository: Repository, hub: Mapping[str, Any]) -> str:
        """What the transformer in a repository is loaded for, by Sentence Transformers' name; raises what is wrong."""
        return EMBED

    def _spare_head(self, settings: Any, repository: Repository, task: str, trust: bool) -> Any:
        """The quantisation config, with a task head left out of it."""
        return settings

    def _meet(self, first: Any) -> None:
        """Look at the first module as it was read, before anything is done to it."""

    def _prepare(self) -> None:
        if not isinstance(self[0], Transformer) or self.transformers_model is None:
            return  # a static or custom first module: nothing here to choose, patch or pack
        bare = self._pending is not None and "modules.json" not in self._pending[0].files
        if self._pending is None:
            task = str(self[0].transformer_task)
            decision = decide(self._options, self.transformers_model.config, str(self.device), None, task)
            given = PrecisionChoice(dtype=self.transformers_model.dtype, reason="as the modules came")
            decision = replace(decision, precision=given)
        else:
            decision = self._pending[1]
        self._pending = None
        adopt(self)
        options = decision.options
        if options.max_seq_length is not None:
            self.max_seq_length = self.check_max_seq_length(options.max_seq_length)
        self.burnish = prepare(self._first_module(), self.transformers_model, decision)
        self._finish(self.burnish, bare=bare)
        if options.purpose != "inference":
            decision.registry.observers("model_loaded")(model=self)
            if not options.quiet:
                print(f"burnish: {_short_name(self)} is ready to train\n{self.burnish}", file=sys.stderr)

    def _finish(self, preparation: Preparation, *, bare: bool) -> None:
        """Prepare what stands behind the transformer, and note it; `bare` without a `modules.json`."""

    @property
    def peft_task(self) -> str:
        """PEFT's name for what this model does."""
        return "FEATURE_EXTRACTION"

    def saved_modules(self, names: Sequence[str] | None) -> tuple[list[str], frozenset[str]]:
        """`modules_to_save` in two: modules of the transformer, and classes of modules that come after it.

        Raises:
            ConfigError: If the adapter would leave out what the model cannot be loaded again without.
        """
        return split_saved(self, names)

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
        layout: str = "compatible",
    ) -> None:
        """Save to a folder: the adapter where there is one (with all that is needed to load it again), else the model.

        The folder appears whole or not at all. Burnish and plain Sentence Transformers both load it; so do, in the
        layout "compatible", Sentence Transformers from 3.4, transformers from 4.48 and the servers in docs/serving.md.
        `deploy.json` and `golden.json` in it tell how to serve the model and how to check that. With `layout="native"`
        the files are those that the installed Sentence Transformers writes.

        Raises:
            ConfigError: With `safe_serialization=False`: only safetensors are written. For another `layout`. Or if the
                folder is that of the adapter's base model, which the adapter would take the place of.
        """
        check_layout(layout)
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
            self._complete(staging)
            saving.finish(self, self, staging, layout)
        # The card's assets go where the model went, not to the staging folder.
        self.model_card_data.save_dir = str(path)  # type: ignore[attr-defined]
        if self.burnish is not None:
            self.burnish.decision.registry.observers("model_saved")(model=self, folder=Path(path))

    def save_pretrained(
        self,
        path: str | Path,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
        layout: str = "compatible",
    ) -> None:
        """The same as `save`."""
        self.save(path, model_name, create_model_card, train_datasets, safe_serialization, layout)

    def _complete(self, folder: Path) -> None:
        """Add to a saved folder what Sentence Transformers leaves out."""

    def _vocabulary_is_the_base_models(self) -> bool:
        loaded = self.burnish.decision.config if self.burnish is not None else None
        return self.config is not None and getattr(self.config, "vocab_size", 0) == getattr(loaded, "vocab_size", None)

    def plain(self, modules: Any) -> BaseModel:
        """Sentence Transformers' own model of these modules, with this one's prompts and settings."""
        made: BaseModel = self.stock(
            modules=modules,
            device=str(self.device),
            prompts=dict(self.prompts),  # type: ignore[arg-type]
            default_prompt_name=self.default_prompt_name,
            **self._settings(),
        )
        made.module_kwargs = self.module_kwargs
        made._model_card_text = self._model_card_text
        made.eval()
        return made

    def _settings(self) -> dict[str, Any]:
        """Arguments of `stock` beside modules, device and prompts."""
        return {}

    def save_pretrained_merged(
        self, path: str | Path, tokenizer: Any = None, save_method: str | None = None, layout: str = "compatible"
    ) -> None:
        """Save a full model with the adapter folded in: stock modules that anything loads.

        Args:
            path: The folder; it appears whole or not at all.
            tokenizer: Saved in place of the model's own if given.
            save_method: None for the dtype the weights were loaded in; "merged_16bit" for float16 (bfloat16 where they
                are bfloat16 already or the family refuses float16); "merged_32bit" for float32; "lora" for the adapter.
            layout: As in `save`.

        Raises:
            ConfigError: For another `save_method` or `layout`.
        """
        saving.save_merged(self, Path(path), tokenizer, save_method, layout)

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
        layout: str = "compatible",
        replace_model_card: bool = False,
    ) -> str:
        """Push what `save_pretrained_merged` would save; returns the commit's address, or the pull request's.

        The parameters are those of `save_pretrained_merged`, and of `push_to_hub` otherwise; docs/hub.md tells them.

        Raises:
            ConfigError: If what is asked for cannot be.
            HubError: If the upload failed: the error names the folder with the model, and the command that goes on.
        """
        return saving.push_merged(
            self, repo_id, tokenizer, save_method, layout, token=token, private=private, commit_message=commit_message,
            revision=revision, create_pr=create_pr, exist_ok=exist_ok, replace_card=replace_model_card,
        )  # fmt: skip

    if not TYPE_CHECKING:  # for a checker the signature stays Sentence Transformers' own, and takes `layout` beside it

        @wraps(BaseModel.push_to_hub)
        def push_to_hub(self, repo_id: str, *arguments: Any, layout: str = "compatible", **keywords: Any) -> str:
            return push_as_stock(self, repo_id, *arguments, layout=layout, **keywords)

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
    quantised, dtype = (model_kwargs or {}).get("quantization_config"), model_kwargs_dtype(model_kwargs)
    return LoadOptions(purpose="script", dtype=dtype, attention=attention, quantization_config=quantised)


def _device_name(device: Any, placement: Any = None) -> str:
    """Where the model goes: `device`, else the first place of accelerate's `placement`, else the best there is."""
    from sentence_transformers.util import get_device_name

    if isinstance(placement, Mapping):
        placement = next(iter(placement.values()), None)
    if isinstance(placement, int):
        placement = f"{get_device_name()}:{placement}"
    chosen = device if placement in (None, "auto", "balanced", "balanced_low_0", "sequential") else placement
    return str(chosen) if chosen is not None else str(get_device_name())


def _with_precision(model_kwargs: Mapping[str, Any] | None, decision: Decision) -> dict[str, Any]:
    """What goes to `from_pretrained` of an `AutoModel…`, with the chosen dtype and storage in it."""
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


def _short_name(model: BaseModel) -> str:
    base = getattr(model.config, "_name_or_path", "") or "model"
    return Path(base).name or base
