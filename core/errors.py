"""What Burnish raises when the user can mend something: one line, what, where and what to do."""

from __future__ import annotations


class BurnishError(Exception):
    """A fault with its remedy.

    Args:
        what: The fault, in a few words, without a full stop.
        where: File, row, column, module or parameter it was found in.
        fix: What to do about it, as an instruction.

    The message is always one line: `where: what (fix)`. The three parts stay readable as attributes.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        line = f"{where}: {what}" if where else what
        super().__init__(" ".join((f"{line}. {fix}" if fix else line).split()))


class ConfigError(BurnishError, ValueError):
    """A parameter, flag or config entry that cannot be honoured."""

    exit_code = 2


class DataError(BurnishError, ValueError):
    """A data file, column or row that cannot be trained on."""

    exit_code = 3


class ModelError(BurnishError):
    """A model or checkpoint that cannot be loaded, trained or saved."""

    exit_code = 4


class PluginError(BurnishError):
    """A plugin that is missing, broken, refused or in conflict."""

    exit_code = 5


class PatchError(PluginError):
    """A patch that cannot be applied or undone."""
