"""`FastSentenceTransformer.get_peft_model`: every parameter acts, or raises one line and leaves no half adapter."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import FastSentenceTransformer
from burnish.core.errors import BurnishError, ConfigError, ModelError

Make = Callable[..., Any]
LINEAR = ["attention.output.dense", "attention.self.key", "attention.self.query", "attention.self.value"]
LAYER = sorted([*LINEAR, "intermediate.dense", "output.dense"])
EVERY = sorted(f"encoder.layer.{layer}.{name}" for layer in (0, 1) for name in LAYER)
SOME = ["encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.value"]
SIGNATURE = (
    "model, r, lora_alpha, target_modules, lora_dropout, bias, use_rslora, use_dora, modules_to_save, "
    "layers_to_transform, init_lora_weights, loftq_config, layers_pattern, max_seq_length, task_type, "
    "use_gradient_checkpointing, random_state"
)


@pytest.fixture
def adapt(load: Make, tiny_bert_st: Path) -> Make:
    """A fresh model with an adapter; takes `get_peft_model`'s parameters."""

    def adapt(**lora: Any) -> Any:
        return FastSentenceTransformer.get_peft_model(load(tiny_bert_st), **lora)

    return adapt


def adapted_layers(model: Any) -> list[str]:
    return sorted({name[8:].split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name})


