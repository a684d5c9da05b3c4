"""How weights are stored, and what is refused before one is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BitsAndBytesConfig

from burnish.core.contracts import Machine, Precision
from burnish.core.errors import BurnishError, ConfigError, ModelError
from burnish.core.options import LoadOptions
from burnish.core.precision import PrecisionChoice, choose_precision
from burnish.core.quantised import CPU_FLOOR, kind_of, settings, stored_as

HERE = {"bitsandbytes": "0.50.2"}
CPU = Machine(device="cpu", packages=HERE)
GPU = Machine(device="cuda", dtypes=frozenset({"float32", "bfloat16"}), packages=HERE)
FOUR, EIGHT = (BitsAndBytesConfig(**{f"load_in_{kind}": True}) for kind in ("4bit", "8bit"))  # type: ignore[no-untyped-call]
POLICY = Precision(refused={"float16": "it overflows"})


def choose(options: dict[str, Any], machine: Machine = CPU, stored: str | None = None) -> PrecisionChoice:
    return choose_precision(LoadOptions(**options), POLICY, machine, stored=stored)


@pytest.mark.parametrize("machine, dtype", [(CPU, torch.float32), (GPU, torch.bfloat16)], ids=["cpu", "cuda"])
def test_4_bits_are_nf4_with_double_quantisation_under_the_policys_dtype(machine: Machine, dtype: torch.dtype) -> None:
    choice = choose({"quantization": "4bit"}, machine)
    config = choice.quantization_config
    assert (choice.dtype, choice.compute, choice.storage) == (dtype, dtype, "4bit")
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == dtype and config.llm_int8_skip_modules is None
    name = str(dtype).removeprefix("torch.")
    assert str(choice).startswith(f"{name} (4bit storage, ") and machine.device in str(choice)


@pytest.mark.parametrize("machine, dtype", [(CPU, torch.float32), (GPU, torch.bfloat16)], ids=["cpu", "cuda"])
def test_8_bits(machine: Machine, dtype: torch.dtype) -> None:
    choice = choose({"quantization": "8bit"}, machine)
    assert (choice.dtype, choice.storage) == (dtype, "8bit")
    assert choice.quantization_config.load_in_8bit and not choice.quantization_config.load_in_4bit


def test_a_stored_checkpoint_keeps_its_config_and_computes_by_the_policy() -> None:
    for options in ({}, {"quantization": "4bit"}):
        choice = choose(options, GPU, "4bit")
        assert (choice.storage, choice.dtype, choice.quantization_config) == ("4bit", torch.bfloat16, None)
        assert "4bit storage of the checkpoint" in choice.reason
    assert choose({"purpose": "inference"}, stored="8bit").dtype is None


def test_a_config_of_the_users_own_keeps_its_compute_dtype() -> None:
    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    for form in (given, given.to_dict()):
        choice = choose({"quantization_config": form})
        assert (choice.dtype, choice.compute, choice.storage) == (torch.float32, torch.bfloat16, "4bit")
        assert choice.quantization_config.bnb_4bit_quant_type == "fp4"


REFUSED: list[tuple[dict[str, Any], Machine, str | None, type[BurnishError], str]] = [
    ({"quantization": "8bit"}, CPU, "4bit", ConfigError, "load_in_8bit: the checkpoint is stored as 4bit. Drop"),
    ({"quantization": "4bit"}, CPU, "8bit", ConfigError, "load_in_4bit: the checkpoint is stored as 8bit. Drop"),
    ({"quantization": "4bit"}, CPU, "gptq", ConfigError, "load_in_4bit: the checkpoint is stored as gptq. Drop"),
    ({}, CPU, "gptq", ConfigError, "the checkpoint: the weights are stored by gptq; adapters train over"),
    ({"purpose": "full"}, CPU, "4bit", ConfigError, "full_finetuning: the weights are stored as 4bit, which cannot be"),
    ({"purpose": "full", "quantization_config": FOUR}, CPU, None, ConfigError, "full_finetuning: the weights are"),
    ({"sixteen_bit": True}, CPU, "4bit", ConfigError, "load_in_16bit: the weights are stored as 4bit. Drop"),
    ({"quantization_config": EIGHT}, CPU, "8bit", ConfigError, "with the checkpoint's own (8bit). Drop it"),
    ({"quantization_config": EIGHT, "quantization": "8bit"}, CPU, None, ConfigError, "with load_in_8bit. Pass one"),
    ({"quantization": "4bit", "dtype": torch.float16}, CPU, None, ModelError, "must not run in float16: it overflows"),
    (
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"}},
        CPU,
        None,
        ModelError,
        "bnb_4bit_compute_dtype: this architecture must not run in float16: it overflows. Pass load_in_4bit=True",
    ),
    ({"quantization": "4bit"}, Machine(device="cpu"), None, ConfigError, "needs bitsandbytes, which is not installed"),
    ({}, Machine(device="cuda"), "8bit", ConfigError, "load_in_8bit: needs bitsandbytes, which is not installed. pip"),
    (
        {"quantization": "4bit"},
        Machine(device="mps", packages=HERE),
        None,
        ConfigError,
        "has not been shown to be right",
    ),
    ({}, Machine(device="xpu", packages=HERE), "4bit", ConfigError, "has not been shown to be right on xpu"),
    (
        {"quantization": "8bit"},
        Machine(device="cpu", packages={"bitsandbytes": "0.49.2"}),
        None,
        ConfigError,
        f"load_in_8bit: needs bitsandbytes {CPU_FLOOR} on a CPU, and 0.49.2 is installed. pip install -U bitsandbytes",
    ),
]


@pytest.mark.parametrize("options, machine, stored, kind, message", REFUSED, ids=[entry[-1][:60] for entry in REFUSED])
def test_refusals_are_one_line(
    options: dict[str, Any], machine: Machine, stored: str | None, kind: type[BurnishError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        choose(options, machine, stored)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_older_bitsandbytes_serves_a_gpu_and_inference() -> None:
    old = {"bitsandbytes": "0.49.0"}
    gpu = Machine(device="cuda", dtypes=frozenset({"float32", "bfloat16"}), packages=old)
    assert choose({"quantization": "4bit"}, gpu).storage == "4bit"
    assert choose({"purpose": "inference"}, Machine(device="cpu", packages=old), "4bit").storage == "4bit"


def test_how_a_config_says_what_it_stores() -> None:
    assert kind_of(None) is None
    for config, kind in ((FOUR, "4bit"), (EIGHT, "8bit")):
        assert kind_of(config) == kind_of(config.to_dict()) == kind
    assert kind_of({"quant_method": "awq"}) == "awq"
    assert stored_as(BertConfig()) is None
    assert stored_as(BertConfig.from_dict({"quantization_config": FOUR.to_dict()})) == "4bit"
    assert stored_as(SimpleNamespace(quantization_config={"quant_method": "gptq"})) == "gptq"  # type: ignore[arg-type]


def test_what_a_family_keeps_in_float32_is_not_quantised() -> None:
    """By suffixes of paths: the module and all inside it, not one whose name merely starts or ends alike."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = settings("4bit", torch.float32, Precision(keep_float32=("head", "layer.1.out")))
    paths = {
        "head": False, "model.head": False, "model.head.dense": False, "model.layer.1.out": False, "layer.1.out": False,
        "model.header": True, "model.layer.11.out": True, "model.layer.2.out": True, "model.head_norm.dense": True,
    }  # fmt: skip
    assert {path: should_convert_module(path, config.llm_int8_skip_modules) for path in paths} == paths


def test_a_script_over_quantised_weights_waits_for_an_adapter() -> None:
    options = LoadOptions(purpose="script")
    assert options.resolved(None).purpose == "full"
    for waits in (
        options.resolved(None, "4bit"),
        LoadOptions(purpose="script", quantization_config=FOUR).resolved(None),
    ):
        assert (waits.purpose, waits.dtype) == ("adapters", torch.float32)


@pytest.mark.parametrize("device, expected", [("cpu", {"": "cpu"}), ("cuda:1", {"": "cuda:1"}), ("cuda", None)])
def test_a_quantised_base_goes_where_it_was_asked_to(device: str, expected: Any) -> None:
    """transformers would take the current GPU; "cuda" is that."""
    from burnish.core.prepared import _with_precision

    decision: Any = SimpleNamespace(device=device, precision=choose({"quantization": "4bit"}))
    given = _with_precision({}, decision)
    assert given.get("device_map") == expected and given["quantization_config"].load_in_4bit
    assert _with_precision({"device_map": "auto"}, decision)["device_map"] == "auto"
    plain: Any = SimpleNamespace(device=device, precision=choose({}))
    assert _with_precision({}, plain) == {"dtype": torch.float32}
