"""A plugin whose import fails, as one does that was built for another version of a library."""

from burnish.core.contracts import no_such_name  # type: ignore[attr-defined] # noqa: F401
