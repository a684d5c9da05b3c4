"""Kills runs and looks at what they leave: a program of its own, because it forks.

    python kill_points.py operations MODEL DATA RUNS    as a kill at each file operation in the run's folder leaves it
    python kill_points.py moments MODEL DATA RUNS       the quickstart killed from outside, as its folder fills

Everything is imported once; every run is a fork. This process itself only loads and encodes: a fork of a process that
has run a backward pass would hang. It prints one JSON object.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch

import burnish.core.fast
import burnish.core.model
import burnish.core.progress
import burnish.core.report
import burnish.core.runs
import burnish.core.trainer
from burnish.core.cli.quiet import quiet
from burnish.core.config import RunConfig
from burnish.core.quickstart import quickstart
from burnish.core.runs import run

TEXTS = ["how do I open an account", "the branch closes at five", "a card that was stolen"]
MARKERS = ("config.json", "modules.json", "adapter_config.json")
Embeddings = np.ndarray[Any, np.dtype[np.float32]]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}


def embed(folder: Path) -> Embeddings:
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)


def models_in(runs: Path) -> list[Path]:
    """Every folder that a reader would take for a model, hidden ones too; parts such as 1_Pooling are none."""
    found = {path.parent for marker in MARKERS for path in runs.rglob(marker)}
    return sorted(path for path in found if not re.fullmatch(r"\d+_\w+", path.name))


def fork(job: Callable[[], object], *, log: Path | None = None) -> int:
    """Run `job` in a child; returns its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if log is not None:
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            job()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """Exit code of a child, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def changes(event: str, arguments: tuple[Any, ...], inside: Path) -> bool:
    """Whether an audit event is about to change a file in a folder."""
    if event == "open":
        writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        writes = event in CHANGES  # within a folder that is being removed, hidden by then, paths are relative
    return bool(writes) and str(arguments[0]).startswith(f"{inside}{os.sep}")


def die_at(operation: int, inside: Path) -> None:
    """Have this process killed just before its n-th change of a file in the folder `inside`."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if changes(event, arguments, inside):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def record(inside: Path, copies: Path) -> None:
    """Keep in `copies` what readers would find after a kill at each of this process's changes of a file in `inside`.

    What a kill leaves is what is on the disk at that moment, so one run shows it for all. A change of what is hidden,
    or of nothing, makes no copy; `operations.txt` has a line for each: the copy's number, the event, hidden or not.
    """
    copies.mkdir()
    log = (copies / "operations.txt").open("w", buffering=1)
    last: object = None
    number = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal last, number
        if not changes(event, arguments, inside):
            return
        found = [path for path in sorted(inside.rglob("*")) if not hidden(path.relative_to(inside))]
        now = [(str(path), *(path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns)) for path in found]
        if now != last:
            last, number = now, number + 1
            shutil.copytree(inside, copies / str(number), ignore=shutil.ignore_patterns(".*"))
        log.write(f"{number} {event} {'hidden' if hidden(Path(arguments[0])) else 'seen'}\n")

    sys.addaudithook(hook)


def hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


class Done(Exception):
    """Every operation has had its kill."""


