"""`FastClassifier`: a classifier of texts or pairs to train, with the parameters of `FastCrossEncoder`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .classifier import Classifier, head_settings
from .fast_common import in_float32, load
from .fast_cross_encoder import FastCrossEncoder
from .loading import CLASSIFY
from .options import EmbeddingStorage

if TYPE_CHECKING:
    import torch

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


class FastClassifier(FastCrossEncoder):
    """Load a classifier for training. `FastClassifier(name, …)` is `from_pretrained(name, …)`.

    `get_peft_model` is `FastCrossEncoder`'s.
    """

    def __new__(cls, *args: Any, **keywords: Any) -> Classifier:  # type: ignore[misc]
        return cls.from_pretrained(*args, **keywords)

    @staticmethod
    def from_pretrained(  # type: ignore[override]
        model_name: str | os.PathLike[str],
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        load_in_16bit: bool | None = None,
        full_finetuning: bool = False,
        for_inference: bool = False,
        labels: Sequence[str | int] | None = None,
        num_labels: int | None = None,
        problem_type: Problem | None = None,
        use_gradient_checkpointing: bool | str = False,
        activation_budget_gb: float | None = None,
        embedding_storage: EmbeddingStorage | None = None,
        backend: str = "auto",
        device: str | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device_map: str | dict[str, Any] | None = None,
        local_files_only: bool = False,
        cache_folder: str | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        keep_in_fp32_modules: Sequence[str] | None = None,
        model_card_data: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        plugins: Sequence[str] | None = None,
        packed: bool | None = None,
        random_state: int = 3407,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        cache_dir: str | None = None,
    ) -> Classifier:
        """Load a classifier by Hub id or folder: any transformer (with a fresh head), a classifier, or a saved adapter.

        What is not explained here is as in `FastCrossEncoder.from_pretrained`.

        Args:
            model_name: Hub id or folder.
            labels: The classes, in the order of the head's outputs. None for those that the repository names; a fresh
                head needs `labels` or `num_labels`.
            num_labels: Instead of `labels`, where they have no names.
            problem_type: As transformers calls it: "single_label_classification" for one class a text,
                "multi_label_classification" for any number of labels, "regression" for a number. None is what the
                repository says; else "regression" for num_labels=1, "single_label_classification" for more.
            full_finetuning: Train every weight; otherwise `get_peft_model` is expected to follow, and the head trains
                beside the adapter.
            for_inference: Stock modules and no patches.

        Returns:
            A `burnish.Classifier`, which is a `sentence_transformers.CrossEncoder`.

        Raises:
            ConfigError: For parameters that contradict each other or cannot be honoured here.
            ModelError: If the model cannot be loaded as asked.
            PluginError: If a plugin that is needed is missing, broken or in conflict.
        """
        head_settings(labels, num_labels, problem_type)  # before anything is read
        return load(
            Classifier, model_name, max_seq_length=max_seq_length, dtype=dtype, load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit, load_in_16bit=load_in_16bit, full_finetuning=full_finetuning,
            for_inference=for_inference, task=CLASSIFY,
            use_gradient_checkpointing=use_gradient_checkpointing, activation_budget_gb=activation_budget_gb,
            embedding_storage=embedding_storage, backend=backend, device=device, token=token, revision=revision,
            trust_remote_code=trust_remote_code, device_map=device_map, local_files_only=local_files_only,
            cache_folder=cache_folder, prompts=prompts, default_prompt_name=default_prompt_name,
            model_card_data=model_card_data, model_kwargs=model_kwargs, processor_kwargs=processor_kwargs,
            config_kwargs=config_kwargs, plugins=plugins, packed=packed, random_state=random_state,
            tokenizer_kwargs=tokenizer_kwargs, cache_dir=cache_dir, labels=labels, num_labels=num_labels,
            problem_type=problem_type, **in_float32(Classifier, keep_in_fp32_modules),
        )  # fmt: skip
