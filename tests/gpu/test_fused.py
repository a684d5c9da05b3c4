"""The fused backend on a CUDA device: captured steps are the reference's, with fresh dropout, whatever the shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from burnish import FastSentenceTransformer, Trainer, TrainingArguments
from burnish.backends import offload
from burnish.backends.regions import Regions
from burnish.core import stream
from burnish.core.testing.backends import model_types
from burnish.core.testing.find import sample_config
from burnish.core.testing.subject import Subject

from ..along import along_gradient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:inner dimension .* is not aligned"),  # bitsandbytes, of tiny layers
]


class Streams:
    """A collator of random token streams; row numbers stand for texts, so that every run sees the same ones."""

    valid_label_columns: tuple[str, ...] = ()

    def __init__(self, model: Any, *, few_shapes: bool, longest: int = 40) -> None:
        packing = model.burnish.decision.family.family.packing
        self.settings: dict[str, Any] = {"position_offset": packing.position_offset}
        if few_shapes:
            self.settings |= {"fit": stream.fit_eighths, "fit_longest": stream.fit_octave}
        self.longest = longest

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        columns = [[self.text(2 * row["row"] + place) for row in rows] for place in range(2)]
        return stream.flatten(columns, **self.settings)

    def text(self, seed: int) -> Any:
        draw = np.random.default_rng(seed)
        return draw.integers(5, 200, int(draw.integers(1, self.longest)), dtype=np.int32)


def model_of(
    folder: Path, model_type: str, backend: str, mode: str, dropout: float, dtype: str = "float32", **more: Any
) -> Any:
    subject = Subject(config=sample_config(model_type), folder=folder / model_type, tolerance=1e-5)
    options: dict[str, Any] = {"dtype": dtype, "backend": backend, "full_finetuning": mode == "full", **more}
    if mode == "qlora4":
        pytest.importorskip("bitsandbytes")
        options["load_in_4bit"] = True
    model = FastSentenceTransformer.from_pretrained(str(subject.repository), **options)
    assert model.burnish is not None and model.burnish.decision.backend.spec.name == backend
    if mode != "full":
        FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8)
    dropouts = [module for module in model.modules() if type(module) is torch.nn.Dropout]
    assert not any(module.p for module in dropouts) and (dropouts or not dropout), "a subject has no dropout of its own"
    for module in dropouts:
        module.p = dropout
    return model


def train(model: Any, folder: Path, loss: Any = None, **settings: Any) -> tuple[list[float], Any]:
    arguments = TrainingArguments(
        str(folder / "run"), per_device_train_batch_size=8, num_train_epochs=3, learning_rate=1e-2, optim="sgd",
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    rows = Dataset.from_dict({"row": list(range(48))})
    collate: Any = Streams(model, few_shapes=model.burnish.decision.backend.spec.few_shapes)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, loss=loss or MultipleNegativesRankingLoss(model),
        data_collator=collate,
    )  # fmt: skip
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


@pytest.mark.parametrize("mode", ["lora", "full", "qlora4"])
@pytest.mark.parametrize("model_type", model_types())
def test_replayed_steps_are_the_reference_s(model_type: str, mode: str, tmp_path: Path) -> None:
    ours = model_of(tmp_path, model_type, "fused", mode, 0.0)
    theirs = model_of(tmp_path, model_type, "reference", mode, 0.0)
    before = {name: weight.detach().clone() for name, weight in ours.named_parameters() if weight.requires_grad}
    losses, trainer = train(ours, tmp_path)
    expected, _ = train(theirs, tmp_path)
    counts = trainer.engine.counts
    assert counts["replayed"] >= 12 and set(counts) <= {"warm-up", "captured", "replayed"}, counts
    np.testing.assert_allclose(losses, expected, rtol=2e-4)
    weights = dict(theirs.named_parameters())
    moved = 0.0
    for name, weight in ours.named_parameters():
        if weight.requires_grad:
            step = (weights[name] - before[name]).detach().norm()
            moved += float(step)
            assert float((weight - weights[name]).detach().norm()) <= 1e-3 * float(step) + 1e-6, name
    assert moved > 0


def test_each_replay_draws_fresh_dropout(tmp_path: Path) -> None:
    model = model_of(tmp_path, "bert", "fused", "full", 0.3)
    _, trainer = train(model, tmp_path, max_steps=12)
    assert trainer.model.training
    assert trainer.engine.counts["replayed"] > 0
    engine, batch = trainer.engine, Streams(model, few_shapes=True)([{"row": row} for row in range(8)])
    batch = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    replayed = engine.counts["replayed"]
    drawn = [float(engine(trainer.model, batch, None)) for _ in range(6)]
    assert engine.counts["replayed"] >= replayed + 4
    assert len({round(value, 6) for value in drawn}) == 6, drawn


@pytest.mark.parametrize("steps", [2, 4])
def test_accumulated_micro_batches_add_up(steps: int, tmp_path: Path) -> None:
    ours = model_of(tmp_path, "bert", "fused", "lora", 0.0)
    theirs = model_of(tmp_path, "bert", "reference", "lora", 0.0)
    losses, trainer = train(ours, tmp_path, gradient_accumulation_steps=steps)
    expected, _ = train(theirs, tmp_path, gradient_accumulation_steps=steps)
    assert trainer.engine.counts["replayed"] >= 10
    np.testing.assert_allclose(losses, expected, rtol=2e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "again": {"use_gradient_checkpointing": True},
    "selective": {"use_gradient_checkpointing": "selective"},
    "offload": {"use_gradient_checkpointing": "offload"},
    "budget": {"activation_budget_gb": 1e-4},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("mode", ["lora", "full", "qlora4"])
@pytest.mark.parametrize("model_type", ["bert", "mpnet", "qwen3", "gemma3_text"])
def test_layers_computed_again_give_the_same_gradients(model_type: str, mode: str, option: str, tmp_path: Path) -> None:
    ours = model_of(tmp_path, model_type, "fused", mode, 0.0, **OPTIONS[option])
    theirs = model_of(tmp_path, model_type, "reference", mode, 0.0)
    losses, trainer = train(ours, tmp_path)
    expected, _ = train(theirs, tmp_path)
    engine, regions = trainer.engine, trainer.engine.regions
    assert regions.own_checkpoints is True, "no layer was computed again"
    if option == "offload":
        assert engine.counts["replayed"] == 0 and regions.offload.bytes_moved > 0
    else:
        assert engine.counts["replayed"] >= 12, engine.counts
    np.testing.assert_allclose(losses, expected, rtol=2e-4)


def test_large_inputs_come_back_when_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "AHEAD", 0)
    monkeypatch.setattr(offload.Offload, "_fetch", lambda *given: pytest.fail("it was fetched ahead"))
    ours = model_of(tmp_path, "bert", "fused", "lora", 0.0, **OPTIONS["offload"])
    theirs = model_of(tmp_path, "bert", "reference", "lora", 0.0)
    losses, trainer = train(ours, tmp_path)
    expected, _ = train(theirs, tmp_path)
    moved = trainer.engine.regions.offload
    assert moved.bytes_moved > 0 and not moved._parked
    np.testing.assert_allclose(losses, expected, rtol=2e-4)


@pytest.mark.parametrize("option", ["again", "selective", "offload"])
@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_a_layer_computed_again_drops_the_same_again(model_type: str, option: str, tmp_path: Path) -> None:
    """The gradient along itself against the loss's change, at one seed: another mask the second time would show."""
    model = model_of(tmp_path, model_type, "fused", "full", 0.3, **OPTIONS[option])
    for module in model.modules():
        if hasattr(module, "attention_head_size") and model_type == "bert":
            module.dropout.p = 0.0  # without a bias float32 takes the plain attention, which draws for itself
    _, trainer = train(model, tmp_path, max_steps=1)
    engine = trainer.engine
    engine._never = "to be called with one seed"
    batch = Streams(model, few_shapes=True)([{"row": row} for row in range(8)])
    batch = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def loss() -> float:
        torch.manual_seed(3)
        for weight in weights:
            weight.grad = None
        return float(engine(trainer.model, batch, None))

    length, change = along_gradient(loss, weights, 2e-3)
    assert engine.regions.own_checkpoints is True
    assert change == pytest.approx(length, rel=0.03)


