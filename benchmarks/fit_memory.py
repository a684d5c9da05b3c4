"""Fit the memory plan's measured factors to recorded lines, and say how far it is off.

    python benchmarks/fit_memory.py

    --write      writes them into core/planning_fitted.py, and what came out into docs/memory.md
    --lines F …  other files than results/grid-*.jsonl and results/memory-*.jsonl

The factors are fitted by least squares of relative errors, none below zero. Then some of the models are left out of the
fit, in turn, and predicted. Lines of an older engine are left out where it took another amount (`OUTDATED`).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

HERE = Path(__file__).resolve().parent
if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks import arms, shapes, workload
else:
    sys.path.insert(0, str(HERE))
    import arms
    import shapes
    import workload

    # transformers looks for a package `kernels`, and would import kernels.py here for it.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]

from burnish.core import planning_fitted as fitted  # noqa: E402
from burnish.core import planning_memory as memory  # noqa: E402
from burnish.core import stream  # noqa: E402
from burnish.core.planning_shapes import Shapes, shapes_of  # noqa: E402

FACTORS = ("KEPT", "OUTSIDE", "PRODUCTS", "WORKSPACE", "AGAIN")
SELECTIVE = "SELECTIVE"
PLAIN = {"activation_budget_gb": None, "optim": None}
"""Settings that the plan does not model: lines that have others are not taken."""
BEGIN, END = "<!-- fitted -->", "<!-- end: fitted -->"
PAGE = HERE.parent / "docs" / "memory.md"
SEED = 42
"""Of the trainer's order, transformers' own."""
RESULTS = ("grid-*.jsonl", "memory-*.jsonl")
FIRST = {"g20261126"}
SECOND = {"h20261126", "h20261126b"}
NORMED = ("Qwen3", "embeddinggemma")
"""Models that norm each head's query and key, which makes them float32 under autocast."""
OUTDATED: tuple[tuple[set[str], str, Callable[[dict[str, Any], Shapes], bool]], ...] = (
    (
        FIRST | SECOND, "whole texts with grouped heads, which FlashAttention-2 took and cuDNN's attention takes now",
        lambda line, sizes: _whole(line) and sizes.spared > 0,
    ),
    (
        FIRST, "full fine-tuning with float32 queries, which attention in a padded grid took",
        lambda line, sizes: line["mode"] == "full" and line["model"].startswith(NORMED),
    ),
)  # fmt: skip
"""(runs, what they recorded that is no longer so, whether a line has it). The engines of these runs were of commits
af8b93b (first) and aba42fc (second); grouped heads changed with 786839f, float32 queries with aba42fc itself."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line: what was trained, how, on how many tokens at most in a step, and the most that torch had allocated."""

    line: dict[str, Any]
    shapes: Shapes
    setup: memory.Setup
    tokens: int
    peak: float

    @property
    def name(self) -> str:
        """The line in words."""
        what = [self.line[name] for name in ("model", "mode", "seq", "batch", "lengths")]
        settings = {name: self.line.get(name) for name in ("checkpointing", "embedding_storage")}
        return " ".join(map(str, [*what, *(f"{name}={said}" for name, said in settings.items() if said)]))

    @property
    def error(self) -> float:
        """The predicted peak less the measured one, as a share of it."""
        return memory.parts_of(self.shapes, self.setup, self.tokens, self.line["batch"]).total / self.peak - 1


def recorded(paths: Iterable[Path] = ()) -> list[Recorded]:
    """The lines of Burnish that the plan can predict, of all in `RESULTS` if no file is named."""
    places = sorted(paths) or sorted(path for name in RESULTS for path in (HERE / "results").glob(name))
    lines = [json.loads(line) for path in places for line in path.read_text(encoding="utf-8").splitlines()]
    return [one for line in lines if (one := _recorded(line)) is not None]


def _recorded(line: dict[str, Any]) -> Recorded | None:
    if line.get("system") != arms.OURS or line.get("backend") != "fused" or line.get("peak_gib") is None:
        return None
    if any(line.get(name, plain) != plain for name, plain in PLAIN.items()):
        return None
    if line["model"] not in shapes.SHAPES or line["mode"] not in arms.MODES:
        return None
    full = line["mode"].startswith("full")
    setup = memory.Setup(
        method="full" if full else "lora", storage="4bit" if line["mode"] == "qlora4" else None, rank=arms.RANK,
        checkpointing=line["checkpointing"], half=line["mode"] == "full-bf16", trains_after=True,
        embedding_storage=line.get("embedding_storage"), whole=_whole(line),
    )  # fmt: skip
    sizes = _shapes(line["model"])
    if outdated(line, sizes) is not None:
        return None
    found, _ = memory.trained_weights(sizes, setup)
    if found != line["trained_parameters"]:
        raise SystemExit(f"{line['model']} {line['mode']}: {line['trained_parameters']} weights train, not {found}")
    steps = line["warmup_steps"] + line["steps"]
    tokens = most_tokens(line["lengths"], line["batch"], line["seq"], steps)
    return Recorded(line, sizes, setup, tokens, line["peak_gib"] * memory.GIB)


