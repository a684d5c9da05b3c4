"""The longest text that a fixed share of a card's memory allows: two pairs, LoRA, real training steps.

    python benchmarks/context.py --out results/context-DATE-DEVICE.jsonl --lanes 4 --budget 540 --each 260 \\
        'st-fa2 bge-m3 --checkpointing offload' 'burnish bge-m3 --checkpointing offload'
    python benchmarks/context.py --one 'burnish bge-m3 --checkpointing offload'      in this process, its tries printed

A cell is 'SYSTEM MODEL' and options of cell.py after it. Four texts of L tokens each, no dropout, positions without end
(`--longest`). The process may hold `--limit-gb` (of 1e9 bytes) on the device: torch is held to what is left beside the
context and the kernels, and a try whose figure by the device is above the limit does not count. L grows until a step
does not fit, the next L from the line through what the largest steps so far took, to within 5% (context_search.py).

Each try is a trainer of its own on the same model, and one or two steps (one where a step takes over 20 s; Adam's state
is made before the first, so that it is as large as any; the longest is then run again, three steps, if there is time: a
captured graph is made in the second and replayed in the third). Prints "TRY {…}" after each, then "RESULT {…}"; of a
search that its limit of time ends, the longest so far is kept and `complete` is false.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks import arms, cell, grid, measuring, shapes, workload
    from benchmarks.context_search import Try, result, search
    from benchmarks.lines import KEY, Line, setting
else:
    sys.path.insert(0, str(HERE))
    import arms
    import measuring
    import shapes
    import workload
    from context_search import Try, result, search
    from lines import KEY, Line, setting

    # isort: split
    import grid  # takes this folder off the path

    cell = grid.cells

WRAPPED = ("forward", "_original_forward")
"""What accelerate sets on the model, anew in every trainer."""
MARGIN = 100_000_000
"""Bytes kept free for what the device loads while a step runs."""
FIXED = ["--mode", "lora16", "--batch", "2", "--lengths", "fixed", "--dropout", "zero"]


class Bench:
    """A system with its model on the device, and the limit that it must stay within."""

    def __init__(self, given: argparse.Namespace, scratch: Path) -> None:
        self.card = measuring.Card(not given.cpu)
        arms.prepare(given.system)
        import torch
        from transformers import AutoTokenizer

        self.given, self.scratch = given, scratch
        given.device = "cuda" if torch.cuda.is_available() and not given.cpu else "cpu"
        path = shapes.build(
            given.model, given.models, given.tokenizer, zero_dropout=True, longest=given.longest, device=given.device
        )  # fmt: skip
        self.words = workload.words(AutoTokenizer.from_pretrained(given.tokenizer))[:2000]
        arms.load_ahead(path, given)
        self.card.cuda = given.device == "cuda"
        self.arm = arms.load(path, given)
        self.own = {name: vars(self.arm.model)[name] for name in WRAPPED if name in vars(self.arm.model)}

    def room(self) -> int | None:
        """Hold torch to what the limit leaves beside the context and the kernels; returns those bytes."""
        import torch

        if self.given.device == "cpu":
            return None
        free, total = torch.cuda.mem_get_info()
        own, _ = self.card.process(total - free)
        if own is None:
            raise SystemExit("the device does not say what this process holds: nvidia-smi gave no figure")
        room = int(self.given.limit_gb * 1e9) - (own - torch.cuda.memory_reserved()) - MARGIN
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / whole))
        return room

    def attempt(self, length: int, steps: int) -> Try:
        """Train on texts of `length` tokens; what it took, or that it did not fit."""
        import torch

        cuda = self.given.device == "cuda"
        self.clean()
        room = self.room()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        try:
            self._train(length, steps, times)
            fits = True
        except RuntimeError as error:  # a compiler wraps what it met
            if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
                raise
            print(f"{length} tokens: {str(error).splitlines()[0][:200]}", file=sys.stderr, flush=True)
            fits = False
        peak = torch.cuda.max_memory_allocated() if cuda else None
        memory = self.card.memory()
        self.clean()
        held: Any = memory["process_gib"]
        if fits and held is not None and held * 2**30 > self.given.limit_gb * 1e9:
            fits = False
        by: Any = memory["process_by"]
        return Try(length, fits, peak, room, round(times[-1], 3) if fits else None, len(times), held, by)

    def clean(self) -> None:
        """Give back all that the last try held."""
        import torch

        for name in WRAPPED:
            vars(self.arm.model).pop(name, None)
        vars(self.arm.model).update(self.own)
        self.arm.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.given.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _train(self, length: int, steps: int, times: list[float]) -> None:
        datasets: Any = import_module("datasets")
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        model = self.arm.model
        model.max_seq_length = length
        trainer = self.arm.trainer(
            model=model,
            args=self._arguments(steps),
            train_dataset=datasets.Dataset.from_dict(texts(self.words, length, 2 * steps)),
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[_watch(times, self.given.device == "cuda")],
        )
        trainer.train()
        if len(times) != steps:
            raise SystemExit(f"{len(times)} of {steps} steps were run")

    def _arguments(self, steps: int) -> Any:
        cuda = self.given.device == "cuda"
        return self.arm.arguments(
            str(self.scratch / "output"), per_device_train_batch_size=2, max_steps=steps, learning_rate=1e-4, bf16=cuda,
            logging_steps=1000, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not cuda,
            optim="adamw_torch_fused" if cuda else "adamw_torch",
        )  # fmt: skip


def texts(words: Sequence[str], length: int, pairs: int) -> dict[str, list[str]]:
    """`pairs` pairs of texts of `length` tokens, every text another beginning of the same words repeated."""
    count = length - workload.ENDS

    def text(place: int) -> str:
        turned = [*words[place:], *words[:place]]
        return " ".join((turned * -(-count // len(turned)))[:count])

    return {
        name: [text((2 * pair + place) % len(words)) for pair in range(pairs)]
        for place, name in enumerate(("anchor", "positive"))
    }


def _watch(times: list[float], cuda: bool) -> Any:
    """A callback that makes the optimizer's state before the first step, and times each step."""
    import torch
    from transformers import TrainerCallback

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            optimizer = getattr(keywords["optimizer"], "optimizer", keywords["optimizer"])
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.grad = torch.zeros_like(weight)
            optimizer.step()  # of no gradients: nothing moves
            optimizer.zero_grad(set_to_none=True)

        def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            self.began = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            times.append(now() - self.began)

    return Watch()


