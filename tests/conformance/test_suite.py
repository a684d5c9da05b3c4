"""The suite can fail: each check is shown a family with the fault that it is there for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertIntermediate, BertLayer, BertModel, BertSelfOutput

from burnish.core.contracts import Family, Head, LoraTargets, Packing, Patch, Precision, patch_all
from burnish.core.registry import forget
from burnish.core.testing import suite
from burnish.core.testing.subject import Subject
from burnish.families import bert, mpnet, qwen3
from burnish.kernels import attention

Break = Callable[[Family], Family]


@pytest.fixture
def examine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run some checks on a built-in family after `change` has been made to it; returns the results by check."""

    right = {module: module.build for module in (bert, mpnet, qwen3)}

    def run(change: Break, *checks: str, module: Any = bert) -> dict[str, suite.Result]:
        monkeypatch.setattr(module, "build", lambda config: change(right[module](config)))
        forget()
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        subject = Subject(config=module.sample("tiny"), folder=folder)
        return {result.check: result for result in suite.run(subject, checks)}

    yield run
    forget()


def failure(results: dict[str, suite.Result], check: str) -> str:
    """What the check says of the fault."""
    assert results[check].state == "failed", results
    return results[check].words


def test_it_passes_what_is_right(examine: Any) -> None:
    results = examine(lambda family: family, "equals stock", "causal order", "padding side")
    assert [result.state for result in results.values()] == ["passed", "passed", "not applicable"]


def test_a_dead_adapter_is_seen(examine: Any) -> None:
    results = examine(lambda family: replace(family, lora=LoraTargets(names=family.lora.names)), "LoRA reach")
    assert failure(results, "LoRA reach") == "an adapter on pooler.dense would be dead: nothing reads its output"


def test_a_missing_adapter_is_seen(examine: Any) -> None:
    results = examine(lambda family: replace(family, lora=LoraTargets(names=("query", "key"))), "LoRA reach")
    assert "has no adapter (8 layers in all)" in failure(results, "LoRA reach")


def test_a_wrong_position_is_seen(examine: Any) -> None:
    results = examine(lambda family: replace(family, packing=Packing(position_offset=1)), "packed equals padded")
    assert "off by" in failure(results, "packed equals padded")


def test_a_wrong_order_is_seen(examine: Any) -> None:
    results = examine(lambda family: replace(family, packing=Packing(causal=True)), "causal order")
    assert "the family says causal=True" in failure(results, "causal order")
    results = examine(lambda family: replace(family, packing=Packing()), "causal order", module=qwen3)
    assert "the family says causal=False" in failure(results, "causal order")


class ScaledIntermediate(BertIntermediate):
    """Wrong by one in ten thousand."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 1.0001


class DetachedOutput(BertSelfOutput):
    """Right outputs; a gradient that goes one of two ways only."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return super().forward(hidden_states, input_tensor.detach())


def patching(old: type, new: type) -> Break:
    """A family with one more kind of patch."""

    def change(family: Family) -> Family:
        def patches(model: Any, machine: Any) -> Sequence[Patch]:
            return [*family.patches(model, machine), *patch_all(model, old, new, "a fault")]

        return replace(family, patches=patches)

    return change


def test_a_patch_that_computes_something_else_is_seen(examine: Any) -> None:
    results = examine(patching(BertIntermediate, ScaledIntermediate), "equals stock", "patches", "trainer")
    assert "the embeddings are off by" in failure(results, "equals stock")
    assert "off by" in failure(results, "patches")


def test_a_patch_that_loses_a_gradient_is_seen(examine: Any) -> None:
    results = examine(patching(BertSelfOutput, DetachedOutput), "equals stock", "patches")
    assert "the gradient of" in failure(results, "equals stock") and "the gradient of" in failure(results, "patches")


def test_a_patch_that_cannot_be_applied_is_seen(examine: Any) -> None:
    def change(family: Family) -> Family:
        wrong = Patch(path="encoder.layer.0", old=BertIntermediate, new=ScaledIntermediate, why="a fault")
        return replace(family, patches=lambda model, machine: [wrong])

    words = failure(examine(change, "patches"), "patches")
    assert "a patch is not applied" in words and "the module is a BertLayer" in words


def test_a_patch_that_cannot_be_pickled_is_seen(examine: Any) -> None:
    class Local(BertIntermediate):
        pass

    words = failure(examine(patching(BertIntermediate, Local), "copies"), "copies")
    assert "Local" in words


