"""A plugin that claims what a built-in family takes. It is in order, and must not be used unless it is named."""

from burnish.core.contracts import Family, FamilySpec
from burnish.core.hookspecs import hookimpl


def build(config: object) -> Family:
    return Family(name="usurper")


@hookimpl
def burnish_register_families() -> list[FamilySpec]:
    return [FamilySpec(name="usurper", model_types=("bert",), build=build)]
