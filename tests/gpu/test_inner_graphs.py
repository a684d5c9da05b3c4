"""The model's forward and backward as two CUDA graphs, with a loss between them that works on the host."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from burnish import FastSentenceTransformer, TrainingArguments
from burnish.backends.fused import FusedStep
from burnish.core import stream
from burnish.core.contracts import Inner, StepContext
from burnish.core.testing.find import sample_config
from burnish.core.testing.subject import Subject

from ..along import along_gradient

pytestmark = [pytest.mark.gpu]

TEXTS = 8


def loaded(folder: Path, model_type: str, mode: str, dropout: float = 0.0) -> Any:
    subject = Subject(config=sample_config(model_type), folder=folder / model_type, tolerance=1e-5)
    model = FastSentenceTransformer.from_pretrained(
        str(subject.repository), dtype="float32", backend="fused", full_finetuning=mode == "full"
    )
    if mode == "lora":
        FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8)
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(weight, std=0.1)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = dropout
    return model.train()


class Bench:
    """An engine round a loss that asks the device for a number between forward and backward."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.said = model, list[str]()
        self.inner = Inner(run=lambda inputs: model(dict(inputs))["sentence_embedding"])
        self.forwards = 1
        preparation = model.burnish
        self.engine = FusedStep(
            StepContext(
                model=model, family=preparation.decision.family.family, machine=preparation.decision.machine,
                arguments=TrainingArguments(str(folder), report_to="none"), loss=nn.Identity(), eager=self.eager,
                constants=lambda: (), say=self.said.append, inner=self.inner,
            )
        )  # fmt: skip
        self.packing = preparation.decision.family.family.packing

    def eager(self, model: nn.Module, batch: Mapping[str, Any], items: Any) -> Tensor:
        losses = []
        for _ in range(self.forwards):
            scores = self.inner.run(stream.model_inputs(batch))[:TEXTS]
            odd = float(scores.detach()[0, 0]) > 1e9  # a graph could not hold this
            assert not odd
            losses.append(nn.functional.softplus(scores @ scores.roll(1, 0).T).mean())
        loss = torch.stack(losses).sum()
        torch.autograd.backward(loss)
        return loss.detach()

    def batch(self, seed: int, longest: int = 40) -> dict[str, Any]:
        draw = np.random.default_rng(seed)
        texts = [draw.integers(5, 200, int(draw.integers(1, longest)), dtype=np.int32) for _ in range(TEXTS)]
        made = stream.flatten(
            [texts], position_offset=self.packing.position_offset, fit=stream.fit_eighths,
            fit_longest=stream.fit_octave,
        )  # fmt: skip
        return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in made.items()}

    def step(self, batch: Mapping[str, Any], *, graphs: bool = True) -> tuple[float, dict[str, Tensor]]:
        self.model.zero_grad(set_to_none=True)
        loss = self.engine(self.model, batch, None) if graphs else self.eager(self.model, batch, None)
        grads = {name: one.grad.clone() for name, one in self.model.named_parameters() if one.grad is not None}
        return float(loss), grads


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-4) -> None:
    assert found.keys() == expected.keys() and max(float(one.abs().max()) for one in expected.values()) > 1e-5
    for name, grad in expected.items():
        assert float((found[name] - grad).norm()) <= tolerance * float(grad.norm()) + 1e-6, name


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("model_type", ["bert", "modernbert", "qwen3"])
def test_replayed_halves_give_the_gradients_of_the_plain_step(model_type: str, mode: str, tmp_path: Path) -> None:
    bench = Bench(loaded(tmp_path, model_type, mode), tmp_path)
    plain = bench.inner.run
    for seed in range(12):
        batch = bench.batch(seed % 4, 40 if seed % 2 else 90)
        loss, found = bench.step(batch)
        assert bench.inner.run is plain, "the graphs outlived the step"
        expected_loss, expected = bench.step(batch, graphs=False)
        assert loss == pytest.approx(expected_loss, rel=2e-4)
        assert_same(found, expected)
    counts = bench.engine.counts
    assert counts["replayed"] >= 6 and set(counts) <= {"warm-up", "captured", "replayed"}, counts


