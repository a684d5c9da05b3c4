"""Layers that keep less for the backward: the same losses and gradients, whatever is kept, and dropout dropped once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from burnish import FastSentenceTransformer, Trainer, TrainingArguments
from burnish.backends import regions as module
from burnish.backends.activations import Activations
from burnish.backends.regions import Regions, repeated_layers
from burnish.core import trainer as trainer_module
from burnish.core.testing.find import sample_config
from burnish.core.testing.subject import Subject

# What torch's compiler itself does while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

TEXTS = [f"a text of {'many ' * (number % 7)}words, number {number}" for number in range(24)]
OPTIONS: dict[str, dict[str, Any]] = {
    "again": {"use_gradient_checkpointing": True},
    "selective": {"use_gradient_checkpointing": "selective"},
    "offload": {"use_gradient_checkpointing": "offload"},
    "budget": {"activation_budget_gb": 2e-4},
}


def model_of(folder: Path, backend: str, model_type: str = "bert", **options: Any) -> Any:
    config: Any = sample_config(model_type)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    subject = Subject(config=config, folder=folder / model_type, tolerance=1e-5)
    model = FastSentenceTransformer.from_pretrained(
        str(subject.repository), dtype="float32", backend=backend, device="cpu", **options
    )
    return FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8)


def train(model: Any, folder: Path, loss: Any = None) -> tuple[list[float], Trainer]:
    arguments = TrainingArguments(
        str(folder / "run"), per_device_train_batch_size=8, num_train_epochs=2, learning_rate=1e-2, optim="sgd",
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    data = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    loss = loss or MultipleNegativesRankingLoss(model)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, loss=loss)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


def agree(ours: Any, theirs: Any, before: dict[str, Tensor]) -> None:
    moved = 0.0
    for (name, weight), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6, msg=name)
        moved += float((weight - before[name]).detach().norm())
    assert moved > 0


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is traced, cut into forward and backward and differentiated, but not turned into C++."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("option", ["again", "budget"])  # "offload" is "again" where the host is the device
def test_compiled_layers_keep_less_and_give_the_same(option: str, tmp_path: Path, traced: None) -> None:
    ours, theirs = model_of(tmp_path, "compiled", **OPTIONS[option]), model_of(tmp_path, "reference")
    before = {name: weight.detach().clone() for name, weight in ours.named_parameters()}
    losses, _ = train(ours, tmp_path)
    expected, _ = train(theirs, tmp_path)
    assert losses == pytest.approx(expected, rel=1e-5)
    agree(ours, theirs, before)
    assert not any(layer._compiled_call_impl for layer in repeated_layers(ours))


@pytest.mark.parametrize(
    ("model_type", "option"), [*(("bert", option) for option in OPTIONS), ("mpnet", "selective"), ("qwen3", "budget")]
)
def test_the_reference_keeps_less_and_gives_the_same(model_type: str, option: str, tmp_path: Path) -> None:
    ours = model_of(tmp_path, "reference", model_type, **OPTIONS[option])
    theirs = model_of(tmp_path, "reference", model_type)
    before = {name: weight.detach().clone() for name, weight in ours.named_parameters()}
    losses, trainer = train(ours, tmp_path)
    expected, _ = train(theirs, tmp_path)
    assert losses == pytest.approx(expected, rel=1e-5)
    agree(ours, theirs, before)
    flags = [layer.gradient_checkpointing for layer in repeated_layers(ours)]
    assert all(flags), "a step changed the model"
    if option == "budget":
        chosen = trainer.engine.activations  # type: ignore[union-attr]
        assert set(chosen.bytes_per_token) == {"kept", "again"}
        assert chosen.bytes_per_token["kept"] > 3 * chosen.bytes_per_token["again"] > 0


def test_a_cached_loss_works_with_layers_computed_again(tmp_path: Path, traced: None) -> None:
    ours = model_of(tmp_path, "compiled", use_gradient_checkpointing=True)
    theirs = model_of(tmp_path, "reference")
    losses, _ = train(ours, tmp_path, CachedMultipleNegativesRankingLoss(ours, mini_batch_size=3))
    expected, _ = train(theirs, tmp_path, MultipleNegativesRankingLoss(theirs))
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_inputs_on_the_host_let_a_batch_go_through_in_parts(
    backend: str, tmp_path: Path, traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "PARKED", 60)
    ours, theirs = (model_of(tmp_path, backend, **options) for options in (OPTIONS["offload"], {}))
    before = {name: weight.detach().clone() for name, weight in ours.named_parameters()}
    forwards: list[int] = []
    for model in (ours, theirs):
        model.transformers_model.embeddings.register_forward_hook(lambda *_: forwards.append(1))
    losses, _ = train(ours, tmp_path)
    cut = len(forwards)
    expected, _ = train(theirs, tmp_path)
    assert cut >= 3 * (len(forwards) - cut) > 0, "no batch was cut"
    assert losses == pytest.approx(expected, rel=1e-5)
    agree(ours, theirs, before)


class Kept:
    """The bytes that a forward keeps for its backward, the weights' own apart."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.seen: dict[int, int] = {}

    def pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.seen[storage.data_ptr()] = storage.nbytes()
        return value


