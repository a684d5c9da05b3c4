"""ELECTRA for Burnish: the smallest family plugin that does everything a user sees."""

from burnish.core.contracts import Family, FamilySpec, Packing, Pooling
from burnish.core.hookspecs import hookimpl


def build(config):
    """Say how this config is pooled and packed; LoRA adapts every linear layer."""
    return Family(
        name="electra",
        pooling=Pooling(mode="mean", normalize=True),
        packing=Packing(position_offset=0),
    )


@hookimpl
def burnish_register_families():
    return [FamilySpec(name="electra", model_types=("electra",), build=build)]
