"""Is one GEMM for query, key and value faster than three? The same model with and without that patch, step by step.

    python benchmarks/joined_qkv.py --output FILE [--device cuda]

Full fine-tuning with float32 masters under bfloat16 autocast (float32 on a CPU), packed input, the config's own
dropout; forward and backward of one batch, without tokeniser and optimizer. The arms take turns; the median of
`--steps` steps is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from burnish.core.contracts import Machine
from burnish.core.environment import describe_environment
from burnish.core.patching import PatchPlan
from burnish.core.testing.subject import Subject
from burnish.core.testing.tokenizer import words

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
MINI = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
# family, changes to its base config, texts, tokens each
CASES: dict[str, tuple[str, dict[str, int], int, int]] = {
    "bge-large": ("bert", LARGE, 64, 512),
    "bge-large short": ("bert", LARGE, 64, 64),
    "MiniLM-L6": ("bert", MINI, 128, 128),
    "mpnet-base": ("mpnet", {}, 64, 128),
    "distilbert": ("distilbert", {}, 64, 512),
}


def arms(case: str, device: str, folder: Path) -> tuple[Any, list[PatchPlan]]:
    """(model with its patches undone, [the plan a CPU gets, with three products; the plan a GPU gets, with one])."""
    name, changes, _, _ = CASES[case]
    config = import_module(f"burnish.families.{name}").sample("base")
    config.update({**changes, "vocab_size": 1000})
    subject = Subject(config=config, folder=folder, device=device)
    model = subject.ours(config_kwargs={drop: getattr(config, drop) for drop in subject.dropouts})
    model.max_seq_length = 512
    model.burnish.plan.undo()
    family = model.burnish.decision.family
    return model, [PatchPlan(family.claims(model[0].model, Machine(device=kind))) for kind in ("cpu", "cuda")]


def run(case: str, device: str, steps: int) -> dict[str, Any]:
    """Times of both arms, in milliseconds a step."""
    _, _, count, length = CASES[case]
    texts = [words(length - 2, seed) for seed in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        model, plans = arms(case, device, Path(folder))
        model.train()
        cast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
        features = {
            key: value.to(device) if torch.is_tensor(value) else value for key, value in model.preprocess(texts).items()
        }
        assert features["input_ids"].shape == (1, count * length), "the input is not packed, or cut"
        times: dict[str, list[float]] = {"three": [], "one": []}
        for turn in range(steps + 3):
            for arm, plan in zip(times, plans, strict=True):
                plan.apply(model[0].model)
                seconds = timed(model, features, cast, device)
                plan.undo()
                if turn >= 3:
                    times[arm].append(seconds * 1e3)
    middle = {arm: statistics.median(found) for arm, found in times.items()}
    return {
        "case": case, "texts": count, "tokens": length, "three_ms": round(middle["three"], 2),
        "one_ms": round(middle["one"], 2), "ratio": round(middle["three"] / middle["one"], 4), "steps": steps,
        "three_range": [round(min(times["three"]), 2), round(max(times["three"]), 2)],
        "one_range": [round(min(times["one"]), 2), round(max(times["one"]), 2)],
    }  # fmt: skip


def timed(model: Any, features: dict[str, Any], cast: Any, device: str) -> float:
    """Seconds of one forward and backward."""
    model.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with cast:
        loss = model(dict(features))["sentence_embedding"].float().square()[:, 0].sum()
    torch.autograd.backward(loss)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Run every case and write a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", action="append", choices=CASES)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    lines = [json.dumps(describe_environment(given.device))]
    for case in given.only or CASES:
        lines.append(json.dumps(run(case, given.device, given.steps)))
        print(lines[-1], flush=True)
        given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
