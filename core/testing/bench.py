"""`burnish plugins bench`: a plugin's families timed against unpatched transformers, both arms side by side."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..contracts import FamilySpec
from ..discovery import Plugin
from ..errors import ConfigError
from ..fast import FastSentenceTransformer
from ..registry import registry
from .find import offers, sampled
from .subject import Subject, embed, quietly
from .tokenizer import words

HEADINGS = ("family", "arm", "longest text", "ms a step", "fastest to slowest", "times as fast", "peak MiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is timed.

    Args:
        model: A model's folder or Hub id in place of random weights.
        device: Where; None is the best there is.
        size: Which of the family's sample configs.
        lora: Rank of the adapter, or 0 for full fine-tuning.
        batch: Pairs in a batch.
        length: Longest text in tokens, cut at the model's positions; lengths go from an eighth of it to all of it.
        steps: Timed steps of each arm, after two that are not.
        packed: Whether Burnish's arm packs its input, where the family can.
    """

    model: str | None
    device: str | None
    size: Literal["tiny", "base"]
    lora: int
    batch: int
    length: int
    steps: int
    packed: bool


def bench_distribution(name: str, **setting: Any) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Time every family of a plugin or distribution; `setting` is what `Setting` takes.

    A step is forward and backward of one batch of pairs (tokenising included, no optimizer) with the config's own
    dropout. The arms take turns, step by step, so that a change of the machine's speed meets both.

    Returns:
        (headings, rows), two rows a family: plain Sentence Transformers with transformers' modules, and Burnish.

    Raises:
        PluginError: If it is not installed, or cannot be used.
        ConfigError: If it has no family to time.
    """
    chosen = Setting(**setting)
    rows: list[tuple[str, ...]] = []
    for plugin in registry().named(name):
        plugins = None if plugin.own else (plugin.id,)
        named = next(other for other in registry(plugins).plugins if other.id == plugin.id)
        specs = offers(named, "burnish_register_families", FamilySpec, plugins) if plugin.values("model_type") else ()
        for spec in specs:
            rows += _family(spec, plugin, plugins, chosen)
    if not rows:
        fix = "Families are timed; name a plugin that has one"
        raise ConfigError("has no family", where=f"plugin {name}", fix=fix)
    return HEADINGS, rows


def _family(
    spec: FamilySpec, plugin: Plugin, plugins: tuple[str, ...] | None, setting: Setting
) -> list[tuple[str, ...]]:
    if spec.sample is None and setting.model is None:
        fix = "Pass --model, or give the family a sample: FamilySpec(sample=…)"
        raise ConfigError("has no sample config", where=f"family {spec.name}", fix=fix)
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as folder:
        config = None if setting.model is not None else sampled(plugin, spec, setting.size)
        ours, plain = _arms(config, plugins, setting, Path(folder))
        longest = _cut(ours, plain, setting.length)
        batch = _batch(setting.batch, longest)
        arms = {"transformers": _step(plain, batch), f"burnish {plugin.label}": _step(ours, batch)}
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        peaks: dict[str, float] = {}
        for turn in range(setting.steps + 2):
            for arm, step in arms.items():
                seconds, peak = _timed(step, ours.device)
                if turn >= 2:
                    times[arm].append(seconds)
                    peaks[arm] = max(peaks.get(arm, 0.0), peak)
    stock = statistics.median(times["transformers"])
    return [(spec.name, arm, f"{longest} tokens", *_row(found, stock, peaks[arm])) for arm, found in times.items()]


def _cut(ours: Any, plain: Any, length: int) -> int:
    """Let both models take texts of `length` tokens, or of as many as they have positions for; returns how many."""
    positions = getattr(ours.config, "max_position_embeddings", None) or length
    longest = min(length, positions - ours._first_module()._infer_flatten_position_offset())
    ours.max_seq_length = plain.max_seq_length = longest
    return int(longest)


def _row(times: list[float], stock: float, peak: float) -> tuple[str, ...]:
    middle = statistics.median(times)
    span = f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}"
    memory = f"{peak / 2**20:.0f}" if peak else "not measured on a CPU"
    return f"{middle * 1e3:.1f}", span, f"{stock / middle:.2f}", memory


def _arms(config: Any, plugins: tuple[str, ...] | None, setting: Setting, folder: Path) -> tuple[Any, Any]:
    """(Burnish's model, the plain one), both in float32 on the device, both adapted or both in full: of the setting's
    model, or of random weights for `config`."""
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer

    device = setting.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"plugins": plugins, "packed": None if setting.packed else False, "dtype": "float32"}
    if setting.model is not None:
        with quietly():
            ours = FastSentenceTransformer.from_pretrained(
                setting.model, device=device, full_finetuning=not setting.lora, **options
            )
        plain: Any = SentenceTransformer(setting.model, device=device, model_kwargs={"dtype": torch.float32})
    else:
        subject = Subject(config=config, folder=folder, plugins=plugins, device=device)
        drops = {name: getattr(subject.config, name) for name in subject.dropouts}
        ours = subject.ours(adapters=bool(setting.lora), config_kwargs=drops, **options)
        plain = subject.plain(**drops)
    if setting.lora:
        with quietly():
            FastSentenceTransformer.get_peft_model(ours, r=setting.lora, lora_alpha=setting.lora)
        adapted: Any = ours.transformers_model
        config = adapted.peft_config[adapted.active_adapters()[0]]
        same = {"target_modules": config.target_modules, "exclude_modules": config.exclude_modules}
        plain.add_adapter(LoraConfig(r=setting.lora, lora_alpha=setting.lora, **same))
    return ours.train(), plain.train()


def _batch(pairs: int, longest: int) -> list[str]:
    """Anchors, then positives: lengths spread evenly from an eighth of the longest, in no order."""
    count = 2 * pairs
    short = max(longest // 8, 1)
    lengths = [short + (longest - short) * place // max(count - 1, 1) for place in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [words(max(lengths[place] - 2, 1), place) for place in order]


def _step(model: Any, texts: list[str]) -> Callable[[], Tensor]:
    """Forward and backward with the in-batch contrastive loss (InfoNCE; van den Oord et al. 2018, equation 4)."""

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        anchors, positives = functional.normalize(embed(model, texts), dim=1).chunk(2)
        scores = anchors @ positives.T * 20
        loss = functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
        torch.autograd.backward(loss)
        return loss.detach()

    return step


def _timed(step: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """(seconds, peak bytes allocated on a CUDA device)."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    loss = step()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if not torch.isfinite(loss):
        raise ConfigError("the loss is not finite", where="plugins bench", fix="Run `burnish plugins check` first")
    return seconds, float(torch.cuda.max_memory_allocated(device)) if on_gpu else 0.0