def test_under_bfloat16_kept_layers_drop_in_the_backward_what_they_dropped(tmp_path: Path) -> None:
    """MiniLM's widths, where torch's partitioner calls attention's operator again in the backward (decision 0017)."""
    config = sample_config("bert")
    config.hidden_size, config.num_attention_heads, config.intermediate_size = 384, 12, 1536
    subject = Subject(config=config, folder=tmp_path / "model", tolerance=1e-5)
    model: Any = FastSentenceTransformer.from_pretrained(
        str(subject.repository), dtype="float32", backend="fused", full_finetuning=True
    ).train()
    for module in model.modules():
        if type(module) is torch.nn.Dropout:
            module.p = 0.1
    layers, weights = Regions(model), [weight for weight in model.parameters() if weight.requires_grad]
    collate = Streams(model, few_shapes=True)
    batch = {name: value.cuda() if torch.is_tensor(value) else value
             for name, value in collate([{"row": row} for row in range(32)]).items()}  # fmt: skip

    def loss() -> float:
        torch.manual_seed(5)
        model.zero_grad(set_to_none=True)
        with layers.active(), torch.autocast("cuda", dtype=torch.bfloat16):
            found = model(stream.model_inputs(batch))["sentence_embedding"][:64].float()
            value = torch.nn.functional.softplus(found @ found.roll(1, 0).T / 20).mean()
        with layers.active():
            torch.autograd.backward(value)
        return float(value.detach())

    length, change = along_gradient(loss, weights, 5e-2)
    assert change == pytest.approx(length, rel=0.1)


