"""`FastSentenceTransformer`: the names that Unsloth's users know, with every parameter acting or raising."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .adapters import add_lora, check_adaptable, freeze_after_pooling, split_saved
from .errors import ConfigError, ModelError
from .loading import first_line
from .model import SentenceTransformer
from .options import (
    EmbeddingStorage,
    LoadOptions,
    checkpointing_option,
    dtype_of,
    model_kwargs_dtype,
    one_of,
    purpose_of,
    quantization_of,
)
from .preparation import set_checkpointing
from .quantised import size
from .tables import check_untouched, hidden_size

if TYPE_CHECKING:
    import torch

_KEEP: Any = object()


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
        import torch

        given = dict(model_kwargs or {})
        placement = one_of("device_map", device_map, "model_kwargs['device_map']", given.pop("device_map", None))
        if device is not None and placement is not None:
            raise ConfigError("both are given", where="device, device_map", fix="Pass one of them")
        if placement is not None:
            given["device_map"] = placement
        options = LoadOptions(
            purpose=purpose_of(full_finetuning=full_finetuning, for_inference=for_inference),
            dtype=one_of("dtype", dtype_of(dtype), "model_kwargs['dtype']", model_kwargs_dtype(given)),
            quantization=quantization_of(
                load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, load_in_16bit=load_in_16bit
            ),
            quantization_config=given.get("quantization_config"),
            sixteen_bit=load_in_16bit,
            pooling_mode=pooling_mode,
            checkpointing=checkpointing_option(use_gradient_checkpointing) or activation_budget_gb is not None,
            activation_budget_gb=activation_budget_gb,
            embedding_storage=embedding_storage,
            backend=backend,
            plugins=None if plugins is None else (plugins,) if isinstance(plugins, str) else tuple(plugins),
            packed=packed,
            max_seq_length=max_seq_length,
            attention=given.get("attn_implementation"),
        )
        processor = one_of("processor_kwargs", processor_kwargs, "tokenizer_kwargs", tokenizer_kwargs)
        with torch.random.fork_rng(), _plain_errors(os.fspath(model_name)):
            torch.manual_seed(random_state)
            return SentenceTransformer(
                os.fspath(model_name),
                options=options,
                device=device,
                token=token,
                revision=revision,
                trust_remote_code=trust_remote_code,
                local_files_only=local_files_only,
                cache_folder=one_of("cache_folder", cache_folder, "cache_dir", cache_dir),
                truncate_dim=truncate_dim,
                prompts=None if prompts is None else dict(prompts),
                similarity_fn_name=_similarity(similarity_fn_name),
                model_card_data=model_card_data,
                model_kwargs=given,
                processor_kwargs=dict(processor or {}),
                config_kwargs=dict(config_kwargs or {}),
            )

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
        use_gradient_checkpointing: bool | str = _KEEP,
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
        option = None if use_gradient_checkpointing is _KEEP else checkpointing_option(use_gradient_checkpointing)
        transformer = check_adaptable(model)
        assert model.burnish is not None
        family = model.burnish.decision.family.family
        if max_seq_length is not None:
            model.check_max_seq_length(max_seq_length)
        if option is not None:
            set_checkpointing(model.burnish, transformer, option, "use_gradient_checkpointing")
        inside, kept = split_saved(model, modules_to_save)
        check_untouched(transformer, inside or (), "modules_to_save")
        check_untouched(transformer, target_modules or (), "target_modules")
        lora = {
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "bias": bias,
            "use_rslora": use_rslora,
            "use_dora": use_dora,
            "modules_to_save": inside,
            "layers_to_transform": layers_to_transform,
            "init_lora_weights": init_lora_weights,
            "loftq_config": dict(loftq_config) if loftq_config else None,
            "layers_pattern": layers_pattern,
            "task_type": task_type,
        }
        notes = add_lora(transformer, family, random_state=random_state, target_modules=target_modules, lora=lora)
        notes += freeze_after_pooling(model, kept)
        if max_seq_length is not None:
            model.max_seq_length = max_seq_length
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        total = sum(size(parameter) for parameter in model.parameters()) + hidden_size(transformer)
        lines = [
            f"adapter on {total / 1e6:.1f}M weights: {trained / 1e6:.2f}M to train ({trained / total:.2%})",
            *notes,
        ]
        if not model.burnish.decision.options.quiet:
            print("\n".join(f"burnish: {line}" for line in lines), file=sys.stderr)
        return model


def _similarity(name: str | None) -> str | None:
    from sentence_transformers import SentenceTransformer as Stock

    known = Stock.SUPPORTED_SIMILARITY_FN_NAMES
    if name is not None and str(getattr(name, "value", name)) not in known:
        raise ConfigError(f"{name!r} is unknown", where="similarity_fn_name", fix=f"Pass one of {', '.join(known)}")
    return name


@contextmanager
def _plain_errors(model_name: str) -> Iterator[None]:
    """Say in one line what the Hub, the disk or Sentence Transformers could not find."""
    try:
        yield
    except OSError as error:
        fix = "Check the name or path, and the connection and token if it is on the Hub"
        raise ModelError(f"cannot be loaded ({first_line(error)})", where=f"model {model_name}", fix=fix) from error
