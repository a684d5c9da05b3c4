"""Families whose sample configs are of no use: one raises, one is of another model type."""

from typing import NoReturn

from burnish.core.contracts import Family, FamilySpec
from burnish.core.hookspecs import hookimpl


def build(config: object) -> Family:
    return Family(name="sampler")


def no_sample(size: str) -> NoReturn:
    raise FileNotFoundError("no such file: samples.json")


def other_sample(size: str) -> object:
    from transformers import BertConfig

    return BertConfig(num_hidden_layers=1)


@hookimpl
def burnish_register_families() -> list[FamilySpec]:
    samples = {"sampler_raises": no_sample, "sampler_other": other_sample}
    return [
        FamilySpec(name=name, model_types=(name,), build=build, sample=sample)  # type: ignore[arg-type]
        for name, sample in samples.items()
    ]
