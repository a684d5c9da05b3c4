"""Task heads on packed input: whether their logits and gradients are the stock model's on padded input."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..contracts import Head
from ..heads import read_vectors
from ..machine import describe
from ..packing import name_attention, register_attention
from ..patching import PatchPlan, patched
from ..registry import registry
from ..selection import choose_family, choose_kernel
from .subject import Subject, compare_gradients, compare_outputs, enliven

LENGTHS = (7, 1, 19, 4, 2)


def error(subject: Subject, task: str) -> float:
    """The largest error of logits and gradients, packed against padded."""
    head = subject.family.heads[task]
    model = subject.exactly(_model(subject, task))
    ids = _ids(subject)
    expected = _padded(model, head, ids, subject)
    reference = _gradients(model, expected)
    choice = choose_family(registry(subject.plugins), subject.config)
    plan = PatchPlan(choice.claims(model, describe(subject.device)))
    kernel = choose_kernel(registry(subject.plugins), describe(subject.device), "packed_attention")
    assert kernel is not None and subject.family.packing is not None
    with patched(model, plan):
        name_attention(model, register_attention(kernel.spec.name, kernel.load()))
        bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=subject.device)
        offset = subject.family.packing.position_offset
        positions = torch.cat([torch.arange(length) + offset for length in LENGTHS])[None].to(subject.device)
        batch = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        hidden = model.base_model(
            input_ids=torch.cat(ids)[None], position_ids=positions, max_length_q=max(LENGTHS),
            max_length_k=max(LENGTHS), **batch,
        ).last_hidden_state[0]  # fmt: skip
        found = head.logits(model, read_vectors(head, hidden, bounds))
        gradients = _gradients(model, found)
    apart = compare_outputs(found.detach(), expected.detach(), subject.tolerance, f"the logits for {task}")
    return max(apart, compare_gradients(gradients, reference, subject.tolerance))


def _model(subject: Subject, task: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

    kinds: dict[str, Any] = {
        "sequence-classification": AutoModelForSequenceClassification,
        "text-generation": AutoModelForCausalLM,
        "token-classification": AutoModelForTokenClassification,
    }
    assert task in kinds, f"there is no task {task!r}; known: {', '.join(kinds)}"
    config = copy.deepcopy(subject.still)
    config.num_labels = 3
    config.use_cache = False
    torch.manual_seed(subject.seed)
    model = kinds[task].from_config(config)
    enliven(model)
    return model.eval().to(subject.device)


def _ids(subject: Subject) -> list[Tensor]:
    """Token ids of each text, none of them padding."""
    pad = int(getattr(subject.config, "pad_token_id", None) or 0)
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(pad + 1, 40, (length,), generator=draw).to(subject.device) for length in LENGTHS]


def _padded(model: Any, head: Head, ids: list[Tensor], subject: Subject) -> Tensor:
    """The stock model's logits: of each text, or of each token that is no padding."""
    pad = int(getattr(subject.config, "pad_token_id", None) or 0)
    grid = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    logits: Tensor = model(input_ids=grid, attention_mask=mask).logits
    if logits.dim() == 2:
        return logits
    if head.reads == "every":
        return logits[mask.bool()]
    places = mask.sum(1) - 1 if head.reads == "last" else torch.zeros(len(ids), dtype=torch.long, device=logits.device)
    return logits[torch.arange(len(ids), device=logits.device), places]


def _gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits)
    torch.autograd.backward((logits * weights).sum())
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
