"""The training half of a run: data checked first, a loss that fits it, the trainer, checkpoints that are whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .columns import PAIRS, default_loss
from .config import RunConfig
from .errors import ConfigError, DataError, ModelError
from .files import discard
from .loss_choice import check_loss, find_loss
from .run_folder import CHECKPOINTS, checkpoints_in, whole_checkpoint

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]
    from transformers import TrainerCallback

    from .model import SentenceTransformer
    from .progress import HistoryRow

# Checkpoints kept: the newest, and the one before it while the newest is being written.
KEPT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """Checked data and the loss for it.

    Args:
        dataset: The columns in loss order.
        loss: A Sentence Transformers loss by name.
        summary: One line for the user.
        kind: What the columns are: "pairs", "scored", …
        skipped: How many bad rows were left out, and `reasons` (reason, how many) for them, the most frequent first.
    """

    dataset: datasets.Dataset
    loss: str
    summary: str
    kind: str = PAIRS
    skipped: int = 0
    reasons: tuple[tuple[str, int], ...] = ()


def training_set(config: RunConfig) -> TrainingSet:
    """Read and check the training data and the loss. No weight is loaded.

    Raises:
        ConfigError: If the loss is unknown or reads other columns, or an option does not apply to this data.
        DataError: If the data cannot be trained on.
    """
    if config.loss is not None:
        find_loss(config.loss)
    is_retrieval = (Path(config.train) / "qrels").is_dir()
    data, kind, texts = _retrieval_set(config) if is_retrieval else _column_set(config)
    check_loss(data.loss, kind, texts, config.train)
    rows = data.dataset.num_rows
    if rows < config.batch_size:
        fix = f"Pass --batch-size {max(2, rows // 2)} or smaller, or more data"
        raise DataError(f"{rows} rows do not fill one batch of {config.batch_size}", where=config.train, fix=fix)
    return data


def _retrieval_set(config: RunConfig) -> tuple[TrainingSet, str, int]:
    from .retrieval_data import training_pairs

    given = {
        "columns": bool(config.columns),
        "max_rows": config.max_rows is not None,
        "on_bad_row": config.on_bad_row != "stop",
    }
    if unused := [name for name, is_given in given.items() if is_given]:
        what = "is for data in rows and columns, and this is a retrieval folder"
        raise ConfigError(f"{what} ({config.train})", where=", ".join(unused), fix="Leave it out")
    pairs = training_pairs(Path(config.train), config.split)
    summary = f"{config.train}: {len(pairs):,} pairs of split {config.split}"
    return TrainingSet(dataset=pairs, loss=config.loss or default_loss(PAIRS), summary=summary), PAIRS, 2


def _column_set(config: RunConfig) -> tuple[TrainingSet, str, int]:
    from .data import load_dataset

    loaded = load_dataset(
        config.train,
        split=config.split,
        columns=config.columns or None,
        on_bad_row=config.on_bad_row,
        max_rows=config.max_rows,
    )
    kind = loaded.columns.kind
    data = TrainingSet(
        dataset=loaded.dataset,
        loss=config.loss or default_loss(kind),
        summary=loaded.summary(),
        kind=kind,
        skipped=loaded.num_skipped,
        reasons=loaded.skipped_counts,
    )
    return data, kind, len(loaded.columns.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What the trainer did.

    Args:
        steps: Optimizer steps, those before a resume included.
        pairs: Rows that went through them, each counted as often as it did.
        history: The logged points.
    """

    steps: int
    pairs: int
    history: list[HistoryRow]


def train(config: RunConfig, model: SentenceTransformer, data: TrainingSet, folder: Path) -> Trained:
    """Train `model` in place, with an adapter put on it first where the run asks for one.

    Raises:
        ModelError: If a trained weight is no longer a finite number.
    """
    from .fast import FastSentenceTransformer
    from .progress import install_progress
    from .trainer import Trainer

    if config.method == "lora" and not has_adapter(model):
        FastSentenceTransformer.get_peft_model(
            model,
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.lora_dropout,
            random_state=config.seed,
        )
    trainer = Trainer(
        model=model,
        args=_arguments(config, model, folder, pair_prompts(config, model, data)),
        train_dataset=data.dataset,
        loss=find_loss(data.loss)(model),
        callbacks=[_rotation(folder)],
    )
    progress = install_progress(trainer)
    checkpoint = whole_checkpoint(folder) if config.resume else None
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    _check_finite(model)
    steps, rows = trainer.state.global_step, data.dataset.num_rows
    most = steps * config.batch_size * config.accumulation
    pairs = most if config.max_steps else min(most, round(config.epochs * rows))  # an epoch's last batch may be short
    return Trained(steps=steps, pairs=pairs, history=progress.history)


def has_adapter(model: SentenceTransformer) -> bool:
    """Whether the model carries a LoRA adapter."""
    return bool(getattr(model.transformers_model, "_hf_peft_config_loaded", False))


def pair_prompts(config: RunConfig, model: SentenceTransformer, data: TrainingSet) -> dict[str, str]:
    """The model's own prompts by column, as `encode_query` and `burnish eval` put them: the query's before the first
    text of a pair, the document's before the others. None for other data, which has no queries."""
    if not config.use_prompts or data.kind != PAIRS:
        return {}
    first, *others = data.dataset.column_names
    query, document = (model.prompts.get(name) or "" for name in ("query", "document"))
    chosen = {first: query, **dict.fromkeys(others, document)}
    return {column: text for column, text in chosen.items() if text}


def _arguments(config: RunConfig, model: SentenceTransformer, folder: Path, prompts: dict[str, str]) -> Any:
    import torch

    from .arguments import TrainingArguments

    kind = model.device.type
    return TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.rate,
        warmup_steps=config.warmup,  # below 1 it is a share
        seed=config.seed,
        logging_steps=config.log_steps,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        bf16=kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
        use_cpu=kind == "cpu",
        report_to="none",
        prompts=prompts or None,
        dataloader_pin_memory=kind == "cuda",
        auto_batch=config.auto_batch,
    )


def _rotation(folder: Path) -> TrainerCallback:
    """A callback that keeps the last checkpoints.

    The trainer's own rotation deletes file by file, in any order: killed in between, it leaves a folder that loads as
    a model with parts missing.
    """
    from transformers import TrainerCallback

    class Rotation(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            if state.is_world_process_zero:
                for old in checkpoints_in(folder)[:-KEPT]:
                    discard(old)

    return Rotation()


def _check_finite(model: SentenceTransformer) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.detach().isfinite().all()):
            fix = "Lower --learning-rate, or use --dtype float32"
            raise ModelError(f"the training diverged: {name} is no longer finite", where="training", fix=fix)
