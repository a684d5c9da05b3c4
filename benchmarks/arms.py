"""How each system of the race loads a model for training, as its own documentation has a user do it.

`prepare(system)` must come before torch and transformers are imported; `load` gives the model and its trainer's parts.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentTypeError, Namespace
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks.shapes import LORA_TARGETS
else:
    from shapes import LORA_TARGETS

PEERS = {
    "st-eager": "eager",  # where transformers has nothing else: MPNet
    "st-sdpa": "sdpa",
    "st-fa2": "flash_attention_2",
    "st-fa2-compile": "flash_attention_2",
    "transformers": "flash_attention_2",
    "unsloth": None,
}
"""The peers, with the attention that Sentence Transformers is told to use."""
WITHOUT_FLASH = ("st-eager", "st-sdpa")
OURS = "burnish"
TASKS = ("embedding", "rerank", "classify")
MODES = ("lora16", "qlora4", "full", "full-bf16")
STORAGES = ("8bit", "4bit", "host")
"""Where Burnish's frozen embedding tables may live, beside their own dtype on the device."""
RANK, ALPHA = 32, 64


@dataclass(slots=True)
class Arm:
    """A system, ready to train: its model, trainer, arguments and loss classes, and which backend runs the step."""

    model: Any
    trainer: Any
    arguments: Any
    backend: str | None

    def made(self, arguments: Any, data: Any, callbacks: list[Any]) -> Any:
        """Its trainer, of MultipleNegativesRankingLoss."""
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        return self.trainer(
            model=self.model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(self.model),
            callbacks=callbacks,
        )  # fmt: skip


def ours(system: str) -> bool:
    """Whether a system is Burnish: "burnish", or "burnish-BACKEND"."""
    return system == OURS or system.startswith(f"{OURS}-")


def checkpointing(said: str) -> bool | str:
    """What follows `--checkpointing`.

    Raises:
        ArgumentTypeError: For anything else.
    """
    known: dict[str, bool | str] = {"true": True, "false": False, "offload": "offload", "selective": "selective"}
    if said.lower() not in known:
        raise ArgumentTypeError(f"{said!r} is not one of {', '.join(known)}")
    return known[said.lower()]


def check_settings(given: Namespace) -> None:
    """Refuse settings that a system does not have.

    Raises:
        SystemExit: If there is one.
    """
    if ours(given.system):
        return
    own = {"--checkpointing selective": given.checkpointing == "selective",
           "--activation-budget": given.activation_budget_gb is not None,
           "--embedding-storage": given.embedding_storage is not None}  # fmt: skip
    if odd := [name for name, on in own.items() if on]:
        raise SystemExit(f"{given.system} has no {odd[0]}")


def prepare(system: str) -> None:
    """What a system needs before torch and transformers are imported.

    Raises:
        SystemExit: If there is no such system.
    """
    if not ours(system) and system not in PEERS:
        raise SystemExit(f"no system {system!r}; there are {', '.join(PEERS)}, {OURS} and {OURS}-BACKEND")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if ours(system):
        return
    # The peers' collators tokenise in forked workers, where a parallel tokenizer would wait for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if system not in WITHOUT_FLASH:
        sys.path.insert(0, str(Path(__file__).with_name("flash_attn_shim")))
    if system == "unsloth":
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        import_module("unsloth")  # it patches what is imported after it


def master_dtype(given: Namespace) -> Any:
    """The dtype that the weights are kept in. Full: float32 masters in every arm. A CPU trains in float32.

    `given.dtype`, where there is one, is it.
    """
    import torch

    if getattr(given, "dtype", None) is not None:
        return given.dtype
    return torch.float32 if given.mode == "full" or given.device == "cpu" else torch.bfloat16


_ahead: list[Any] = []  # the model that `load_ahead` has loaded


def load_ahead(path: Path, given: Namespace) -> None:
    """Load what needs no GPU, and import the rest: checks for FlashAttention and for 4 bits ask the GPU."""
    if given.system == "unsloth":  # it patches trainers while it loads: nothing of them comes before
        return
    if given.task != "embedding":
        import_module("sentence_transformers.cross_encoder.trainer")
        return
    import_module("sentence_transformers.sentence_transformer.trainer")
    if ours(given.system):
        import burnish

        _ = burnish.FastSentenceTransformer, burnish.Trainer
    elif given.system in WITHOUT_FLASH and given.mode != "qlora4":
        _ahead.append(_stock(path, given))


