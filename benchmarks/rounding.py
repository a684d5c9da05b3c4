"""What becomes of a full fine-tuning whose weights are held in bfloat16: to the nearest, or rounded stochastically?

    OMP_NUM_THREADS=1 python benchmarks/rounding.py                all arms, two seeds: about 15 minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/rounding.py --steps 3      whether it works at all; nothing is written
    OMP_NUM_THREADS=1 python benchmarks/rounding.py --bytes        what every optimizer holds, in bytes a weight

Every arm trains all-MiniLM-L6-v2 in full on `core/quickstart_data` for one epoch: batches of 32 pairs, at most 64
tokens, a rate of 2e-5 that falls linearly, no dropout, clipping at 1, on the CPU. The data come in the same order in
all arms of a seed. Afterwards the weights are taken as they are, and the held-out queries are measured in float32.

Arms: `float32`, masters in float32, the forward under bfloat16 autocast, as on a GPU; `bfloat16`, pure bfloat16 and
torch's AdamW; `rounded`, the same with `stochastic_rounding=True`; `rounded-float32-moments`, with moments in float32.

`went` is how far the weights went, ‖w - w0‖ / ‖w0‖; `moved` the share of them that are not where they were; `along` how
far they went in the direction of the float32 arm's, as a share of how far those went.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish import FastSentenceTransformer, Trainer, TrainingArguments, losses
from burnish.core.environment import versions
from burnish.core.quickstart import DATA, find_weights
from burnish.core.retrieval_data import training_pairs

if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks.quality_parity import commit, evaluate, machine
else:
    from quality_parity import commit, evaluate, machine

ARMS = ("float32", "bfloat16", "rounded", "rounded-float32-moments")
FIRST_SEED, SEEDS, STEPS, BATCH, LENGTH, RATE = 42, 2, 44, 32, 64, 2e-5
RESULTS = Path(__file__).parent / "results"
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Line = dict[str, Any]


class Float32Moments(Trainer):
    """Stochastic rounding of weights alone."""

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        kind, keywords = super().get_optimizer_cls_and_kwargs(args, model)
        keywords["rounding"] = replace(keywords["rounding"], moments=torch.float32)
        return kind, keywords


def load(weights: str, arm: str) -> Any:
    dtype = torch.float32 if arm == "float32" else torch.bfloat16
    return FastSentenceTransformer.from_pretrained(
        weights, full_finetuning=True, dtype=dtype, max_seq_length=LENGTH, device="cpu", config_kwargs=STILL
    )


def vector(model: Any) -> Tensor:
    """All weights in a row, float32."""
    return torch.cat([weight.detach().float().flatten() for weight in model.parameters()])


def train(arm: str, model: Any, seed: int, steps: int) -> Line:
    """Train in place; returns the losses and what a step and the optimizer cost."""
    pairs = training_pairs(DATA)
    kind = Float32Moments if arm == "rounded-float32-moments" else Trainer
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE, seed=seed, logging_steps=1,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, bf16=arm == "float32",
            stochastic_rounding=arm.startswith("rounded"),
        )  # fmt: skip
        trainer = kind(model, arguments, train_dataset=pairs, loss=losses.MultipleNegativesRankingLoss(model))
        began = time.perf_counter()
        with contextlib.redirect_stdout(None):  # the log of every step
            trainer.train()
        seconds = time.perf_counter() - began
    optimizer: Any = trainer.optimizer
    state = [value for one in optimizer.state.values() for value in one.values() if torch.is_tensor(value)]
    count = sum(weight.numel() for weight in model.parameters())
    return {
        "losses": [round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row],
        "train_seconds": round(seconds, 1),
        "weight_bytes": round(sum(one.numel() * one.element_size() for one in model.parameters()) / count, 2),
        "state_bytes": round(sum(value.numel() * value.element_size() for value in state) / count, 2),
    }


def run_seed(weights: str, seed: int, steps: int) -> list[Line]:
    """All arms with one seed, the float32 one first."""
    lines, reference = [], None
    for arm in ARMS:
        model = load(weights, arm)
        start = vector(model)
        line: Line = {"benchmark": "rounding", "arm": arm, "seed": seed, "steps": steps}
        line |= train(arm, model, seed, steps)
        change = vector(model) - start
        reference = change if reference is None else reference
        line |= {
            "went": float(change.norm() / start.norm()),
            "moved": float((change != 0).float().mean()),
            "along": float(change @ reference / (reference @ reference)),
            "after": evaluate(model.float()),
        }
        lines.append(line)
        print(row(line), flush=True)
    return lines


def ends(line: Line) -> tuple[float, float]:
    """The mean loss of the first and of the last tenth of the steps."""
    part = max(1, len(line["losses"]) // 10)
    return fmean(line["losses"][:part]), fmean(line["losses"][-part:])


HEADINGS = (
    f"{'arm':24}{'seed':>5}{'loss':>9}{'→':>3}{'':6}{'nDCG@10':>9}{'went':>10}{'moved':>8}{'along':>8}{'bytes':>9}"
)


def row(line: Line) -> str:
    """One measurement as a line of the table; bytes a weight of weights and optimizer."""
    first, last = ends(line)
    return (
        f"{line['arm']:24}{line['seed']:>5}{first:>9.4f}{'→':>3}{last:>7.4f}{line['after']['ndcg@10']:>8.4f}"
        f"{line['went']:>10.5f}{line['moved']:>8.1%}{line['along']:>8.3f}"
        f"{line['weight_bytes'] + line['state_bytes']:>9.1f}"
    )


FREE = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "adamw_8bit": {"optim": "adamw_8bit"},
    "sparse_embeddings": {"sparse_embeddings": True},
    "optimizer_in_backward": FREE,
    "adamw_8bit, in_backward": {"optim": "adamw_8bit", **FREE},
    "sparse, in_backward": {"sparse_embeddings": True, **FREE},
    "bfloat16": {},
    "stochastic_rounding": {"stochastic_rounding": True},
    "rounding, in_backward": {"stochastic_rounding": True, **FREE},
    "rounding, sparse, in_backward": {"stochastic_rounding": True, "sparse_embeddings": True, **FREE},
}


def size_of(tensor: Tensor) -> int:
    """Bytes of what a tensor stores, of a sparse one its indices and values."""
    parts = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
    return sum(part.numel() * part.element_size() for part in parts)


def held(weights: str, choice: str) -> tuple[float, float, float]:
    """Bytes a weight in two steps: of the weights, of all gradients that there are at one time, of the state."""
    model = load(weights, "bfloat16" if "bfloat16" in choice or "rounding" in choice else "float32")
    parameters: list[Any] = list(model.parameters())
    most = 0

    def look(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(size_of(one.grad) for one in parameters if one.grad is not None))

    hooks = [weight.register_post_accumulate_grad_hook(look) for weight in parameters]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        arguments = TrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=BATCH, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, **CHOICES[choice],
        )  # fmt: skip
        loss = losses.MultipleNegativesRankingLoss(model)
        trainer = Trainer(model, arguments, train_dataset=training_pairs(DATA), loss=loss)
        trainer.train()
    for hook in hooks:
        hook.remove()
    optimizer: Any = trainer.optimizer
    # bitsandbytes' two tables of 256 values are one for all weights.
    state = {id(one): one for part in optimizer.state.values() for one in part.values() if torch.is_tensor(one)}
    count = sum(weight.numel() for weight in parameters)
    sizes = sum(map(size_of, parameters)), most, sum(map(size_of, state.values()))
    return sizes[0] / count, sizes[1] / count, sizes[2] / count


def print_bytes(weights: str) -> None:
    """What every choice holds of all-MiniLM-L6-v2, 52% of whose weights are the table of tokens."""
    print(f"{'':32}{'weights':>9}{'gradients':>11}{'state':>8}{'all':>8}")
    for choice in CHOICES:
        sizes = held(weights, choice)
        print(f"{choice:32}{sizes[0]:>9.2f}{sizes[1]:>11.2f}{sizes[2]:>8.2f}{sum(sizes):>8.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="another number of steps; then nothing is written")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many seeds, counted up from 42")
    parser.add_argument("--bytes", action="store_true", help="print what every optimizer holds, and nothing else")
    options = parser.parse_args()
    weights = find_weights(lambda: False)
    if options.bytes:
        print_bytes(weights.model)
        return 0
    print(HEADINGS)
    before = evaluate(load(weights.model, "float32"))
    lines: list[Line] = []
    for place in range(options.seeds):
        lines += run_seed(weights.model, FIRST_SEED + place, options.steps)
    now = datetime.now(UTC)
    stamp = {"at": now.isoformat(timespec="seconds"), "commit": commit(), "machine": machine(), "versions": versions()}
    report = {"before": before, "weights": weights.note, **stamp, "lines": lines}
    if options.steps == STEPS:
        path = RESULTS / f"rounding-{now.date()}.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
