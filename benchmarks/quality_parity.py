"""Does training with Burnish cost quality? Plain Sentence Transformers against Burnish: same data, seeds and schedule.

    python benchmarks/quality_parity.py                        three seeds, both arms, one process each, one at a time
    python benchmarks/quality_parity.py --check                the same, and exit code 1 if Burnish is worse than noise
    python benchmarks/quality_parity.py --qlora                Burnish against itself: base in 4 bits against float32
    python benchmarks/quality_parity.py --seeds 1 --max-steps 3     whether it works at all; nothing is written

Both arms train all-MiniLM-L6-v2 with LoRA (r=16, alpha 32, on every linear layer but the pooler, which nothing reads)
for one epoch over `core/quickstart_data`: batches of 32 pairs, at most 96 tokens, learning rate 1e-3 falling linearly,
float32 on the CPU, config's own dropout. Data order and the adapter's first weights follow from the seed and are the
same in both. Both are measured by Sentence Transformers' InformationRetrievalEvaluator on the test queries.

Arms: `sentence-transformers`, stock model, trainer and PEFT; `burnish`, FastSentenceTransformer and burnish.Trainer;
`burnish-qlora4`, the same with `load_in_4bit=True`: NF4 with double quantisation under float32 arithmetic, since 16-bit
arithmetic on a CPU is many times slower. What the two of `--qlora` differ in is the storage of the frozen weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

Arms = tuple[str, str]  # what is compared with, what is compared
ARMS: Arms = ("sentence-transformers", "burnish")
QLORA_ARMS: Arms = ("burnish", "burnish-qlora4")
STORAGE: dict[str, dict[str, bool]] = {"burnish": {}, "burnish-qlora4": {"load_in_4bit": True}}
SHORT = {"sentence-transformers": "ST", "burnish": "burnish", "burnish-qlora4": "qlora4"}
METRICS = ("ndcg@10", "recall@10", "mrr@10")
RESULTS = Path(__file__).parent / "results" / "quality-parity-cpu.jsonl"
QLORA_RESULTS = RESULTS.with_name("quality-parity-qlora4-cpu.jsonl")
FIRST_SEED, LENGTH, BATCH, RATE, RANK, ALPHA = 42, 96, 32, 1e-3, 16, 32
TARGETS, DEAD = ["query", "key", "value", "dense"], ["pooler.dense"]

Line = dict[str, Any]


def stock_model(weights: str, seed: int) -> Any:
    """The stock model with PEFT's LoRA."""
    import torch
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(weights, device="cpu")
    model.max_seq_length = LENGTH
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, exclude_modules=DEAD, task_type="FEATURE_EXTRACTION"
    )
    torch.manual_seed(seed)
    model.add_adapter(lora)
    return model


def burnish_model(arm: str, weights: str, seed: int) -> Any:
    """The same through Burnish, by its defaults: packed input, the family's targets."""
    from burnish import FastSentenceTransformer

    storage: Any = STORAGE[arm]
    model = FastSentenceTransformer.from_pretrained(weights, max_seq_length=LENGTH, device="cpu", **storage)
    return FastSentenceTransformer.get_peft_model(model, r=RANK, lora_alpha=ALPHA, random_state=seed)


def train(arm: str, model: Any, seed: int, max_steps: int) -> Line:
    """Train in place; returns steps, pairs and seconds, with the first step (which warms up) also apart."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    import burnish
    from burnish.core.quickstart import DATA
    from burnish.core.retrieval_data import training_pairs

    class Clock(TrainerCallback):
        ends: list[float]

        def __init__(self) -> None:
            self.ends = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    pairs, clock = training_pairs(DATA), Clock()
    trainer_class = burnish.Trainer if arm in STORAGE else SentenceTransformerTrainer
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            num_train_epochs=1,
            max_steps=max_steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            seed=seed,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=pairs,
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[clock],
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    steps = len(clock.ends)
    seen = min(steps * BATCH, len(pairs))
    steady = clock.ends[-1] - clock.ends[0] if steps > 1 else None
    return {
        "steps": steps,
        "pairs": seen,
        "train_seconds": round(seconds, 2),
        "first_step_seconds": round(clock.ends[0] - began, 2),
        "pairs_per_second": round(seen / seconds, 2),
        "pairs_per_second_after_first_step": round((seen - BATCH) / steady, 2) if steady else None,
        "losses": [round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row],
    }


def evaluate(model: Any) -> dict[str, float]:
    """The three metrics on the test queries, by Sentence Transformers' evaluator."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    from burnish.core.quickstart import DATA
    from burnish.core.retrieval_data import load_retrieval

    held_out = load_retrieval(DATA, "test")
    queries: dict[str, Any] = dict(held_out.queries)
    corpus: dict[str, Any] = dict(held_out.corpus)
    evaluator = InformationRetrievalEvaluator(
        queries,
        corpus,
        held_out.relevant,
        precision_recall_at_k=[10],
        batch_size=64,
        write_csv=False,
        name="test",
    )
    scores = evaluator(model)
    return {name: round(scores[f"test_{model.similarity_fn_name}_{name}"], 6) for name in METRICS}


