"""A plugin that takes its time to import, and then works."""

import time

from burnish.core.hookspecs import hookimpl

time.sleep(2.1)
seen: list[str] = []


@hookimpl
def burnish_model_loaded(model: object) -> None:
    seen.append(type(model).__name__)
