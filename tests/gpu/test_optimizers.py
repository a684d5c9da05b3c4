"""The optimizers on a CUDA device: stochastic rounding in Triton, steps in the backward, rows, and bitsandbytes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish import FastSentenceTransformer, Trainer, TrainingArguments, losses
from burnish.core.testing.operations import OPERATIONS
from burnish.kernels import adamw

pytestmark = pytest.mark.gpu

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FREE: dict[str, Any] = {"optimizer_in_backward": True, "max_grad_norm": 0.0}


def pairs() -> Any:
    from datasets import Dataset  # type: ignore[import-untyped]

    return Dataset.from_dict(
        {"anchor": [f"question {n}" for n in range(96)], "positive": [f"the answer to it is {n}" for n in range(96)]}
    )


def run(folder: Path, weights: Path, load: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Train the real MiniLM in full for six steps; the trainer."""
    options: dict[str, Any] = {"full_finetuning": True, "config_kwargs": STILL, **(load or {})}
    model = FastSentenceTransformer.from_pretrained(str(weights), **options)
    given: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 16, "learning_rate": 2e-5, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "bf16": True, "disable_tqdm": True, **settings,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **given)
    trainer = Trainer(model, arguments, train_dataset=pairs(), loss=losses.MultipleNegativesRankingLoss(model))
    trainer.before = weights_of(trainer)  # type: ignore[attr-defined]
    trainer.train()
    return trainer


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if "loss" in row]


def test_rounded_adamw_in_triton_is_the_plain_one() -> None:
    from burnish.kernels import adamw_tiles

    told = OPERATIONS["rounded_adamw"](adamw_tiles.rounded_adamw, adamw.rounded_adamw, torch.float64, "cuda", 1e-5)
    assert "cases" in told


def test_rounding_costs_no_more_than_torch_s_fused_step() -> None:
    """100 million weights in 200 tensors, bfloat16 throughout: 14 bytes a weight either way."""
    from burnish.kernels import adamw_tiles

    shapes = [(500, 1000)] * 200
    weights = [torch.nn.Parameter(torch.randn(shape, device="cuda").bfloat16()) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    theirs = torch.optim.AdamW(weights, fused=True)
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    numbers: dict[str, Any] = {"step": 3, "rate": 1e-5, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "decay": 0.0}

    def ours() -> None:
        with torch.no_grad():
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            adamw_tiles.rounded_adamw(weights, gradients, means, squares, list(range(200)), **numbers)

    def seconds(step: Any) -> float:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / 20

    mine, other = seconds(ours), seconds(theirs.step)
    print(f"rounded {mine * 1e3:.2f} ms, torch fused {other * 1e3:.2f} ms")
    assert mine <= 1.5 * other


def test_rounded_steps_are_replayed_from_graphs(minilm: Path, tmp_path: Path) -> None:
    """The optimizer steps outside the graph, so rounding costs no graph; and small updates count."""
    settings: dict[str, Any] = {"bf16": False, "max_steps": 12, "lr_scheduler_type": "constant"}
    exact = run(tmp_path, minilm, **settings)
    plain = run(tmp_path, minilm, {"dtype": "bfloat16"}, **settings)
    rounded = run(tmp_path, minilm, {"dtype": "bfloat16"}, stochastic_rounding=True, **settings)
    assert rounded.engine.counts["replayed"] >= 1

    def moved(trainer: Any) -> Tensor:
        before, after = trainer.before, weights_of(trainer)
        names = [name for name in before if ".layer." in name and before[name].dim() == 2]
        return torch.cat([(after[name].float() - before[name].float()).flatten() for name in names])

    reference = moved(exact)
    shares = [float(moved(one) @ reference / (reference @ reference)) for one in (plain, rounded)]
    assert shares[0] < 0.3 and 0.8 < shares[1] < 1.2, shares


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_steps_in_the_backward(minilm: Path, tmp_path: Path, backend: str) -> None:
    """The plain run's weights and norms, and no set of gradients in memory."""
    plain = run(tmp_path, minilm, {"backend": backend}, max_grad_norm=0.0)
    inside = run(tmp_path, minilm, {"backend": backend}, **FREE)
    mine, theirs = weights_of(inside), weights_of(plain)
    assert all(torch.allclose(mine[name], theirs[name], rtol=0, atol=2e-5) for name in mine)
    assert logged(inside, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=0.02)
    assert all(weight.grad is None for weight in inside.model.parameters())
    if backend == "fused":
        reason = "weights are stepped inside the backward, and their gradients freed"
        assert inside.engine.counts == {reason: 6}


def test_sparse_rows(minilm: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 1, "max_grad_norm": 0.1}
    plain, sparse = run(tmp_path, minilm, **settings), run(tmp_path, minilm, sparse_embeddings=True, **settings)
    name = "0.model.embeddings.word_embeddings.weight"
    mine, theirs = weights_of(sparse)[name], weights_of(plain)[name]
    assert logged(sparse, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=0.02)
    assert (mine - theirs).abs().max() <= 4e-5 and sum(sparse.engine.counts.values()) == 1


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("inside", [True, False])
def test_bitsandbytes(minilm: Path, tmp_path: Path, optim: str, inside: bool) -> None:
    """About AdamW's losses; embeddings in 32 bits."""
    plain = run(tmp_path, minilm)
    trainer = run(tmp_path, minilm, optim=optim, **(FREE if inside else {}))
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), abs=0.1)
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    kinds = {names[weight]: state["state1"].dtype for weight, state in trainer.optimizer.state.items()}
    assert {kind for name, kind in kinds.items() if "_embeddings." in name} == {torch.float32}
    large = {kind for name, kind in kinds.items() if ".layer." in name and name.endswith("query.weight")}
    assert large == {torch.uint8 if "8bit" in optim else torch.float32}