def options() -> argparse.ArgumentParser:
    """The command line beside that of cell.py."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("cells", nargs="*", metavar="CELL", help="'SYSTEM MODEL' and options of cell.py")
    made.add_argument("--one", metavar="CELL", help="run this one, in this process")
    made.add_argument("--run", default="", help="the run that its line belongs to")
    made.add_argument("--cache", help="where its compiled code is kept")
    made.add_argument("--cells", dest="file", type=Path, help="a file with a cell on each line")
    made.add_argument("--out", type=Path, help="the file of JSON lines, which grows")
    made.add_argument("--budget", type=float, default=540, help="seconds for all of them")
    made.add_argument("--each", type=float, default=260, help="seconds for one")
    made.add_argument("--lanes", type=int, default=1, help="cells at a time, each on a card of its own")
    made.add_argument("--limit-gb", type=float, default=24.0, help="GB of 1e9 bytes on the device")
    made.add_argument("--start", type=int, default=4096, help="the first length in tokens")
    made.add_argument("--longest", type=int, default=262_144, help="the model's positions, and the last length")
    return made


def given_cell(text: str, *more: str) -> argparse.Namespace:
    """A cell as it is written, in cell.py's terms."""
    system, model, *rest = shlex.split(text)
    return cell.given_cell([*FIXED, "--system", system, "--model", model, *rest, *more])


