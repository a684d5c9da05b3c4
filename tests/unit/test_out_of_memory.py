"""Steps that run out of memory: run again in smaller parts they leave an undisturbed run's weights; else advice."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers.sentence_transformer import losses
from torch import Tensor, nn

from burnish import FastSentenceTransformer, Trainer, TrainingArguments
from burnish.core import out_of_memory, stream
from burnish.core.cached import cached_step, loss_of, ranking_of
from burnish.core.contracts import StepContext
from burnish.core.errors import ModelError
from burnish.core.out_of_memory import WHOLE, Before, OutOfMemory, Room, is_out_of_memory

from .injection import SAID, Injection

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PLACES = [f"{a} {b}" for a in ("old", "new", "far", "near", "red", "blue", "cold", "warm") for b in "abcdefgh"]


@pytest.fixture(scope="module")
def data() -> Any:
    anchors = [f"what is in {place}?" for place in PLACES]
    positives = [f"in {place} there is {'much ' * (n % 7)}room for number {n}" for n, place in enumerate(PLACES)]
    return Dataset.from_dict({"anchor": anchors, "positive": positives})


def loaded(folder: Path, **settings: Any) -> Any:
    settings = {"full_finetuning": True, "config_kwargs": NO_DROPOUT, **settings}
    return FastSentenceTransformer.from_pretrained(str(folder), device="cpu", **settings)


def first_norm(model: Any) -> nn.Module:
    """What every backward reaches late, when most gradients of the step have been added."""
    found: nn.Module = model.transformers_model.embeddings.LayerNorm
    return found


Fit = Callable[..., tuple[Any, dict[str, Tensor]]]


@pytest.fixture
def fit(data: Any, tiny_bert_st: Path, tmp_path: Path) -> Fit:
    """Train the tiny BERT; returns (trainer, the trained weights). `prepare` gets the model first."""

    def fit(prepare: Callable[[Any], object] = lambda model: None, loss: Any = None, **settings: Any) -> Any:
        model = settings.pop("model", None) or loaded(tiny_bert_st)
        settings = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "max_steps": 5, "optim": "sgd",
            "learning_rate": 0.5, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
            "logging_steps": 1, "lr_scheduler_type": "constant", **settings,
        }  # fmt: skip
        made = (loss or losses.MultipleNegativesRankingLoss)(model)
        trainer = Trainer(model=model, args=TrainingArguments(**settings), train_dataset=data, loss=made)
        prepare(model)
        trainer.train()
        return trainer, {name: weight.detach().clone() for name, weight in model.named_parameters()}

    return fit


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Any = None) -> None:
    """Equal but for the rounding of sums in another order, which is far below what training changed."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-6, msg=name)
    if start is not None:
        moved = max(float((weight - start[name]).abs().max()) for name, weight in expected.items())
        assert moved > 1e-2, "nothing was trained"


def started(folder: Path) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in loaded(folder).named_parameters()}


