"""The trainer's optimizers: runs equal AdamW's, resume to the bit, log what they log; what cannot be is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformerTrainingArguments as StockArguments
from torch import Tensor, nn
from transformers import TrainerCallback

from burnish import FastSentenceTransformer, Trainer, TrainingArguments, losses
from burnish.core import optimizer_checks, optimizers
from burnish.core.errors import ConfigError

Fit = Callable[..., Any]
STEPS = 6
FREE = {"optimizer_in_backward": True, "max_grad_norm": 0.0}


def pairs() -> Any:
    from datasets import Dataset  # type: ignore[import-untyped]

    texts = [f"{a} {b}" for a in ("old", "new", "far", "near", "red", "blue") for b in "abcdefgh"]
    return Dataset.from_dict({"anchor": [f"what of {text}?" for text in texts], "positive": [f"a {t}" for t in texts]})


@pytest.fixture(autouse=True)
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of 2^18 weights count as large: the tiny model's, of 30,522 rows of 32, and not its positions."""
    import burnish.core.optimizer_trainer as trainer

    monkeypatch.setattr(trainer, "tables_of", lambda model: optimizers.tables_of(model, 2**18))


@pytest.fixture
def fresh(tiny_bert_st: Path) -> Fit:
    """The tiny model for full fine-tuning; without dropout, so that two runs of it can be compared."""

    def fresh(**options: Any) -> Any:
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        given: dict[str, Any] = {"full_finetuning": True, "config_kwargs": still, **options}
        return FastSentenceTransformer.from_pretrained(str(tiny_bert_st), device="cpu", **given)

    return fresh


@pytest.fixture
def trainer(tmp_path: Path) -> Fit:
    def trainer(model: Any, **settings: Any) -> Any:
        passed = {name: settings.pop(name) for name in ("callbacks", "optimizers", "loss") if name in settings}
        loss = passed.pop("loss", None) or losses.MultipleNegativesRankingLoss(model)
        kind = settings.pop("arguments", TrainingArguments)
        given: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"), "max_steps": STEPS, "per_device_train_batch_size": 8,
            "learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 2, "logging_steps": 1, "use_cpu": True,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **settings,
        }  # fmt: skip
        return Trainer(model, kind(**given), train_dataset=pairs(), loss=loss, **passed)

    return trainer


@pytest.fixture
def fit(trainer: Fit) -> Fit:
    """Train; returns (trainer, its log)."""

    def fit(model: Any, resume: Any = None, **settings: Any) -> Any:
        made = trainer(model, **settings)
        made.train(resume_from_checkpoint=resume)
        return made, [row for row in made.state.log_history if "loss" in row]

    return fit


def weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def states(made: Any) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by the name of the weight."""
    names = {weight: name for name, weight in made.model.named_parameters()}
    return {names[weight]: dict(state) for weight, state in made.optimizer.state.items()}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    if first.keys() != second.keys() or not first:
        return False
    pairs = ((first[name], second[name]) for name in first)
    return all(same(a, b) if isinstance(a, dict) else torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


class Stop(TrainerCallback):
    """Ends a run early, as a crash after a checkpoint would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= 4


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_run_stepped_in_the_backward_is_the_plain_run(fresh: Fit, fit: Fit, optim: str) -> None:
    """Bit for bit, weights and state; and what is logged, the norm of gradients that are gone included."""
    theirs, ours = fresh(), fresh()
    before = weights(ours)
    expected, rows = fit(theirs, optim=optim, max_grad_norm=0.0)
    found, logged = fit(ours, optim=optim, **FREE)
    assert same(weights(ours), weights(theirs)) and same(states(found), states(expected))
    assert not same(weights(ours), before) and all(row["grad_norm"] > 0 for row in rows)
    assert [row["loss"] for row in logged] == [row["loss"] for row in rows]
    assert [row["learning_rate"] for row in logged] == [row["learning_rate"] for row in rows]
    assert len({row["learning_rate"] for row in logged}) > 3
    assert [row["grad_norm"] for row in logged] == pytest.approx([row["grad_norm"] for row in rows], rel=1e-5)
    assert len({group["weight_decay"] for group in found.optimizer.param_groups}) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("options", [{"backend": "compiled"}, {"use_gradient_checkpointing": True}], ids=str)