def layers(model: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_signature_is_the_documented_one() -> None:
    parameters = inspect.signature(FastSentenceTransformer.get_peft_model).parameters
    assert ", ".join(parameters) == SIGNATURE
    defaults = [parameters[name].default for name in ("r", "lora_alpha", "lora_dropout", "bias", "random_state")]
    assert defaults == [16, 16, 0.0, "none", 3407]


def test_the_defaults(load: Make, tiny_bert_st: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    model = load(tiny_bert_st)
    before = model.encode(texts)
    capsys.readouterr()
    assert FastSentenceTransformer.get_peft_model(model) is model
    said = capsys.readouterr().err
    assert adapted_layers(model) == EVERY, "the dead pooler has an adapter, or a live layer has none"
    assert all("lora" in name for name in trained(model)) and len(trained(model)) == 2 * len(EVERY)
    assert (model.encode(texts) == before).all(), "a fresh adapter changes the embeddings"
    assert {(layer.r["default"], layer.scaling["default"]) for layer in layers(model)} == {(16, 1.0)}
    assert "0.01M to train (1.41%)" in said and "pooler.dense gets no adapter: nothing reads its output" in said


REFUSALS: list[tuple[dict[str, Any], type[BurnishError], str]] = [
    ({"r": 0}, ConfigError, r"get_peft_model: PEFT refuses the adapter: `r` should be a positive integer"),
    (
        {"target_modules": ["q_proj"]},
        ConfigError,
        r"target_modules: no module is called 'q_proj'\. Linear layers here: dense, key, query, value",
    ),
    ({"target_modules": []}, ConfigError, r"target_modules: the list is empty\. Pass None"),
    ({"target_modules": "query"}, ConfigError, r"target_modules: 'query' matches no module.*pass a list: \['query'\]"),
    ({"target_modules": "("}, ConfigError, r"target_modules: '\(' is no regular expression"),
    ({"target_modules": ["LayerNorm"]}, ConfigError, r"get_peft_model: PEFT refuses the adapter: .*LayerNorm"),
    ({"lora_dropout": 1.5}, ConfigError, r"get_peft_model: PEFT refuses the adapter: dropout probability"),
    ({"bias": "some"}, ConfigError, r"get_peft_model: PEFT refuses the adapter: .*some"),
    (
        {"modules_to_save": ["head"]},
        ConfigError,
        r"modules_to_save: no module is called 'head'\. Modules here: LayerNorm",
    ),
    ({"layers_to_transform": [7]}, ConfigError, r"get_peft_model: PEFT refuses the adapter: No modules were targeted"),
    ({"layers_pattern": "layer"}, ConfigError, r"get_peft_model: PEFT refuses .*`layers_to_transform` must"),
    ({"init_lora_weights": "zeros"}, ConfigError, r"get_peft_model: PEFT refuses the adapter: Unknown initialization"),
    ({"init_lora_weights": "eva"}, ConfigError, r"init_lora_weights: 'eva' needs a pass over data\. Pass True"),
    ({"init_lora_weights": "corda"}, ConfigError, r"init_lora_weights: 'corda' needs a pass over data"),
    ({"loftq_config": {"loftq_bits": 4}}, ConfigError, r"loftq_config: it acts only on LoftQ's initialisation"),
    (
        {"loftq_config": {"bits": 4}, "init_lora_weights": "loftq"},
        ConfigError,
        r"loftq_config: 'bits' is unknown\. It takes loftq_bits and loftq_iter",
    ),
    ({"max_seq_length": 129}, ConfigError, r"max_seq_length: 129 is not between 1 and the 128 positions"),
    ({"max_seq_length": 0}, ConfigError, r"max_seq_length: 0 is not between 1 and the 128 positions"),
    ({"task_type": "EMBEDDING"}, ConfigError, r"get_peft_model: PEFT refuses the adapter: Invalid task type"),
    ({"use_gradient_checkpointing": "often"}, ConfigError, r"use_gradient_checkpointing: 'often' is unknown"),
]


@pytest.mark.parametrize("lora, kind, message", REFUSALS, ids=[str(lora) for lora, _, _ in REFUSALS])
def test_what_is_refused_leaves_the_model_as_it_was(
    load: Make, tiny_bert_st: Path, lora: dict[str, Any], kind: type[BurnishError], message: str
) -> None:
    model = load(tiny_bert_st)
    keys, trainable = list(model.state_dict()), list(trained(model))
    with pytest.raises(kind, match=message) as caught:
        FastSentenceTransformer.get_peft_model(model, **lora)
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == keys and list(trained(model)) == trainable and len(trainable) > 30
    assert model.max_seq_length == 64 and model.burnish.checkpointing == "off"
    assert adapted_layers(FastSentenceTransformer.get_peft_model(model, r=2)) == EVERY


@pytest.mark.parametrize("options", [{"for_inference": True}, {"full_finetuning": True}], ids=str)
def test_a_model_for_something_else_takes_no_adapter(load: Make, tiny_bert_st: Path, options: Any) -> None:
    flag = next(iter(options))
    with pytest.raises(ModelError, match=rf"get_peft_model: this model was loaded for .*without {flag}=True"):
        FastSentenceTransformer.get_peft_model(load(tiny_bert_st, **options))


def test_a_plain_model_and_a_second_adapter_are_refused(adapt: Make, plain: Make, tiny_bert_st: Path) -> None:
    with pytest.raises(ModelError, match=r"get_peft_model: this model was not loaded by Burnish\. Load it with"):
        FastSentenceTransformer.get_peft_model(plain(tiny_bert_st))
    with pytest.raises(ModelError, match=r"get_peft_model: this model has an adapter already"):
        FastSentenceTransformer.get_peft_model(adapt())


@pytest.mark.parametrize("rslora, expected", [(False, 24 / 8), (True, 24 / math.sqrt(8))])
def test_rank_alpha_and_rslora(adapt: Make, rslora: bool, expected: float) -> None:
    model = adapt(r=8, lora_alpha=24, use_rslora=rslora)
    assert {layer.r["default"] for layer in layers(model)} == {8}
    assert {layer.lora_A["default"].out_features for layer in layers(model)} == {8}
    assert all(layer.scaling["default"] == pytest.approx(expected) for layer in layers(model))


@pytest.mark.parametrize(
    "targets, expected",
    [
        (None, EVERY),
        ("all-linear", EVERY),
        (["query", "key", "value", "dense"], EVERY),
        (["query"], [name for name in EVERY if name.endswith("query")]),
        (("attention.output.dense",), [name for name in EVERY if "attention.output" in name]),
        (r".*layer\.1\.attention\.self\.(query|value)", SOME),
        (r".*dense", [name for name in EVERY if name.endswith("dense")]),
    ],
    ids=str,
)  # fmt: skip
def test_target_modules_and_never_the_dead_pooler(adapt: Make, targets: Any, expected: list[str]) -> None:
    assert adapted_layers(adapt(target_modules=targets)) == expected


def test_the_pooler_would_get_an_adapter_that_nothing_trains(plain: Make, tiny_bert_st: Path, step: Make) -> None:
    """What the family's list is for: plain PEFT with the usual names puts one there."""
    from peft import LoraConfig

    model = plain(tiny_bert_st)
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "key", "value", "dense"]))
    before = model[0].model.pooler.dense.lora_A["default"].weight.clone()
    step(model)
    assert torch.equal(before, model[0].model.pooler.dense.lora_A["default"].weight)


def test_lora_dropout(adapt: Make) -> None:
    assert {layer.lora_dropout["default"].p for layer in layers(adapt(lora_dropout=0.3))} == {0.3}
    assert {type(layer.lora_dropout["default"]).__name__ for layer in layers(adapt())} == {"Identity"}