def test_a_global_patch_is_seen(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home = sys.modules[BertLayer.__module__]
    monkeypatch.setattr(home, "BertLayer", BertLayer)  # put back at the end

    def change(family: Family) -> Family:
        def patches(model: Any, machine: Any) -> Sequence[Patch]:
            vars(home)["BertLayer"] = type("FastLayer", (BertLayer,), {})
            return family.patches(model, machine)

        return replace(family, patches=patches)

    words = failure(examine(change, "nothing global"), "nothing global")
    assert "modeling_bert.BertLayer is not what it was" in words


def test_a_dropout_that_is_forgotten_is_seen(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.packed_attention

    def forgetful(*states: Any, dropout: float = 0.0, **options: Any) -> Tensor:
        return right(*states, **options)

    monkeypatch.setattr(attention, "packed_attention", forgetful)
    words = failure(examine(lambda family: family, "dropout"), "dropout")
    assert "attention_probs_dropout_prob moves the embeddings 0.00 times as much as stock" in words


def test_an_attention_that_mixes_texts_is_seen(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.packed_attention

    def mixing(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, **options: Any) -> Tensor:
        return right(query, key, value, bounds[[0, -1]], query.shape[0], **options)

    monkeypatch.setattr(attention, "packed_attention", mixing)
    results = examine(lambda family: family, "equals stock", "packed equals padded", "trainer", "heads")
    assert {result.state for result in results.values()} == {"failed"}


def test_checkpointing_that_does_nothing_is_seen(examine: Any) -> None:
    def change(family: Family) -> Family:
        return replace(family, checkpointing=lambda model, machine: ())

    assert failure(examine(change, "gradient checkpointing", module=mpnet), "gradient checkpointing")


def test_a_head_that_reads_elsewhere_is_seen(examine: Any) -> None:
    def change(family: Family) -> Family:
        return replace(family, heads={"sequence-classification": Head(reads="last", logits=bert.classify)})

    assert "the logits for sequence-classification" in failure(examine(change, "heads"), "heads")


def test_a_head_without_its_dropout_is_seen(examine: Any) -> None:
    def change(family: Family) -> Family:
        def dry(model: Any, vectors: Tensor) -> Any:
            return model.classifier(model.bert.pooler(vectors[:, None]))

        return replace(family, heads={"sequence-classification": Head(reads="first", logits=dry, inside=("pooler",))})

    assert "dropout is not drawn in training" in failure(examine(change, "heads"), "heads")


def test_a_head_that_names_what_is_not_there_is_seen(examine: Any) -> None:
    def change(family: Family) -> Family:
        head = Head(reads="first", logits=bert.classify, inside=("pooled",))
        return replace(family, heads={"sequence-classification": head})

    assert "the head has no pooled inside the base model" in failure(examine(change, "heads"), "heads")


def test_columns_that_are_others_are_seen(examine: Any) -> None:
    def change(family: Family) -> Family:
        def wrong(model: Any, vectors: Tensor, columns: Tensor) -> Tensor:
            return qwen3.predict_some(model, vectors, columns.flip(0))

        head = Head(reads="last", logits=qwen3.predict, columns=wrong)
        return replace(family, heads={"text-generation": head})

    assert "the logits of columns" in failure(examine(change, "heads", module=qwen3), "heads")


def test_masters_in_half_precision_are_seen(examine: Any) -> None:
    change: Break = lambda family: replace(family, precision=Precision(full="bfloat16"))  # noqa: E731
    assert failure(examine(change, "master weights"), "master weights") == "the masters are not float32"


class Overflowing(BertIntermediate):
    """Exact, and out of float16's range on the way."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 1e5 / 1e5


def test_a_dtype_that_overflows_is_seen(examine: Any) -> None:
    results = examine(patching(BertIntermediate, Overflowing), "dtypes")
    assert failure(results, "dtypes")
    change = patching(BertIntermediate, Overflowing)
    refusing: Break = lambda family: replace(change(family), precision=Precision(refused={"float16": "overflows"}))  # noqa: E731
    assert examine(refusing, "dtypes")["dtypes"].state == "passed"


class StatefulModel(BertModel):  # type: ignore[no-untyped-call]
    """A model's own class in place of transformers', which changes its neighbours through a class attribute."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        BertModel.base_model_prefix = "changed"
        return super().forward(*args, **kwargs)


StatefulModel.__name__ = BertModel.__name__


def test_a_class_attribute_that_is_set_is_seen(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BertModel, "base_model_prefix", BertModel.base_model_prefix)
    words = failure(examine(patching(BertModel, StatefulModel), "nothing global"), "nothing global")
    assert "BertModel.base_model_prefix" in words


def test_an_untrained_reference_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison with a model whose gradients are all nothing is a failure, not a pass."""
    subject = Subject(config=bert.sample("tiny"), folder=tmp_path)
    plain = subject.plain

    def dead(*args: Any, **options: Any) -> nn.Module:
        model: nn.Module = plain(*args, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return model

    monkeypatch.setattr(subject, "plain", dead)
    (result,) = suite.run(subject, ["equals stock"])
    assert result.state == "failed"