def losses_of(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_a_batch_in_parts_trains_as_the_whole(fit: Fit, tiny_bert_st: Path, tokens: int) -> None:
    whole, expected = fit()
    embedded: list[int] = []
    watch = lambda model: first_norm(model).register_forward_hook(lambda m, a, out: embedded.append(out.shape[1]))  # noqa: E731
    cut, found = fit(watch, auto_batch=tokens)
    assert len(embedded) >= 2 * 5 * 2 and max(embedded) <= max(tokens, 25), "batches were not cut"
    assert cut.room.retried == 0 and cut.room.budget == tokens
    assert_same(found, expected, started(tiny_bert_st))
    assert losses_of(cut) == pytest.approx(losses_of(whole), rel=1e-4)


def test_float64_gradients_of_a_batch_in_parts(tiny_bert_st: Path) -> None:
    model = loaded(tiny_bert_st).double()
    loss = losses.MultipleNegativesRankingLoss(model)
    texts = [[f"text {n} of {column}" for n in range(6)] for column in "ab"]
    columns = [[np.array(ids, np.int32) for ids in model.tokenizer(column)["input_ids"]] for column in texts]
    batch, found = stream.flatten(columns), list[list[Tensor]]()
    of_embeddings = ranking_of(loss)
    assert of_embeddings is not None and loss_of(loss) is None
    for budget in (WHOLE, 15):
        model.zero_grad(set_to_none=True)
        value = cached_step(
            lambda one: model(stream.model_inputs(one))["sentence_embedding"], batch, of_embeddings, budget
        )
        torch.autograd.backward(value)
        grads = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
        assert len(grads) > 30 and max(float(grad.abs().max()) for grad in grads) > 1e-4
        found.append([value.detach(), *grads])
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_is_run_again(
    fit: Fit, tiny_bert_st: Path, where: str, accumulation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _, expected = fit(gradient_accumulation_steps=accumulation, max_steps=6 // accumulation)
    injections: list[Injection] = []
    # Whole batches until call 3; then in parts, of which later ones fail too, in the midst of a step.
    calls = {3, 3 + 3, 3 + 8, 3 + 15}
    prepare = lambda model: injections.append(Injection(first_norm(model), where, calls))  # noqa: E731
    trainer, found = fit(
        prepare, auto_batch=True, gradient_accumulation_steps=accumulation, max_steps=6 // accumulation
    )
    (injection,) = injections
    fired = len(injection.fired)
    assert fired >= (3 if where == "forward" else 2), injection.fired
    assert trainer.room.retried == fired and trainer.room.budget is not None
    assert_same(found, expected, started(tiny_bert_st))
    said = capsys.readouterr().err
    assert said.count("out of memory: the step is run again") == fired
    assert "auto_batch has nothing to plan with on cpu" in said


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_a_failed_step_had_added_matters(
    fit: Fit, tiny_bert_st: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above would see a gradient that is left, or one that is lost."""
    _, expected = fit(gradient_accumulation_steps=2, max_steps=2)

    def lose(before: Before) -> None:
        for weight, _ in before._gradients if where == "forward" else []:
            weight.grad = None

    monkeypatch.setattr(Before, "restore", lose)
    # The forward of the second micro-batch; or the last backward of a batch in parts, all others having been added.
    calls, tokens = ({1}, WHOLE) if where == "forward" else ({4}, 40)
    injections: list[Injection] = []
    prepare = lambda model: injections.append(Injection(first_norm(model), where, calls))  # noqa: E731
    _, found = fit(prepare, auto_batch=tokens, gradient_accumulation_steps=2, max_steps=2)
    assert injections[0].fired
    with pytest.raises(AssertionError):
        assert_same(found, expected)


def test_an_adapter_is_run_again_too(fit: Fit, tiny_bert_st: Path) -> None:
    def adapted() -> Any:
        return FastSentenceTransformer.get_peft_model(loaded(tiny_bert_st, full_finetuning=False), r=4)

    _, expected = fit(model=adapted())
    injections: list[Injection] = []
    prepare = lambda model: injections.append(Injection(first_norm(model), "forward", {1, 4, 7}))  # noqa: E731
    trainer, found = fit(prepare, model=adapted(), auto_batch=True)
    assert trainer.room.retried == len(injections[0].fired) == 3
    assert_same(found, expected)
    lora = [name for name in expected if "lora_B" in name]
    assert sum(float(found[name].abs().max()) > 1e-4 for name in lora) > 8


def test_a_cached_loss_is_run_again(fit: Fit, tiny_bert_st: Path) -> None:
    cached: Any = losses.CachedMultipleNegativesRankingLoss
    _, expected = fit(loss=cached)
    injections: list[Injection] = []
    prepare = lambda model: injections.append(Injection(first_norm(model), "forward", {2}))  # noqa: E731
    trainer, found = fit(prepare, loss=cached, auto_batch=True)
    assert trainer.room.retried == len(injections[0].fired) == 1
    assert_same(found, expected, started(tiny_bert_st))


def test_memory_of_the_failed_step_is_gone(fit: Fit) -> None:
    alive: list[Callable[[], object]] = []
    dead: list[bool] = []

    def prepare(model: Any) -> None:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            if len(alive) == 1:
                dead.append(alive[0]() is None)
            alive.append(weakref.ref(out))
            if len(alive) == 1:
                raise torch.OutOfMemoryError(SAID)

        first_norm(model).register_forward_hook(hook)
        gc.disable()

    try:
        trainer, _ = fit(prepare, auto_batch=True)
    finally:
        gc.enable()
    assert trainer.room.retried == 1 and dead == [True]


def test_the_backend_lets_go_of_its_memory(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    build, forgotten = Trainer._build_step, list[int]()
    contexts: list[Any] = []

    def noted(**given: Any) -> StepContext:
        contexts.append(StepContext(**given))
        made: StepContext = contexts[-1]
        return made

    monkeypatch.setattr("burnish.core.step_trainer.StepContext", noted)

    def forgetful(trainer: Any) -> Any:
        step = build(trainer)
        engine = trainer.engine = type("Engine", (), {"forget": lambda self: forgotten.append(1)})()
        assert engine is not None
        return step

    monkeypatch.setattr(Trainer, "_build_step", forgetful)
    trainer, _ = fit(lambda model: Injection(first_norm(model), "forward", {0, 3}), auto_batch=True)
    assert trainer.room.retried == 2 and len(forgotten) == 2 + 1, "at each failure, and when the run is over"
    batch = stream.flatten([[np.arange(5, 65, dtype=np.int32)] * 9])
    assert contexts[0].host_work(batch) is not None and contexts[0].host_work({"input_ids": 1}) is None


def test_the_fused_backend_forgets_all_that_it_keeps() -> None:
    from burnish.backends.fused import FusedStep

    step: Any = FusedStep.__new__(FusedStep)
    step._graphs, step._warmed, step._refused, step.gradients = ({"a shape": 1} for _ in range(4))
    told = list[bool]()
    step.inner = type("Inner", (), {"forget": lambda self: told.append(True)})()
    step.forget()
    assert [step._graphs, step._warmed, step._refused, step.gradients, told] == [{}, {}, {}, {}, [True]]


def test_a_batch_that_is_cut_is_not_captured(tiny_bert_st: Path, tmp_path: Path) -> None:
    from burnish.backends.fused import FusedStep

    model = loaded(tiny_bert_st)
    room = Room(model, TrainingArguments(str(tmp_path), use_cpu=True, auto_batch=20), print)
    room.plan()
    loss = losses.MultipleNegativesRankingLoss(model)
    long, short = (stream.flatten([[np.arange(5, 5 + count, dtype=np.int32)] * 3]) for count in (10, 5))
    assert room.host_work(short, loss) is None and room.host_work({"input_ids": 1}, loss) is None
    assert room.host_work(long, losses.CoSENTLoss(model)) is None
    why = room.host_work(long, loss)
    assert why == "a batch of more tokens than a forward may have is cut on the host"

    class Told(FusedStep):
        def __init__(self) -> None:
            self._never = self.inner = None
            self.context: Any = type(
                "Context", (), {"host_work": staticmethod(lambda batch: room.host_work(batch, loss))}
            )

        def _without(self, model: Any, batch: Any, items: Any, reason: str) -> Any:
            return reason

        def _key(self, batch: Any, items: Any) -> Any:
            raise LookupError("it would be captured")

    step: Any = Told()
    assert step(model, long, None) == why
    with pytest.raises(LookupError):
        step(model, short, None)


def test_one_text_that_does_not_fit_ends_the_run(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    injections: list[Injection] = []
    prepare = lambda model: injections.append(Injection(first_norm(model), "forward", range(10**6)))  # noqa: E731
    with pytest.raises(
        OutOfMemory, match=r"training on cpu: out of memory with \d+ tokens in 16 texts of at most"
    ) as caught:
        fit(prepare, auto_batch=True)
    assert isinstance(caught.value, (ModelError, torch.OutOfMemoryError)) and caught.value.exit_code == 4
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError) and str(caught.value.__cause__) == SAID
    assert "in forwards of" in str(caught.value) and "auto_batch" not in str(caught.value)
    assert "use_gradient_checkpointing=True" in str(caught.value) and "\n" not in str(caught.value)
    said = [line for line in capsys.readouterr().err.splitlines() if "is run again" in line]
    assert 2 <= len(said) == len(injections[0].fired) - 1 <= 8


def test_advice_without_auto_batch(fit: Fit) -> None:
    with pytest.raises(
        OutOfMemory, match=r"Use TrainingArguments\(auto_batch=True\), use_gradient_checkpointing"
    ) as caught:
        fit(lambda model: Injection(first_norm(model), "forward", {2}))
    assert str(caught.value.__cause__) == SAID


def test_memory_that_runs_out_in_the_optimizer(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    for settings in ({}, {"auto_batch": True}):
        with pytest.raises(
            OutOfMemory, match=r'outside of a step.*Use optim="adamw_8bit" or a smaller per_dev'
        ) as caught:
            fit(**settings)
        assert str(caught.value.__cause__) == SAID


def test_a_loss_that_cannot_be_cut(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    def matryoshka(model: Any) -> Any:
        return losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [16, 32])

    with pytest.raises(OutOfMemory, match=r"Use per_device_train_batch_size=4, use_gradient") as caught:
        fit(lambda model: Injection(first_norm(model), "forward", {3}), loss=matryoshka, auto_batch=True)
    assert str(caught.value.__cause__) == SAID
    assert "auto_batch has nothing to cut: MatryoshkaLoss takes its batches whole" in capsys.readouterr().err


def test_padded_input_cannot_be_cut(fit: Fit, tiny_bert_st: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = fit(model=loaded(tiny_bert_st, packed=False), auto_batch=True, max_steps=1)
    assert trainer.room.retried == 0
    assert "auto_batch has nothing to cut: the input is no stream" in capsys.readouterr().err
    with pytest.raises(OutOfMemory, match="out of memory with a batch of 8 rows"):
        fit(lambda model: Injection(first_norm(model), "forward", {0}), model=loaded(tiny_bert_st, packed=False))


def test_other_errors_are_what_they_were(fit: Fit) -> None:
    def broken(model: Any) -> None:
        def hook(*_: Any) -> None:
            raise RuntimeError("the size of tensor a must match")

        first_norm(model).register_forward_hook(hook)

    with pytest.raises(RuntimeError, match=r"^the size of tensor a must match$"):
        fit(broken, auto_batch=True)


def test_the_search_for_a_batch_size_still_sees_the_error(fit: Fit) -> None:
    pytest.importorskip("accelerate")
    injections: list[Injection] = []
    trainer, _ = fit(
        lambda model: injections.append(Injection(first_norm(model), "forward", {0})),
        auto_find_batch_size=True, max_steps=2,
    )  # fmt: skip
    assert injections[0].fired == [0] and trainer.room.retried == 0
    assert trainer._train_batch_size < 8


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError(SAID), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: an illegal memory access"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_which_errors_are_out_of_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_random_numbers_and_gradients_come_back() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.ones(2, 2)
    mine = layer.weight.grad
    before = Before(layer)
    drawn = []
    for _ in range(2):
        drawn.append((random.random(), np.random.random(), torch.rand(1).item()))
        mine += 5.0
        layer.bias.grad = torch.ones(2)
        before.restore()
        assert layer.bias.grad is None and torch.equal(layer.weight.grad, torch.ones(2, 2))
        mine = layer.weight.grad
    assert drawn[0] == drawn[1]


def test_several_processes_do_not_wait_for_a_step_run_again(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "_is_shared", lambda: True)
    with pytest.raises(OutOfMemory):
        fit(lambda model: Injection(first_norm(model), "forward", {0}), auto_batch=True)
