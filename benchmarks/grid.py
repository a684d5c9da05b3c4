"""Run many cells under one time budget, each in a process of its own, the systems of one cell next to each other.

    python benchmarks/grid.py --out results.jsonl --budget 540 \\
        'st-fa2,unsloth,burnish bge-large-en-v1.5 lora16 512 32 fixed' \\
        'st-fa2,burnish all-MiniLM-L6-v2 full 128 64 natural --warmup 30 --each 300'

A cell is 'SYSTEMS MODEL MODE SEQ BATCH LENGTHS', and options of cell.py after it; --each is its limit in seconds.
`--cells FILE` has one a line; `--options='…'` hold for all. While a cell runs, the next one imports, builds its model
and waits at a gate until the GPU is free: timings never overlap on a card. `--lanes 4` runs four cells at a time on the
cards 0 to 3, each lane on its own share of the cores, with its own compiled code; all systems of a cell share a lane.

Every outcome is a line of the file, a failure with its reason. Only lines of one run are ever compared, so a cell of
which one run holds every system is skipped, and any other is run as a whole; `--run ID` goes on with a run that broke
off on this same machine. What the budget leaves out is named at the end: exit code 3.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks import cell as cells
    from benchmarks.lines import KEY, setting, value
else:
    import cell as cells
    from lines import KEY, setting, value

Line = dict[str, Any]
LEAST = 15
"""Seconds of budget below which no cell is let through the gate."""


@dataclass(frozen=True, slots=True)
class Group:
    """One cell and the systems that are timed on it."""

    systems: tuple[str, ...]
    options: tuple[str, ...]
    each: float
    where: Line = field(hash=False)

    def key(self, system: str) -> tuple[Any, ...]:
        """What says that a line of the file is this cell of that system."""
        return tuple({**self.where, "system": system}[name] for name in KEY)


def group(text: str, each: float, extra: Sequence[str] = ()) -> Group:
    """Read a cell as it is written on the command line; `extra` are options of cell.py that hold for every cell.

    Raises:
        SystemExit: If it is not one, whatever it lacks.
    """
    systems, *rest = shlex.split(text)
    if len(rest) < 5:
        raise SystemExit(f"not a cell: {text!r}. Write SYSTEMS MODEL MODE SEQ BATCH LENGTHS [options]")
    names = ("--model", "--mode", "--seq", "--batch", "--lengths")
    options = [part for pair in zip(names, rest[:5], strict=True) for part in pair] + rest[5:]
    if "--each" in options:
        place = options.index("--each")
        each = float(options[place + 1])
        del options[place : place + 2]
    for system in systems.split(","):  # also says which system lacks one of the settings
        known = vars(cells.given_cell(["--system", system, *options, *extra, "--tokenizer", "-"]))
    return Group(tuple(systems.split(",")), tuple(options), each, {name: known[name] for name in KEY})


def done_before(lines: Sequence[Line]) -> dict[tuple[Any, ...], set[str]]:
    """Cell and system to the runs that have a line of it."""
    found: dict[tuple[Any, ...], set[str]] = {}
    for line in lines:
        found.setdefault(tuple(value(line, name) for name in KEY), set()).add(line["run"])
    return found


def left_to_run(wanted: Group, lines: Sequence[Line], run: str) -> tuple[str, ...]:
    """The systems of a cell that this run has to time: none if one run has them all."""
    done = done_before(lines)
    runs = [done.get(wanted.key(system), set()) for system in wanted.systems]
    if set.intersection(*runs):
        return ()
    return tuple(system for system, had in zip(wanted.systems, runs, strict=True) if run not in had)


@dataclass(frozen=True, slots=True)
class Lane:
    """One of several cards that cells run on at a time, and the share of the cores that goes with it.

    Alone it is whatever card and cores the process sees.
    """

    number: int
    many: int
    alone: bool = False
    """Whether nothing gets ready on the card while a cell runs: its context would be counted as the cell's memory."""

    def options(self) -> list[str]:
        """What cell.py is told beside the cell."""
        name = f"-{self.number}" if self.many > 1 else ""
        return ["--gate", str(cells.HOME / f"gate{name}"), "--cache", str(cells.HOME / f"compiled{name}")]

    def environment(self) -> dict[str, str]:
        """The card, for the child process."""
        return {"CUDA_VISIBLE_DEVICES": str(self.number)} if self.many > 1 else {}

    def pin(self, process: int) -> None:
        """Keep a process, and what it will start, to the lane's cores."""
        if self.many > 1:
            cores = sorted(os.sched_getaffinity(0))
            share = len(cores) // self.many
            os.sched_setaffinity(process, cores[self.number * share : (self.number + 1) * share])


