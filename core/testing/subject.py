"""What the checks examine: one architecture with random weights, as Burnish prepares it and as it is without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..contracts import Family, Machine, Pooling
from ..fast import FastSentenceTransformer
from ..registry import registry
from ..selection import choose_family
from .tokenizer import save_tokenizer, words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig


class NotApplicable(Exception):
    """A check that says nothing about this subject; the message says why."""


# The GPU that patches for GPUs are asked for. Those in plain PyTorch run on a CPU as well, and are compared there.
GPU = Machine(
    device="cuda", compute_capability=(9, 0), dtypes=frozenset({"float32", "bfloat16", "float16"}), packages={}
)


@dataclass(slots=False, kw_only=True)
class Subject:
    """One config under test.

    Args:
        config: What the random weights are made for; small, or the checks take long.
        folder: Where its files go.
        tolerance: Largest error against the reference, as a share of the largest value, in float64; ten times that in
            float32.
        backend: Execution backend, or "auto".
        plugins: Plugins named for the run, as `FastSentenceTransformer` takes them.
        devices: "cpu" for this machine's patches, "cuda" for those that a GPU would get (run where the subject is).
        device: Where everything runs.
        exact: The dtype in which ours and the reference are compared; float32 where float64 would not fit.
        examples: How many random batches of texts packed input is tried on.
    """

    config: PretrainedConfig
    folder: Path
    tolerance: float = 1e-5
    backend: str = "auto"
    plugins: tuple[str, ...] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    device: str = "cpu"
    exact: torch.dtype = torch.float64
    examples: int = 25
    seed: int = field(default=0)

    @cached_property
    def family(self) -> Family:
        """The family that takes the config."""
        return choose_family(registry(self.plugins), self.config).family

    @cached_property
    def pooling(self) -> Pooling:
        """The family's default pooling for it."""
        return self.family.default_pooling(self.config, frozenset())

    @cached_property
    def still(self) -> PretrainedConfig:
        """The config without dropout."""
        config = copy.deepcopy(self.config)
        for name in self.dropouts:
            setattr(config, name, 0.0)
        return config

    @cached_property
    def dropouts(self) -> list[str]:
        """The config's dropout probabilities, by name."""
        values = self.config.to_dict()
        return sorted(name for name, value in values.items() if "drop" in name and type(value) in (int, float))

    @cached_property
    def longest(self) -> int:
        """Longest text in tokens, special ones included."""
        room = getattr(self.config, "max_position_embeddings", None) or 64
        offset = self.family.packing.position_offset if self.family.packing else 2
        return min(int(room) - offset, 128)

    @cached_property
    def texts(self) -> list[str]:
        """Texts of unequal length: one word, none, the longest there may be, and some between."""
        return [words(count, seed) for seed, count in enumerate((9, 1, 0, self.longest + 3, 17, 2, 30))]

    @cached_property
    def repository(self) -> Path:
        """A plain transformers folder with the random weights, float32, without dropout."""
        from transformers import AutoModel

        place = self.folder / "repository"
        if not (place / "config.json").exists():
            torch.manual_seed(self.seed)
            kind: Any = AutoModel
            model = kind.from_config(self.still).float()
            enliven(model)
            model.save_pretrained(place)
            first = self.pooling.mode != "lasttoken"
            save_tokenizer(place, self.config, first=first, max_length=self.longest)
        return place

    def exactly(self, model: Any) -> Any:
        """The model in the dtype of comparisons."""
        return model.to(self.exact)

    def ours(self, folder: Path | None = None, **options: Any) -> Any:
        """The model as Burnish prepares it, for full fine-tuning unless `options` say otherwise."""
        given = {"full_finetuning": True, "backend": self.backend, "plugins": self.plugins, **options}
        if given.get("adapters"):
            given["full_finetuning"] = False
        given.pop("adapters", None)
        with quietly():
            return FastSentenceTransformer.from_pretrained(folder or self.repository, device=self.device, **given)

    def plain(self, folder: Path | None = None, *, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        """Sentence Transformers' own model with the family's pooling: what Burnish's is compared with."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule

        trunk = Transformer(str(folder or self.repository), model_kwargs={"dtype": dtype}, config_kwargs=config)
        rule = self.pooling
        width = trunk.get_embedding_dimension()
        modules: list[nn.Module] = [trunk, PoolingModule(width, rule.mode, include_prompt=rule.include_prompt)]
        return SentenceTransformer(modules=[*modules, Normalize()] if rule.normalize else modules, device=self.device)

    def read(self, folder: Path) -> Any:
        """A saved folder as plain Sentence Transformers reads it, in float32."""
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(folder), device=self.device, model_kwargs={"dtype": torch.float32})


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what Burnish says of a loaded model from the terminal."""
    with redirect_stderr(StringIO()):
        yield


def enliven(model: nn.Module) -> None:
    """Weights at which every part acts: transformers' own start (0.02) leaves attention all but even."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.1)


def embed(model: Any, texts: Sequence[str]) -> Tensor:
    """(N, width) embeddings with a gradient, in the mode that the model is in."""
    features = {
        key: value.to(model.device) if torch.is_tensor(value) else value
        for key, value in model.preprocess(list(texts)).items()
    }
    result: Tensor = model(features)["sentence_embedding"]
    return result


def backward(model: Any, texts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """(embeddings, gradients by parameter name) of a weighted sum of the embeddings, in training mode."""
    model.train()
    model.zero_grad()
    out = embed(model, texts)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    torch.autograd.backward((out * weights).sum())
    model.eval()
    gradients = {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return out.detach(), gradients


def compare_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> float:
    """The largest error of a gradient, as a share of the largest value of its tensor (or a hundredth of the largest of
    all, for tensors in which everything cancels).

    Raises:
        AssertionError: If it is above `tolerance`, a gradient is missing or one too many, or all are nothing.
    """
    top = max((float(value.abs().max()) for value in theirs.values()), default=0.0)
    assert top > 1e-4, f"the reference has no gradient to speak of (largest {top:.1e}): nothing would be proved"
    missing, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    nothing = [name for name in missing if float(theirs[name].abs().max()) == 0]
    missing = [name for name in missing if name not in nothing]
    assert not missing, f"no gradient reaches {', '.join(missing[:3])} ({len(missing)} in all)"
    assert not extra, f"a gradient reaches {', '.join(extra[:3])} that has none in the reference"
    worst, where = 0.0, ""
    for name, value in theirs.items():
        if name in nothing:
            continue
        error = float((ours[name] - value).abs().max()) / max(float(value.abs().max()), top / 100)
        worst, where = max((worst, where), (error, name))
    assert worst <= tolerance, f"the gradient of {where} is off by {worst:.1e} of its size (allowed {tolerance:.0e})"
    return worst


def compare_outputs(ours: Tensor, theirs: Tensor, tolerance: float, what: str = "the embeddings") -> float:
    """The largest error as a share of the largest value.

    Raises:
        AssertionError: If it is above `tolerance`, or the reference is nothing or the same for every text.
    """
    assert ours.shape == theirs.shape, f"{what} have the shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    top = float(theirs.abs().max())
    assert top > 1e-4, f"{what} of the reference are nothing: nothing would be proved"
    error = float((ours.double() - theirs.double()).abs().max()) / top
    assert error <= tolerance, f"{what} are off by {error:.1e} of the largest value (allowed {tolerance:.0e})"
    return error


def unchanged(now: Tensor, before: Tensor) -> bool:
    """Whether nothing has changed by a bit; on a GPU, by more than sums in no fixed order do (pooling packed texts and
    embedding gradients add up with atomics there)."""
    if now.device.type == "cpu":
        return torch.equal(now, before)
    return bool((now - before).abs().max() <= 1e-5 * before.abs().max())


def live_linears(model: Any, texts: Sequence[str]) -> set[str]:
    """The linear layers inside the transformer whose weights the embeddings depend on, by full name."""
    _, gradients = backward(model, texts)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        name.partition(".model.")[2]
        for name in linear
        if name.startswith("0.")
        and f"{name}.weight" in gradients
        and float(gradients[f"{name}.weight"].abs().max()) > 0
    }


def each(items: Iterable[Any], run: Callable[[Any], float]) -> float:
    """The worst of several measured errors."""
    return max((run(item) for item in items), default=0.0)