def one(own: argparse.Namespace) -> None:
    """Run one cell in this process."""
    end = time.monotonic() + own.each
    # Lengths change with every try: without this, memory would be lost between blocks of other sizes. For every system.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    cache = ["--cache", own.cache] if own.cache else []
    given = given_cell(own.one, "--seq", str(own.longest), "--run", own.run, *cache)
    for name in ("limit_gb", "start", "longest"):
        setattr(given, name, getattr(own, name))
    known: Line = {"bench": "context", **{name: getattr(given, name) for name in KEY if name != "seq"}}
    with tempfile.TemporaryDirectory(prefix="burnish-context-", ignore_cleanup_errors=True) as folder:
        cell.compile_into(given, Path(folder))
        bench = Bench(given, Path(folder))
        known |= {
            "backend": bench.arm.backend, "limit_gb": own.limit_gb, "longest_positions": own.longest, "run": given.run,
            "at": datetime.now(UTC).isoformat(timespec="seconds"), **measuring.machine(given.device),
            "versions": measuring.versions(), "burnish": measuring.commit(),
        }  # fmt: skip
        print("KNOWN " + json.dumps(known), flush=True)
        tries, complete = search(bench, own.start, own.longest, end)
    print("RESULT " + json.dumps(result(known, tries, complete)), flush=True)


def run_one(text: str, own: argparse.Namespace, lane: grid.Lane, run: str, end: float) -> None:
    """Run one cell in a process of its own until its limit, and write its line."""
    system, model = shlex.split(text)[:2]
    left = min(own.each, end - time.monotonic())
    if left < 45:
        print(f"NOT RUN, the budget is spent: {text}", flush=True)
        return
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--each", str(left - 15)]
    for name in ("limit_gb", "start", "longest"):
        command += [f"--{name.replace('_', '-')}", str(getattr(own, name))]
    command += ["--one", text, "--run", run, "--cache", lane.options()[-1]]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **lane.environment()},
        )  # fmt: skip
        lane.pin(process.pid)
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        lines = said.read().splitlines()
    line = outcome(lines, {"system": system, "model": model, "cell": text, "run": run}, process.returncode)
    assert own.out is not None
    grid.append(own.out, {**line, "lane": lane.number, "lanes": lane.many})
    shown = f"{system:10} {model:22} {setting(line):28} {line.get('longest_tokens')} tokens"
    print(f"{shown}, {line.get('process_gib')} GiB, {line.get('step_s')} s  {line.get('error', '')}", flush=True)


def outcome(said: Sequence[str], where: Line, code: int) -> Line:
    """The line of a cell by what its process printed; of one that was cut off, what its tries showed."""
    found = {kind: [json.loads(text[len(kind) + 1 :]) for text in said if text.startswith(f"{kind} ")]
             for kind in ("KNOWN", "TRY", "RESULT")}  # fmt: skip
    if found["RESULT"]:
        line: Line = found["RESULT"][-1]
        return line
    tries = list({one["length"]: Try(**one) for one in found["TRY"]}.values())  # of a length, the last
    reason = "its time was over" if code == -signal.SIGKILL else grid.reason("\n".join(said))
    line = result((found["KNOWN"] or [where])[-1], tries, False)
    if line["longest_tokens"] is None:
        return {"device": "unknown", **line, "error": reason, "said": "\n".join(said)[-2500:]}
    return {**line, "ended": reason}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that are named, or the one that the other options describe."""
    own = options().parse_args(arguments)
    listed = own.file.read_text(encoding="utf-8").splitlines() if own.file else []
    cells = [*own.cells, *(text for text in listed if text.strip() and not text.startswith("#"))]
    if own.one:
        one(own)
        return
    if not cells or own.out is None:
        raise SystemExit("name cells and --out, or --one cell")
    for text in cells:  # a mistyped cell is found before the first is run
        given_cell(text, "--tokenizer", "-")
    end = time.monotonic() + own.budget
    run = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    queue = list(cells)
    prebuild(cells, own)

    def lane(number: int) -> None:
        while queue:
            run_one(queue.pop(0), own, grid.Lane(number, own.lanes, True), run, end)

    with ThreadPoolExecutor(own.lanes) as pool:
        for done in [pool.submit(lane, number) for number in range(own.lanes)]:
            done.result()


def prebuild(cells: Sequence[str], own: argparse.Namespace) -> None:
    """Write the models before several lanes want the same one."""
    given = [given_cell(text) for text in cells]
    names = dict.fromkeys(f"{one.model}-nodrop" for one in given)
    command = [sys.executable, "-W", "ignore", str(HERE / "shapes.py"), *names, "--longest", str(own.longest)]
    command += ["--models", str(given[0].models), "--tokenizer", given[0].tokenizer, *["--cpu"] * given[0].cpu]
    subprocess.run(command, check=False)


if __name__ == "__main__":
    main()