class Child:
    """A cell of one system in a process of its own, a session that is ended as a whole, data-loader processes too."""

    def __init__(self, wanted: Group, system: str, extra: Sequence[str], lane: Lane) -> None:
        self.wanted, self.system = wanted, system
        self.entered = threading.Event()  # beyond the gate, or dead
        self.done = threading.Event()  # has printed its line, or is dead
        self.at_gate = 0.0
        self._said: list[str] = []
        self._started = time.monotonic()
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("cell.py")), "--system", system]
        command += [*wanted.options, *extra, *lane.options(), "--dump-after", str(max(5.0, wanted.each - 5))]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, **lane.environment()},
        )
        lane.pin(self._process.pid)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line)
            if line == "GATE\n":
                self.at_gate = time.monotonic()
                self.entered.set()
            elif line.startswith("RESULT "):
                break  # the rest is a process that ends, which may take its time
        self.entered.set()
        self.done.set()

    def finish(self, end: float) -> Line | None:
        """Wait for its line, or for its limit, which counts from now to the gate and again from there; None if `end`
        on the monotonic clock comes first."""
        error = None
        for event, place in ((self.entered, "at the gate"), (self.done, "beyond the gate")):
            began = self.at_gate if event is self.done else time.monotonic()
            limit = began + self.wanted.each
            if not event.wait(max(0.0, min(end, limit) - time.monotonic())):
                if end < limit:
                    return None
                error = f"no result {place} in {self.wanted.each:.0f} s"
                break
        self.end()
        now = time.monotonic()
        spent = {
            "wall_s": round(now - self._started, 1),
            "gate_s": round(now - self.at_gate, 1) if self.at_gate else None,
        }
        for line in self._said:
            if line.startswith("RESULT "):
                return {**json.loads(line.removeprefix("RESULT ")), **spent}
        said = "".join(self._said)
        error = error or f"exit code {self._process.returncode}: {reason(said)}"
        return {**self.wanted.where, "system": self.system, "error": error, "said": said[-2500:], **spent}

    def end(self) -> None:
        """End the process and all that it started; one that has closed its output gets a moment to say how it ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0 if self.done.is_set() else 0.0)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()


def reason(said: str) -> str:
    """The line of a traceback that names the error, or the last line there is."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Exit", "Interrupt"))]
    return (named or lines or ["it said nothing"])[-1][:300]


def shown(line: Line) -> str:
    """A line for people."""
    size = f"{line['seq']:5} x{line['batch']:<4} {setting(line):13}"
    cell = f"{line['system']:18} {line['model']:23} {line['mode']:9} {line['lengths']:7} {size}"
    if "error" in line:
        return f"{cell}  FAILED after {line['wall_s']:.0f} s: {line['error']}"
    steady = line["steady_ms_median"]
    return (
        f"{cell} {line['pairs_per_s']:9.1f} pairs/s {line['step_ms_median']:8.1f} ms "
        f"(steady {'-' if steady is None else format(steady, '.1f')} in {line['steady_steps']} of {line['steps']})  "
        f"{line['peak_gib']} GiB, device {line.get('process_gib')}  first {line['first_step_s']:.1f} s, "
        f"compile {line['compile_s']:.1f} s ({line['cache']})  [{line['gate_s']:.0f} of {line['wall_s']:.0f} s]"
    )


def read(path: Path) -> list[Line]:
    """The lines of a file; none if it is not there. A line that a killed run left half written is passed over, said."""
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{path}, line {number}: not JSON, passed over", file=sys.stderr)
    return found


def append(path: Path, line: Line) -> None:
    """Add a line, on a line of its own whatever stands before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def measured_machine(extra: Sequence[str]) -> Line:
    """The device, its driver and its bfloat16 rate (None on a CPU), measured in a process of its own."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("cell.py")), "--rate", *extra]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    found: Line = json.loads(next(line for line in said if line.startswith("RESULT ")).removeprefix("RESULT "))
    return found


def build_models(wanted: Sequence[Group], extra: Sequence[str], limit: float) -> None:
    """Write the models of all cells before the first is timed, in one process, on the GPU where there is one: there a
    model of 4 billion weights takes seconds. What fails is said, and left to its cells."""
    given = [cells.given_cell([*one.options, *extra]) for one in wanted]
    names = dict.fromkeys(f"{one.model}{'-nodrop' * (one.dropout == 'zero')}" for one in given)
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("shapes.py")), *names]
    command += ["--models", str(given[0].models), "--tokenizer", given[0].tokenizer, *["--cpu"] * given[0].cpu]
    try:
        subprocess.run(command, check=True, timeout=max(1.0, limit))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"models are left to their cells to build: {error}", flush=True)