def test_micro_batches_add_up_and_a_gradient_that_is_there_stays(tmp_path: Path) -> None:
    bench = Bench(loaded(tmp_path, "bert", "lora"), tmp_path)
    batch = bench.batch(1)
    for _ in range(3):
        _, once = bench.step(batch)
    bench.model.zero_grad(set_to_none=True)
    for _ in range(3):
        bench.engine(bench.model, batch, None)
    found = {name: one.grad / 3 for name, one in bench.model.named_parameters() if one.grad is not None}
    assert_same(found, once)


def test_dropout_is_fresh_in_every_replay(tmp_path: Path) -> None:
    bench = Bench(loaded(tmp_path, "bert", "full", dropout=0.3), tmp_path)
    batch = bench.batch(1)
    losses = [bench.step(batch)[0] for _ in range(8)]
    assert bench.engine.counts["replayed"] >= 6 and len({round(loss, 7) for loss in losses}) == 8


def test_the_backward_of_a_replay_drops_what_its_forward_dropped(tmp_path: Path) -> None:
    """The gradient along itself against the loss's change, at one seed."""
    bench = Bench(loaded(tmp_path, "bert", "full", dropout=0.3), tmp_path)
    batch = bench.batch(2)
    weights = list(bench.model.parameters())

    def loss() -> float:
        torch.manual_seed(5)
        return bench.step(batch)[0]

    for _ in range(2):
        loss()
    length, change = along_gradient(loss, weights, 2e-3)
    assert bench.engine.counts["replayed"] >= 3
    assert change == pytest.approx(length, rel=0.03)


def test_a_second_forward_before_the_backward_runs_without_a_graph(tmp_path: Path) -> None:
    bench = Bench(loaded(tmp_path, "bert", "lora"), tmp_path)
    batch = bench.batch(3)
    bench.forwards = 2
    for _ in range(3):
        _, found = bench.step(batch)
    assert bench.engine.counts["a forward before the last one's backward"] == 3
    assert bench.engine.counts["replayed"] == 2
    assert_same(found, bench.step(batch, graphs=False)[1])
    assert len(bench.said) == len(set(bench.said)) or bench.said.count(bench.said[0]) == 3


def test_a_step_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    bench = Bench(loaded(tmp_path, "bert", "lora"), tmp_path)
    batch, plain = bench.batch(3), bench.inner.run

    def fails(inputs: Mapping[str, Any]) -> Tensor:
        raise ValueError("no scores")

    bench.inner.run = fails
    with pytest.raises(ValueError, match="no scores"):
        bench.step(batch)
    bench.inner.run = plain
    for _ in range(3):
        _, found = bench.step(batch)
    assert bench.engine.counts["replayed"] >= 1
    assert_same(found, bench.step(batch, graphs=False)[1])


def test_under_autocast_weights_are_cast_anew_in_every_replay(tmp_path: Path) -> None:
    bench = Bench(loaded(tmp_path, "bert", "full"), tmp_path)
    batch = bench.batch(1)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(3):
            first, _ = bench.step(batch)
        with torch.no_grad():
            for weight in bench.model.parameters():
                weight.mul_(1.05)
        second, found = bench.step(batch)
        torch.clear_autocast_cache()
        expected_loss, expected = bench.step(batch, graphs=False)
    assert bench.engine.counts["replayed"] >= 2 and second != first
    assert second == pytest.approx(expected_loss, rel=2e-2)
    whole, error = (
        sum(float(one.norm()) ** 2 for one in grads) ** 0.5
        for grads in (expected.values(), [found[name] - grad for name, grad in expected.items()])
    )
    assert error <= 0.03 * whole and whole > 0  # old casts would be off by the whole of the change, 5% a weight