def test_layers_that_are_compiled_or_computed_twice(
    fresh: Fit, fit: Fit, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that changes inside the backward is read no more by then."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # C++ takes long to compile
    theirs, ours = fresh(**options), fresh(**options)
    fit(theirs, max_grad_norm=0.0)
    made, _ = fit(ours, **FREE)
    assert same(weights(ours), weights(theirs)) and len(made.optimizer.state) > 30


def test_no_gradient_outlives_the_backward(fresh: Fit, fit: Fit) -> None:
    class Look(TrainerCallback):
        held: list[int]

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.held.append(sum(weight.grad is not None for weight in model.parameters()))

    plain, inside = Look(), Look()
    plain.held, inside.held = [], []
    fit(fresh(), max_grad_norm=0.0, callbacks=[plain])
    model = fresh()
    fit(model, **FREE, callbacks=[inside])
    assert min(plain.held) > 30 and inside.held == [0] * STEPS
    assert not any(weight._post_accumulate_grad_hooks for weight in model.parameters()), "a hook is left on the model"


CHOICES: dict[str, dict[str, Any]] = {
    "in backward": FREE,
    "rounded": {"stochastic_rounding": True},
    "sparse": {"sparse_embeddings": True},
    "all": {**FREE, "stochastic_rounding": True, "sparse_embeddings": True},
    "8 bits": {"optim": "adamw_8bit"},
    "8 bits in backward": {**FREE, "optim": "adamw_8bit"},
}


def dtype(choice: str) -> dict[str, Any]:
    return {"dtype": "bfloat16"} if CHOICES[choice].get("stochastic_rounding") else {}


@pytest.fixture(params=CHOICES)
def choice(request: pytest.FixtureRequest) -> str:
    """A choice by name, those of 8 bits where bitsandbytes has them for a CPU."""
    name: str = request.param
    if "8 bits" in name:
        request.getfixturevalue("eight_bits")
    return name


def test_a_resumed_run_equals_an_uninterrupted_one(fresh: Fit, fit: Fit, tmp_path: Path, choice: str) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, **CHOICES[choice]}
    whole, again = fresh(**dtype(choice)), fresh(**dtype(choice))
    first, rows = fit(whole, output_dir=str(tmp_path / "whole"), **settings)
    fit(fresh(**dtype(choice)), callbacks=[Stop()], **settings)
    second, logged = fit(again, resume=True, **settings)
    assert second.state.global_step == STEPS and [row["loss"] for row in logged] == [row["loss"] for row in rows]
    assert same(weights(again), weights(whole))
    mine, theirs = states(second), states(first)
    assert {name: [k for k in state] for name, state in mine.items()}.keys() == theirs.keys()
    for name, state in theirs.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(mine[name][key]), torch.as_tensor(value)), (name, key)


def test_a_second_run_of_a_trainer_goes_on(fresh: Fit, fit: Fit, choice: str) -> None:
    """With the state it has, and nothing doubled: a weight's step count is the steps of both runs."""
    settings: dict[str, Any] = {**CHOICES[choice], "lr_scheduler_type": "constant", "warmup_steps": 0}
    model = fresh(**dtype(choice))
    made, _ = fit(model, **settings)
    before = weights(model)
    made.train()
    assert not same(weights(model), before)
    assert {int(state["step"]) for state in states(made).values()} == {2 * STEPS}


def test_a_saved_model_is_the_same_as_ever(fresh: Fit, fit: Fit, tmp_path: Path, choice: str) -> None:
    from sentence_transformers import SentenceTransformer

    model = fresh(**dtype(choice))
    names = set(model.state_dict())
    fit(model, **CHOICES[choice])
    model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu", model_kwargs={"dtype": model.dtype})
    assert set(model.state_dict()) == set(again.state_dict()) == names
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert not any(module.sparse for module in model.modules() if isinstance(module, nn.Embedding))


TABLE = "0.model.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("limit", [0.05, 0.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_sparse_rows_move_as_dense_ones_at_the_first_step(
    fresh: Fit, fit: Fit, limit: float, accumulation: int
) -> None:
    """Clipped or not, with gradients added up or not; rows that no batch has do not move."""
    settings: dict[str, Any] = {
        "max_steps": 1, "warmup_steps": 0, "max_grad_norm": limit, "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8,
    }  # fmt: skip
    theirs, ours = fresh(), fresh()
    start = weights(ours)[TABLE]
    _, rows = fit(theirs, **settings)
    made, logged = fit(ours, **settings, sparse_embeddings=True)
    assert rows[0]["grad_norm"] > 0.1 and logged[0]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-5)
    moved = (weights(ours)[TABLE] != start).any(1)
    assert 10 < moved.sum() < 200, "the batch has some rows and lacks most"
    assert torch.allclose(weights(ours)[TABLE][moved], weights(theirs)[TABLE][moved], rtol=0, atol=1e-6)
    # Sums of repeated rows in another order: Adam divides by them, and those near nothing may turn around.
    rest = [name for name in start_names(ours) if name != TABLE]
    assert all(torch.allclose(weights(ours)[n], weights(theirs)[n], rtol=0, atol=1e-5) for n in rest)
    assert states(made)[TABLE]["exp_avg"].dtype == torch.float32
    assert made.accelerator.clip_grad_norm_.__func__ is type(made.accelerator).clip_grad_norm_


def start_names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_rounded_weights_go_as_far_as_float32_ones(fresh: Fit, fit: Fit) -> None:
    """At a rate of 2e-6, a 60th of the distance between neighbours, plain bfloat16 hardly moves. The seed decides."""
    settings: dict[str, Any] = {"learning_rate": 2e-6, "warmup_steps": 0, "lr_scheduler_type": "constant"}

    def moved(seed: int = 42, **options: Any) -> Tensor:
        """How far all matrices of the layers went."""
        model = fresh(dtype=options.pop("dtype", "bfloat16"))
        before = weights(model)
        fit(model, seed=seed, **settings, **options)
        after = weights(model)
        names = [name for name in before if ".layer." in name and before[name].dim() == 2]
        return torch.cat([(after[name].float() - before[name].float()).flatten() for name in names])

    exact, plain, rounded = moved(dtype="float32"), moved(), moved(stochastic_rounding=True)
    shares = [float(one @ exact / (exact @ exact)) for one in (plain, rounded)]
    assert shares[0] < 0.3 and 0.8 < shares[1] < 1.2, shares
    assert torch.equal(rounded, moved(stochastic_rounding=True))
    assert not torch.equal(rounded, moved(stochastic_rounding=True, seed=1))


