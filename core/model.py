"""The embedding model a user holds: Sentence Transformers' own class, prepared for training."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

from sentence_transformers import SentenceTransformer as Stock
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule
from torch import nn

from . import dimensions, saving
from .adapters import adapter_base, freeze_after_pooling
from .errors import ConfigError
from .exportable import Exportable
from .inputs import prompt_notes, texts_as_they_are
from .loading import Repository
from .packing import POOLS_PACKED_PROMPTS, padded, pool_packed
from .preparation import Preparation, describe_pooling

# Where `encode` takes, after `self`, what it shall return.
_OUTPUT_VALUE = list(signature(Stock.encode).parameters).index("output_value") - 1
_SENTENCE = "sentence_embedding"


class SentenceTransformer(Exportable, Stock):
    """`sentence_transformers.SentenceTransformer`, prepared for training: one changed import moves a script.

    Takes what that class takes, plus `options`. Made without options it is loaded for full fine-tuning, in float32
    unless `model_kwargs` says otherwise, which is what a Sentence Transformers script expects of it.

    Raises:
        BurnishError: Where something asked for cannot be had; the message says what to do.
    """

    stock = Stock
    _pooling_source = "as given"
    _texts_notes: tuple[tuple[str, str], ...] = ()
    _saved_dimensions: tuple[int, ...] = ()

    def _task_of(self, repository: Repository, hub: Mapping[str, Any]) -> str:
        self._pooling_source = "modules.json"
        if self._options.pooling_mode is not None and "modules.json" in repository.files:
            fix = "Drop pooling_mode, or load the bare transformer"
            raise ConfigError("the repository's modules.json says how it is pooled", where="pooling_mode", fix=fix)
        return super()._task_of(repository, hub)

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
        self._texts_notes = tuple(texts_as_they_are(first))
        width = first.get_embedding_dimension()
        pooled: list[nn.Module] = [first, PoolingModule(width, rule.mode, include_prompt=rule.include_prompt)]
        return [*pooled, Normalize()] if rule.normalize else pooled, module_kwargs

    def _prepare(self) -> None:
        if (wanted := self.truncate_dim) is not None:
            self.truncate_dim = None  # which the width would answer with otherwise
            _check_width(wanted, self.get_embedding_dimension())
            self.truncate_dim = wanted
        super()._prepare()
        if self._saved_dimensions and self.config is not None:
            dimensions.set_on(self.config, self._saved_dimensions)

    def _finish(self, preparation: Preparation, *, bare: bool) -> None:
        preparation.pooling = describe_pooling(self, self._pooling_source)
        for module in self.children() if preparation.packed else ():
            if isinstance(module, PoolingModule):
                pool_packed(module)
        if preparation.decision.options.purpose != "inference":
            if preparation.decision.base is not None:
                preparation.notes += [("after pooling", line) for line in freeze_after_pooling(self, frozenset())]
            preparation.notes += [*self._texts_notes, *prompt_notes(self, self._given_prompts, bare=bare)]

    def _get_model_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super()._get_model_config()
        found = dimensions.of_config(self.config) if adapter_base(self.transformers_model) is not None else []
        return {**config, dimensions.KEY: found} if found else config

    def _parse_model_config(self, model_config: dict[str, Any]) -> None:
        super()._parse_model_config(model_config)
        self._saved_dimensions = tuple(model_config.get(dimensions.KEY) or ())

    def merged(self, save_method: str | None = None) -> Stock:
        """A plain SentenceTransformer with the adapter folded in; this model keeps its adapter and can train on.

        See `save_pretrained_merged` for `save_method`.
        """
        return cast(Stock, saving.merged_model(self, save_method))

    def _settings(self) -> dict[str, Any]:
        return {
            "similarity_fn_name": self.similarity_fn_name,
            "truncate_dim": self.truncate_dim,
            "model_card_data": copy.copy(self.model_card_data),
        }

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


def _check_width(wanted: int, width: int | None) -> None:
    if wanted < 1 or (width is not None and wanted > width):
        what = f"{wanted} is not between 1 and the {width} dimensions of the embedding"
        raise ConfigError(what, where="truncate_dim", fix="Leave it out to keep every dimension")


__all__ = ["Preparation", "Repository", "SentenceTransformer"]
