"""The plan for a model that is loaded: how many tokens a forward may have in the memory that is free now."""

from __future__ import annotations

from typing import Any

import torch

from .errors import ConfigError
from .planning import GRAPHS, MARGIN, most
from .planning_memory import OPTIMIZER, Setup, optimizer_bytes, parts_of
from .planning_shapes import Shapes, shapes_of
from .quantised import agreed, stored_as


def free_memory(device: torch.device) -> float:
    """Bytes that torch can still allocate on a CUDA device: what is free, and what torch holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def token_budget(model: Any, arguments: Any, free: float) -> tuple[int, list[str]]:
    """The most tokens that a forward may have with its backward, and what the user should know of how it was found.

    Args:
        model: A model that Burnish loaded, with its adapter if it gets one, before its first step: gradients and states
            of the optimizer are still to come.
        arguments: The run's training arguments.
        free: Bytes that torch can still allocate.

    Returns:
        A multiple of 64, or 0 where not even 64 tokens fit.

    Raises:
        ModelError: If the model's shapes cannot be found (`shapes_of`).
    """
    decision, notes = model.burnish.decision, list[str]()
    options = decision.options
    own = type(model.transformers_model).__module__.startswith("transformers_modules.")  # the repository's own code
    shapes = shapes_of(decision.config, decision.family.family.lora, trust_remote_code=own)
    states = 8.0
    try:
        states = optimizer_bytes(str(getattr(arguments.optim, "value", arguments.optim)))
    except ConfigError:
        notes.append(f"the optimizer {arguments.optim} is counted as adamw, {OPTIMIZER['adamw']:.0f} bytes a weight")
    full = options.purpose == "full"
    stored = agreed(options.quantization, options.quantization_config, stored_as(decision.config), options.purpose)
    setup = Setup(
        method="full" if full else "lora", storage=stored,
        checkpointing=model.burnish.recompute, half=full and _trains_in(model, torch.bfloat16),
    )  # fmt: skip
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    sets = 1 + (arguments.gradient_accumulation_steps > 1)  # what was added up is kept, to go back to
    stays = sum(weight.numel() * weight.element_size() * (sets + states / 4) for weight in trained)
    pairs = arguments.per_device_train_batch_size
    graphs = GRAPHS if decision.backend.spec.few_shapes and setup.checkpointing != "offload" else 1
    wide = 1 if arguments.bf16 or arguments.fp16 or not _trains_in(model, torch.float32, every=True) else 2
    room = free / MARGIN - stays

    def fits(tokens: int) -> bool:
        return bool(_step(shapes, setup, tokens, pairs) * graphs * wide <= room)

    return most(fits), notes


def _step(shapes: Shapes, setup: Setup, tokens: int, pairs: int) -> float:
    parts = parts_of(shapes, setup, tokens, pairs)
    return parts.step + parts.workspace


def _trains_in(model: Any, dtype: torch.dtype, *, every: bool = False) -> bool:
    """Whether the weights that train, or every one, are of a dtype."""
    return all(weight.dtype == dtype for weight in model.parameters() if every or weight.requires_grad)
