"""Does training a reranker or a classifier with Burnish cost quality? One run: a task, a system and a seed.

    python benchmarks/rerank_quality.py --task rerank --system burnish --seed 42 --model FOLDER --out results.jsonl
    python benchmarks/rerank_quality.py --task classify --system st --seed 42 --model FOLDER --out results.jsonl
    python benchmarks/rerank_quality.py --table results.jsonl

Each run adds one line to its file. FOLDER holds MiniLM, or any encoder without a head; nothing asks the Hub. The data
is that of docs/examples, or what --data names. Every weight trains, with bfloat16 autocast on a GPU and in float32 on a
CPU. The seed gives both systems the same head.

rerank: pairs with 0/1 labels under BinaryCrossEntropyLoss, from the first 2,000 training queries with all of their 30
candidates, one epoch, batches of 64, at most 128 tokens. `st` is Sentence Transformers' CrossEncoder and trainer. Both
see the same batches in the same order. They are measured by nDCG@10 over the candidates of the test queries, and of the
first 300 of them.

classify: sentences with one of 14 tactics under cross-entropy, four epochs, batches of 32, at most 96 tokens. `st` is
transformers' Trainer on AutoModelForSequenceClassification; the order of the data is each trainer's own. They are
measured by accuracy and macro F1 on the test split.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks import quality_parity
else:
    sys.path.insert(0, str(HERE))
    import quality_parity

SYSTEMS = ("st", "burnish")
METRICS = {"rerank": ("ndcg@10", "mrr@10", "first_300_ndcg@10"), "classify": ("accuracy", "macro_f1")}
DATA = {"rerank": "attack_rerank", "classify": "attack_tactics"}
FIRST = 300
"""Test queries that the data's own sheet gives figures for."""

Line = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What both systems are given.

    Args:
        queries, negatives: For rerank: training queries from the start, and negatives of each at most.
        texts: For classify: training texts from the start; None for all.
        test: Test queries or texts from the start; None for all.
        epochs, batch, rate, warmup, length: Passes, rows in a batch, peak rate falling linearly, share of the steps
            over which it rises, tokens of a text or pair.
        max_steps: Stop early; -1 does not.
    """

    queries: int = 2_000
    negatives: int = 29
    texts: int | None = None
    test: int | None = None
    epochs: float = 1
    batch: int = 64
    rate: float = 1e-4
    warmup: float = 0.1
    length: int = 128
    max_steps: int = -1


RECIPES = {"rerank": Recipe(), "classify": Recipe(epochs=4, batch=32, rate=2e-4, length=96)}


def arguments(recipe: Recipe, seed: int, folder: str, *, cuda: bool) -> Line:
    """Training arguments by the names that all three trainers have for them."""
    return {
        "output_dir": folder,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps,
        "per_device_train_batch_size": recipe.batch,
        "per_device_eval_batch_size": 64,
        "learning_rate": recipe.rate,
        "warmup_steps": recipe.warmup,
        "seed": seed,
        "bf16": cuda,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "disable_tqdm": True,
    }


def timed(trainer: Any) -> Line:
    """Train; steps, seconds, rows a second and the logged losses."""
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    return {
        "steps": trainer.state.global_step,
        "train_seconds": round(seconds, 2),
        "losses": [round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row],
    }


def rerank(system: str, recipe: Recipe, seed: int, data: Path, weights: Path, device: str, backend: str) -> Line:
    """Train and measure a reranker; `backend` is Burnish's."""
    import torch
    from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    import burnish
    from burnish.core.hard_negatives import with_hard_negatives
    from burnish.core.reranking import evaluate_reranking, load_reranking

    train = load_reranking(data, "train", max_queries=recipe.queries)
    test = load_reranking(data, "test", max_queries=recipe.test)
    pairs = with_hard_negatives(train, num_negatives=recipe.negatives, sampling_strategy="random", seed=seed)
    model: Any
    if system == "burnish":
        model = burnish.FastCrossEncoder.from_pretrained(
            str(weights), full_finetuning=True, num_labels=1, max_seq_length=recipe.length, random_state=seed,
            device=device, backend=backend,
        )  # fmt: skip
    else:
        torch.manual_seed(seed)
        model = CrossEncoder(str(weights), num_labels=1, max_length=recipe.length, device=device)
    head = first_head(model.model)
    trainer_class = burnish.CrossEncoderTrainer if system == "burnish" else CrossEncoderTrainer
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = trainer_class(
            model=model,
            args=CrossEncoderTrainingArguments(**arguments(recipe, seed, folder, cuda=device == "cuda")),
            train_dataset=pairs,
            loss=BinaryCrossEntropyLoss(model),
        )
        found = timed(trainer)
    result = evaluate_reranking(model, test)
    first = list(result.per_query.values())[:FIRST]
    return {
        **found,
        "rows": len(pairs),
        "head": head,
        "metrics": {**result.metrics(), "first_300_ndcg@10": fmean(ndcg for ndcg, _ in first)},
        "intervals": {"ndcg@10": [result.ndcg.low, result.ndcg.high]},
        "bounds": {"as they came": result.first, "at best": result.best},
        "test": len(result.per_query),
        "test_seconds": round(result.seconds, 2),
    }


