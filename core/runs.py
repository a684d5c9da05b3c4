"""A run from data to report: checked data, a model, a score before, training, a score after, and everything on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import RunConfig
from .files import write_json
from .options import CHECKPOINTING_WORDS
from .run_folder import (
    ADAPTER_FOLDER,
    MERGED_FOLDER,
    METRICS,
    MODEL_FOLDER,
    check_folder,
    claim_folder,
    disk_errors,
    tidy,
)
from .run_results import RunRecord, metrics, report_possible, write_run_report
from .training import has_adapter, train, training_set

if TYPE_CHECKING:
    from .evaluate import RetrievalResult
    from .model import SentenceTransformer
    from .retrieval_data import RetrievalData


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


def say(line: str) -> None:
    """Tell the user something, on standard error, so that standard output stays for results."""
    print(line, file=sys.stderr, flush=True)


def run(config: RunConfig, *, notes: tuple[str, ...] = (), called: str | None = None) -> RunResult:
    """Carry out a run.

    Data and loss are read and checked before any weight is loaded. An earlier run of the name, if it is to be
    replaced, stays until the new model is loaded. Every artifact appears whole or not at all, metrics.json last: a run
    that is killed and started again leaves nothing half-written that loads.

    Args:
        config: The run.
        notes: Sentences for the report's reader, such as where the weights came from.
        called: What to call the model in metrics and report, where `config.model` is a folder somewhere.

    Raises:
        BurnishError: With what is wrong, where, and what to do.
    """
    record = _prepare(config, notes, called)
    with _phase(record, "load model"):
        model = _load(config)
    _name_card(record, model)
    folder = claim_folder(config)
    record.before = _evaluate(record, model, "before")
    try:
        with disk_errors(folder), _phase(record, "train"):
            record.trained = train(config, model, record.data, folder)
    finally:
        tidy(folder)
    record.after = _evaluate(record, model, "after")
    if record.after is not None and config.eval is not None:
        data = f"{Path(config.eval).name} ({config.eval_split})"
        model.card.add_result(data, record.after, record.before, seed=config.seed)
    with disk_errors(folder):
        with _phase(record, "save"):
            record.files = _save(model, folder)
        figures = metrics(record, model)
        if report_possible():
            write_run_report(record, model, folder)
        write_json(folder / METRICS, figures)
    return RunResult(folder=folder, metrics=figures, model=model)


def _name_card(record: RunRecord, model: SentenceTransformer) -> None:
    """Have the model's card say what was trained on what, where nothing says so yet."""
    data: Any = model.model_card_data
    trained_on = Path(record.config.train).name
    data.model_name = data.model_name or f"{Path(record.called).name}, fine-tuned on {trained_on}"
    data.train_datasets = data.train_datasets or [{"name": trained_on}]


@contextmanager
def _phase(record: RunRecord, name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        record.seconds[name] = round(time.perf_counter() - began, 2)


def _prepare(config: RunConfig, notes: tuple[str, ...], called: str | None) -> RunRecord:
    """Everything that can be known without the model."""
    began = time.perf_counter()
    check_folder(config)
    data = training_set(config)
    record = RunRecord(config=config, called=called or config.model, data=data, held_out=_held_out(config), notes=notes)
    say(data.summary)
    if not report_possible():
        say("No report.html will be drawn: it needs `pip install 'burnish[report]'`")
    record.seconds["check data"] = round(time.perf_counter() - began, 2)
    return record


def _held_out(config: RunConfig) -> RetrievalData | None:
    from .retrieval_data import load_retrieval

    return None if config.eval is None else load_retrieval(Path(config.eval), config.eval_split)


def _load(config: RunConfig) -> SentenceTransformer:
    from .fast import FastSentenceTransformer

    return FastSentenceTransformer.from_pretrained(
        config.model,
        max_seq_length=config.max_seq_length,
        dtype=config.dtype,
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        embedding_storage=config.embedding_storage,
        full_finetuning=config.method == "full",
        use_gradient_checkpointing=CHECKPOINTING_WORDS[config.checkpointing],
        activation_budget_gb=config.activation_budget,
        backend=config.backend,
        device=config.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        plugins=config.plugins,
        packed=config.packed,
        random_state=config.seed,
    )


def _evaluate(record: RunRecord, model: SentenceTransformer, when: str) -> RetrievalResult | None:
    from .evaluate import evaluate_retrieval

    held_out, config = record.held_out, record.config
    if held_out is None:
        return None
    with _phase(record, f"evaluate {when}"):
        result = evaluate_retrieval(
            model,
            held_out.queries,
            held_out.corpus,
            held_out.relevant,
            batch_size=config.eval_batch_size,
            seed=config.seed,
        )
    say(f"{when + ' training:':17}" + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics().items()))
    return result


def _save(model: SentenceTransformer, folder: Path) -> list[tuple[str, str]]:
    if not has_adapter(model):
        model.save_pretrained(str(folder / MODEL_FOLDER))
        return [(MODEL_FOLDER, "the fine-tuned model: a Sentence Transformers folder")]
    model.save_pretrained(str(folder / ADAPTER_FOLDER))
    model.save_pretrained_merged(folder / MERGED_FOLDER)
    return [
        (ADAPTER_FOLDER, "the LoRA adapter; loads over its base model, and can train on"),
        (MERGED_FOLDER, "the full model with the adapter folded in: a plain Sentence Transformers folder"),
    ]
