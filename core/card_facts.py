"""What a model card says that no file of the model holds: how good it is, and what its training took."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .evaluate import Metric, RetrievalResult, paired_gain

if TYPE_CHECKING:
    pass

_POWERCAP = Path("/sys/class/powercap")
_JOULES = 3.6e6  # in a kWh


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Figures on held-out data.

    Args:
        data: What it is called.
        count: How much of it there is, in words.
        after: Figures of the model, each with its 95% interval.
        before: Those of the model that the training began with; empty where they were not measured.
        change: The paired differences; empty where they are not known.
    """

    data: str
    count: str
    after: Mapping[str, Metric]
    before: Mapping[str, Metric] = field(default_factory=dict)
    change: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the last training in this process took.

    Args:
        seconds: Wall clock, evaluations and saves within it included.
        first, last: Optimizer steps before and after.
        hardware: The device, in words.
        devices: How many of them.
        watts: The power limit of one, None where it cannot be read.
        measured: Whether CodeCarbon measured the energy, which the card then says by itself.
    """

    seconds: float
    first: int
    last: int
    hardware: str
    devices: int
    watts: float | None
    measured: bool

    @property
    def kilowatt_hours(self) -> float | None:
        """Energy at the power limit for all of the time: what the devices can have taken at most."""
        return None if self.watts is None else self.watts * self.devices * self.seconds / _JOULES


@dataclass(slots=True)
class CardFacts:
    """`model.card`: what the model's card will say beside what is known from the model.

    Args:
        results: Figures on held-out data.
        cost: What the training took; a trainer writes it.
    """

    results: list[Held] = field(default_factory=list)
    cost: Cost | None = None

    def add_result(self, data: str, after: Any, before: Any = None, *, seed: int = 0) -> None:
        """Have the card say how good the model is on held-out data, in place of what was said of the same data.

        Args:
            data: What the data is called.
            after: What `evaluate_retrieval`, `evaluate_reranking` or a classifier's `measure` returned.
            before: The same of the model before its training, on the same data.
            seed: Of the intervals of the change.

        Raises:
            ConfigError: If a result is of another kind, or the two are not of the same data.
        """
        held = Held(
            data=data,
            count=_count(after),
            after=_figures(after),
            before={} if before is None else _figures(before),
            change={} if before is None else _change(before, after, seed),
        )
        if held.before and held.before.keys() != held.after.keys():
            raise ConfigError("the two results have other figures", where="before, after", fix="Measure both alike")
        self.results = [*(one for one in self.results if one.data != data), held]


def _figures(result: Any) -> dict[str, Metric]:
    """Every figure of a result that has an interval."""
    named = getattr(result, "metrics", None)
    if isinstance(named, Mapping):
        return dict(named)
    depth = getattr(result, "k", None)
    found = {one.name: getattr(result, one.name) for one in fields(result)} if is_dataclass(result) else {}
    suffix = "" if depth is None else f"@{depth}"
    metrics = {f"{name}{suffix}": one for name, one in found.items() if isinstance(one, Metric)}
    if not metrics:
        fix = "Pass what evaluate_retrieval, evaluate_reranking or measure returned"
        raise ConfigError(f"a {type(result).__name__} has no figures with intervals", where="add_result", fix=fix)
    return metrics


def _count(result: Any) -> str:
    if isinstance(texts := getattr(result, "texts", None), int):
        return f"{texts:,} texts"
    queries = getattr(result, "queries", None)
    queries = len(getattr(result, "per_query", ())) if queries is None else queries
    documents = getattr(result, "documents", None)
    return f"{queries:,} queries" + (f" over {documents:,} documents" if documents is not None else "")


def _change(before: Any, after: Any, seed: int) -> dict[str, Metric]:
    """Paired differences, where there is a test for results of this kind."""
    from .class_metrics import ClassResult, paired_change

    if isinstance(before, ClassResult) and isinstance(after, ClassResult):
        return paired_change(before, after, seed=seed)
    if isinstance(before, RetrievalResult) and isinstance(after, RetrievalResult):
        gain = paired_gain(before, after, seed=seed)
        ranges = gain["intervals"]
        return {name: Metric(mean=gain[name], low=low, high=high) for name, (low, high) in ranges.items()}
    return {}


def power_limit(device: str) -> float | None:
    """Watts that a device may take: a GPU's by nvidia-smi, a processor's by the first limit of Linux' powercap."""
    kind = device.partition(":")[0]
    if kind == "cuda" and (program := shutil.which("nvidia-smi")):
        import torch

        uuid = f"GPU-{torch.cuda.get_device_properties(torch.device(device)).uuid}"
        query = [program, f"--id={uuid}", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
            return float(said)
        except (subprocess.SubprocessError, OSError, ValueError):
            return None
    if kind == "cpu":
        return _processor_limit(_POWERCAP)
    return None


def _processor_limit(root: Path) -> float | None:
    try:
        limits = [int(path.read_text()) for path in sorted(root.glob("intel-rapl:?/constraint_0_power_limit_uw"))]
    except (OSError, ValueError):
        return None
    return sum(limits) / 1e6 if limits else None
