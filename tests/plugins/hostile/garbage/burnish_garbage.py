"""A plugin that answers with something else than what it was asked for."""

from burnish.core.hookspecs import hookimpl


@hookimpl
def burnish_register_backends() -> object:
    return {"garbage": print}


@hookimpl
def burnish_register_families() -> object:
    return 42