@pytest.mark.parametrize("bias, expected", [("none", 0), ("lora_only", len(EVERY)), ("all", len(EVERY) + 5 + 1)])
def test_bias(adapt: Make, bias: str, expected: int) -> None:
    names = [name for name in trained(adapt(bias=bias)) if name.endswith("bias")]
    assert len(names) == expected  # "all" adds five layer norms and the pooler's


def test_use_dora(adapt: Make) -> None:
    assert sum("lora_magnitude_vector" in name for name in trained(adapt(use_dora=True))) == len(EVERY)
    assert not any("lora_magnitude_vector" in name for name in trained(adapt()))


def test_modules_to_save(adapt: Make) -> None:
    names = {name for name in trained(adapt(modules_to_save=["embeddings.LayerNorm"])) if "lora" not in name}
    assert names == {f"0.model.embeddings.LayerNorm.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")}


@pytest.mark.parametrize("pattern", [None, "layer", ["layer"]], ids=str)
@pytest.mark.parametrize("which", [1, [1]], ids=str)
def test_layers_to_transform(adapt: Make, which: Any, pattern: Any) -> None:
    second = [name for name in EVERY if "layer.1" in name]
    assert adapted_layers(adapt(layers_to_transform=which, layers_pattern=pattern)) == second


@pytest.mark.parametrize("start", [True, False, "gaussian", "pissa", "olora", "orthogonal"], ids=str)
def test_init_lora_weights(adapt: Make, load: Make, tiny_bert_st: Path, texts: list[str], start: Any) -> None:
    model = adapt(init_lora_weights=start, r=4)
    zero = all(not layer.lora_B["default"].weight.any() for layer in layers(model))
    assert zero == (start in (True, "gaussian"))
    same = abs(model.encode(texts) - load(tiny_bert_st).encode(texts)).max() <= 1e-5
    assert same == (start is not False)
    if start is not True:
        default = trained(adapt(r=4))
        assert any(not torch.equal(values, default[name]) for name, values in trained(model).items())


def test_loftq(adapt: Make) -> None:
    """LoftQ starts from a quantised copy of the weights, which bitsandbytes makes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ConfigError, match="bitsandbytes is not available"):
            adapt(init_lora_weights="loftq")
        return
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="LoftQ quantises on a CUDA device"):
            adapt(init_lora_weights="loftq")
        return
    weights = [trained(adapt(init_lora_weights="loftq", loftq_config=entry)) for entry in (None, {"loftq_bits": 8})]
    assert all(values.abs().max() > 0 for entry in weights for values in entry.values())
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_max_seq_length_and_task_type(adapt: Make) -> None:
    model = adapt(max_seq_length=20, task_type="SEQ_CLS")
    assert model.max_seq_length == 20 and model[0].model.peft_config["default"].task_type == "SEQ_CLS"
    model = adapt()
    assert model.max_seq_length == 64 and model[0].model.peft_config["default"].task_type == "FEATURE_EXTRACTION"


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("asked", [None, False, True, "unsloth", ...], ids=str)
def test_use_gradient_checkpointing(load: Make, tiny_bert_st: Path, step: Make, loaded: bool, asked: Any) -> None:
    model = load(tiny_bert_st, use_gradient_checkpointing=loaded)
    lora = {} if asked is ... else {"use_gradient_checkpointing": asked}
    FastSentenceTransformer.get_peft_model(model, r=2, **lora)
    on = loaded if asked is ... else bool(asked)
    assert {layer.gradient_checkpointing for layer in model[0].model.encoder.layer} == {on}
    assert (model.burnish.checkpointing != "off") == on
    before = {name: values.clone() for name, values in trained(model).items()}
    step(model)
    assert any(not torch.equal(before[name], values) for name, values in trained(model).items())


def test_checkpointed_adapters_get_the_same_gradients(load: Make, tiny_bert_st: Path, step: Make) -> None:
    results = []
    for option in (False, True):
        model = load(tiny_bert_st, config_kwargs={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
        FastSentenceTransformer.get_peft_model(model, r=2, init_lora_weights=False, use_gradient_checkpointing=option)
        step(model)
        results.append(trained(model))
    for name, values in results[0].items():
        torch.testing.assert_close(results[1][name], values, rtol=1e-5, atol=1e-7)


def test_random_state(adapt: Make) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, torch_state = trained(adapt()), torch.get_rng_state()
    torch.rand(7)
    second, third = trained(adapt(random_state=3407)), trained(adapt(random_state=1))
    assert torch.equal(before, torch_state), "the global generator was moved"
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)
    assert all(values.dtype == torch.float32 for values in first.values())