WHOLE = ("20261126T094134Z",)
"""Runs of context.py whose batches went through in one forward. Since then "offload" cuts them, which the plan does not
count: it says up to 3.2 times what is taken (docs/memory.md)."""


def contexts() -> dict[str, float]:
    """The errors of the longest texts of `results/context-*.jsonl`, which are not in the fit: two pairs of each."""
    found = {}
    places = sorted((HERE / "results").glob("context-*.jsonl"))
    for line in (json.loads(line) for path in places for line in path.read_text(encoding="utf-8").splitlines()):
        if line.get("system") != arms.OURS or line.get("backend") != "fused" or line.get("peak_gib") is None:
            continue
        if line["run"] not in WHOLE or any(line.get(name, plain) != plain for name, plain in PLAIN.items()):
            continue
        setup = memory.Setup(
            storage="4bit" if line["mode"] == "qlora4" else None, rank=arms.RANK, checkpointing=line["checkpointing"],
            trains_after=True, embedding_storage=line["embedding_storage"],
        )  # fmt: skip
        tokens = 2 * line["batch"] * line["longest_tokens"]
        predicted = memory.parts_of(_shapes(line["model"]), setup, tokens, line["batch"]).total
        found[f"{line['model']} {tokens} {setup.checkpointing}"] = predicted / line["peak_gib"] / memory.GIB - 1
    return found


def outdated(line: dict[str, Any], sizes: Shapes) -> str | None:
    """What of a line its engine did otherwise than today's does; None if nothing."""
    found = (what for runs, what, has in OUTDATED if line.get("run") in runs and has(line, sizes))
    return next(found, None)


def _whole(line: dict[str, Any]) -> bool:
    return bool(line["lengths"] == "fixed" and line["seq"] % 64 == 0)


@functools.cache
def _shapes(name: str) -> Shapes:
    from burnish.core.registry import registry
    from burnish.core.selection import choose_family

    shape = shapes.SHAPES[name]
    config = shape.config()
    widths = [int(config.hidden_size), *shape.dense]
    after = sum(width * out for width, out in itertools.pairwise(widths))
    return shapes_of(config, choose_family(registry(), config).family.lora, after=after)


