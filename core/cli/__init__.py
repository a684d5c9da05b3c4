"""The `burnish` program. Commands import what they need when they run, so `--help` answers at once."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

_by_python = warnings.formatwarning


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit: 0 done, 1 failed, 2 wrong use, 3 bad data, 4 model, 5 plugin, 130 interrupted."""
    warnings.formatwarning = _warning  # type: ignore[assignment]
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def _warning(text: Warning | str, kind: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A plugin's fault in one line, as errors are; other warnings as Python writes them."""
    from ..registry import PluginWarning

    return f"warning: {text}\n" if issubclass(kind, PluginWarning) else _by_python(text, kind, filename, lineno, line)


def run(arguments: list[str]) -> int:
    """The program without the exit: returns the exit code. Set BURNISH_DEBUG=1 to see tracebacks of user errors."""
    from ..errors import BurnishError

    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        print(f"error: the command line needs {error.name}. Run: pip install 'burnish[cli]'", file=sys.stderr)
        return 2
    from .app import dispatch

    try:
        return dispatch(arguments)
    except BurnishError as error:
        if os.environ.get("BURNISH_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if os.environ.get("BURNISH_DEBUG") or error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}. Mend the cause and run again", file=sys.stderr)
        return 1