def test_loading_in_bfloat16_names_the_way_out(fresh: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fresh(dtype="bfloat16")
    assert "small updates round away unless TrainingArguments has stochastic_rounding=True" in capsys.readouterr().err


def test_what_the_model_or_loss_rules_out(fresh: Fit, trainer: Fit) -> None:
    model = fresh()
    cached = losses.CachedMultipleNegativesRankingLoss(model)
    with pytest.raises(ConfigError, match=r"^optimizer_in_backward: CachedMultipleNegativesRankingLoss goes back"):
        trainer(model, loss=cached, **FREE)
    own = torch.optim.SGD(model.parameters()), None
    with pytest.raises(ConfigError, match=r"^optimizer_in_backward: is not for an optimizer that is passed"):
        trainer(model, optimizers=own, **FREE)
    with pytest.raises(ConfigError, match=r"^stochastic_rounding: no weight that is trained is bfloat16"):
        trainer(model, stochastic_rounding=True)
    adapted = FastSentenceTransformer.get_peft_model(fresh(full_finetuning=False), r=2)
    with pytest.raises(ConfigError, match=r"^sparse_embeddings: the model has no embedding table"):
        trainer(adapted, sparse_embeddings=True)


def test_sentence_transformers_own_arguments_are_checked_too(fresh: Fit, trainer: Fit) -> None:
    with pytest.raises(ConfigError, match=r"^optim='paged_adamw_8bit'"):
        trainer(fresh(), arguments=StockArguments, optim="paged_adamw_8bit")


def test_a_loss_that_goes_back_twice_is_found(fresh: Fit, fit: Fit) -> None:
    """One that no check can know: a hook of its own goes back through the model again."""

    class Twice(losses.MultipleNegativesRankingLoss):
        def forward(self, *args: Any, **keywords: Any) -> Tensor:
            torch.autograd.backward(super().forward(*args, **keywords), retain_graph=False)
            loss: Tensor = super().forward(*args, **keywords)
            return loss

    model = fresh()
    with pytest.raises(Exception, match=r"^optimizer_in_backward: the gradient of .* comes in several parts"):
        fit(model, loss=Twice(model), token_store=False, **FREE)


@pytest.fixture
def eight_bits(tmp_path: Path) -> Iterator[None]:
    """Where bitsandbytes steps on a CPU; older versions do not, which is an error of one line (above)."""
    try:
        optimizer_checks.check_bitsandbytes("adamw_8bit", torch.device("cpu"))
    except ConfigError as error:
        assert "cannot step on a cpu" in str(error)
        pytest.skip(str(error))
    yield


@pytest.mark.usefixtures("eight_bits")
def test_eight_bits_keep_embeddings_in_32(fresh: Fit, fit: Fit) -> None:
    """And train about as AdamW does; inside the backward the same bits."""
    theirs, ours, inside = fresh(), fresh(), fresh()
    _, rows = fit(theirs, max_grad_norm=0.0)
    made, logged = fit(ours, optim="adamw_8bit", max_grad_norm=0.0)
    assert [row["loss"] for row in logged] == pytest.approx([row["loss"] for row in rows], abs=0.02)
    found = states(made)
    eight = {name for name, state in found.items() if state["state1"].dtype == torch.uint8}
    embeddings = {name for name in found if "_embeddings." in name}
    small = {name for name, weight in ours.named_parameters() if weight.numel() < 4096}
    assert len(embeddings) == 3 and eight == {name for name in found if name not in embeddings | small}
    other, _ = fit(inside, optim="adamw_8bit", **FREE)
    assert same(weights(inside), weights(ours))
    assert {name for name, state in states(other).items() if state["state1"].dtype == torch.uint8} == eight


@pytest.mark.usefixtures("eight_bits")
def test_one_run_s_embeddings_are_nothing_to_the_next(fresh: Fit, fit: Fit) -> None:
    """bitsandbytes' one manager would keep the next run's weights in these places in 32 bits, and this model alive."""
    from bitsandbytes.optim import GlobalOptimManager  # type: ignore[attr-defined]

    manager: Any = GlobalOptimManager
    before = len(manager.get_instance().module_weight_config_triple)
    model = fresh()
    made, _ = fit(model, optim="adamw_8bit", max_steps=1)
    assert len(manager.get_instance().module_weight_config_triple) == before
    assert not manager.get_instance().index2config and not manager.get_instance().pid2config
    table = weakref.ref(model[0].model.embeddings.word_embeddings)
    del model, made
    gc.collect()
    assert table() is None, "the model lives on"