def load(path: Path, given: Namespace) -> Arm:
    """The model at `path`, ready to train in the mode that is asked for."""
    if ours(given.system):
        return _burnish(path, given)
    if given.system == "unsloth":
        model = _unsloth(path, given)
    else:
        model = _ahead.pop() if _ahead else _stock(path, given)
        if given.mode != "qlora4":
            model.to(given.device)
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    return Arm(model, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, None)


def targets(path: Path) -> list[str]:
    """The linear layers that LoRA adapts."""
    return LORA_TARGETS[model_type(path)]


def model_type(path: Path) -> str:
    """transformers' name for the model's architecture."""
    return str(json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"])


def _stock(path: Path, given: Namespace) -> Any:
    """Sentence Transformers with PEFT.

    In 4 bits what is not a linear layer is bfloat16. `prepare_model_for_kbit_training` is not called: it would make all
    of that float32, the embeddings too, and is not needed where training runs under autocast.
    """
    import torch
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer
    from transformers import BitsAndBytesConfig

    settings: dict[str, Any] = {"attn_implementation": PEERS[given.system], "dtype": master_dtype(given)}
    device: str | None = "cpu"
    if given.mode == "qlora4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # type: ignore[no-untyped-call]
        device = None
    model = SentenceTransformer(str(path), model_kwargs=settings, device=device)
    model.max_seq_length = given.seq
    if not given.mode.startswith("full"):
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets(path), task_type="FEATURE_EXTRACTION"
        )
        model.add_adapter(lora)
    if given.checkpointing:
        _checkpoint(model[0].model, offload=given.checkpointing == "offload")
    return model


def _checkpoint(transformer: Any, *, offload: bool) -> None:
    """transformers' own checkpointing of every layer, without re-entrance, as its trainer would switch it on.

    Here and not by a training argument: those cannot ask for host memory in every version that is measured.
    """
    # transformers 5.18 renamed the method; the old name warns there and the new one is missing before.
    enable = getattr(transformer, "activation_checkpointing_enable", None) or transformer.gradient_checkpointing_enable
    enable({"use_reentrant": False}, every_n_layers=1, offload=offload)


def _unsloth(path: Path, given: Namespace) -> Any:
    """Unsloth's FastSentenceTransformer. In 4 bits it wants `load_in_16bit=False`, and computes in the `dtype` given.

    "unsloth", its checkpoints in host memory, stands for "offload". Its compiler is off under any checkpointing.
    """
    kind = import_module("unsloth").FastSentenceTransformer
    full = given.mode.startswith("full")
    checkpointing = "unsloth" if given.checkpointing == "offload" else given.checkpointing
    model = kind.from_pretrained(
        str(path),
        max_seq_length=given.seq,
        dtype=master_dtype(given),
        full_finetuning=full,
        load_in_4bit=given.mode == "qlora4",
        load_in_16bit=given.mode == "lora16",
        use_gradient_checkpointing=checkpointing,
    )
    if full:
        return model
    return kind.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=targets(path),
        task_type="FEATURE_EXTRACTION", use_gradient_checkpointing=checkpointing,
    )  # fmt: skip


def _burnish(path: Path, given: Namespace) -> Arm:
    """Burnish. Dense layers after the pooling train under an adapter too, as they do in the other arms."""
    from burnish import FastSentenceTransformer, Trainer, TrainingArguments

    full = given.mode.startswith("full")
    told = {"activation_budget_gb": given.activation_budget_gb, "embedding_storage": given.embedding_storage}
    chosen: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    model = FastSentenceTransformer.from_pretrained(
        str(path),
        max_seq_length=given.seq,
        dtype=master_dtype(given),
        load_in_4bit=given.mode == "qlora4",
        full_finetuning=full,
        use_gradient_checkpointing=given.checkpointing,
        backend=given.backend,
        device=given.device,
        **chosen,
    )
    if not full:
        dense = ["Dense"] if any(type(module).__name__ == "Dense" for module in model.children()) else None
        model = FastSentenceTransformer.get_peft_model(
            model, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets(path), modules_to_save=dense
        )
    assert model.burnish is not None
    return Arm(model, Trainer, TrainingArguments, model.burnish.decision.backend.spec.name)
