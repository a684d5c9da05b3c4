"""GradCache on a stream: a batch of any size with the activations of one chunk of tokens (Gao et al. 2021, section 3).

Every chunk is embedded and its graph dropped; the loss of all embeddings gives each its gradient; then every chunk is
embedded again, with the random numbers it had, and its part of the gradient goes back through it. Sentence
Transformers' cached losses do so in mini-batches of so many texts of one column; here a chunk is a stream of whole
texts of any column, cut by tokens, and a batch that is one chunk is embedded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from . import stream
from .parking import on_the_host

Embed: TypeAlias = Callable[[Mapping[str, Any]], Tensor]
"""From a stream, with the keys of `stream.flatten`, to the embeddings of its texts, (N + M, D)."""
LossOfEmbeddings: TypeAlias = Callable[[list[Tensor]], Tensor]
"""From the embeddings of each column, (texts, D), to the loss, a scalar."""

PARKED = 2**14
"""Tokens of a forward whose layers keep their inputs on the host: enough to fill a GPU. What is on the device is one
layer going backward, about 50 bytes a token and hidden unit."""

BUDGET = 2**15
"""Tokens of a chunk: enough to fill a GPU, and a few GiB of activations for a model of 12 layers of 768."""


def loss_of(loss: nn.Module) -> LossOfEmbeddings | None:
    """What a cached loss of Sentence Transformers makes of all embeddings, for `cached_step`; None for other losses.

    That is CachedMultipleNegativesRankingLoss and its symmetric form. A subclass that computes for itself, and one on
    which MatryoshkaLoss has bound a computation, are left to Sentence Transformers.
    """
    kind = CachedMultipleNegativesRankingLoss
    if not isinstance(loss, kind):
        return None
    if not _is_computed_by(kind, loss, "calculate_loss"):
        return None
    inner = loss.loss  # not cached; it holds the settings, and `tiled_loss.tile` has bound it where the outer one is
    return lambda embeddings: inner.compute_loss_from_embeddings(embeddings, torch.empty(0))


def ranking_of(loss: nn.Module) -> LossOfEmbeddings | None:
    """What MultipleNegativesRankingLoss makes of all embeddings, where a run may cut any batch; None for other losses.

    Its symmetric form too. A subclass that computes for itself is another loss.
    """
    kind = MultipleNegativesRankingLoss
    if not isinstance(loss, kind) or "forward" in vars(loss):
        return None
    if not _is_computed_by(kind, loss, "compute_loss_from_embeddings"):
        return None
    ranking: Any = loss
    return lambda embeddings: ranking.compute_loss_from_embeddings(embeddings, torch.empty(0))


def _is_computed_by(kind: type[nn.Module], loss: nn.Module, method: str) -> bool:
    """Whether `loss` computes by its `kind`'s own forward and `method`, which only `tiled_loss` may have bound anew."""
    own = vars(loss).get(method)
    if own is not None and getattr(getattr(own, "func", None), "__module__", "") != f"{__package__}.tiled_loss":
        return False
    return all(getattr(type(loss), name) is getattr(kind, name) for name in ("forward", method))


def budget_of(loss: Any, longest: int) -> int:
    """The tokens of a chunk for a cached loss: its `mini_batch_num_tokens`; else `BUDGET`, or the `mini_batch_size`
    texts of `longest` tokens that its mini-batch may hold, if they are fewer."""
    found = getattr(loss, "mini_batch_num_tokens", None)
    return min(BUDGET, loss.mini_batch_size * longest) if found is None else int(found)


def in_parts(
    embed: Embed,
    batch: Mapping[str, Any],
    budget: int,
    *,
    filler: int = 0,
    fit: stream.Fit | None = None,
    fit_longest: stream.Fit | None = None,
) -> Tensor:
    """(N, D) or more rows: the embeddings of a stream in forwards of at most `budget` tokens, with all their graphs.

    For layers that keep their input on the host: the device holds the activations of one layer of one forward, however
    long the stream is, and nothing is embedded twice. What comes after the layers is kept on the host too.
    Arguments as `cached_step`'s.
    """
    if batch[stream.IDS].shape[1] <= budget:
        return embed(batch)
    chunks = cut(batch, budget, filler=filler, fit=fit, fit_longest=fit_longest)
    parts = []
    for chunk in chunks:
        with on_the_host():
            parts.append(embed(chunk)[: sum(chunk[stream.COLUMNS])])
    return torch.cat(parts)