def run_arm(arm: str, seed: int, max_steps: int, *, before: bool) -> Line:
    """One arm with one seed, in this process."""
    from burnish.core.environment import versions
    from burnish.core.quickstart import find_weights

    weights = find_weights(lambda: False)
    start = peak_mebibytes()
    model = burnish_model(arm, weights.model, seed) if arm in STORAGE else stock_model(weights.model, seed)
    line: Line = {
        "benchmark": "quality-parity",
        "arm": arm,
        "mode": "qlora4" if STORAGE.get(arm) else "lora32",
        "seed": seed,
        "max_steps": max_steps if max_steps > 0 else None,
        "trained_parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
    }
    if before:
        line["before"] = evaluate(model)  # an adapter that has not been trained changes nothing
    line |= train(arm, model, seed, max_steps)
    line |= {"peak_rss_mib": peak_mebibytes(), "rss_before_model_mib": start}
    line["after"] = evaluate(model)
    return line | {"weights": weights.note, "machine": machine(), "versions": versions()}


def peak_mebibytes() -> int:
    """The most resident memory this process has had; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def machine() -> Line:
    """What a reader needs to judge the seconds, how busy the machine was included."""
    import torch

    from burnish.core.environment import describe_environment

    facts = describe_environment("cpu")
    return {
        "processor": facts["device"],
        "cores": facts["CPU cores"],
        "torch_threads": torch.get_num_threads(),
        "system": facts["system"],
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def commit() -> str:
    """The checkout's commit, with a plus where files differ from it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True).stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "-uno") else "")


def run_all(seeds: list[int], max_steps: int, output: Path | None, arms: Arms = ARMS) -> list[Line]:
    """Every arm and seed, each in a process of its own, one after another; the arms take turns to go first."""
    lines = []
    stamp = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    part = output.with_suffix(".jsonl.part") if output else None
    if part:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("", encoding="utf-8")
    for place, seed in enumerate(seeds):
        for arm in arms if place % 2 == 0 else arms[::-1]:
            command = [sys.executable, __file__, "--arm", arm, "--seed", str(seed), "--max-steps", str(max_steps)]
            command += ["--before"] if place == 0 else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            if done.returncode != 0:
                raise SystemExit(f"arm {arm}, seed {seed} ended with exit code {done.returncode}")
            lines.append({**json.loads(done.stdout.splitlines()[-1]), **stamp})
            print(row(lines[-1]), flush=True)
            if part:
                with part.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    if part and output:
        part.replace(output)
    return lines


COLUMNS = (*METRICS, "train_seconds", "pairs_per_second", "pairs_per_second_after_first_step", "peak_rss_mib")
HEADINGS = ("nDCG@10", "recall@10", "MRR@10", "train s", "pairs/s", "after 1st step", "peak RSS MiB")
WIDTHS = (8, 10, 8, 8, 8, 15, 13)


def figure(line: Line, name: str) -> float | None:
    value: float | None = line["after"][name] if name in METRICS else line[name]
    return value


def row(line: Line) -> str:
    """One measurement as a line of the table."""
    return cells(line["arm"], str(line["seed"]), [figure(line, name) for name in COLUMNS])


def cells(arm: str, seed: str, values: list[float | None], sign: str = "") -> str:
    shown = [
        "-" if value is None else f"{value:{sign}.4f}" if name in METRICS else f"{value:{sign}.1f}"
        for name, value in zip(COLUMNS, values, strict=True)
    ]
    return f"{arm:22}{seed:>6}" + "".join(f"{text:>{width}}" for text, width in zip(shown, WIDTHS, strict=True))


