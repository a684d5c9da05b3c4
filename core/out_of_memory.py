"""Steps that run out of memory: with `auto_batch` put back and run again in smaller parts, else an error with advice.

A batch is cut into forwards of so many tokens (`core.cached`), so that its loss compares all of its texts however small
the parts are. Nothing of a failed step is left: no gradient, no random number drawn, no memory.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import stream
from .cached import BUDGET, LossOfEmbeddings, budget_of, loss_of, random_on, ranking_of, set_random_on, spans
from .errors import ModelError

WHOLE = 2**62
"""Tokens of a forward that nothing limits."""


class OutOfMemory(ModelError, torch.OutOfMemoryError):
    """A step does not fit in the memory of the device; the original error is its cause."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was asked for and not had: torch's allocator, CUDA itself, or cuBLAS."""
    said = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


class Room:
    """How many tokens a forward of a run may have, and what happens to a step that memory does not suffice for.

    Args:
        model: The run's model.
        arguments: Its training arguments.
        say: Tells the user one line, once.
    """

    def __init__(self, model: Any, arguments: Any, say: Callable[[str], None]) -> None:
        self.model, self.arguments, self.say = model, arguments, say
        self.asked = getattr(arguments, "auto_batch", False)
        self.budget: int | None = None
        """Tokens of a forward; None where nothing limits them."""
        self.retried = 0
        self.forget: Callable[[], object] = lambda: None
        """Has the backend let go of the memory that it keeps for steps to come."""
        self._planned = False

    @property
    def is_on(self) -> bool:
        """Whether batches may be cut."""
        return self.asked is not False

    def plan(self) -> None:
        """Decide the budget, once: the number that was asked for, or what the device's free memory allows."""
        if not self.is_on or self._planned:
            return
        self._planned = True
        device = self.model.device
        if self.asked is not True:
            self.budget = int(self.asked)
        elif device.type != "cuda":
            self.say(f"auto_batch has nothing to plan with on {device.type}: batches go through in one forward")
        else:
            from .planning_live import free_memory

            self.budget = self._planned_tokens(free_memory(device))

    def _planned_tokens(self, free: float) -> int:
        from .planning_live import token_budget

        try:
            tokens, notes = token_budget(self.model, self.arguments, free)
        except ModelError as error:
            self.say(f"auto_batch starts with forwards of {BUDGET:,} tokens: {error}")
            return BUDGET
        for note in notes:
            self.say(f"auto_batch: {note}")
        device = self.model.device
        longest = self.model.max_seq_length or 1
        if tokens < longest:
            self.say(f"auto_batch: {free / 1e9:.2f} GB free on {device} are little for one text of {longest:,} tokens")
        else:
            self.say(f"auto_batch: {free / 1e9:.2f} GB free on {device}: forwards of at most {tokens:,} tokens")
        return max(tokens, 1)

    def of_embeddings(self, loss: Any) -> LossOfEmbeddings | None:
        """A loss as a function of all of a batch's embeddings, where this run may cut the batch; else None."""
        return loss_of(loss) or (ranking_of(loss) if self.is_on else None)

    def limit(self, loss: Any) -> int:
        """The tokens of a forward for a loss that lets batches be cut: its own `mini_batch_num_tokens` and the budget,
        whichever is less. A cached loss that was told no tokens takes the budget, or its default where there is none.
        """
        told = getattr(loss, "mini_batch_num_tokens", None)
        if self.budget is not None:
            return self.budget if told is None else min(int(told), self.budget)
        return budget_of(loss, self.model.max_seq_length or BUDGET) if hasattr(loss, "mini_batch_size") else WHOLE

    def host_work(self, batch: Mapping[str, Any], loss: Any) -> str | None:
        """Why a batch makes a step work on the host (`StepContext.host_work`): it is to be cut there."""
        if stream.IDS not in batch or self.of_embeddings(loss) is None:
            return None
        cut = batch[stream.IDS].shape[1] > self.limit(loss)
        return "a batch of more tokens than a forward may have is cut on the host" if cut else None

    def run(
        self, step: Callable[..., Tensor], model: nn.Module, batch: Mapping[str, Any], items: Any, loss: Any
    ) -> Tensor:
        """A step, again with a smaller budget as often as memory does not suffice.

        Args:
            step: The backend's.
            model, batch, items: What it takes.
            loss: What it computes.

        Returns:
            What `step` returns.

        Raises:
            OutOfMemory: If nothing can be cut, or is left to be cut.
        """
        cuts = stream.IDS in batch and self.of_embeddings(loss) is not None
        if cuts:
            self.plan()
        elif self.is_on:
            why = f"{type(loss).__name__} takes its batches whole" if stream.IDS in batch else "the input is no stream"
            self.say(f"auto_batch has nothing to cut: {why}")
        again = self.is_on and cuts and not _is_shared()
        before: Before | None = None
        while True:
            try:
                if again and before is None:
                    before = Before(self.model)
                return step(model, dict(batch), items)
            except RuntimeError as error:
                if not is_out_of_memory(error) or getattr(self.arguments, "auto_find_batch_size", False):
                    raise
                smaller = None if before is None else _smaller(batch, self.limit(loss))
                if before is None or smaller is None:
                    raise self.advice(batch, loss) from error
            # Outside of the block: the error holds the frames of the failed step, and these its tensors.
            self._recover(before, smaller)

    def _recover(self, before: Before, smaller: int) -> None:
        before.restore()
        self.forget()
        gc.collect()
        device = self.model.device
        if device.type != "cpu":
            module: Any = torch.get_device_module(device)
            module.empty_cache()
        self.retried += 1
        self.budget = smaller
        self.say(f"out of memory: the step is run again, and all others run, in forwards of {smaller:,} tokens at most")

    def advice(self, batch: Mapping[str, Any] | None = None, loss: Any = None) -> OutOfMemory:
        """What to do when memory ran out: in a step, with its batch and loss, or outside of one."""
        device, rows = self.model.device, self.arguments.per_device_train_batch_size
        cuts, could, what = False, False, f"out of memory with a batch of {rows} rows"
        if batch is None:
            what = "out of memory outside of a step's forward and backward: in the optimizer, or in an evaluation"
        elif stream.IDS in batch:
            cuts, could = self.of_embeddings(loss) is not None, not self.is_on
            tokens, texts = batch[stream.IDS].shape[1], sum(batch[stream.COLUMNS])
            what = f"out of memory with {tokens:,} tokens in {texts:,} texts of at most {batch[stream.LONGEST]:,}"
        if cuts and (limit := self.limit(loss)) < WHOLE:
            what += f", in forwards of {limit:,} tokens at most"
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            what += f" ({free / 1e9:.2f} of {total / 1e9:.1f} GB are free)"
        ways = ["use_gradient_checkpointing=True", "load_in_4bit=True", "a smaller max_seq_length"]
        if batch is None:
            ways = ['optim="adamw_8bit"', "a smaller per_device_eval_batch_size"]
        elif could and (cuts or ranking_of(loss) is not None):
            ways.insert(0, "TrainingArguments(auto_batch=True)")
        elif not cuts:
            ways.insert(0, f"per_device_train_batch_size={max(1, rows // 2)}")
        return OutOfMemory(what, where=f"training on {device}", fix=f"Use {', '.join(ways[:-1])} or {ways[-1]}")


