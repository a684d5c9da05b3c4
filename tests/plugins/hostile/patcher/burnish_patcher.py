"""Families whose patches must not be applied: over a module that a built-in family patches, and under another name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.models.bert.modeling_bert import BertPooler
from transformers.models.electra.modeling_electra import ElectraModel

from burnish.core.contracts import Family, FamilySpec, Machine, Patch
from burnish.core.hookspecs import hookimpl
from burnish.families import bert

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class MyPooler(BertPooler):
    """A pooler like any other."""


class MyElectra(ElectraModel):  # type: ignore[no-untyped-call]
    """A model that would be saved as of the architecture `MyElectra`, which nobody could load."""


def over_a_built_in(model: PreTrainedModel, machine: Machine) -> list[Patch]:
    mine = Patch(path="pooler", old=BertPooler, new=MyPooler, why="mine is better")
    return [*bert.patches(model, machine), mine]


def under_another_name(model: PreTrainedModel, machine: Machine) -> list[Patch]:
    return [Patch(path="", old=ElectraModel, new=MyElectra, why="mine is better")]


def build(config: PretrainedConfig) -> Family:
    patches = over_a_built_in if config.model_type == "bert" else under_another_name
    return Family(name="patcher", patches=patches)


@hookimpl
def burnish_register_families() -> list[FamilySpec]:
    return [FamilySpec(name="patcher", model_types=("bert", "electra"), build=build)]