@functools.cache
def most_tokens(lengths: str, batch: int, seq: int, steps: int) -> int:
    """The most tokens in a step of a run of `steps` steps, filled up: the order is the trainer's, of seed 42."""
    import torch

    if lengths == "fixed":
        return 2 * batch * seq
    count = steps * batch
    columns = [np.array(workload.lengths(lengths, count, seq, place)) for place in (1, 2)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED)).numpy()
    found = 0
    for step in range(steps):
        rows = order[step * batch : (step + 1) * batch]
        texts = [np.zeros(length, np.int32) for column in columns for length in column[rows]]
        bound = -(-seq // 64) * 64
        filled = stream.flatten([texts], fit=stream.fit_eighths, fit_longest=functools.partial(max, bound))
        found = max(found, filled[stream.IDS].shape[1])
    return found


def fit(lines: Sequence[Recorded]) -> dict[str, float]:
    """The factors that lines have something of, all at once."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    taken = [one for one in lines if one.setup.checkpointing != "selective"]
    terms = [memory.coefficients(one.shapes, one.setup, one.tokens) for one in taken]
    names = [name for name in FACTORS if any(term[name] for term in terms)]
    weight = 1 / np.array([one.peak for one in taken])
    rest = np.array([one.peak - _known(one) for one in taken])
    scaled = np.array([[term[name] for name in names] for term in terms]) * weight[:, None]
    sizes = scaled.mean(axis=0)
    found, _ = nnls(scaled / sizes, rest * weight)
    return dict(zip(names, (found / sizes).tolist(), strict=True))


def _known(one: Recorded) -> float:
    """What is not fitted: weights, adapter, gradients, states, loss, layers' inputs."""
    parts = memory.parts_of(one.shapes, one.setup, one.tokens, one.line["batch"])
    inputs = memory.checkpoints(one.shapes, one.setup, one.tokens)
    return parts.weights + parts.adapter + parts.gradients + parts.optimizer + parts.loss + inputs


def fit_selective(lines: Sequence[Recorded]) -> dict[str, float]:
    """What selective checkpointing keeps, if lines have it; the other factors stay what they are."""
    measured = [one for one in lines if one.setup.checkpointing == "selective"]
    if not measured:
        return {}
    use({SELECTIVE: 0.0})
    without = np.array([one.error for one in measured])
    use({SELECTIVE: 1.0})
    step = np.array([one.error for one in measured]) - without  # an error is linear in the factor
    found = {SELECTIVE: max(0.0, float(-(step @ without) / (step @ step)))}
    use(found)
    return found


def use(factors: Mapping[str, object]) -> None:
    """Have the plan predict with these factors, in this process."""
    for name, value in factors.items():
        setattr(fitted, name, value)


def held_out(lines: Sequence[Recorded], without: int, *, again: bool = False) -> list[list[float]]:
    """The errors of lines whose models were not in the fit, for every choice of `without` models to leave out.

    Args:
        lines: All that there are.
        without: How many models.
        again: Whether the lines that are predicted are those with checkpointing, or those without.
    """
    own = [one for one in lines if bool(one.setup.checkpointing) == again]
    kept, found = {name: getattr(fitted, name) for name in FACTORS}, []
    for out in itertools.combinations(sorted({one.line["model"] for one in own}), without):
        use(fit([one for one in lines if one.line["model"] not in out]))
        found.append([abs(one.error) for one in own if one.line["model"] in out])
    use(kept)
    return found


def report(lines: Sequence[Recorded]) -> str:
    """What docs/memory.md says of the fit that is in use: the factors, each model's errors, and models left out."""
    parts = ["| Factor | Value |", "| --- | ---: |"]
    for name in (*FACTORS, SELECTIVE):
        assumed = " (assumed: no line has it)" if name in fitted.ASSUMED else ""
        parts.append(f"| `{name}`{assumed} | {getattr(fitted, name):g} |")
    parts += ["", "| Model | Lines | Measured peaks, GiB | Off, at least and at most |", "| --- | ---: | ---: | ---: |"]
    for model in dict.fromkeys(one.line["model"] for one in sorted(lines, key=lambda one: one.shapes.weights)):
        own = [one for one in lines if one.line["model"] == model]
        peaks, errors = [one.peak / memory.GIB for one in own], [one.error for one in own]
        parts.append(
            f"| {model} | {len(own)} | {min(peaks):.2f} to {max(peaks):.2f} | {min(errors):+.1%}, {max(errors):+.1%} |"
        )
    models = len({one.line["model"] for one in lines if not one.setup.checkpointing})
    parts += ["", f"Fitted {fitted.FITTED}."]
    for without in (1, models // 2):
        choices = held_out(lines, without)
        worst, every = sorted(map(max, choices)), list(itertools.chain(*choices))
        said = (
            f"With {without} of {models} models left out of the fit and predicted, for every choice of them, a line is "
            f"off by {np.mean(every):.1%} on average; the worst line by {worst[len(worst) // 2]:.1%} in the median "
            f"choice and by {worst[-1]:.1%} in the worst. Lines with checkpointing are not among these."
        )
        parts += ["", *textwrap.wrap(said, 120)]
    if choices := held_out(lines, 1, again=True):
        every = list(itertools.chain(*choices))
        said = (
            f"Of the {len(choices)} models with lines that have checkpointing, one left out and predicted from all "
            f"other lines: {np.mean(every):.1%} on average, {max(every):.1%} at most."
        )
        parts += ["", *textwrap.wrap(said, 120)]
    return "\n".join(parts)


def publish(page: Path, said: str) -> None:
    """Put the report between the page's marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{said}\n\n{END}{after}", encoding="utf-8")


def write(path: Path, values: dict[str, Any]) -> None:
    """Put the values in the place of those that the file has.

    Raises:
        SystemExit: If it lacks one.
    """
    text = path.read_text(encoding="utf-8")
    for name, value in values.items():
        said = json.dumps(value) if isinstance(value, str) else repr(value).replace("'", '"')
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {said}".replace("\\", r"\\"), text, flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"{path} has no line {name} = …")
    path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--lines", type=Path, nargs="*", default=())
    given = parser.parse_args(arguments)
    lines = recorded(given.lines)
    factors = fit(lines)
    use(factors)
    factors |= fit_selective(lines)
    rounded = {name: round(value, 3) for name, value in factors.items()}
    use(rounded)
    errors = [one.error for one in lines]
    for one in sorted(lines, key=lambda one: -abs(one.error)):
        print(f"{one.error:+7.1%}  {one.peak / memory.GIB:7.2f} GiB  {one.name}")
    print("not in the fit:", {name: f"{error:+.1%}" for name, error in contexts().items()})
    print({**rounded, "lines": len(lines), "rms": round(float(np.sqrt(np.mean(np.square(errors)))), 4)})
    if given.write:
        models = len({one.line["model"] for one in lines})
        worst = max(error for again in (False, True) for errors in held_out(lines, 1, again=again) for error in errors)
        made = {
            **rounded, "ASSUMED": tuple(name for name in (*FACTORS, SELECTIVE) if name not in factors),
            "FITTED": f"{datetime.now(UTC):%Y-%m-%d}, {len(lines)} lines, {models} models",
            "WORST": round(max(map(abs, errors)), 3), "HELD_OUT": round(worst, 3),
        }  # fmt: skip
        write(Path(str(fitted.__file__)), made)
        use(made)
        publish(PAGE, report(lines))
    print(report(lines))


if __name__ == "__main__":
    main()