def _smaller(batch: Mapping[str, Any], limit: int) -> int | None:
    """A limit that cuts a batch into more parts than `limit` does; None where each part is one text."""
    bounds: Tensor = batch[stream.BOUNDS]
    lengths: list[int] = torch.diff(bounds)[: sum(batch[stream.COLUMNS])].tolist()
    tokens: int = batch[stream.IDS].shape[1]
    parts = 1 if tokens <= limit else len(spans(lengths, limit))
    if parts == len(lengths):
        return None
    smaller = min(tokens, limit)
    while True:
        smaller = max(1, smaller // 2)
        if len(spans(lengths, smaller)) > parts:
            return smaller


def _is_shared() -> bool:
    """Whether other processes exchange gradients with this one: they would wait for a step that is run again."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class Before:
    """Gradients and random numbers as they are before a step.

    Gradients that micro-batches before have added up are copied: a backward adds to them in place. A step that starts
    from none copies nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self._gradients = [(weight, None if weight.grad is None else weight.grad.clone()) for weight in trained]
        self._device: torch.device = trained[0].device
        self._numbers = random.getstate(), np.random.get_state(), torch.get_rng_state(), random_on(self._device)

    def restore(self) -> None:
        """Put them back. May be called again: what is put back is a copy."""
        for weight, gradient in self._gradients:
            weight.grad = None if gradient is None else gradient.clone()
        own, numpy, host, device = self._numbers
        random.setstate(own)
        np.random.set_state(numpy)
        set_random_on(self._device, host, device)
