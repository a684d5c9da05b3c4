"""What an architecture is like, found by trying it on a model of a few thousand random weights: which linear layers an
adapter reaches, and whether packed input is exact. `burnish plugins new` writes down what is found here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging import CRITICAL
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import lora_layers
from .contracts import LoraTargets, Packing, Pooling, Precision
from .errors import ModelError
from .loading import first_line
from .machine import describe
from .packing import register_attention
from .registry import registry
from .selection import choose_kernel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Sizes = dict[str, Any]

# Attributes that configs of text models have under these names or map to their own: for the tests, and for timing.
# What a config calls otherwise (a second name for the width of the MLP, windows) stands beside them.
_TINY: Sizes = {
    "vocab_size": 250, "hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "hidden_dim": 64, "ffn_dim": 64,
    "max_position_embeddings": 96, "sliding_window": 8, "local_attention": 8,
}  # fmt: skip
_BASE: Sizes = {
    "hidden_size": 768, "embedding_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 3072, "hidden_dim": 3072, "ffn_dim": 3072,
}  # fmt: skip
# What an architecture may not let be set, or only to something else; tried in this order.
_MENDS: tuple[Sizes, ...] = (
    {}, {"embedding_size": 32}, {"max_position_embeddings": None}, {"num_hidden_layers": None}, {"head_dim": None},
)  # fmt: skip
# A window and a text that is longer; one token; and more texts than one.
_LENGTHS = (7, 1, 40, 19)
# Relative to the largest output. Two orders of summation differ by 1e-6 in float32; texts that see each other, or
# positions that are off by one, by more than 1e-3.
_EXACT = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a family module can say of an architecture.

    Args:
        pooling: The default pooling of the family it is like.
        lora: Every linear layer that is alive.
        precision: The dtype policy of the family it is like.
        packing: How packed input is exact; None where it is not.
        packing_reason: What was seen when it was tried, in a few words.
        layers: The last names of the layers that `lora` adapts, sorted.
        dead: The linear layers whose output nothing reads, by the shortest names that no other layer has, sorted.
        checkpointing: Whether transformers has gradient checkpointing for it.
    """

    pooling: Pooling
    lora: LoraTargets
    precision: Precision
    packing: Packing | None
    packing_reason: str
    layers: tuple[str, ...]
    dead: tuple[str, ...]
    checkpointing: bool


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from logging what a model or config does not take: here that is the answer, and is told."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def sample_sizes(kind: type[PretrainedConfig]) -> dict[str, Sizes]:
    """Arguments of a config class for a tiny model and for one of a common size, under the class's own names.

    Raises:
        ModelError: If no tiny model can be made of it; with the reason that transformers gives.
    """
    tiny = _sizes(kind, _TINY)
    fault: Exception | None = None
    for mend in _MENDS:
        sizes = {key: value for key, value in (tiny | _named(kind, mend, tiny)).items() if value is not None}
        try:
            _hidden(random_model(kind(**sizes)), _texts(kind(**sizes)))
        except Exception as error:  # a library's code on sizes that it may not take: told below
            fault = fault or error
        else:
            return {"tiny": sizes, "base": _base(kind)}
    assert fault is not None
    what = f"no tiny model of type {kind.model_type!r} reads token ids ({type(fault).__name__}: {first_line(fault)})"
    raise ModelError(what, where="transformers", fix="Burnish needs an encoder of texts that AutoModel makes")


def _sizes(kind: type[PretrainedConfig], wanted: Sizes) -> Sizes:
    default = kind()
    sizes = {name: value for name, value in _named(kind, wanted, vars(default)).items()}
    whole = {name: value for name, value in sizes.items() if type(getattr(default, name, None)) in (int, type(None))}
    sizes = {name: value for name, value in whole.items() if getattr(default, name) is not None or name == "head_dim"}
    layers = kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    kinds = getattr(default, "layer_types", None)
    if layers in sizes and kinds:  # as many as it takes to have one of each
        sizes[layers] = max(sizes[layers], 1 + max(kinds.index(one) for one in set(kinds)))
    if "vocab_size" in wanted:
        sizes |= _special_tokens(default, sizes.get("vocab_size", 0))
    return sizes


