"""The cached step in two processes, compared in each with everything at once; run by test_cached.py as a script."""

from __future__ import annotations

import copy
import multiprocessing
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer import losses
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from burnish.core import stream
from burnish.core.cached import cached_step, cut, loss_of
from burnish.core.tiled_loss import tile
from burnish.kernels.infonce import tiled_infonce

WORLD, TEXTS = 2, 5


class Means(nn.Module):
    """The mean of each text's tokens; with a buffer, since DistributedDataParallel exchanges those in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        tokens = torch.tanh(self.layer(self.words(batch[stream.IDS][0])))
        lengths = torch.diff(batch[stream.BOUNDS])
        text = torch.repeat_interleave(lengths)
        return tokens.new_zeros(len(lengths), 8).index_add(0, text, tokens) / lengths[:, None]


def columns(rank: int) -> list[list[Any]]:
    """More tokens, so more chunks, in the second process."""
    draw = np.random.default_rng(rank)
    return [[draw.integers(0, 50, draw.integers(2, 9 + 8 * rank)).astype(np.int32) for _ in range(TEXTS)] for _ in "qd"]


def at_once(model: nn.Module, gather: bool) -> Tensor:
    """The mean loss of all processes."""
    embedded = [[model(stream.flatten([column])) for column in columns(rank)] for rank in range(WORLD)]
    if gather:
        everybody = [torch.cat(parts) for parts in zip(*embedded, strict=True)]
        return tiled_infonce(everybody[0], everybody[1:]).mean()
    return torch.stack([tiled_infonce(own[0], own[1:]).mean() for own in embedded]).mean()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    distributed.init_process_group("gloo", f"file://{folder}/store", limit, rank=rank, world_size=WORLD)
    for gather in (False, True):
        compare(rank, folder, gather)
    distributed.destroy_process_group()


def compare(rank: int, folder: str, gather: bool) -> None:
    torch.manual_seed(0)
    model = Means().double()
    alone, together = copy.deepcopy(model), DistributedDataParallel(model)
    stand_in: Any = nn.Sequential(nn.Identity())
    loss = losses.CachedMultipleNegativesRankingLoss(stand_in, gather_across_devices=gather)
    tile(loss, tiled_infonce, 0)
    of_embeddings = loss_of(loss)
    assert of_embeddings is not None
    torch.autograd.backward(at_once(alone, gather))
    for budget in (18, 10**6, 30):
        model.zero_grad()
        batch = stream.flatten(columns(rank))
        torch.autograd.backward(cached_step(together, batch, of_embeddings, budget, no_sync=together.no_sync))
        for own, expected in zip(model.parameters(), alone.parameters(), strict=True):
            assert own.grad is not None and expected.grad is not None and float(expected.grad.abs().max()) > 1e-3
            torch.testing.assert_close(own.grad, expected.grad, rtol=1e-12, atol=1e-13)
        chunks = str(len(cut(batch, budget)))
        Path(folder, f"{gather}-{rank}-{budget}").write_text(chunks, encoding="utf-8")


if __name__ == "__main__":
    forked = multiprocessing.get_context("fork")  # what takes long is the imports: once for both
    processes = [forked.Process(target=work, args=(rank, sys.argv[1])) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))
