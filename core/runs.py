"""A run from data to report: checked data, a model, a score before, training, a score after, and everything on disk."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import RunConfig
from .environment import describe_environment
from .errors import ConfigError, DataError
from .files import write_json

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

    from .evaluate import RetrievalResult
    from .model import SentenceTransformer
    from .retrieval_data import RetrievalData

# What a run leaves in its folder. metrics.json is written last and removed first: where it is, the run is complete.
RESULTS = ("metrics.json", "report.html", "adapter", "merged", "model", "config.json.used")
CHECKPOINTS = "checkpoints"


@dataclass(slots=True)
class RunResult:
    """A finished run.

    Args:
        folder: Where everything is.
        metrics: The content of metrics.json.
        model: The trained model, with its adapter.
    """

    folder: Path
    metrics: dict[str, Any]
    model: SentenceTransformer


@dataclass(slots=True)
class _Clock:
    """Seconds by phase, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - began, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TrainingData:
    dataset: datasets.Dataset
    loss: str
    summary: str
    skipped: int = 0


def say(line: str) -> None:
    """Tell the user something, on standard error, so that standard output stays for results."""
    print(line, file=sys.stderr, flush=True)


def run(config: RunConfig, notes: tuple[str, ...] = ()) -> RunResult:
    """Carry out a run.

    The data is read and checked before any weight is loaded. Every artifact appears whole or not at all, metrics.json
    last; a run that is killed and started again leaves nothing half-written that loads.

    Args:
        config: The run.
        notes: Sentences for the report's reader, such as where the weights came from.

    Raises:
        BurnishError: With what is wrong, where, and what to do.
    """
    clock = _Clock()
    with clock.phase("check data"):
        folder = _claim_folder(config)
        data = _training_data(config)
        held_out = _held_out(config)
    say(data.summary)
    with clock.phase("load model"):
        model = _load(config)
    before = _evaluate(config, model, held_out, clock, "before")
    history = _train(config, model, data, folder, clock)
    after = _evaluate(config, model, held_out, clock, "after")
    with clock.phase("save"):
        files = _save(config, model, folder)
    metrics = _metrics(config, model, data, before, after, clock, history)
    _write_report(config, model, held_out, before, after, history, clock, files, folder, notes)
    write_json(folder / "metrics.json", metrics)
    return RunResult(folder=folder, metrics=metrics, model=model)


def _claim_folder(config: RunConfig) -> Path:
    """Make the run's folder fit to write into: new, or cleared of earlier results, or resumable."""
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError("is a file", where=str(folder), fix="Pass another --name or --runs")
    checkpoints = folder / CHECKPOINTS
    if config.resume:
        if not any(checkpoints.glob("checkpoint-*")):
            raise ConfigError("has no checkpoint to go on from", where=str(folder), fix="Drop --resume; checkpoints need --save-steps")
    elif any((folder / name).exists() for name in (*RESULTS, CHECKPOINTS)):
        if not config.overwrite:
            raise ConfigError("holds an earlier run", where=str(folder), fix="Pass another --name, or --overwrite to replace it")
        for name in (*RESULTS, CHECKPOINTS):
            old = folder / name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _training_data(config: RunConfig) -> _TrainingData:
    from .columns import default_loss
    from .data import load_dataset
    from .retrieval_data import training_pairs

    source = Path(config.train)
    if (source / "qrels").is_dir():
        if config.columns or config.max_rows is not None:
            raise ConfigError("a retrieval folder has no columns or rows to choose", where="columns, max_rows", fix="Drop them")
        pairs = training_pairs(source, config.split)
        return _TrainingData(dataset=pairs, loss=config.loss or default_loss("pairs"), summary=f"{source}: {len(pairs):,} pairs of split {config.split}")
    loaded = load_dataset(config.train, split=config.split, columns=config.columns or None, on_bad_row=config.on_bad_row, max_rows=config.max_rows)
    loss = config.loss or default_loss(loaded.columns.kind)
    return _TrainingData(dataset=loaded.dataset, loss=loss, summary=loaded.summary(), skipped=loaded.num_skipped)