def classify(system: str, recipe: Recipe, seed: int, data: Path, weights: Path, device: str, backend: str) -> Line:
    """Train and measure a classifier; `backend` is Burnish's."""
    import numpy as np
    from scipy.special import softmax  # type: ignore[import-untyped]

    from burnish.core.class_data import load_classes
    from burnish.core.class_metrics import measure

    train = load_classes(data / "train.jsonl.gz")
    names = train.features["label"].names
    test = load_classes(data / "test.jsonl.gz", labels=names)
    train = train.select(range(min(len(train), recipe.texts or len(train))))
    test = test.select(range(min(len(test), recipe.test or len(test))))
    run = partial(_ours, backend) if system == "burnish" else _transformers
    found, logits = run(recipe, seed, weights, device, names, train, test)
    result = measure(test["label"], softmax(np.asarray(logits, np.float64), axis=1), names)
    return {
        **found,
        "rows": len(train),
        "metrics": {name: result.metrics[name].mean for name in METRICS["classify"]},
        "intervals": {name: [result.metrics[name].low, result.metrics[name].high] for name in METRICS["classify"]},
        "test": len(test),
    }


def _ours(
    backend: str, recipe: Recipe, seed: int, weights: Path, device: str, names: list[str], train: Any, test: Any
) -> tuple[Line, Any]:
    import burnish

    model = burnish.FastClassifier.from_pretrained(
        str(weights), labels=names, full_finetuning=True, max_seq_length=recipe.length, random_state=seed,
        device=device, backend=backend,
    )  # fmt: skip
    head = first_head(model.transformers_model)
    with tempfile.TemporaryDirectory() as folder:
        given: Any = burnish.CrossEncoderTrainingArguments(**arguments(recipe, seed, folder, cuda=device == "cuda"))
        found = timed(burnish.ClassifierTrainer(model=model, args=given, train_dataset=train))
    began = time.perf_counter()
    logits = model.logits(test["text"][:], batch_size=64)
    return {**found, "head": head, "test_seconds": round(time.perf_counter() - began, 2)}, logits


def _transformers(
    recipe: Recipe, seed: int, weights: Path, device: str, names: list[str], train: Any, test: Any
) -> tuple[Line, Any]:
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(weights)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=len(names), dtype=torch.float32)
    head = first_head(model)

    def tokenised(dataset: Any) -> Any:
        def step(rows: Any) -> Any:
            return tokenizer(rows["text"], truncation=True, max_length=recipe.length)

        return dataset.map(step, batched=True, remove_columns=["text"], load_from_cache_file=False)

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        ready = tokenised(train)
        tokenising = time.perf_counter() - began
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments(recipe, seed, folder, cuda=device == "cuda")),
            train_dataset=ready,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )
        found = timed(trainer)
        began = time.perf_counter()
        logits = trainer.predict(tokenised(test)).predictions
    test_seconds = round(time.perf_counter() - began, 2)
    return {**found, "head": head, "tokenise_seconds": round(tokenising, 2), "test_seconds": test_seconds}, logits


def first_head(model: Any) -> float:
    """A sum over the head's first weights: equal for two systems that start from the same head."""
    return round(float(model.classifier.weight.detach().double().abs().sum()), 6)