def _named(kind: type[PretrainedConfig], wanted: Sizes, known: Mapping[str, Any]) -> Sizes:
    """`wanted` under the class's own names, without what it does not have."""
    own = {kind.attribute_map.get(name, name): value for name, value in wanted.items()}
    return {name: value for name, value in own.items() if name in known}


def _special_tokens(default: PretrainedConfig, vocabulary: int) -> Sizes:
    """Small ids for the special tokens that a small vocabulary does not reach."""
    names = [name for name in vars(default) if name.endswith("_token_id")]
    beyond = [name for name in names if isinstance(at := getattr(default, name), int) and at >= vocabulary]
    taken = {getattr(default, name) for name in names} - {getattr(default, name) for name in beyond}
    free = iter(number for number in range(len(names) * 2) if number not in taken)
    return {name: next(free) for name in sorted(beyond, key=lambda name: (name != "pad_token_id", name))}


def _base(kind: type[PretrainedConfig]) -> Sizes:
    sizes = _sizes(kind, _BASE)
    try:
        with torch.device("meta"):
            _from_config(kind(**sizes))
    except Exception:  # the sizes do not go together in this architecture: its own default is a common size too
        return {}
    return sizes


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """The encoder with random weights, none of them zero or one as fresh biases and norms are; seeded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.train(False)
    return model


def _from_config(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModel

    if config.is_encoder_decoder:
        raise ValueError("it has an encoder and a decoder")
    model: PreTrainedModel = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    return model


def _texts(config: PretrainedConfig) -> list[Tensor]:
    """Random token ids, a text each; no special tokens."""
    special = [at for name, at in vars(config).items() if name.endswith("_token_id") and isinstance(at, int)]
    first = max([at for at in special if at < config.vocab_size // 2], default=0) + 1
    generator = torch.Generator().manual_seed(0)
    longest = (getattr(config, "max_position_embeddings", None) or 512) - first
    return [
        torch.randint(first, config.vocab_size, (min(length, longest),), generator=generator) for length in _LENGTHS
    ]


def _hidden(model: PreTrainedModel, texts: Sequence[Tensor]) -> Tensor:
    """(T, hidden): the token vectors of padded texts, without the padding."""
    pad = getattr(model.config, "pad_token_id", None) or 0
    ids = nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    hidden: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden[mask.bool()]


def fit(config: PretrainedConfig, pooling: Pooling, precision: Precision) -> Facts:
    """Make a model with this config and see what is true of it.

    Args:
        config: A small one: its model is made and run, on the CPU.
        pooling, precision: What cannot be tried, from the family that the new one is like. Modules that are not there
            are taken out.

    Raises:
        ModelError: If no linear layer of the model can take an adapter.
    """
    model = random_model(config)
    texts = _texts(config)
    alive, dead = _alive(model, texts)
    if not alive:
        what = f"a {config.model_type!r} model has no linear layer that its embeddings depend on"
        raise ModelError(what, where="LoRA", fix="Burnish has nothing to adapt in it")
    packing, reason = _packing(model, texts)
    paths = [path for path, _ in model.named_modules()]
    kept = tuple(name for name in precision.keep_float32 if any(_ends(path, name) for path in paths))
    return Facts(
        pooling=pooling,
        lora=_targets(alive, dead),
        precision=replace(precision, keep_float32=kept),
        packing=packing,
        packing_reason=reason,
        layers=tuple(sorted({_last(path) for path in alive})),
        dead=tuple(sorted({_shortest(path, alive) for path in dead})),
        checkpointing=bool(model.supports_gradient_checkpointing),
    )


def _alive(model: PreTrainedModel, texts: Sequence[Tensor]) -> tuple[list[str], list[str]]:
    """(linear layers that the mean of the token vectors depends on, the others), by the gradient of their weights."""
    hidden = _hidden(model, texts)
    means = torch.stack([part.mean(0) for part in torch.split(hidden, [len(text) for text in texts])])
    # In a random direction: all components of a normalised vector together depend on nothing.
    direction = torch.randn(means.shape, generator=torch.Generator().manual_seed(1))
    (means * direction).sum().backward()  # type: ignore[no-untyped-call]
    linear, _ = lora_layers(model, LoraTargets())
    read = {path for path in linear if _has_gradient(model.get_submodule(path))}
    # A layer that comes many times is alive if one is: not every expert is asked for every text.
    patterns = {_pattern(path) for path in read}
    model.zero_grad()
    return [path for path in linear if _pattern(path) in patterns], [
        path for path in linear if _pattern(path) not in patterns
    ]


def _has_gradient(layer: nn.Module) -> bool:
    gradient = layer.weight.grad
    return isinstance(gradient, Tensor) and bool(gradient.ne(0).any())


def _pattern(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _ends(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")


def _targets(alive: Sequence[str], dead: Sequence[str]) -> LoraTargets:
    """Names that reach what is alive and nothing else, in a model of any size.

    A layer outside the numbered ones may be missing from another config (a projection between two widths), and a name
    that is missing is an error; where there is one, every layer is taken but the dead.
    """
    names = tuple(sorted({_last(path) for path in alive}))
    if any("*" not in _pattern(path) for path in alive):
        names = ()
    reached = [path for path in dead if not names or _last(path) in names]
    exclude = {_shortest(path, alive) for path in reached}
    return LoraTargets(names=names, exclude=tuple(sorted(exclude)))


def _shortest(path: str, alive: Sequence[str]) -> str:
    """The shortest suffix of a dead layer's path that no layer alive has."""
    parts = path.split(".")
    suffixes = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
    return next(suffix for suffix in suffixes if not any(_ends(other, suffix) for other in alive))


