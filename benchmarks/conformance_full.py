"""The conformance suite on one model of published size of each family: random weights, exact shapes.

    make conformance-full                     every model, on the CPU
    make conformance-full ARGS='--only bge-m3 --device cuda'

Each model runs in a process of its own. It is compared in float32, since two copies in float64 do not fit 24 GB. The
log goes to benchmarks/results/conformance-full-DATE-DEVICE.jsonl: one line for the machine, then one for each check.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def models() -> dict[str, Callable[[], Any]]:
    """The published shapes, by name."""
    from transformers import BertConfig, DistilBertConfig, MPNetConfig, RobertaConfig, XLMRobertaConfig

    from burnish.families import gemma, modernbert, qwen3

    large: dict[str, Any] = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    m3: dict[str, Any] = {
        "vocab_size": 250002,
        "max_position_embeddings": 8194,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    }
    return {
        "bge-large-en-v1.5": lambda: BertConfig(**large),
        "all-mpnet-base-v2": lambda: MPNetConfig(vocab_size=30527, max_position_embeddings=514),
        "distilbert-base-uncased": DistilBertConfig,
        "ModernBERT-base": lambda: modernbert.sample("base"),
        "bge-m3": lambda: XLMRobertaConfig(**large, **m3),
        "embeddinggemma-300m": lambda: gemma.sample("base"),
        "Qwen3-Embedding-0.6B": lambda: qwen3.sample("base"),
        "roberta-base (generic)": lambda: RobertaConfig(vocab_size=50265, max_position_embeddings=514, pad_token_id=1),
    }


def examine(name: str, device: str) -> None:
    """Run the suite on one model; a JSON line for each check."""
    import torch

    from burnish.core.cli.quiet import quiet
    from burnish.core.testing import suite
    from burnish.core.testing.subject import Subject

    quiet()
    torch.backends.cuda.matmul.allow_tf32 = False
    config = models()[name]()
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(
            config=config, folder=Path(folder), device=device, tolerance=1e-4, exact=torch.float32, examples=2
        )
        start = time.monotonic()
        for result in suite.run(subject):
            seconds = round(time.monotonic() - start, 1)
            line = {"model": name, "check": result.check, "state": result.state, "measured": result.words}
            print(json.dumps({**line, "seconds": seconds}), flush=True)
            start = time.monotonic()


def main() -> int:
    """Run each model in a process of its own; returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=models(), help="one model; repeat for more")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="the log, in place of the dated file in benchmarks/results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        examine(given.one, given.device)
        return 0
    from burnish.core.environment import describe_environment

    log = given.output or RESULTS / f"conformance-full-{date.today()}-{given.device}.jsonl"
    lines = [json.dumps({"date": str(date.today()), **describe_environment(given.device)})]
    print(lines[0])
    failed = False
    for name in given.only or models():
        command = [sys.executable, __file__, "--one", name, "--device", given.device]
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert child.stdout is not None
            for line in child.stdout:
                lines.append(line.rstrip("\n"))
                row = json.loads(line)
                failed = failed or row["state"] == "failed"
                words = f"{row['seconds']:6.1f} s  {row['measured']}"
                print(f"{row['model']:24} {row['check']:24} {row['state']:15} {words}", flush=True)
            if child.wait():
                errors.seek(0)
                told, failed = errors.read()[-2000:], True
                lines.append(json.dumps({"model": name, "check": "the whole", "state": "failed", "measured": told}))
                print(f"{name}: ended with {child.returncode}\n{told}")
        log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(log)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
