"""The reranker or classifier a user holds: Sentence Transformers' own CrossEncoder, prepared for training.

Sentence Transformers pads every batch of pairs, since a task head reads a place in each row. Here a family says which
place that is, so texts and pairs go through the transformer as one row without padding, and the head reads its vectors
out of it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from sentence_transformers import CrossEncoder as Stock
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule
from torch import Tensor

from . import saving
from .adapters import adapter_base, freeze_after_pooling, split_saved
from .contracts import Inner
from .errors import ConfigError
from .exportable import Exportable
from .heads import fresh_modules, head_modules, read_vectors, within
from .inputs import prompt_notes
from .loading import CLASSIFY, EMBED, GENERATE, Repository, saved_task, settings_of_base, skeleton
from .packing import Flattening, pool_packed
from .preparation import Preparation, describe_pooling

# What a packed forward takes; token types only where the tokenizer gives them.
_INPUTS = (
    "input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "token_type_ids",
)  # fmt: skip
# What of an adapter's model is not its base model's: told to whoever loads the adapter.
_OF_THE_HEAD = ("num_labels", "id2label", "label2id", "problem_type", "pad_token_id")


class CrossEncoder(Exportable, Stock):
    """`sentence_transformers.CrossEncoder`, prepared for training and for packed prediction.

    Takes what that class takes, plus `options`. Made without options it is loaded for full fine-tuning, in float32
    unless `model_kwargs` says otherwise, which is what a Sentence Transformers script expects of it.

    `packed_scores` is the forward of packed input, the one callable that does the work: None where input is padded.
    `fresh` names the modules whose weights the checkpoint did not have.

    Raises:
        BurnishError: Where something asked for cannot be had; the message says what to do.
    """

    stock = Stock
    packed_scores: Inner | None = None
    fresh: tuple[str, ...] = ()
    _asked_labels: int | None = None
    _columns: tuple[tuple[int, ...], Tensor] | None = None

    def _load_modules(self, model_name_or_path: str, *args: Any, **keywords: Any) -> tuple[Any, dict[str, Any]]:
        given = keywords.get("config_kwargs")
        self._asked_labels = (given or {}).get("num_labels")
        hub = {key: keywords.get(key) for key in ("token", "cache_folder", "revision", "local_files_only")}
        if of_base := settings_of_base(model_name_or_path, given, **hub):
            keywords["model_kwargs"] = {**of_base, **(keywords.get("model_kwargs") or {})}
        try:
            return super()._load_modules(model_name_or_path, *args, **keywords)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error) or self._asked_labels is None:
                raise
            what = f"the checkpoint's head does not have {self._asked_labels} labels"
            fix = "Leave it out, or pass model_kwargs={'ignore_mismatched_sizes': True} for a fresh head"
            raise ConfigError(what, where="num_labels", fix=fix) from error

    def _task_of(self, repository: Repository, hub: Mapping[str, Any]) -> str:
        task = self._named_task(repository, hub)
        if task == GENERATE and self._asked_labels not in (None, 1):
            fix = f"Leave it out, or pass task={CLASSIFY!r} for a head of its own"
            raise ConfigError("a vocabulary's answer is one score", where="num_labels", fix=fix)
        return task

    def _named_task(self, repository: Repository, hub: Mapping[str, Any]) -> str:
        options = self._options
        if options.pooling_mode is not None:
            raise ConfigError("a cross-encoder reads one token of each pair", where="pooling_mode", fix="Drop it")
        saved = "modules.json" in repository.files and self._get_model_type(repository.name, **hub) == self.model_type
        if saved:
            task = saved_task(repository.name, **hub)
            if options.task not in (None, task):
                fix = f"Drop it, or load the model that {repository.name} was made from"
                raise ConfigError(f"the repository's modules.json says {task}", where=f"task={options.task!r}", fix=fix)
            return task
        causal = _is_causal(repository)
        if options.task == GENERATE and not causal:
            fix = f"Pass task={CLASSIFY!r}, or leave it out"
            raise ConfigError("the repository holds no causal language model", where=f"task={GENERATE!r}", fix=fix)
        return options.task or (GENERATE if causal else CLASSIFY)

    def _load_default_modules(self, model_name_or_path: str, *args: Any, **keywords: Any) -> tuple[Any, dict[str, Any]]:
        if self._pending is None or self._pending[1].task != CLASSIFY or not _is_causal(self._pending[0]):
            return super()._load_default_modules(model_name_or_path, *args, **keywords)
        # A decoder that is to classify: Sentence Transformers would take its vocabulary for the head.
        hub = {key: keywords.get(key) for key in ("token", "revision", "trust_remote_code", "local_files_only")}
        hub["cache_dir"] = keywords.get("cache_folder")
        given = {
            name: {**hub, **(keywords.get(name) or {})}
            for name in ("model_kwargs", "processor_kwargs", "config_kwargs")
        }
        return [Transformer(model_name_or_path, transformer_task=CLASSIFY, **given)], {}

    def _spare_head(self, settings: Any, repository: Repository, task: str, trust: bool) -> Any:
        assert self._pending is not None
        stock = self._pending[1].options.purpose == "inference"
        if task == EMBED or stock or not hasattr(settings, "llm_int8_skip_modules"):
            return settings
        names = head_modules(skeleton(repository, task, trust), self._pending[1].head)
        spared = copy.deepcopy(settings)
        # transformers takes regular expressions over full names, and leaves out fewer by itself.
        kept = [rf"{re.escape(name)}(?=\.|$)" for name in names]
        spared.llm_int8_skip_modules = [*(settings.llm_int8_skip_modules or []), *kept]
        return spared

    def _meet(self, first: Any) -> None:
        self.fresh = tuple(fresh_modules(first.model))
        text = first.model.config.get_text_config()
        if first.transformer_task == CLASSIFY and text.pad_token_id is None and first.tokenizer is not None:
            # transformers' heads on decoders refuse batches without it.
            text.pad_token_id = first.tokenizer.pad_token_id

    def _finish(self, preparation: Preparation, *, bare: bool) -> None:
        decision = preparation.decision
        preparation.pooling = self._describe(preparation)
        if preparation.packed:
            first: Any = self._first_module()
            first.data_collator = Flattening(getattr(first.config.get_text_config(), "pad_token_id", None))
            self.packed_scores = Inner(run=self._packed)
        for module in self.children() if preparation.packed else ():
            if isinstance(module, PoolingModule):
                pool_packed(module)
        if decision.options.purpose != "inference":
            if decision.base is not None:
                freeze_after_pooling(self, self.saved_modules(None)[1])
            preparation.notes += prompt_notes(self, self._given_prompts, bare=False)

    @property
    def peft_task(self) -> str:
        """PEFT's name for what this model does."""
        assert self.burnish is not None
        names = {CLASSIFY: "SEQ_CLS", GENERATE: "CAUSAL_LM"}
        return names.get(self.burnish.decision.task, super().peft_task)

    def saved_modules(self, names: Sequence[str] | None) -> tuple[list[str], frozenset[str]]:
        """By default a classification head trains in full, as everything does that is not in the checkpoint."""
        assert self.burnish is not None and self.transformers_model is not None
        decision = self.burnish.decision
        head = head_modules(self.transformers_model, decision.head) if decision.task == CLASSIFY else []
        inside, kept = split_saved(self, names)
        if names is None:
            inside = head
            kept = frozenset(type(module).__name__ for module in list(self.children())[1:])
        lost = [name for name in self.fresh if not within(name, inside)]
        if names is not None and lost:
            what = f"{', '.join(lost)} was drawn at random, and would neither train nor be saved"
            raise ConfigError(what, where="modules_to_save", fix="Leave it out, or name that too")
        return [*inside, *lost], kept

    def _describe(self, preparation: Preparation) -> str:
        decision = preparation.decision
        if decision.task == EMBED:
            return describe_pooling(self, "modules.json")
        labels = f"{self.num_labels} label" + ("s" if self.num_labels != 1 else "")
        reads = {None: "", "every": ", read of every token", "mean": ", read of the mean of the tokens"}
        place = None if decision.head is None else decision.head.reads
        where = reads.get(place, f", read of the {place} token")
        drawn = f"; not in the checkpoint, drawn at random: {', '.join(self.fresh)}" if self.fresh else ""
        return f"{labels}{where}{drawn}"

    def _packed(self, inputs: Mapping[str, Any]) -> Tensor:
        """Packed tensors to the (N + M, labels) scores of all texts, those that fill the stream up included."""
        first, *rest = list(self.children())
        preparation, transformer = self.burnish, self.transformers_model
        assert preparation is not None and transformer is not None and isinstance(first, Transformer)
        head = preparation.decision.head
        features: dict[str, Any]
        if preparation.decision.task == EMBED or head is None:
            features = first(dict(inputs))
        else:
            bounds = inputs["cu_seq_lens_q"]
            # transformers' heads find the last token by looking for padding, a vocabulary's is the last there is.
            pad = transformer.config.get_text_config().pad_token_id if preparation.decision.task == CLASSIFY else None
            passed_over = inputs["input_ids"][0] == pad if pad is not None and head.reads == "last" else None
            hidden = transformer.base_model(**inputs).last_hidden_state[0]
            vectors = read_vectors(head, hidden, bounds, passed_over)
            score = rest[0] if len(rest) == 1 else None
            if head.columns is not None and isinstance(score, LogitScore):
                return self._two_columns(score, vectors)
            logits = head.logits(transformer, vectors)
            features = {first.module_output_name: logits[:, None] if preparation.decision.task == GENERATE else logits}
        for module in rest:
            features = module(features)
        return cast(Tensor, features["scores"])

    def _two_columns(self, score: LogitScore, vectors: Tensor) -> Tensor:
        """(N, hidden) last tokens to (N, 1) scores, as `LogitScore` takes them from all words of the vocabulary."""
        assert self.burnish is not None and self.burnish.decision.head is not None
        head, transformer = self.burnish.decision.head, self.transformers_model
        assert head.columns is not None and transformer is not None
        asked = tuple(number for number in (score.true_token_id, score.false_token_id) if number is not None)
        known = self._columns
        if known is None or known[0] != asked or known[1].device != vectors.device:
            # Kept, for a captured step can copy nothing from the host; made so that a backward may use it later.
            with torch.inference_mode(False):
                known = self._columns = (asked, torch.tensor(asked, device=vectors.device))
        logits = head.columns(transformer, vectors, known[1])
        return logits if len(asked) == 1 else logits[:, :1] - logits[:, 1:]

    if not TYPE_CHECKING:

        @wraps(Stock.forward)
        def forward(self, input: Any, **keywords: Any) -> Any:
            if self.packed_scores is None or "cu_seq_lens_q" not in input:
                return super().forward(input, **keywords)
            scores = self.packed_scores.run({name: input[name] for name in _INPUTS if name in input})
            texts = input.get("texts")
            return {**input, "scores": scores if texts is None else scores[:texts]}

    def pad_inputs(self, reason: str) -> None:
        """Go back to padded input and stock attention; patches stay."""
        super().pad_inputs(reason)
        self.packed_scores = None

    def merged(self, save_method: str | None = None) -> Stock:
        """A plain CrossEncoder with the adapter folded in; this model keeps its adapter and can train on.

        See `save_pretrained_merged` for `save_method`.
        """
        return cast(Stock, saving.merged_model(self, save_method))

    def _settings(self) -> dict[str, Any]:
        settings = {"activation_fn": self.activation_fn, "model_card_data": copy.copy(self.model_card_data)}
        if names := getattr(self, "keep_in_fp32_modules", None):  # Sentence Transformers 6.2
            settings["keep_in_fp32_modules"] = names
        return settings

    def _complete(self, folder: Path) -> None:
        """Beside an adapter lies no config of its model: its labels go where Sentence Transformers looks for them."""
        path = folder / "sentence_bert_config.json"
        if adapter_base(self.transformers_model) is None or not path.exists():
            return
        settings = json.loads(path.read_text(encoding="utf-8"))
        assert self.config is not None
        config = self.config.to_dict()
        config["num_labels"] = self.config.num_labels
        known = {name: config[name] for name in _OF_THE_HEAD if config.get(name) is not None}
        settings["config_kwargs"] = {**settings.get("config_kwargs", {}), **known}
        path.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def _is_causal(repository: Repository) -> bool:
    architectures = repository.config.architectures or [""]
    return bool(architectures[0].endswith("ForCausalLM"))


__all__ = ["CrossEncoder"]
