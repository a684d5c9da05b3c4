"""What the contract's values check of themselves. Each helper raises ValueError: the owner's class and the fault."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Letters, digits, "_" and "-": what an entry point's name may hold beside the dot that parts kind from value.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def check(condition: bool, owner: object, message: str) -> None:
    """Refuse unless `condition`, under the name of the owner's class and the owner's own where it has one."""
    if not condition:
        name = getattr(owner, "name", None) or getattr(owner, "target", None)
        whose = f" {name}" if isinstance(name, str) and _NAME.fullmatch(name) else ""
        raise ValueError(f"{type(owner).__name__}{whose}: {message}")


def check_name(owner: object, name: object) -> None:
    """Letters, digits, `_` and `-`: a name that can stand in an entry point's."""
    fits = isinstance(name, str) and _NAME.fullmatch(name) is not None
    check(fits, owner, f"name {name!r} is not letters, digits, '_', '-'")


def check_members(owner: object, what: str, given: Iterable[object], known: Sequence[str]) -> None:
    """Every item is a known one."""
    unknown = [item for item in given if item not in known]
    check(not unknown, owner, f"{what} {unknown} not among {list(known)}")


def check_tuples(owner: object, *parts: str) -> None:
    """Each part is a tuple of non-empty strings; a lone string would pass for a tuple of letters."""
    for part in parts:
        value = getattr(owner, part)
        fits = isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)
        check(fits, owner, f"{part} {value!r} is not a tuple of non-empty strings")


def check_types(owner: object, **parts: type | tuple[type, ...]) -> None:
    """Each part of `owner` is of its kind."""
    for part, kinds in parts.items():
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        value = getattr(owner, part)
        # True is an int to Python; to a priority or an offset it is a slip.
        fits = isinstance(value, kinds) and (kinds is not int or not isinstance(value, bool))
        check(fits, owner, f"{part} is a {type(value).__name__}, not a {names}")


def check_functions(owner: object, *parts: str) -> None:
    """Each part can be called."""
    for part in parts:
        check(callable(getattr(owner, part)), owner, f"{part} is not a function")