class Queue:
    """Cells that lanes take from, a whole group at a time: its systems run on one card."""

    def __init__(self, groups: Sequence[tuple[Group, Sequence[str]]]) -> None:
        self._groups = [(one, systems) for one, systems in groups if systems]
        self._lock = threading.Lock()

    def take(self) -> list[tuple[Group, str]]:
        """The next group's cells, one for each system; none if all are taken."""
        with self._lock:
            if not self._groups:
                return []
            one, systems = self._groups.pop(0)
        return [(one, system) for system in systems]

    def rest(self) -> list[tuple[Group, str]]:
        """What nobody took."""
        return [(one, system) for one, systems in self._groups for system in systems]


def run_lane(queue: Queue, lane: Lane, out: Path, end: float, stamp: Line, extra: Sequence[str]) -> list[str]:
    """Run cells until `end`, on the monotonic clock; returns those that were cut off."""
    taken: list[tuple[Group, str]] = []
    children: list[Child] = []  # the one beyond the gate, and the one that gets ready meanwhile

    def left() -> float:
        return max(0.0, end - time.monotonic())

    def begin() -> None:
        if left() < LEAST:
            return
        taken.extend([] if taken else queue.take())
        if taken:
            children.append(Child(*taken.pop(0), extra, lane))

    try:
        begin()
        while children and left() >= LEAST:
            children[0].entered.wait(min(left(), children[0].wanted.each))
            if stamp["device"] != "cpu" and not lane.alone:  # there, getting ready would take what is being timed
                begin()
            line = children[0].finish(end)
            if line is None:
                break
            children.pop(0)
            line = {**stamp, "lane": lane.number, "lanes": lane.many, **line, "run": stamp["run"]}
            with _WRITING:
                append(out, line)
                print(shown(line), flush=True)
            if not children:
                begin()
        late = [(child.wanted, child.system) for child in children]
    finally:
        for child in children:
            child.end()
    return [f"{system} {' '.join(one.options)}" for one, system in [*late, *taken]]


_WRITING = threading.Lock()


def run_all(
    groups: Sequence[tuple[Group, Sequence[str]]],
    out: Path,
    end: float,
    stamp: Line,
    extra: Sequence[str],
    lanes: int,
    alone: bool = False,
) -> list[str]:
    """Run the groups in order on as many lanes until `end`; returns the cells that were not run, or cut off."""
    queue = Queue(groups)
    with ThreadPoolExecutor(lanes) as pool:
        ends = [
            pool.submit(run_lane, queue, Lane(number, lanes, alone), out, end, stamp, extra) for number in range(lanes)
        ]  # fmt: skip
        late = [text for one in ends for text in one.result()]
    return late + [f"{system} {' '.join(one.options)}" for one, system in queue.rest()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left; the exit code is 3 if the budget ended first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="CELL")
    parser.add_argument("--cells", type=Path, help="a file with a cell on each line")
    parser.add_argument("--out", type=Path, required=True, help="the file of JSON lines, which grows")
    parser.add_argument(
        "--options", default="", help="options of cell.py for every cell, as one text: --options='--steps 5'"
    )
    parser.add_argument("--budget", type=float, default=540, help="seconds for all of them")
    parser.add_argument("--each", type=float, default=150, help="seconds for one, unless it says otherwise")
    parser.add_argument("--lanes", type=int, default=1, help="cells at a time, each on a card of its own")
    parser.add_argument("--alone", action="store_true", help="prepare no cell while one runs, for figures of memory")
    parser.add_argument("--run", help="go on with this run, on the same machine (default: a new one)")
    given = parser.parse_args(arguments)
    extra = shlex.split(given.options)
    end = time.monotonic() + given.budget
    texts = [*given.groups, *(given.cells.read_text(encoding="utf-8").splitlines() if given.cells else [])]
    wanted = [group(text, given.each, extra) for text in texts if text.strip() and not text.lstrip().startswith("#")]
    run = given.run or datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    cells.HOME.mkdir(parents=True, exist_ok=True)
    stamp = {**measured_machine([*extra, *Lane(0, given.lanes).options()]), "run": run}
    rate = stamp["bf16_tflops"]
    print(
        f"run {run}: {len(wanted)} cells, {given.budget:.0f} s; {stamp['device']}, bfloat16 {rate or '-'} TFLOP/s",
        flush=True,
    )
    extra += ["--run", run, *(["--tflops", f"{rate:.1f}"] if rate else [])]
    groups = []
    for place, one in enumerate(wanted):
        systems = left_to_run(one, read(given.out), run)
        groups.append((one, systems if place % 2 == 0 else systems[::-1]))  # who goes first alternates
    if left := [one for one, systems in groups if systems]:
        build_models(left, extra, end - time.monotonic())
    skipped = run_all(groups, given.out, end, stamp, extra, given.lanes, given.alone)
    for text in skipped:
        print(f"NOT RUN, the budget is spent: {text}", flush=True)
    return 3 if skipped else 0


if __name__ == "__main__":
    raise SystemExit(main())