@dataclass(slots=True)
class _Trial:
    """An attention operation that remembers how it was called."""

    operation: Callable[..., Tensor]
    calls: list[tuple[bool, int | None]]

    def __call__(self, *states: Any, causal: bool, window: int | None, **settings: Any) -> Tensor:
        self.calls.append((causal, window))
        return self.operation(*states, causal=causal, window=window, **settings)


def _packing(model: PreTrainedModel, texts: Sequence[Tensor]) -> tuple[Packing | None, str]:
    """How packed input is exact, and what was seen; the model may be left with another attention."""
    kernel = choose_kernel(registry(), describe("cpu"), "packed_attention")
    if kernel is None:
        return None, "no plugin brings an attention for it"
    with torch.no_grad():
        wanted = _hidden(model, texts)
        seen: list[str] = []
        for offset in _offsets(model):
            trial = _Trial(kernel.load(), [])
            try:
                with _attention(model, trial):
                    got = _packed_hidden(model, texts, offset)
            except Exception as error:  # whatever a model says to input that it was not made for
                seen.append(f"the model refuses packed input ({type(error).__name__}: {first_line(error)})")
                continue
            if not trial.calls:
                return None, "its attention does not go through transformers' AttentionInterface"
            apart = float((got - wanted).abs().max() / wanted.abs().max())
            if math.isfinite(apart) and apart < _EXACT:
                causal = all(causal for causal, _ in trial.calls)
                window = any(window is not None for _, window in trial.calls)
                packing = Packing(position_offset=offset, causal=causal, sliding_window=window)
                return packing, "packed and padded outputs agree" + (f" (apart by {apart:.0e})" if apart else "")
            seen.append(f"packed and padded outputs differ by {apart:.0e} of the largest")
    return None, seen[0]


def _offsets(model: nn.Module) -> Iterator[int]:
    """Where positions may start: at 0, or after the padding token's, as tables that keep a row for it have them."""
    yield 0
    pads = {getattr(module, "padding_idx", None) for module in model.modules()}
    yield from sorted(pad + 1 for pad in pads if isinstance(pad, int))


@contextmanager
def _attention(model: PreTrainedModel, operation: Callable[..., Tensor]) -> Iterator[None]:
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation(register_attention("trial", operation))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _packed_hidden(model: PreTrainedModel, texts: Sequence[Tensor], offset: int) -> Tensor:
    """(T, hidden): the token vectors of texts in one row, given as Sentence Transformers gives them."""
    lengths = torch.tensor([len(text) for text in texts])
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    places = torch.cat([torch.arange(offset, offset + len(text)) for text in texts])
    longest = int(lengths.max())
    hidden: Tensor = model(
        input_ids=torch.cat(list(texts))[None], position_ids=places[None], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds,
        max_length_q=longest, max_length_k=longest,
    ).last_hidden_state[0]  # fmt: skip
    return hidden