def cached_step(
    embed: Embed,
    batch: Mapping[str, Any],
    loss_of_embeddings: LossOfEmbeddings,
    budget: int = BUDGET,
    *,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    filler: int = 0,
    fit: stream.Fit | None = None,
    fit_longest: stream.Fit | None = None,
) -> Tensor:
    """The loss of a batch; its backward embeds chunk after chunk again and adds the gradients up.

    A stream of at most `budget` tokens is one chunk: it is embedded once, with a graph, and the host waits for nothing,
    so that such a step can be captured. Longer ones are cut on the host, which waits for the token ids.

    Args:
        embed: The model.
        batch: A stream, with the keys of `stream.flatten`.
        loss_of_embeddings: The loss. Weights of its own get no gradient from more than one chunk.
        budget: Tokens of a chunk at most; a longer text is a chunk of its own.
        no_sync: A context in which gradients are not exchanged between processes (`DistributedDataParallel`'s); all but
            the last forward and its backward run in it.
        filler, fit, fit_longest: How chunks are filled up to a few shapes, as in `stream.flatten`.

    Returns:
        A scalar. Without a graph (in evaluation) where gradients are off.
    """
    counts = batch[stream.COLUMNS]
    chunks = [dict(batch)]
    if batch[stream.IDS].shape[1] > budget:
        chunks = cut(batch, budget, filler=filler, fit=fit, fit_longest=fit_longest)
    if len(chunks) == 1:
        embeddings = embed(chunks[0])[: sum(counts)]
        return loss_of_embeddings(list(torch.split(embeddings, list(counts))))
    graph = torch.is_grad_enabled()
    device = batch[stream.IDS].device
    states, parts = [], []
    for chunk in chunks:
        states.append(_State.now(device))
        # With a graph, which dies here. Without one, compiled layers and attention may run other code than in the
        # second forward, which rounds or draws otherwise, and would have to be compiled too. A copy, since a detached
        # view holds what it is a view of, and that its graph.
        with no_sync():
            parts.append(embed(chunk)[: sum(chunk[stream.COLUMNS])].detach().clone())
    leaf = torch.cat(parts).requires_grad_(graph)
    loss = loss_of_embeddings(list(torch.split(leaf, list(counts))))
    if not graph:
        return loss
    gradients = torch.split(torch.autograd.grad(loss, leaf)[0], [len(part) for part in parts])

    def replay(outer: Tensor) -> None:
        for place, (chunk, state, gradient) in enumerate(zip(chunks, states, gradients, strict=True)):
            last = place == len(chunks) - 1
            with torch.enable_grad(), nullcontext() if last else no_sync(), state.again():
                again = embed(chunk)[: len(gradient)]
                torch.autograd.backward(again, (gradient * outer).to(again.dtype))
                del again

    value = loss.detach().requires_grad_()
    value.register_hook(replay)  # type: ignore[no-untyped-call]
    return value


def cut(
    batch: Mapping[str, Any],
    budget: int,
    *,
    filler: int = 0,
    fit: stream.Fit | None = None,
    fit_longest: stream.Fit | None = None,
) -> list[dict[str, Any]]:
    """A stream as streams of whole texts, in the same order and about equally long.

    Args:
        batch: A stream, with the keys of `stream.flatten`. Texts that fill it up are left out.
        budget: Tokens of each at most; a longer text stands alone.
        filler, fit, fit_longest: As in `stream.flatten`, for each of them. What fills comes on top of the budget.

    Returns:
        Streams with the same keys on the same device. `stream_columns` is (texts,), whatever column they are of.
    """
    ids: NDArray[np.int32] = batch[stream.IDS][0].cpu().numpy().astype(np.int32)
    bounds: NDArray[np.int32] = batch[stream.BOUNDS].cpu().numpy()
    bounds = bounds[: sum(batch[stream.COLUMNS]) + 1]
    offset = int(batch[stream.POSITIONS][0, 0]) if len(ids) else 0
    device = batch[stream.IDS].device
    found = []
    for first, last in spans(np.diff(bounds).tolist(), budget):
        texts = [ids[bounds[place] : bounds[place + 1]] for place in range(first, last)]
        chunk = stream.flatten([texts], position_offset=offset, filler=filler, fit=fit, fit_longest=fit_longest)
        found.append({key: value.to(device) if isinstance(value, Tensor) else value for key, value in chunk.items()})
    return found


def spans(lengths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Consecutive texts as (first, after the last) spans of at most `budget` tokens, and about equally many.

    Filling each up to the budget would leave a rest in the last: the peak is the same, but small batches are slow.
    """
    total = sum(lengths)
    parts = max(1, -(-total // budget))
    # Each span that is left holds more than this less the longest text, so that no more than `parts` are needed.
    limit = min(budget, -(-total // parts) + max(lengths, default=0))
    found, first, held = [], 0, 0
    for place, length in enumerate(lengths):
        if held + length > limit and place > first:
            found.append((first, place))
            first, held = place, 0
        held += length
    return [*found, (first, len(lengths))]


@dataclass(frozen=True, slots=True)
class _State:
    """What a chunk's second forward must find as its first did: random numbers, and autocast."""

    device: torch.device
    random: Tensor
    device_random: Tensor | None
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> _State:
        kind = device.type
        return cls(
            device, torch.get_rng_state(), random_on(device),
            torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind),
        )  # fmt: skip

    @contextmanager
    def again(self) -> Iterator[None]:
        """As it was then, for the length of a block; after it, random numbers go on as if nothing had been drawn."""
        before, device_before = torch.get_rng_state(), random_on(self.device)
        set_random_on(self.device, self.random, self.device_random)
        try:
            with torch.autocast(self.device.type, self.dtype, enabled=self.enabled):
                yield
        finally:
            set_random_on(self.device, before, device_before)


def random_on(device: torch.device) -> Tensor | None:
    """The state of the device's generator; None for a CPU, whose generator is the host's."""
    if device.type == "cpu":
        return None
    module: Any = torch.get_device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def set_random_on(device: torch.device, host: Tensor, own: Tensor | None) -> None:
    """Set the host's generator and, unless `own` is None, that of the device."""
    torch.set_rng_state(host)
    if own is not None:
        module: Any = torch.get_device_module(device)
        module.set_rng_state(own) if device.type == "mps" else module.set_rng_state(own, device)
