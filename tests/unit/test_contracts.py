"""What a plugin hands over is checked when it is made, cannot be changed afterwards, and costs no import of torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from burnish.core import contracts
from burnish.core.contracts import (
    BackendSpec,
    CommandSpec,
    ExporterSpec,
    ExportRequest,
    Exports,
    Family,
    FamilySpec,
    Head,
    KernelSpec,
    LoraTargets,
    Machine,
    Needs,
    Packing,
    Patch,
    Pooling,
    Precision,
    StepContext,
)


def nothing(*args: Any) -> Any:
    return args


class Old:
    pass


class New(Old):
    pass


# One that is right, for every value of the contract that checks itself.
RIGHT: dict[type, dict[str, Any]] = {
    Pooling: {"mode": "cls", "normalize": True},
    LoraTargets: {"names": ("query",), "exclude": ("pooler.dense",)},
    Packing: {"position_offset": 2, "attention": "patch"},
    Precision: {"adapter_base": ("float16", "float32"), "refused": {"bfloat16": "overflows"}},
    Head: {"reads": "last", "logits": nothing},
    Exports: {"gguf": "bert", "refused": {"onnx": "comes out wrong"}},
    Patch: {"path": "encoder.0", "old": Old, "new": New, "why": "faster"},
    Needs: {"devices": ("cuda",), "compute_capability": (8, 0), "dtypes": ("bfloat16",), "packages": ("triton",)},
    Family: {"name": "electra", "packing": Packing(), "heads": {"text-generation": Head(reads="last", logits=nothing)}},
    FamilySpec: {"name": "electra", "model_types": ("electra", "data2vec-text"), "build": nothing},
    BackendSpec: {"name": "fused", "summary": "fast", "build_step": nothing, "priority": 5},
    KernelSpec: {"operation": "layer_norm", "name": "triton", "load": nothing},
    ExporterSpec: {"target": "gguf", "summary": "for llama.cpp", "run": nothing},
    CommandSpec: {"name": "bench", "summary": "measures", "run": nothing},
}

WRONG: list[tuple[type, dict[str, Any], str]] = [
    (Pooling, {"mode": "average"}, "mode ['average'] not among"),
    (Pooling, {"normalize": "yes"}, "normalize is a str, not a bool"),
    (LoraTargets, {"names": "query"}, "names 'query' is not a tuple"),
    (LoraTargets, {"exclude": ("pooler.dense", "")}, "exclude ('pooler.dense', '') is not a tuple of non-empty"),
    (Packing, {"position_offset": -1}, "position_offset is negative"),
    (Packing, {"position_offset": True}, "position_offset is a bool, not a int"),
    (Packing, {"attention": "flash"}, "attention ['flash'] not among"),
    (Packing, {"causal": None}, "causal is a NoneType"),
    (Precision, {"adapter_base": ()}, "adapter_base is empty"),
    (Precision, {"adapter_base": ("bfloat16",)}, "all of it is refused"),
    (Precision, {"adapter_base": ("float8",)}, "dtypes ['float8'] not among"),
    (Precision, {"adapter_base": "float32"}, "adapter_base 'float32' is not a tuple"),
    (Precision, {"keep_float32": "norm"}, "keep_float32 'norm' is not a tuple"),
    (Precision, {"full": "bfloat16"}, "full=bfloat16 is refused by its own policy"),
    (Precision, {"refused": ("float16",)}, "refused is a tuple, not a Mapping"),
    (Head, {"reads": "middle"}, "reads ['middle'] not among"),
    (Exports, {"gguf": True}, "gguf is a bool"),
    (Exports, {"onnx": "no"}, "onnx is a str"),
    (Exports, {"refused": ["onnx"]}, "refused is a list"),
    (Patch, {"path": ""}, "the transformer's own class must keep its name: set New.__name__"),
    (Patch, {"old": "Old"}, "encoder.0: old and new must be classes"),
    (Patch, {"new": Old}, "encoder.0: old and new are the same class"),
    (Patch, {"new": dict}, "encoder.0: dict does not subclass Old"),
    (Patch, {"why": ""}, "encoder.0: why is empty"),
    (Needs, {"devices": "cuda"}, "devices 'cuda' is not a tuple"),
    (Needs, {"dtypes": ("float8",)}, "dtypes ['float8'] not among"),
    (Needs, {"packages": [1]}, "packages [1] is not a tuple"),
    (Needs, {"compute_capability": 8.0}, "compute_capability is a float"),
    (Family, {"name": "my family"}, "name 'my family' is not letters, digits"),
    (Family, {"name": None}, "name None is not letters, digits"),
    (Family, {"lora": ("query",)}, "Family electra: lora is a tuple, not a LoraTargets"),
    (Family, {"precision": None}, "Family electra: precision is a NoneType"),
    (Family, {"exports": {}}, "Family electra: exports is a dict"),
    (Family, {"packing": True}, "Family electra: packing is a bool"),
    (Family, {"pooling": "mean"}, "Family electra: pooling is not a Pooling or a function"),
    (Family, {"patches": ()}, "Family electra: patches is not a function"),
    (Family, {"checkpointing": True}, "Family electra: checkpointing is not a function"),
    (Family, {"heads": {"ranking": "first"}}, "Family electra: heads ['ranking'] are not a Head"),
    (Family, {"leaves": "speed"}, "Family electra: leaves 'speed' is not a tuple"),
    (FamilySpec, {"name": "a.b"}, "name 'a.b' is not letters"),
    (FamilySpec, {"build": Family(name="electra")}, "FamilySpec electra: build is not a function"),
    (FamilySpec, {"model_types": "electra"}, "model_types 'electra' is not a tuple"),
    (FamilySpec, {"model_types": ("kosmos-2.5",)}, "name 'kosmos-2.5' is not letters"),
    (FamilySpec, {"model_types": ()}, "needs model_types, or fallback=True"),
    (FamilySpec, {"fallback": True}, "needs model_types, or fallback=True without any"),
    (FamilySpec, {"specificity": 2}, "specificity is not a function"),
    (BackendSpec, {"name": "auto"}, "a backend cannot be called 'auto'"),
    (BackendSpec, {"name": "-x"}, "name '-x' is not letters"),
    (BackendSpec, {"build_step": None}, "BackendSpec fused: build_step is not a function"),
    (BackendSpec, {"priority": "high"}, "priority is a str, not a int"),
    (BackendSpec, {"needs": ("cuda",)}, "needs is a tuple, not a Needs"),
    (BackendSpec, {"summary": None}, "summary is a NoneType"),
    (BackendSpec, {"few_shapes": 1}, "few_shapes is a int"),
    (KernelSpec, {"operation": "layer norm"}, "name 'layer norm' is not letters"),
    (KernelSpec, {"name": ""}, "name '' is not letters"),
    (KernelSpec, {"load": "module"}, "load is not a function"),
    (KernelSpec, {"needs": None}, "needs is a NoneType"),
    (KernelSpec, {"priority": 1.5}, "priority is a float"),
    (ExporterSpec, {"target": "gguf q4"}, "name 'gguf q4' is not letters"),
    (ExporterSpec, {"run": None}, "ExporterSpec gguf: run is not a function"),
    (ExporterSpec, {"needs": {}}, "needs is a dict"),
    (CommandSpec, {"name": "--bench"}, "name '--bench' is not letters"),
    (CommandSpec, {"run": "bench"}, "run is not a function"),
    (CommandSpec, {"summary": 1}, "summary is a int"),
]


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_what_is_right_is_taken(kind: type) -> None:
    value = kind(**RIGHT[kind])
    assert all(getattr(value, part) == given for part, given in RIGHT[kind].items())


@pytest.mark.parametrize(("kind", "change", "message"), WRONG, ids=lambda part: getattr(part, "__name__", None))
def test_what_is_wrong_is_refused_where_it_is_made(kind: type, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**RIGHT[kind] | change)
    assert str(caught.value).startswith(kind.__name__)
    assert message in str(caught.value)


def test_every_value_that_checks_itself_is_seen_to_refuse() -> None:
    values = {value for value in vars(contracts).values() if isinstance(value, type)}
    checked = {value for value in values if "__post_init__" in vars(value)}
    assert checked == set(RIGHT) == {kind for kind, _, _ in WRONG}


VALUES = [*RIGHT, Machine, ExportRequest, StepContext]


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_values_are_frozen_keyword_only_and_hold_nothing_else(kind: Any) -> None:
    parts = [part.name for part in dataclasses.fields(kind)]
    value = kind(**RIGHT.get(kind, dict.fromkeys(parts)))
    assert kind.__dataclass_params__.frozen and all(part.kw_only for part in dataclasses.fields(kind))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, parts[0], None)
    with pytest.raises((AttributeError, TypeError)):  # slots: no new attribute either
        object.__setattr__(value, "other", None)


def test_a_pooling_rule_is_asked_with_the_config_and_the_files() -> None:
    config = PretrainedConfig()
    asked: list[Any] = []

    def rule(*args: Any) -> Pooling:
        asked.append(args)
        return Pooling(mode="cls")

    family = Family(name="electra", pooling=rule)
    assert family.default_pooling(config, frozenset({"config.json"})) == Pooling(mode="cls")
    assert asked == [(config, frozenset({"config.json"}))]
    assert Family(name="electra", pooling=Pooling(mode="max")).default_pooling(config, frozenset()).mode == "max"


def test_a_pooling_rule_that_returns_something_else_is_told() -> None:
    family = Family(name="electra", pooling=lambda config, files: "mean")  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=r"electra: its pooling rule returned a str"):
        family.default_pooling(PretrainedConfig(), frozenset())


def test_a_family_matches_its_model_types_as_narrowly_as_it_says() -> None:
    config: PretrainedConfig = type("Config", (PretrainedConfig,), {"model_type": "electra"})()
    assert FamilySpec(name="a", model_types=("electra",), build=nothing).matches(config) == 1
    assert FamilySpec(name="a", model_types=("bert",), build=nothing, specificity=lambda config: 9).matches(config) == 0
    assert (
        FamilySpec(name="a", model_types=("electra",), build=nothing, specificity=lambda config: 3).matches(config) == 3
    )
    assert (
        FamilySpec(name="a", model_types=("electra",), build=nothing, specificity=lambda config: 0).matches(config) == 0
    )
    assert FamilySpec(name="a", fallback=True, build=nothing).matches(config) == 0


H100 = Machine(
    device="cuda", compute_capability=(9, 0), dtypes=frozenset({"float32", "bfloat16"}), packages={"triton": "3.6"}
)
CPU = Machine(device="cpu")


@pytest.mark.parametrize(
    ("needs", "machine", "missing"),
    [
        (Needs(), CPU, None),
        (Needs(devices=("cuda", "cpu")), CPU, None),
        (Needs(devices=("cuda", "xpu")), CPU, "needs cuda or xpu, this is cpu"),
        (Needs(compute_capability=(9, 0)), H100, None),
        (Needs(compute_capability=(10, 0)), H100, "needs compute capability 10.0"),
        (Needs(compute_capability=(8, 0)), CPU, "needs compute capability 8.0"),
        (Needs(dtypes=("float32", "float16")), H100, "needs float16, which cuda lacks"),
        (Needs(packages=("triton",)), H100, None),
        (Needs(packages=("triton", "flash-attn", "x")), H100, "needs the package flash-attn, x"),
    ],
)
def test_needs_say_what_a_machine_lacks(needs: Needs, machine: Machine, missing: str | None) -> None:
    assert needs.missing(machine) == missing


def test_mappings_of_any_kind_do() -> None:
    assert Precision(refused=OrderedDict(float16="overflows")).refused["float16"] == "overflows"


HEAVY = ["torch", "transformers", "sentence_transformers", "datasets", "peft", "numpy"]


@pytest.mark.parametrize("extra", ["", "import numpy"])
def test_contracts_and_hookspecs_load_nothing_heavy(extra: str, tmp_path: Path) -> None:
    code = f"""
import json, sys
import burnish.core.contracts, burnish.core.hookspecs
{extra}
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    # The second case shows that the first would see a heavy import.
    assert json.loads(done.stdout) == (["numpy"] if extra else [])