def _held_out(config: RunConfig) -> RetrievalData | None:
    from .retrieval_data import load_retrieval

    return None if config.eval is None else load_retrieval(Path(config.eval), config.eval_split)


def _load(config: RunConfig) -> SentenceTransformer:
    from .fast import FastSentenceTransformer

    return FastSentenceTransformer.from_pretrained(
        config.model, max_seq_length=config.max_seq_length, dtype=config.dtype, load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit, full_finetuning=config.method == "full", use_gradient_checkpointing=config.checkpointing,
        backend=config.backend, device=config.device, revision=config.revision, trust_remote_code=config.trust_remote_code,
        plugins=config.plugins, packed=config.packed, random_state=config.seed,
    )  # fmt: skip


def _evaluate(config: RunConfig, model: SentenceTransformer, held_out: RetrievalData | None, clock: _Clock, when: str) -> RetrievalResult | None:
    from .evaluate import evaluate_retrieval

    if held_out is None:
        return None
    with clock.phase(f"evaluate {when}"):
        result = evaluate_retrieval(
            model, held_out.queries, held_out.corpus, held_out.relevant, batch_size=config.eval_batch_size, seed=config.seed
        )
    say(f"{when + ' training:':17}" + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics().items()))
    return result


def find_loss(name: str) -> Any:
    """A loss class of Sentence Transformers by name.

    Raises:
        ConfigError: If there is none of that name.
    """
    from difflib import get_close_matches

    from sentence_transformers.sentence_transformer import losses

    known = [item for item in dir(losses) if item.endswith("Loss") or item.startswith("CachedMultiple")]
    if name not in known:
        near = get_close_matches(name, known, 1)
        raise ConfigError(f"Sentence Transformers has no loss {name!r}", where="loss", fix=f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}")
    return getattr(losses, name)


def _train(config: RunConfig, model: SentenceTransformer, data: _TrainingData, folder: Path, clock: _Clock) -> list[dict[str, Any]]:
    import torch

    from .fast import FastSentenceTransformer
    from .progress import install_progress
    from .trainer import Trainer, TrainingArguments

    loss_class = find_loss(data.loss)
    adapted = bool(getattr(model.transformers_model, "_hf_peft_config_loaded", False))
    if config.method == "lora" and not adapted:
        FastSentenceTransformer.get_peft_model(
            model, r=config.rank, lora_alpha=config.alpha, lora_dropout=config.lora_dropout, random_state=config.seed
        )
    if data.dataset.num_rows < config.batch_size:
        raise DataError(f"{data.dataset.num_rows} rows do not fill one batch of {config.batch_size}", where=config.train, fix="Lower --batch-size")
    on_cuda = model.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS), num_train_epochs=config.epochs, max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size, gradient_accumulation_steps=config.accumulation,
        learning_rate=config.rate, warmup_steps=config.warmup, seed=config.seed, logging_steps=config.log_steps,
        save_strategy="steps" if config.save_steps else "no", save_steps=config.save_steps or 500, save_total_limit=2,
        bf16=on_cuda and torch.cuda.is_bf16_supported(including_emulation=False), use_cpu=model.device.type == "cpu", report_to="none",
        dataloader_pin_memory=on_cuda,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data.dataset, loss=loss_class(model))
    progress = install_progress(trainer)
    try:
        with clock.phase("train"):
            trainer.train(resume_from_checkpoint=True if config.resume else None)
    finally:
        progress.close()
    return [dict(row) for row in progress.history]


def _save(config: RunConfig, model: SentenceTransformer, folder: Path) -> list[tuple[str, str]]:
    if not getattr(model.transformers_model, "_hf_peft_config_loaded", False):
        model.save_pretrained(str(folder / "model"))
        return [("model", "the fine-tuned model: a Sentence Transformers folder")]
    model.save_pretrained(str(folder / "adapter"))
    model.save_pretrained_merged(folder / "merged")
    return [
        ("adapter", "the LoRA adapter; loads over its base model, and can train on"),
        ("merged", "the full model with the adapter folded in: a plain Sentence Transformers folder"),
    ]