def hidden_of(model: Any, ids: Tensor) -> Tensor:
    states: Tensor = model.transformers_model(input_ids=ids).last_hidden_state
    return states


def attention_of(model: nn.Module) -> list[Any]:
    found = [layer for layer in model.modules() if hasattr(layer, "attention_head_size")]
    assert found
    return found


@pytest.fixture
def padded(tmp_path: Path) -> Any:
    model = model_of(tmp_path, "reference", packed=False)
    for layer in model.modules():
        if type(layer) is nn.Dropout:
            layer.p = 0.3
    for layer in attention_of(model):
        layer.dropout.p = 0.0  # which torch's attention would draw numbers for by itself
    model.train()
    return model


def test_the_less_is_kept_the_more_is_asked(padded: Any, traced: None) -> None:
    ids = torch.arange(5, 45).view(2, 20)
    bytes_kept = []
    for option in (False, "selective", True):
        regions, kept = Regions(padded, Activations(2, option)), Kept(padded)
        with regions.active(), torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda value: value):
            out = hidden_of(padded, ids)
        bytes_kept.append(sum(kept.seen.values()))
        out.sum().backward()  # type: ignore[no-untyped-call]
    assert bytes_kept[0] > 1.2 * bytes_kept[1] > 1.5 * bytes_kept[2] > 0, bytes_kept


@pytest.mark.parametrize("option", [True, "selective"])
def test_a_layer_computed_again_drops_what_it_dropped(padded: Any, option: Any, traced: None) -> None:
    """Against the same layers called once, as they are, with the same seeds."""
    ids = torch.arange(5, 45).view(2, 20)
    found = []
    for once in (False, True):
        regions = Regions(padded, Activations(2, option))
        if once:
            regions._variant = lambda share: module._call  # type: ignore[method-assign]
        padded.zero_grad()
        torch.manual_seed(7)
        with regions.active():
            out = hidden_of(padded, ids)
            out.square().sum().backward()  # type: ignore[no-untyped-call]
        assert regions.own_checkpoints is True
        grads = [weight.grad.clone() for weight in padded.parameters() if weight.grad is not None]
        assert grads and sum(float(grad.norm()) for grad in grads) > 0
        found.append([out.detach(), *grads])
    padded.eval()
    still = hidden_of(padded, ids)
    assert not torch.allclose(still, found[0][0]), "nothing was dropped"
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_layer_that_draws_by_itself_is_left_to_transformers(
    tmp_path: Path, traced: None, capfd: pytest.CaptureFixture[str]
) -> None:
    model = model_of(tmp_path, "compiled", packed=False, use_gradient_checkpointing=True)
    for layer in attention_of(model):
        layer.dropout.p = 0.3
    losses, _ = train(model, tmp_path)
    assert all(loss > 0 for loss in losses)
    assert capfd.readouterr().err.count("draws random numbers of its own") == 1
    assert all(layer.gradient_checkpointing for layer in repeated_layers(model))
