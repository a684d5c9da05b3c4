"""Optimizers beside torch's: AdamW for rows and for bfloat16 masters, and any optimizer stepped inside the backward.

What each costs in memory, and where it differs from AdamW, stands in docs/optimizers.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .errors import ModelError

RoundedAdamW: TypeAlias = Callable[..., None]
"""The operation `rounded_adamw`: a step in place, with weights rounded stochastically."""

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Rounding:
    """How bfloat16 weights are stepped.

    Args:
        operation: The implementation of `rounded_adamw`.
        seed: What the random numbers follow from, with the step and the weight.
        moments: bfloat16 or float32.
    """

    operation: RoundedAdamW
    seed: int
    moments: torch.dtype = torch.bfloat16

    def key(self, step: int, number: int) -> int:
        """The key of weight `number` in a step: 64 bits."""
        return int.from_bytes(blake2b(f"{self.seed} {step} {number}".encode(), digest_size=8).digest(), "little")


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, and two more kinds of weights.

    * Those with a row-sparse gradient are stepped in these rows only, as `torch.optim.SparseAdam` does: the moments of
      other rows stay, the correction of the bias counts the steps of the table, and weight decay acts on these rows.
      The arithmetic is AdamW's in float32, and so are the moments.
    * Those in bfloat16 are rounded stochastically, where `rounding` says how.

    Args:
        params: As torch's: parameters or groups.
        rounding: How bfloat16 weights are rounded; None leaves them to torch.
        **keywords: torch's own.
    """

    def __init__(self, params: Any, *, rounding: Rounding | None = None, **keywords: Any) -> None:
        super().__init__(params, **keywords)
        self._rounding = rounding
        self._numbers: dict[Tensor, int] = {}
        for weight in self._weights():
            self._number(weight)

    def _weights(self) -> list[nn.Parameter]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def _number(self, weight: Tensor) -> int:
        """The weight's place among all, which its random numbers depend on: the same in a resumed run."""
        return self._numbers.setdefault(weight, len(self._numbers))

    def _rounds(self, weight: Tensor) -> bool:
        return self._rounding is not None and weight.dtype == torch.bfloat16

    def step(self, closure: Any = None) -> Any:
        """A step of every weight that has a gradient; returns what `closure` does, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held: list[tuple[nn.Parameter, Tensor]] = []
        with torch.no_grad():
            for group in self.param_groups:
                held += self._step_apart(group)
        for weight, _ in held:
            weight.grad = None  # torch's step passes them over
        try:
            super().step()
        finally:
            for weight, gradient in held:
                weight.grad = gradient
        return loss

    def _step_apart(self, group: dict[str, Any]) -> list[tuple[nn.Parameter, Tensor]]:
        """Step the weights of a group that torch's AdamW cannot; returns them with their gradients."""
        done, rounded = [], []
        for weight in group["params"]:
            gradient = weight.grad
            if gradient is None or not (gradient.is_sparse or self._rounds(weight)):
                continue
            done.append((weight, gradient))
            if gradient.is_sparse:
                self._step_rows(group, weight, gradient.coalesce())
            else:
                rounded.append(weight)
        self._step_rounded(group, rounded)
        return done

    def _state_of(self, group: Mapping[str, Any], weight: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[weight]
        if not state:
            moments = torch.float32 if self._rounding is None or not self._rounds(weight) else self._rounding.moments
            on_device = group["fused"] and not self._rounds(weight)
            state["step"] = torch.zeros((), device=weight.device if on_device else "cpu")
            for name in MOMENTS:
                state[name] = torch.zeros_like(weight, dtype=moments, memory_format=torch.contiguous_format)
        return state

    def _step_rounded(self, group: Mapping[str, Any], weights: Sequence[Tensor]) -> None:
        """Whole weights in bfloat16: those that have taken as many steps, together."""
        by_step: dict[int, list[Tensor]] = {}
        for weight in weights:
            state = self._state_of(group, weight)
            state["step"] += 1
            by_step.setdefault(int(state["step"]), []).append(weight)
        for step, some in by_step.items():
            means, squares = ([self.state[weight][name] for weight in some] for name in MOMENTS)
            self._round(group, step, some, [_gradient(weight) for weight in some], means, squares, some)

    def _round(
        self, group: Mapping[str, Any], step: int, weights: Sequence[Tensor], gradients: Sequence[Tensor],
        means: Sequence[Tensor], squares: Sequence[Tensor], numbered: Sequence[Tensor],
    ) -> None:  # fmt: skip
        assert self._rounding is not None
        beta1, beta2 = group["betas"]
        keys = [self._rounding.key(step, self._number(weight)) for weight in numbered]
        self._rounding.operation(
            weights, gradients, means, squares, keys,
            step=step, rate=float(group["lr"]), beta1=beta1, beta2=beta2, epsilon=group["eps"],
            decay=group["weight_decay"],
        )  # fmt: skip

    def _step_rows(self, group: Mapping[str, Any], weight: Tensor, gradient: Tensor) -> None:
        """The rows of a table that a coalesced sparse `gradient` names; nothing of the table's size is made."""
        state = self._state_of(group, weight)
        rows, values = gradient.indices()[0], gradient.values()
        if not len(rows):
            return
        stored = (weight, state["exp_avg"], state["exp_avg_sq"])
        taken = [tensor.index_select(0, rows) for tensor in stored]
        if self._rounds(weight):
            state["step"] += 1
            some, mean, square = taken
            self._round(group, int(state["step"]), [some], [values], [mean], [square], [weight])
        else:
            taken = [tensor.float() for tensor in taken]
            beta1, beta2 = group["betas"]
            adamw(
                taken[:1], [values.float()], taken[1:2], taken[2:], [], [state["step"]],
                foreach=False, fused=bool(group["fused"]), amsgrad=False, maximize=False, lr=group["lr"],
                beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip
        for tensor, part in zip(stored, taken, strict=True):
            tensor.index_copy_(0, rows, part.to(tensor.dtype))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast float32 moments to the dtype of a bfloat16 weight, and move steps to a GPU."""
        super().load_state_dict(state_dict)
        saved: Mapping[Any, Any] = state_dict["state"]
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, weight in zip(names, self._weights(), strict=True):
            if name not in saved:
                continue
            state = self.state[weight]
            for moment in MOMENTS:
                if state[moment].dtype != saved[name][moment].dtype:
                    state[moment] = saved[name][moment].to(weight.device)
            if self._rounds(weight):
                state["step"] = state["step"].cpu()


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


class InBackward:
    """Steps each weight of an optimizer as soon as its gradient is there, and frees the gradient.

    A hook that runs after a weight's gradient is complete hands the optimizer a group of this weight alone, with the
    settings that its own group has at that moment: a schedule, weight decay and the optimizer's state are as ever. The
    optimizer's own step then finds no gradient and does nothing.

    Args:
        optimizer: One whose step treats each weight for itself.
        names: A weight's name, for messages.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[Any, str]) -> None:
        self._optimizer = optimizer
        self._names = names
        self._places = {
            weight: place for place, group in enumerate(optimizer.param_groups) for weight in group["params"]
        }
        self._norms: dict[Tensor, Tensor] = {}
        self._hooks = [weight.register_post_accumulate_grad_hook(self._hook) for weight in self._places]

    def begin(self) -> None:
        """A new step begins: each weight may be stepped once."""
        self._norms = {}

    def norm(self) -> Tensor:
        """The norm of all gradients of the step, a float32 scalar, though they are gone."""
        return norm_of(list(self._norms.values()))

    def remove(self) -> None:
        """Leave nothing on the weights."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _hook(self, weight: Tensor) -> None:
        if weight in self._norms:
            fix = "Leave optimizer_in_backward out for this loss and model"
            what = f"the gradient of {self._names.get(weight, 'a weight')} comes in several parts in a step"
            raise ModelError(f"{what}, and the first has been stepped", where="optimizer_in_backward", fix=fix)
        gradient = _gradient(weight)
        if gradient.is_sparse:
            gradient = gradient.coalesce()
        self._norms[weight] = torch.linalg.vector_norm(values_of(gradient), dtype=torch.float32)
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [{**groups[self._places[weight]], "params": [weight]}]
        try:
            weight.grad = gradient
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        weight.grad = None


def values_of(gradient: Tensor) -> Tensor:
    """A gradient's numbers: of a sparse one, which must be coalesced, those that are stored, not a copy."""
    return gradient.values() if gradient.is_sparse else gradient


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all tensors as one vector, a scalar on their device; 0 for none."""
    total: Tensor = torch.nn.utils.get_total_norm(tensors)
    return total


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for gradients some of which are row-sparse; returns the norm before.

    The rows of a sparse gradient are summed first where a row occurs twice, since the norm is that of the sums.
    """
    gradients = []
    for weight in parameters:
        if weight.grad is not None:
            if weight.grad.is_sparse:
                weight.grad = weight.grad.coalesce()
            gradients.append(values_of(weight.grad))
    total = norm_of(gradients)
    if gradients and limit != float("inf"):
        # torch's own share: the 1e-6 keeps a norm of 0 from dividing.
        torch._foreach_mul_(gradients, torch.clamp(limit / (total + 1e-6), max=1.0))
    return total


def tables_of(model: nn.Module, least: int = 2**20) -> list[nn.Embedding]:
    """Trained embedding tables of at least `least` weights that no other module of `model` has as well."""
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None:
                owners[weight] = owners.get(weight, 0) + 1
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [
        table for table in found
        if table.weight.requires_grad and table.weight.numel() >= least and owners[table.weight] == 1
        and not table.scale_grad_by_freq  # torch has no sparse gradient for it
    ]  # fmt: skip
