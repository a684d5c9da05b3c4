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


def memory(device: str) -> dict[str, float | None]:
    """GiB: most allocated and most reserved by torch since the counters were last reset, what the whole card holds now
    (torch gives back nothing that it reserved), and the process's most main memory."""
    import torch

    cuda = device == "cuda"
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    found = {
        "peak_gib": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved_gib": torch.cuda.max_memory_reserved() if cuda else None,
        "used_gib": total - free if cuda else None,
        "rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return {name: None if value is None else round(value / 2**30, 3) for name, value in found.items()}


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