def _metrics(
    config: RunConfig, model: SentenceTransformer, data: _TrainingData, before: RetrievalResult | None,
    after: RetrievalResult | None, clock: _Clock, history: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    from .evaluate import paired_gain

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    metrics: dict[str, Any] = {"run": config.run_name, "model": config.model}
    if before is not None and after is not None:
        metrics |= {"before": before.as_json(), "after": after.as_json(), "gain": paired_gain(before, after, seed=config.seed)}
    seconds = clock.seconds["train"]
    return metrics | {
        "training": {
            "pairs": data.dataset.num_rows, "skipped_rows": data.skipped, "loss": data.loss, "trained_parameters": trained,
            "final_loss": history[-1]["loss"] if history else None, "seconds": seconds,
        },
        "history": history,
        "seconds": clock.seconds,
        "chosen": dict(model.burnish.rows()) if model.burnish else {},
        "config": json.loads(json.dumps(asdict(config))),
        "environment": describe_environment(str(model.device)),
    }  # fmt: skip


def _write_report(
    config: RunConfig, model: SentenceTransformer, held_out: RetrievalData | None, before: RetrievalResult | None,
    after: RetrievalResult | None, history: list[dict[str, Any]], clock: _Clock, files: list[tuple[str, str]], folder: Path,
    notes: tuple[str, ...],
) -> None:  # fmt: skip
    from .evaluate import paired_gain
    from .report import RunReport, write_report

    preparation = model.burnish
    decision = preparation.decision if preparation else None
    kept = folder / files[-1][0]
    gain = paired_gain(before, after, seed=config.seed) if before is not None and after is not None else None
    report = RunReport(
        title=f"{config.run_name}: fine-tuning report", run=config.run_name, model=config.model,
        family=decision.family.family.name if decision else "", summary=_summary(config, before, after, clock),
        before=before, after=after, gain=gain, history=history,
        queries=held_out.queries if held_out else {}, corpus=held_out.corpus if held_out else {}, relevant=held_out.relevant if held_out else {},
        environment=describe_environment(str(model.device)), plugins=_plugin_rows(model),
        patches=preparation.plan.rows() if preparation else (), settings=asdict(config) | {"learning_rate": config.rate},
        timings=clock.seconds, files=[*files, ("metrics.json", "every figure of this page")],
        how_to_use=_snippet(kept), notes=notes + (decision.family.family.leaves if decision else ()),
    )  # fmt: skip
    write_report(folder / "report.html", report)


def _summary(config: RunConfig, before: RetrievalResult | None, after: RetrievalResult | None, clock: _Clock) -> str:
    trained = f"{'LoRA' if config.method == 'lora' else 'full'} fine-tuning of {Path(config.model).name} took {clock.seconds['train']:.0f} s"
    if before is None or after is None:
        return f"{trained}; nothing was held out, so nothing was measured."
    k = after.k
    return f"{trained} and moved held-out nDCG@{k} from {before.ndcg.mean:.3f} to {after.ndcg.mean:.3f} over {after.queries} queries."


def _plugin_rows(model: SentenceTransformer) -> list[tuple[str, str, str, str]]:
    if model.burnish is None:
        return []
    decision = model.burnish.decision
    chosen = [(decision.family.plugin, f"family {decision.family.family.name}"), (decision.backend.plugin, f"backend {decision.backend.spec.name}")]
    if decision.attention is not None and model.burnish.packed is not None:
        chosen.append((decision.attention.plugin, f"operation packed_attention ({decision.attention.spec.name})"))
    return [(plugin.name, plugin.distribution, plugin.version, role) for plugin, role in chosen]


def _snippet(folder: Path) -> str:
    return (
        "from sentence_transformers import SentenceTransformer\n\n"
        f'model = SentenceTransformer("{folder.as_posix()}")\n'
        'queries = model.encode_query(["your question"])\n'
        'documents = model.encode_document(["one document", "another"])\n'
        "print(model.similarity(queries, documents))\n"
    )
