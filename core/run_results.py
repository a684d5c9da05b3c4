"""What a run writes about itself: metrics.json and report.html."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import RunConfig
from .environment import describe_environment
from .run_folder import METRICS, REPORT, plain_settings
from .training import Trained, TrainingSet

if TYPE_CHECKING:
    from .evaluate import RetrievalResult
    from .model import SentenceTransformer
    from .retrieval_data import RetrievalData


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """Everything a run has found out, filled in as it goes.

    Args:
        config: The run.
        called: The model's name for readers; `config.model` may be a folder somewhere.
        data: The training data.
        held_out: What is measured on, or None.
        notes: Sentences the report's reader must not miss.
        before, after: The measurements.
        trained: What the trainer did.
        seconds: Wall clock by phase, in order.
        files: (name, what it is) of the models that were saved.
    """

    config: RunConfig
    called: str
    data: TrainingSet
    held_out: RetrievalData | None
    notes: tuple[str, ...] = ()
    before: RetrievalResult | None = None
    after: RetrievalResult | None = None
    trained: Trained = field(default_factory=lambda: Trained(steps=0, pairs=0, history=[]))
    seconds: dict[str, float] = field(default_factory=dict)
    files: list[tuple[str, str]] = field(default_factory=list)

    def gain(self) -> dict[str, Any] | None:
        """The difference on the same queries, with its intervals."""
        from .evaluate import paired_gain

        if self.before is None or self.after is None:
            return None
        return paired_gain(self.before, self.after, seed=self.config.seed)

    def skipped(self) -> str:
        """How many rows were left out and why, as a sentence; empty where none was."""
        if not self.data.skipped:
            return ""
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in self.data.reasons)
        return f"{self.data.skipped:,} bad rows were skipped: {reasons}"


def report_possible() -> bool:
    """Whether the packages that draw the report, the extra `report`, are installed."""
    return all(find_spec(package) is not None for package in ("matplotlib", "jinja2"))


def metrics(record: RunRecord, model: SentenceTransformer) -> dict[str, Any]:
    """The content of metrics.json; numbers that are not finite are null."""
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    figures: dict[str, Any] = {"run": record.config.run_name, "model": record.called}
    if record.before is not None and record.after is not None:
        figures |= {"before": record.before.as_json(), "after": record.after.as_json(), "gain": record.gain()}
    history = [{key: _finite(value) for key, value in row.items()} for row in record.trained.history]
    return figures | {
        "training": {
            "rows": record.data.dataset.num_rows,
            "steps": record.trained.steps,
            "pairs": record.trained.pairs,
            "skipped_rows": record.data.skipped,
            "skipped_reasons": dict(record.data.reasons),
            "loss": record.data.loss,
            "trained_parameters": weights,
            "final_loss": history[-1]["loss"] if history else None,
            "seconds": record.seconds["train"],
        },
        "history": history,
        "seconds": record.seconds,
        "chosen": dict(model.burnish.rows()) if model.burnish else {},
        "config": json.loads(json.dumps(plain_settings(record.config))),
        "environment": describe_environment(str(model.device)),
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_run_report(record: RunRecord, model: SentenceTransformer, folder: Path) -> None:
    """Write report.html into the run's folder."""
    from .report import RunReport, write_report

    config, held_out = record.config, record.held_out
    preparation = model.burnish
    report = RunReport(
        title=f"{config.run_name}: fine-tuning report",
        run=config.run_name,
        model=record.called,
        family=preparation.decision.family.family.name if preparation else "",
        summary=_summary(record),
        before=record.before,
        after=record.after,
        gain=record.gain(),
        history=[dict(row) for row in record.trained.history],
        queries=held_out.queries if held_out else {},
        corpus=held_out.corpus if held_out else {},
        relevant=held_out.relevant if held_out else {},
        environment=describe_environment(str(model.device)),
        plugins=_plugin_rows(model),
        patches=preparation.plan.rows() if preparation else (),
        settings=plain_settings(config) | {"learning_rate": config.rate, "loss": record.data.loss},
        timings=record.seconds,
        files=[*record.files, (METRICS, "every figure of this page")],
        how_to_use=_snippet(folder / record.files[-1][0]),
        notes=record.notes,
    )
    write_report(folder / REPORT, report)


def _summary(record: RunRecord) -> str:
    method = "LoRA" if record.config.method == "lora" else "full"
    name = Path(record.called).name or record.called
    line = f"{method} fine-tuning of {name} took {record.seconds['train']:.0f} s"
    before, after = record.before, record.after
    if before is None or after is None:
        line = f"{line}; nothing was held out, so nothing was measured."
    else:
        change = f"from {before.ndcg.mean:.3f} to {after.ndcg.mean:.3f} over {after.queries} queries"
        line = f"{line} and moved held-out nDCG@{after.k} {change}."
    return f"{line} {record.skipped()}." if record.data.skipped else line


def _plugin_rows(model: SentenceTransformer) -> list[tuple[str, str, str, str]]:
    if model.burnish is None:
        return []
    decision = model.burnish.decision
    chosen = [
        (decision.family.plugin, f"family {decision.family.family.name}"),
        (decision.backend.plugin, f"backend {decision.backend.spec.name}"),
    ]
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