def run(options: argparse.Namespace, recipe: Recipe) -> Line:
    """One run, in this process."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it
    import torch

    from burnish.core.environment import versions

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = (rerank if options.task == "rerank" else classify)(
        options.system, recipe, options.seed, options.data, options.model, device, options.backend
    )
    seen = min(found["steps"] * recipe.batch, round(found["rows"] * recipe.epochs))
    found["rows_per_second"] = round(seen / found["train_seconds"], 2)
    return {
        "benchmark": "rerank-quality",
        "task": options.task,
        "system": options.system,
        "backend": options.backend if options.system == "burnish" else None,
        "seed": options.seed,
        "recipe": {name: getattr(recipe, name) for name in Recipe.__slots__},
        "precision": "bfloat16 autocast" if device == "cuda" else "float32",
        **found,
        "data": options.data.name,
        "weights": options.model.name,
        "peak_rss_mib": quality_parity.peak_mebibytes(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "machine": quality_parity.machine(),
        "versions": versions(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options.commit or quality_parity.commit(),
    }


def table(lines: Sequence[Line]) -> str:
    """Each task's figures by system and seed, means, and Burnish minus the other, paired by seed.

    Raises:
        ValueError: If lines of a task were not made by one recipe on one kind of device.
    """
    rows = []
    for task, names in METRICS.items():
        of = {(line["system"], line["seed"]): line for line in lines if line["task"] == task}
        if not of:
            continue
        kinds = {json.dumps([line[name] for name in ("recipe", "device", "test")]) for line in of.values()}
        if len(kinds) > 1:
            raise ValueError(f"the lines of {task} are of different recipes or devices")
        rows.append(f"{task:24}" + "".join(f"{name:>20}" for name in (*names, "train seconds")))
        for (system, seed), line in sorted(of.items()):
            rows.append(_row(f"{system} {seed}", [line["metrics"][name] for name in names], line["train_seconds"]))
        for system in SYSTEMS:
            own = [line for (one, _), line in of.items() if one == system]
            if own:
                means = [fmean(line["metrics"][name] for line in own) for name in names]
                rows.append(_row(f"{system} mean of {len(own)}", means, fmean(line["train_seconds"] for line in own)))
        seeds = sorted(seed for system, seed in of if system == "burnish" and ("st", seed) in of)
        if seeds:
            gaps = [
                fmean(of["burnish", seed]["metrics"][name] - of["st", seed]["metrics"][name] for seed in seeds)
                for name in names
            ]
            plain = [of["st", seed]["metrics"] for seed in seeds]
            spreads = [max(one[name] for one in plain) - min(one[name] for one in plain) for name in names]
            rows.append(_row("burnish − st", gaps, None, "+"))
            rows.append(_row("seeds of st apart by", spreads, None))
    return "\n".join(rows)


def _row(name: str, values: Sequence[float], seconds: float | None, sign: str = "") -> str:
    shown = "-" if seconds is None else f"{seconds:.1f}"
    return f"{name:24}" + "".join(f"{value:>{sign}20.4f}" for value in values) + f"{shown:>20}"


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="only show what a file of results holds")
    parser.add_argument("--system", choices=SYSTEMS)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--task", choices=tuple(METRICS))
    parser.add_argument("--data", type=Path, help="folder of the task's data; left out, that of docs/examples")
    parser.add_argument("--model", type=Path, help="folder of an encoder's weights")
    parser.add_argument("--out", type=Path, help="JSON lines file that the run is added to")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left out: cuda if it is there")
    parser.add_argument("--backend", default="auto", help="of Burnish's model")
    parser.add_argument("--commit", help="what to write down where there is no git")
    for name, kind in (("queries", int), ("negatives", int), ("texts", int), ("test", int), ("max-steps", int),
                       ("epochs", float), ("batch", int), ("rate", float), ("length", int)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, help="of the recipe; left out, the task's")
    options = parser.parse_args(given)
    needed = ("system", "task", "model", "out")
    if options.table is None and any(getattr(options, name) is None for name in needed):
        parser.error(f"a run needs {', '.join(f'--{name}' for name in needed)}")
    if options.table is None and options.data is None:
        options.data = HERE.parent / "docs" / "examples" / "data" / DATA[options.task]
    return options


def main() -> int:
    options = parsed()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text(encoding="utf-8").splitlines()]))
        return 0
    base = RECIPES[options.task]
    asked = {name: getattr(options, name, None) for name in Recipe.__slots__}
    recipe = Recipe(**{name: getattr(base, name) if value is None else value for name, value in asked.items()})
    line = run(options, recipe)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps({name: line[name] for name in ("task", "system", "seed", "metrics", "train_seconds")}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