def operations(model: str, data: str, runs: Path) -> dict[str, Any]:
    """What a run that replaces an earlier one leaves if it is killed at any of its file operations.

    One run shows it for all of them; some, among them one of each kind, are killed for real and then run again. Runs
    fork where the run's folder is claimed, the first thing that writes, so that the model is loaded once.
    """
    values: dict[str, Any] = {
        "model": model, "train": data, "name": "one", "runs": str(runs), "overwrite": True, "max_seq_length": 32,
        "batch_size": 16, "max_steps": 1, "device": "cpu", "save_steps": 1, "learning_rate": 0.05,
    }  # fmt: skip
    folder, earlier, copies = runs / "one", runs.parent / "earlier", runs.parent / "copies"
    references: list[dict[str, Embeddings]] = []
    for seed in (1, 2):
        assert ended(fork(partial(run, RunConfig(**values, seed=seed)))) == 0
        references.append({name: embed(folder / name) for name in ("adapter", "merged")})
        if seed == 1:
            shutil.copytree(folder, earlier)
    assert all(np.abs(references[0][name] - references[1][name]).max() > 1e-4 for name in references[0])
    claim: Callable[[RunConfig], Path] = vars(burnish.core.runs)["claim_folder"]
    found: dict[str, Any] = {"faults": [], "states": {}, "kills": 0}
    faults: list[str] = found["faults"]

    def start(config: RunConfig, before: Callable[[], object], *, fresh: bool) -> int:
        """Fork a run, after the earlier one's folder is put back if it is to be `fresh`; 0 in the child."""
        if fresh:
            shutil.rmtree(runs)
            shutil.copytree(earlier, folder)
        if (pid := os.fork()) == 0:
            before()
        return pid

    def examined(config: RunConfig) -> Path:
        if (pid := start(config, partial(record, runs, copies), fresh=True)) == 0:
            return claim(config)
        assert ended(pid) == 0
        done = [line.split(" ", 1) for line in (copies / "operations.txt").read_text().splitlines()]
        for number in sorted({int(copy) for copy, _ in done}):
            count = sum(int(copy) == number for copy, _ in done)
            state = judge(copies / str(number), references, number, faults)
            found["states"][state] = found["states"].get(state, 0) + count
        found["operations"], kinds = len(done), [kind for _, kind in done]
        found["kinds"] = sorted(set(kinds))
        middles = [[n for n, one in enumerate(kinds, 1) if one == kind] for kind in found["kinds"]]
        for number in sorted({*range(1, len(kinds), 25), *(some[len(some) // 2] for some in middles)}):
            if (pid := start(config, partial(die_at, number, runs), fresh=True)) == 0:
                return claim(config)
            code = ended(pid)
            assert code == -signal.SIGKILL, f"the run ended by itself, with {code}"
            found["kills"] += 1
            if (state := judge(runs, references, number, faults)) not in found["states"]:
                faults.append(f"operation {number}: a kill leaves {state}, and the run showed nothing of it")
            if found["kills"] % 2:
                continue
            if (again := start(config, lambda: None, fresh=False)) == 0:
                return claim(config)
            if (code := ended(again)) != 0:
                faults.append(f"operation {number}: a second run ended with {code}")
            left = sorted(path.name for path in folder.iterdir())
            if left != ["adapter", "checkpoints", "merged", "metrics.json", "report.html", "settings.json"]:
                faults.append(f"operation {number}: after a second run there is {left}")
        raise Done

    vars(burnish.core.runs)["claim_folder"] = examined
    try:
        run(RunConfig(**values, seed=2))
    except Done:
        return found
    os._exit(0)  # a child that was to be killed later than it lived


def judge(runs: Path, references: list[dict[str, Embeddings]], number: int, faults: list[str]) -> str:
    """Which of the two runs' models are there; one that is neither run's goes into `faults`."""
    there = []
    for model in models_in(runs):
        name = str(model.relative_to(runs / "one"))
        if name.startswith(".") or "/." in name:
            continue  # staging: hidden, and swept by the next run
        try:
            found = embed(model)
        except Exception as error:
            # The trainer makes a checkpoint's folder before there is anything to put into it.
            if (model / "trainer_state.json").exists() or not name.startswith("checkpoints/"):
                faults.append(f"operation {number}: {name} does not load ({type(error).__name__}: {error})")
            continue
        kind = "adapter" if name.startswith("checkpoints/") else name  # the only step's checkpoint is the adapter
        equal = [index for index in (0, 1) if np.abs(found - references[index][kind]).max() < 1e-6]
        if not equal:
            faults.append(f"operation {number}: {name} loads, and is neither the earlier nor the new model")
        there += [f"{('earlier', 'new')[index]} {name}" for index in equal]
    if (runs / "one" / "metrics.json").exists():
        json.loads((runs / "one" / "metrics.json").read_text())
        there.append("complete")
        if not {"adapter", "merged"} <= {part.split()[-1] for part in there}:
            faults.append(f"operation {number}: metrics.json says that the run is complete, and there is {there}")
    return ", ".join(there) or "no model"


def staged(folder: Path, name: str, least: int) -> bool:
    """Whether a file of that name lies in staging with at least so many bytes."""
    found = [*folder.glob(f".burnish-staging-*/{name}"), *folder.glob(f".burnish-staging-*/**/{name}")]
    return any(path.stat().st_size >= least for path in found if path.exists())


def moments(model: str, data: str, runs: Path) -> dict[str, Any]:
    """Kill the quickstart from outside at several moments, one after another in the same folder, then let it finish."""
    folder = runs / "quickstart"
    log = runs.parent / "log"

    def job() -> None:
        quickstart(train=data, eval=data, runs=str(runs), max_steps=2, eval_batch_size=8)

    def said(words: str) -> bool:
        return words in log.read_text(encoding="utf-8", errors="replace")

    moments: dict[str, Callable[[], bool]] = {
        "load": lambda: said("pairs of split train"),
        "evaluation": lambda: (folder / "settings.json").exists() and said("is ready to train"),
        "training": lambda: said("Training on"),
        "adapter": lambda: staged(folder, "adapter_model.safetensors", 0),
        "merged": lambda: (folder / "adapter").exists() and staged(folder, "model.safetensors", 0),
        "report": lambda: (folder / "merged").exists(),
        "metrics": lambda: (folder / "report.html").exists(),
    }
    seen: dict[str, str] = {}
    faults: list[str] = []
    for name, arrived in moments.items():
        shutil.rmtree(runs, ignore_errors=True)
        log.write_text("")
        pid = fork(job, log=log)
        code = None
        while code is None and not arrived():
            done, status = os.waitpid(pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.0005)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            code = ended(pid)
        if code == 0 and name in ("report", "metrics"):
            faults += [f"{name}: {fault}" for fault in look(runs, model)]
            continue  # open for milliseconds, and missed on a busy machine: the kill at every file operation covers it
        if code != -signal.SIGKILL:
            faults.append(f"{name}: not caught in time, the run ended with {code}: {log.read_text()[-400:]}")
        here = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        seen[name] = ", ".join(entry if not entry.startswith(".") else "staging" for entry in here)
        faults += [f"{name}: {fault}" for fault in look(runs, model)]
    log.write_text("")
    code = ended(fork(job, log=log))
    if code != 0:
        faults.append(f"the last run ended with {code}: {log.read_text()[-400:]}")
    left = sorted(path.name for path in folder.iterdir())
    return {"seen": seen, "faults": faults + [f"at last: {fault}" for fault in look(runs, model)], "left": left}


def look(runs: Path, model: str) -> list[str]:
    """What is wrong with the models under `runs`: unlike the base model's, or too far from it, their embeddings."""
    base, faults = embed(Path(model)), []
    for folder in models_in(runs):
        if any(part.startswith(".") for part in folder.relative_to(runs).parts):
            continue
        try:
            found = embed(folder)
        except Exception as error:
            faults.append(f"{folder} does not load ({type(error).__name__}: {error})")
            continue
        # Two steps move an embedding of length one by a few hundredths; a model with parts missing is elsewhere.
        distance = float(np.linalg.norm(found - base, axis=1).max())
        if not 1e-4 < distance < 0.5:
            faults.append(f"{folder} is {distance:.3g} from the base model")
    return faults


if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet()
    mode, model, data, where = sys.argv[1:]
    kill = {"operations": operations, "moments": moments}[mode]
    print(json.dumps(kill(model, data, Path(where).resolve())))
