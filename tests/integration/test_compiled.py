"""The compiled backend on a CPU: the reference's losses and weights, and nothing left on the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

from burnish import FastSentenceTransformer, Trainer, TrainingArguments
from burnish.backends import activations, regions
from burnish.backends.regions import Regions, fused_adapters, repeated_layers
from burnish.core.testing.find import sample_config
from burnish.core.testing.subject import Subject
from burnish.kernels.lora import FusedLora

from ..along import along_gradient

# What torch's compiler itself does while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

TEXTS = [f"a text of {'many ' * (number % 7)}words, number {number}" for number in range(24)]


def model_of(folder: Path, backend: str, mode: str) -> Any:
    config = sample_config("bert")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    subject = Subject(config=config, folder=folder / "model", tolerance=1e-5)
    options: dict[str, Any] = {"dtype": "float32", "backend": backend, "full_finetuning": mode == "full"}
    model = FastSentenceTransformer.from_pretrained(str(subject.repository), **options)
    return model if mode == "full" else FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8)


def train(model: Any, folder: Path) -> tuple[list[float], Trainer]:
    arguments = TrainingArguments(
        str(folder / "run"), per_device_train_batch_size=8, num_train_epochs=2, learning_rate=1e-2, optim="sgd",
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    data = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    trainer = Trainer(model=model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_compiled_steps_are_the_reference_s(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "lora":  # traced and differentiated, but not turned into C++, which takes 50 s here
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ours, theirs = model_of(tmp_path, "compiled", mode), model_of(tmp_path, "reference", mode)
    before = {name: weight.detach().clone() for name, weight in ours.named_parameters()}
    kinds = [type(module) for module in ours.modules()]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    losses, _ = train(ours, tmp_path)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled, "nothing was compiled"
    expected, _ = train(theirs, tmp_path)
    assert losses == pytest.approx(expected, rel=1e-5)
    moved = 0.0
    for (name, weight), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6, msg=name)
        moved += float((weight - before[name]).detach().norm())
    assert moved > 0
    assert kinds == [type(module) for module in ours.modules()], "a step changed the model"
    assert not any(layer._compiled_call_impl for layer in repeated_layers(ours))


def test_a_step_that_raises_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = model_of(tmp_path, "reference", "lora")
    kinds = [type(module) for module in model.modules()]
    regions = Regions(model)
    assert len(regions.layers) == 2
    with pytest.raises(RuntimeError, match="stopped"), regions.active():
        assert sum(isinstance(module, FusedLora) for module in model.modules()) == 12
        raise RuntimeError("stopped")
    assert kinds == [type(module) for module in model.modules()]
    with fused_adapters(model), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("texts", "length", "fragile"),
    [(64, 512, True), (64, 513, False), (8, 512, True)],
    ids=["whole", "ragged", "small"],
)
def test_a_norm_s_gradient_is_summed_apart_where_inductor_would_stumble(
    texts: int, length: int, fragile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole texts, until torch 2.13; and batches that would lie on both sides of inductor's 5 Mi elements."""
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    tokens = texts * 512 + (length - 512)
    batch = {"hidden": torch.empty(1, tokens, 1024, device="meta"), "bounds": torch.arange(texts + 1)}
    rows, bounds = regions._mark_tokens(batch)
    assert [row.shape[1] for row in rows] == [tokens] and len(bounds) == 1
    assert regions._fragile(rows, bounds) == fragile
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert regions._fragile(rows, bounds) == (tokens * 1024 < 20 * 2**20)
    config: Any = torch._inductor.config.triton
    with regions._sums_apart():
        assert config.mix_order_reduction is False
    assert config.mix_order_reduction is True


@pytest.mark.parametrize("share", [0.7, 0.3])
def test_what_a_layer_computes_again_drops_what_it_dropped(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No random number is drawn inside a compiled layer, where its backward might draw others; and the gradient along
    itself is the loss's change at one seed."""
    graphs: list[str] = []

    def recorded(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    own = torch.compile
    monkeypatch.setattr(torch, "compile", partial(own, backend=aot_autograd(fw_compiler=recorded)))
    monkeypatch.setitem(activations.SHARES, "kept", share)
    config = sample_config("bert")
    config.hidden_dropout_prob, config.attention_probs_dropout_prob = 0.3, 0.0
    subject = Subject(config=config, folder=tmp_path / "model", tolerance=1e-5)
    model: Any = FastSentenceTransformer.from_pretrained(
        str(subject.repository), dtype="float32", backend="compiled", full_finetuning=True
    ).train()
    for module in model.modules():
        if hasattr(module, "attention_head_size"):
            module.dropout.p = 0.0
        elif type(module) is torch.nn.Dropout:
            module.p = 0.3
    layers, batch = Regions(model), model.preprocess(TEXTS[:8])
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def loss() -> float:
        torch.manual_seed(5)
        model.zero_grad(set_to_none=True)
        with layers.active():
            found = model(dict(batch))["sentence_embedding"]
            value = torch.nn.functional.softplus(found @ found.roll(1, 0).T).mean()
            torch.autograd.backward(value)
        return float(value.detach())

    length, change = along_gradient(loss, weights, 2e-3)
    assert any("burnish.spread" in code for code in graphs), "no dropout was compiled"
    assert not any("burnish.draw" in code for code in graphs)
    assert change == pytest.approx(length, rel=0.03)
