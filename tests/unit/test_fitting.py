"""What an architecture is found to be on a tiny random model, and that a wrong answer would be seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.utils import logging

from burnish.core import fitting
from burnish.core.adapters import lora_layers
from burnish.core.choices import KernelChoice
from burnish.core.contracts import FamilySpec, LoraTargets, Packing, Pooling, Precision
from burnish.core.errors import ModelError
from burnish.core.fitting import Facts, fit, quiet, random_model, sample_sizes
from burnish.core.registry import registry


def built_in() -> list[FamilySpec]:
    """Every family that comes with Burnish and is for one architecture."""
    plugins = registry([])
    found = plugins.collect(plugins.claimants("model_type"), "burnish_register_families", FamilySpec)
    return [spec for _, spec in found if spec.sample is not None]


def facts(model_type: str) -> Facts:
    """What is found of a type that transformers knows."""
    kind = CONFIG_MAPPING[model_type]
    with quiet():
        return fit(kind(**sample_sizes(kind)["tiny"]), Pooling(), Precision())


@pytest.mark.parametrize("spec", built_in(), ids=lambda spec: spec.name)
def test_it_finds_what_the_built_in_families_say(spec: FamilySpec) -> None:
    assert spec.sample is not None
    config = spec.sample("tiny")
    family = spec.build(config)
    found = fit(config, family.default_pooling(config, frozenset()), family.precision)
    model = random_model(config)
    assert lora_layers(model, found.lora)[0] == lora_layers(model, family.lora)[0] != []
    said = family.packing
    if said is not None and said.attention == "interface":
        assert found.packing == said
    else:
        assert found.packing is None and "AttentionInterface" in found.packing_reason
    assert found.precision == family.precision


@pytest.mark.parametrize(
    ("model_type", "packing"),
    [
        ("electra", Packing()),
        ("roberta", Packing(position_offset=2)),
        ("nomic_bert", Packing()),
        ("llama", Packing(causal=True)),
        ("mistral", Packing(causal=True, sliding_window=True)),
    ],
)
def test_packed_input_is_tried(model_type: str, packing: Packing) -> None:
    assert facts(model_type).packing == packing


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("roformer", "its attention does not go through"),  # nothing of it does
        ("mobilebert", "packed and padded outputs differ by"),  # its embeddings look at their neighbours
    ],
)
def test_where_packed_input_is_not_exact_it_says_why(model_type: str, reason: str) -> None:
    found = facts(model_type)
    assert found.packing is None and reason in found.packing_reason


def test_texts_that_see_each_other_are_not_called_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(query: Any, key: Any, value: Any, bounds: Any, longest: int, **settings: Any) -> torch.Tensor:
        states = [part.transpose(0, 1)[None] for part in (query, key, value)]
        return nn.functional.scaled_dot_product_attention(*states)[0].transpose(0, 1)

    assert facts("bert").packing == Packing()
    monkeypatch.setattr(KernelChoice, "load", lambda choice: blind)
    found = facts("bert")
    assert found.packing is None and "differ by" in found.packing_reason


def test_without_an_attention_for_it_input_stays_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "choose_kernel", lambda *arguments: None)
    found = facts("bert")
    assert found.packing is None and found.packing_reason == "no plugin brings an attention for it"


@pytest.mark.parametrize(
    ("model_type", "lora", "dead"),
    [
        # The name "dense" is also that of the pooler's layer.
        ("bert", LoraTargets(names=("dense", "key", "query", "value"), exclude=("pooler.dense",)), ("pooler.dense",)),
        # The projection stands outside the layers, and only where two widths differ: no name may be insisted on.
        ("electra", LoraTargets(), ()),
        ("albert", LoraTargets(exclude=("pooler",)), ("pooler",)),
        ("jina_embeddings_v3", LoraTargets(names=("fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj")), ("dense",)),
    ],
)
def test_lora_goes_where_a_gradient_does(model_type: str, lora: LoraTargets, dead: tuple[str, ...]) -> None:
    found = facts(model_type)
    assert (found.lora, found.dead) == (lora, dead)


def test_a_layer_that_comes_many_times_is_alive_if_one_is() -> None:
    assert fitting._pattern("layers.11.experts.3.up") == "layers.*.experts.*.up" != fitting._pattern("lin1.up")


def test_modules_that_are_not_there_are_not_kept_in_float32() -> None:
    kind = CONFIG_MAPPING["bert"]
    policy = Precision(keep_float32=("LayerNorm", "rotary_emb"), refused={"float16": "for a reason"})
    found = fit(kind(**sample_sizes(kind)["tiny"]), Pooling(mode="cls"), policy)
    assert found.precision == Precision(keep_float32=("LayerNorm",), refused={"float16": "for a reason"})
    assert found.pooling == Pooling(mode="cls")


@pytest.mark.parametrize(
    "model_type", ["bert", "distilbert", "modernbert", "gemma3_text", "eurobert", "opt", "squeezebert"]
)
def test_sizes_are_small_under_the_names_of_the_config(model_type: str) -> None:
    kind = CONFIG_MAPPING[model_type]
    sizes = sample_sizes(kind)
    config = kind(**sizes["tiny"])
    assert set(sizes["tiny"]) <= set(vars(kind()))
    assert (config.vocab_size, config.hidden_size, config.max_position_embeddings) == (250, 32, 96)
    special = [value for name, value in vars(config).items() if name.endswith("_token_id") and isinstance(value, int)]
    assert all(at < config.vocab_size for at in special)
    assert sum(parameter.numel() for parameter in random_model(config).parameters()) < 100_000
    assert kind(**sizes["base"]).hidden_size == 768


def test_there_are_as_many_layers_as_kinds_of_them() -> None:
    for model_type, layers in (("bert", 2), ("gemma3_text", 6)):
        kind = CONFIG_MAPPING[model_type]
        assert kind(**sample_sizes(kind)["tiny"]).num_hidden_layers == layers
    types = set(kind(**sample_sizes(kind)["tiny"]).layer_types)
    assert types == set(kind().layer_types) and len(types) == 2


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("t5", "it has an encoder and a decoder"), ("vit", "no tiny model of type 'vit' reads token ids")],
)
def test_what_is_no_encoder_of_texts_is_refused(model_type: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        facts(model_type)


def test_what_has_no_layer_to_adapt_is_refused() -> None:
    with pytest.raises(ModelError, match="has no linear layer that its embeddings depend on"):
        facts("squeezebert")


def test_neither_random_numbers_nor_the_log_are_left_changed() -> None:
    state, level = torch.get_rng_state(), logging.get_verbosity()
    facts("roformer")
    assert torch.equal(torch.get_rng_state(), state) and logging.get_verbosity() == level