def table(lines: list[Line], arms: Arms = ARMS) -> str:
    """All measurements, the arms' means, and the second arm minus the first, paired by seed."""
    header = f"{'arm':22}{'seed':>6}" + "".join(
        f"{text:>{width}}" for text, width in zip(HEADINGS, WIDTHS, strict=True)
    )
    rows = [header, *(row(line) for line in sorted(lines, key=lambda line: (arms.index(line["arm"]), line["seed"])))]
    for arm in arms:
        rows.append(cells(arm, "mean", [mean(lines, arm, name) for name in COLUMNS]))
    label = f"{SHORT[arms[1]]} − {SHORT[arms[0]]}"
    for seed in sorted({line["seed"] for line in lines}):
        rows.append(cells(label, str(seed), [difference(lines, seed, name, arms) for name in COLUMNS], "+"))
    gaps = [mean(lines, arms[1], name) - mean(lines, arms[0], name) for name in METRICS]
    faster = mean(lines, arms[1], "pairs_per_second") / mean(lines, arms[0], "pairs_per_second")
    rows.append(
        "mean paired difference: "
        + ", ".join(f"{name} {gap:+.4f}" for name, gap in zip(METRICS, gaps, strict=True))
        + f"; seed spread of {SHORT[arms[0]]}'s nDCG@10: {spread(lines, arms):.4f}; pairs/s ×{faster:.2f}"
    )
    return "\n".join(rows)


def of(lines: list[Line], arm: str) -> dict[int, Line]:
    return {line["seed"]: line for line in lines if line["arm"] == arm}


def mean(lines: list[Line], arm: str, name: str) -> float:
    """The arm's mean over seeds; `nan` for what was not measured."""
    values = [figure(line, name) for line in of(lines, arm).values()]
    return fmean(value if value is not None else float("nan") for value in values)


def difference(lines: list[Line], seed: int, name: str, arms: Arms = ARMS) -> float | None:
    ours, theirs = (figure(of(lines, arm)[seed], name) for arm in reversed(arms))
    return None if ours is None or theirs is None else ours - theirs


def spread(lines: list[Line], arms: Arms = ARMS) -> float:
    """How far apart the seeds put the first arm's own nDCG@10: highest minus lowest."""
    scores = [line["after"]["ndcg@10"] for line in of(lines, arms[0]).values()]
    return float(max(scores) - min(scores))


def verdict(lines: list[Line], arms: Arms = ARMS) -> str | None:
    """Why the check fails, or None."""
    trained = {line["trained_parameters"] for line in lines}
    if len(trained) > 1:
        return f"the arms do not train the same weights: {sorted(trained)} parameters"
    gap, seeds = mean(lines, arms[1], "ndcg@10") - mean(lines, arms[0], "ndcg@10"), spread(lines, arms)
    if gap < -seeds:
        return f"the mean nDCG@10 of {arms[1]} is {-gap:.4f} lower, more than the {seeds:.4f} between seeds"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, counted up from 42")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop each training early; then nothing is written")
    parser.add_argument("--check", action="store_true", help="exit code 1 if Burnish is worse by more than the seeds")
    parser.add_argument("--qlora", action="store_true", help="compare a base in 4 bits with one in float32")
    parser.add_argument("--output", type=Path, help=f"where the JSON lines go (default {RESULTS.name})")
    parser.add_argument("--arm", choices=(*ARMS, *QLORA_ARMS[1:]), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--before", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.seed, options.max_steps, before=options.before)))
        return 0
    if options.check and options.seeds < 3:
        parser.error("--check needs at least three seeds: with fewer there is no spread to compare with")
    arms, results = (QLORA_ARMS, QLORA_RESULTS) if options.qlora else (ARMS, RESULTS)
    output = options.output or (None if options.max_steps > 0 else results)
    lines = run_all([FIRST_SEED + place for place in range(options.seeds)], options.max_steps, output, arms)
    print(f"\n{table(lines, arms)}")
    fault = verdict(lines, arms) if options.check else None
    if fault:
        print(f"check failed: {fault}", file=sys.stderr)
    return 1 if fault else 0


if __name__ == "__main__":
    raise SystemExit(main())
