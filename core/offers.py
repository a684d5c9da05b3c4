"""What plugins offer beside families: backends, kernels, export targets and commands. Part of the contract, re-exported
by `contracts`, where plugins import it from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .checks import check, check_functions, check_name, check_types
from .needs import ANYTHING, Machine, Needs

if TYPE_CHECKING:
    import torch

    from .contracts import Family

Step: TypeAlias = "Callable[[torch.nn.Module, Mapping[str, Any], Any], torch.Tensor]"
"""Forward and backward of one micro-batch: (model, the collator's batch, items in the whole batch or None) to the loss,
detached, a float32 scalar; gradients are added to the parameters' `.grad`."""


def no_host_work(batch: Mapping[str, Any]) -> str | None:
    """That of a step which does all of its work on the device."""
    return None


@dataclass(slots=True)
class Inner:
    """The forward of a model whose loss works on the host between the model's forwards, as a reranker's does.

    Args:
        run: From packed tensors, keys as the transformer takes them, to the (N + M, labels) scores of N texts and M
            that fill the stream up. A backend may replace it, for the length of a step, by a faster callable that means
            the same; what it returns must carry a gradient to the weights wherever gradients are on.
    """

    run: Callable[[Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What a backend gets to build a training step from.

    Args:
        model: The SentenceTransformer in training.
        family: What the model's plugin says about it.
        machine: Where it runs.
        arguments: The trainer's arguments.
        loss: The loss module, or one for each data set by name.
        eager: Sentence Transformers' own step: exact, on any device, the thing to be equal to.
        constants: What the step reads beside its arguments, such as the number of micro-batches that the loss is
            divided by. A step that was captured or specialised holds only while these stay the same.
        say: Tells the user one line, once.
        checkpointing: What the user asked of gradient checkpointing: False, True, "selective" or "offload".
            transformers' own is on already, layer by layer, unless it is False.
        activation_budget: Bytes that layers may keep for the backward, or None: which of them are checkpointed is then
            the backend's choice.
        host_work: Why a step of this batch does work on the host that a captured step would not do again; None where
            it does not.
        inner: The model's forward alone, where the step as a whole works on the host but this does not: the only part
            that a captured step may then be. None where the whole step is the piece.
    """

    model: torch.nn.Module
    family: Family
    machine: Machine
    arguments: Any
    loss: Any
    eager: Step
    constants: Callable[[], tuple[Hashable, ...]]
    say: Callable[[str], None]
    checkpointing: bool | str = False
    activation_budget: float | None = None
    host_work: Callable[[Mapping[str, Any]], str | None] = no_host_work
    inner: Inner | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """A way to execute a training step.

    Args:
        name: What the user passes as `backend=`.
        summary: One line for `burnish plugins`.
        build_step: Turns a loaded model into an executable step.
        needs: What it cannot run without.
        priority: With `backend="auto"` the highest priority that can be had wins; the reference has 0.
        few_shapes: Whether its steps are faster if batches come in few shapes: streams of tokens are then filled up
            to one of a few lengths.
    """

    name: str
    summary: str
    build_step: Callable[[StepContext], Step]
    needs: Needs = ANYTHING
    priority: int = 0
    few_shapes: bool = False

    def __post_init__(self) -> None:
        check_name(self, self.name)
        check(self.name != "auto", self, "a backend cannot be called 'auto'")
        check_functions(self, "build_step")
        check_types(self, summary=str, needs=Needs, priority=int, few_shapes=bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """An implementation of a named operation.

    Args:
        operation: The operation's name, such as "packed_attention".
        name: The implementation's name, such as "reference".
        load: Imports and returns the function; called once, when it is first needed.
        needs: What it cannot run without.
        priority: The highest priority that can be had wins; a plain reference has 0.
    """

    operation: str
    name: str
    load: Callable[[], Callable[..., Any]]
    needs: Needs = ANYTHING
    priority: int = 0

    def __post_init__(self) -> None:
        check_name(self, self.operation)
        check_name(self, self.name)
        check_functions(self, "load")
        check_types(self, needs=Needs, priority=int)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What an exporter gets.

    Args:
        source: A folder that Burnish saved: an adapter, a merged model or a full one.
        output: Where to write; it is there and empty, and takes its name once the exporter has returned.
        options: The target's own options, as `--option KEY=VALUE` gave them.
    """

    source: Path
    output: Path
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExporterSpec:
    """A target of `burnish export`.

    Args:
        target: What the user passes as `--target`.
        summary: One line for `burnish plugins`.
        run: Writes into `request.output` and returns the files it made.
        needs: What it cannot run without.
        argument: The option that VALUE sets in `--target TARGET:VALUE`; empty for a target that takes none there.
    """

    target: str
    summary: str
    run: Callable[[ExportRequest], Sequence[Path]]
    needs: Needs = ANYTHING
    argument: str = ""

    def __post_init__(self) -> None:
        check_name(self, self.target)
        check_functions(self, "run")
        check_types(self, summary=str, needs=Needs, argument=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSpec:
    """A command of the `burnish` program.

    Args:
        name: What the user types after `burnish`.
        summary: One line for `burnish --help`.
        run: Gets the arguments after the name and returns the exit code.
    """

    name: str
    summary: str
    run: Callable[[Sequence[str]], int]

    def __post_init__(self) -> None:
        check_name(self, self.name)
        check_functions(self, "run")
        check_types(self, summary=str)
