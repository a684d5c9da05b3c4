"""`FastSentenceTransformer`: the names that Unsloth's users know, with every parameter acting or raising."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .fast_common import KEEP, adapt, load
from .model import SentenceTransformer
from .options import EmbeddingStorage

if TYPE_CHECKING:
    import torch


class FastSentenceTransformer:
    """Load an embedding model for training. `FastSentenceTransformer(name, …)` is `from_pretrained(name, …)`."""

    def __new__(cls, *args: Any, **keywords: Any) -> SentenceTransformer:  # type: ignore[misc]
        return cls.from_pretrained(*args, **keywords)

    @staticmethod
    def from_pretrained(
        model_name: str | os.PathLike[str],
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        load_in_16bit: bool | None = None,
        full_finetuning: bool = False,
        for_inference: bool = False,
        pooling_mode: str | None = None,
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
        truncate_dim: int | None = None,
        prompts: Mapping[str, str] | None = None,
        similarity_fn_name: str | None = None,
        model_card_data: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        plugins: Sequence[str] | None = None,
        packed: bool | None = None,
        random_state: int = 3407,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        cache_dir: str | None = None,
    ) -> SentenceTransformer:
        """Load a model by Hub id or folder: a bare transformer, a Sentence Transformers folder, or a saved adapter.

        Args:
            model_name: Hub id or folder.
            max_seq_length: Longest text in tokens; at most the model's positions. None keeps the model's own.
            dtype: float32, bfloat16, float16, or "auto" for the checkpoint's own. None: float32 masters for full
                fine-tuning; under adapters bfloat16 on an accelerator that has it if the family allows it, else
                float32; on a CPU float32.
            load_in_4bit: Store the frozen base's linear layers as NF4 with double quantisation (bitsandbytes; a CUDA
                device or a CPU).
            load_in_8bit: Store them in 8 bits, LLM.int8() (bitsandbytes; a CUDA device or a CPU).
            load_in_16bit: True for a 16-bit base, False for float32, None for the policy of `dtype=None`.
            full_finetuning: Train every weight; otherwise `get_peft_model` is expected to follow.
            for_inference: Stock modules and no patches: embeddings are bit-equal to plain Sentence Transformers.
            pooling_mode: For a repository without `modules.json`; None is the family's default, and is said.
            use_gradient_checkpointing: False; True: a layer keeps its input and is computed again in the backward;
                "selective": it keeps what is costly to compute too; "offload" (also "unsloth"): inputs in host memory.
            activation_budget_gb: GB (1e9 bytes) that all layers may keep for the backward: as many as fit keep all, the
                others are treated by `use_gradient_checkpointing` (left out: True).
            embedding_storage: Where the frozen embedding tables under an adapter lie: "8bit", "4bit" (NF4), or "host",
                pinned host memory that the GPU reads a batch's rows from. None keeps them as they are read.
            backend: How a training step is executed: a backend's name, or "auto".
            device: "cpu", "cuda", "cuda:1", "mps"; None picks the best there is.
            token: Hub token; None is the one that `hf auth login` left.
            revision: Branch, tag or commit on the Hub.
            trust_remote_code: Whether the repository's own Python may run.
            device_map: accelerate's placement, instead of `device`.
            local_files_only: Do not ask the Hub.
            cache_folder: Where downloads are kept (alias `cache_dir`).
            truncate_dim: Keep the first N dimensions of every embedding.
            prompts: Prompt texts by name, added to the saved ones.
            similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan".
            model_card_data: Sentence Transformers' card data.
            model_kwargs: Passed to `AutoModel.from_pretrained`.
            processor_kwargs: Passed to the tokenizer's `from_pretrained` (alias `tokenizer_kwargs`).
            config_kwargs: Passed to `AutoConfig.from_pretrained`.
            plugins: Plugins to use by name, also in place of a built-in; an empty list means Burnish's own only.
            packed: Unpadded input: None where the family says it is exact, True to insist, False for padded.
            random_state: Seed for weights that the checkpoint lacks.

        Returns:
            A `sentence_transformers.SentenceTransformer` with `save_pretrained_merged` and `push_to_hub_merged`.

        Raises:
            ConfigError: For parameters that contradict each other or cannot be honoured here.
            ModelError: If the model cannot be loaded as asked.
            PluginError: If a plugin that is needed is missing, broken or in conflict.
        """
        return load(
            SentenceTransformer, model_name, max_seq_length=max_seq_length, dtype=dtype, load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit, load_in_16bit=load_in_16bit, full_finetuning=full_finetuning,
            for_inference=for_inference, pooling_mode=pooling_mode,
            use_gradient_checkpointing=use_gradient_checkpointing, activation_budget_gb=activation_budget_gb,
            embedding_storage=embedding_storage, backend=backend, device=device, token=token, revision=revision,
            trust_remote_code=trust_remote_code, device_map=device_map, local_files_only=local_files_only,
            cache_folder=cache_folder, truncate_dim=truncate_dim, prompts=prompts,
            similarity_fn_name=_similarity(similarity_fn_name), model_card_data=model_card_data,
            model_kwargs=model_kwargs, processor_kwargs=processor_kwargs, config_kwargs=config_kwargs,
            plugins=plugins, packed=packed, random_state=random_state, tokenizer_kwargs=tokenizer_kwargs,
            cache_dir=cache_dir,
        )  # fmt: skip

    @staticmethod
    def get_peft_model(
        model: SentenceTransformer,
        r: int = 16,
        lora_alpha: float = 16,
        target_modules: Sequence[str] | str | None = None,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        max_seq_length: int | None = None,
        task_type: str | None = None,
        use_gradient_checkpointing: bool | str = KEEP,
        random_state: int = 3407,
    ) -> SentenceTransformer:
        """Put a LoRA adapter (Hu et al. 2021) on the model, in place; returns the same model.

        Args:
            model: From `from_pretrained`, loaded neither for full fine-tuning nor for inference.
            r: Rank.
            lora_alpha: Scale; the adapter counts `lora_alpha / r` times (`/ sqrt(r)` with `use_rslora`).
            target_modules: Names of the layers to adapt; None is the family's list: none dead, none missing.
            lora_dropout: Dropout on the adapter's input.
            bias: "none", "all" or "lora_only": which biases train.
            use_rslora: Rank-stabilised scale (Kalajdzievski 2023).
            use_dora: Weight-decomposed LoRA (Liu et al. 2024).
            modules_to_save: Modules to train and save in full beside the adapter; "Dense" for the layers that some
                models have after the pooling, frozen otherwise.
            layers_to_transform: Indices of the layers to adapt; None is all.
            init_lora_weights: PEFT's initialisation: True, False, "gaussian", "pissa", "loftq", …
            loftq_config: For `init_lora_weights="loftq"`.
            layers_pattern: Name of the layer list that `layers_to_transform` counts in.
            max_seq_length: Longest text in tokens; None keeps it.
            task_type: PEFT's task type; None is FEATURE_EXTRACTION.
            use_gradient_checkpointing: As in `from_pretrained`; left out, what was chosen there stays.
            random_state: Seed of the adapter's first weights.

        Raises:
            ConfigError: If a target names no module, or PEFT refuses a setting.
            ModelError: If the model cannot take an adapter.
        """
        return adapt(
            model, r=r, lora_alpha=lora_alpha, target_modules=target_modules, lora_dropout=lora_dropout, bias=bias,
            use_rslora=use_rslora, use_dora=use_dora, modules_to_save=modules_to_save,
            layers_to_transform=layers_to_transform, init_lora_weights=init_lora_weights, loftq_config=loftq_config,
            layers_pattern=layers_pattern, max_seq_length=max_seq_length, task_type=task_type,
            use_gradient_checkpointing=use_gradient_checkpointing, random_state=random_state,
        )  # fmt: skip


def _similarity(name: str | None) -> str | None:
    from sentence_transformers import SentenceTransformer as Stock

    known = Stock.SUPPORTED_SIMILARITY_FN_NAMES
    if name is not None and str(getattr(name, "value", name)) not in known:
        raise ConfigError(f"{name!r} is unknown", where="similarity_fn_name", fix=f"Pass one of {', '.join(known)}")
    return name
