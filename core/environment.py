"""What a run ran on, in words for people and for the record."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECORDED = (
    "burnish",
    "torch",
    "transformers",
    "sentence-transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "triton",
    "bitsandbytes",
)


def versions() -> dict[str, str]:
    """Installed version of every library a run depends on, "not installed" for the optional ones that are not."""
    found = {}
    for name in RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_environment(device: str) -> dict[str, str]:
    """Hardware, operating system and versions."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name(torch.device(device)) if torch.device(device).type == "cuda" else _processor()
    return {
        "device": f"{device} ({name})",
        "CPU cores": str(cores),
        "system": platform.platform(),
        "Python": platform.python_version(),
        **versions(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
