"""What a cell measures beside its steps: compile time, memory, the arithmetic floor, and what it ran on."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

VERSIONS = (
    "torch", "transformers", "sentence-transformers", "peft", "triton", "accelerate", "datasets", "tokenizers",
    "bitsandbytes", "unsloth", "unsloth_zoo",
)  # fmt: skip


def compile_seconds(trainer: Any) -> float:
    """Seconds of torch.compile in this process, and of Burnish's captures."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    spent = float(dynamo.calculate_time_spent()["total_wall_time"]) if dynamo else 0.0
    return spent + float(getattr(getattr(trainer, "engine", None), "capture_seconds", 0.0))


class Card:
    """The memory of the card that a cell runs on: torch's figures, and the device's own for this process.

    Made before the process opens the card, so that what others hold there is known.

    Args:
        cuda: Whether there is a card.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.before: int | None = None  # bytes that others hold
        self.look()

    def look(self) -> None:
        """Others hold what the whole card holds now, or held when this was last asked, whichever is less: a library may
        have opened the card for us since, and a cell before us may have ended."""
        said = self._smi("--query-gpu=memory.used") if self.cuda else []
        if said and said[0][0].isdigit():
            now = int(said[0][0]) * 2**20
            self.before = now if self.before is None else min(now, self.before)

    def _smi(self, query: str) -> list[list[str]]:
        """Rows of one query of nvidia-smi on our card, sizes in MiB; none where it cannot be asked."""
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
        said = _said("nvidia-smi", f"--id={first}", query, "--format=csv,noheader,nounits")
        return [[part.strip() for part in line.split(",")] for line in said.splitlines()]

    def load_peak(self) -> dict[str, float | None]:
        """{"load_peak_gib"}: the most that torch allocated so far."""
        import torch

        return {"load_peak_gib": _gib(torch.cuda.max_memory_allocated() if self.cuda else None)}

    def process(self, used: int) -> tuple[int | None, str | None]:
        """(bytes on the device that this process holds now, how that is known).

        "pid": nvidia-smi lists the process. Where it does not, as in containers with numbers of their own: "card less
        before", what the whole card holds less what others held before; a process that opened the card since is in it.

        Args:
            used: Bytes that the whole card holds now.
        """
        own = [row[1] for row in self._smi("--query-compute-apps=pid,used_memory") if row[0] == str(os.getpid())]
        if own and own[0].isdigit():
            return int(own[0]) * 2**20, "pid"
        if self.before is not None:
            return used - self.before, "card less before"
        return None, None

    def memory(self) -> dict[str, float | str | None]:
        """GiB of the training: most allocated and most reserved by torch since its counters were last reset; what the
        device says that this process held at the most, and how that is known; what the whole card holds now; the
        process's most main memory.

        The device's figure is taken now. Torch may have given back some of what it reserved at its peak, to capture a
        graph for example, so the most it reserved takes the place of what it has reserved now.
        """
        import torch

        found: dict[str, float | str | None] = dict.fromkeys(
            ("peak_gib", "reserved_gib", "process_gib", "process_by", "used_gib")
        )
        if self.cuda:
            free, total = torch.cuda.mem_get_info()
            own, by = self.process(total - free)
            most = torch.cuda.max_memory_reserved()
            found = {
                "peak_gib": _gib(torch.cuda.max_memory_allocated()),
                "reserved_gib": _gib(most),
                "process_gib": None if own is None else _gib(own - torch.cuda.memory_reserved() + most),
                "process_by": by,
                "used_gib": _gib(total - free),
            }
        return {**found, "rss_gib": _gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)}


def _gib(size: float | None) -> float | None:
    return None if size is None else round(size / 2**30, 3)


def bf16_tflops(size: int = 8192, repeats: int = 30) -> float:
    """The card's own rate for a product of two bfloat16 matrices of `size` squared, the median of `repeats`."""
    import torch

    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    events: Any = torch.cuda.Event
    marks = [events(enable_timing=True) for _ in range(repeats + 1)]
    for _ in range(10):
        left @ right
    for mark in marks:
        mark.record()
        left @ right
    torch.cuda.synchronize()
    times: list[float] = sorted(before.elapsed_time(after) for before, after in pairwise(marks))
    return float(2 * size**3 / (times[repeats // 2] * 1e-3) / 1e12)


def training_flops(config: Any, lengths: Sequence[int], full: bool) -> float:
    """Floating-point operations that training on texts of these lengths takes at least.

    tokens × (4P under an adapter | 6P in full) + 12 × heads × head size × attended keys, summed over layers and tokens;
    P counts the weights of the transformer's matrices outside embeddings and pooler, attended keys are the window or
    the text's length, whichever is less, and half of it where attention is causal. An adapter's own work is not in.
    """
    import torch
    from transformers import AutoModel

    kind: Any = AutoModel
    with torch.device("meta"):
        model = kind.from_config(config)
    matrices = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in name
    )
    heads = int(config.num_attention_heads)
    width = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    causal = config.model_type == "qwen3"
    attended = sum(length * min(window, length) for window in _windows(config) for length in lengths)
    return (6 if full else 4) * matrices * sum(lengths) + 12 * width * attended / (2 if causal else 1)


def _windows(config: Any) -> list[int]:
    """How many keys a token of a long text sees, layer by layer."""
    everything = 1 << 40
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * int(config.num_hidden_layers)
    local = getattr(config, "local_attention", None) or 2 * (getattr(config, "sliding_window", None) or 0)
    return [int(local) if kind == "sliding_attention" else everything for kind in kinds]


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "python": sys.version.split()[0]}


def commit() -> str:
    """Burnish's commit, with a plus where files differ from it: BURNISH_COMMIT, or what git says."""
    if given := os.environ.get("BURNISH_COMMIT"):
        return given
    root = str(Path(__file__).parents[1])
    found = _said("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    return found + "+" * bool(_said("git", "-C", root, "status", "--porcelain", "-uno")) if found else "unknown"


def machine(device: str) -> dict[str, Any]:
    """The device and its driver, the processor, its cores that are ours, and how many processes wanted one of late."""
    found: dict[str, Any] = {"device": device, "driver": None}
    if device == "cuda":
        import torch

        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found = {"device": torch.cuda.get_device_name(), "driver": driver.split("\n")[0] or None}
    named = [line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith("model name")]
    processor = named[0].split(":", 1)[1].strip() if named else platform.machine()
    return {**found, "cpu": processor, "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