class Waits(MultipleNegativesRankingLoss):
    """A loss that asks the device for a number, which no graph can hold."""

    __module__ = "sentence_transformers.test"

    def forward(self, *args: Any, **keywords: Any) -> Any:
        loss = super().forward(*args, **keywords)
        return loss * (1.0 if float(loss.detach()) > 0 else 2.0)


def test_a_step_that_cannot_be_captured_is_run_counted_and_told(tmp_path: Path, capfd: Any) -> None:
    ours = model_of(tmp_path, "bert", "fused", "lora", 0.1)
    losses, trainer = train(ours, tmp_path, loss=Waits(ours))
    assert trainer.engine.counts["replayed"] == 0
    reasons = [reason for reason in trainer.engine.counts if "cannot be captured" in reason]
    assert len(reasons) == 1 and trainer.engine.counts[reasons[0]] >= 12, trainer.engine.counts
    assert len(losses) == 18 and np.isfinite(losses).all()
    assert capfd.readouterr().err.count("steps run without a CUDA graph") == 1


@pytest.mark.parametrize("model_type", model_types())
def test_bfloat16_adapters_are_as_close_to_float32_as_plain_ones(model_type: str, tmp_path: Path) -> None:
    """Gradients of one step in three ways: our error against float32 is at most twice the reference backend's."""
    gradients = []
    for backend, dtype in (("reference", "float32"), ("reference", "bfloat16"), ("fused", "bfloat16")):
        model = model_of(tmp_path, model_type, backend, "lora", 0.0, dtype)
        generator = torch.Generator().manual_seed(2)
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.data = (torch.randn(weight.shape, generator=generator) * 0.05).to(weight)
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        before = {name: weight.detach().clone() for name, weight in trained.items()}
        # Plain descent by one step shows the gradient.
        train(model, tmp_path, max_steps=1, bf16=dtype == "bfloat16", max_grad_norm=0.0)
        steps = [(weight.detach() - before[name]).flatten() for name, weight in sorted(trained.items())]
        gradients.append(torch.cat(steps))
    exact, plain, ours = gradients
    bound, error = float((plain - exact).norm()), float((ours - exact).norm())
    assert float(exact.norm()) > 0 and bound > 0
    assert error <= 2 * bound, f"{error:.3e} against {bound:.3e}"
