"""`burnish verify`: a saved folder as another runtime reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that Burnish saved or exported.")],
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="What reads it; left out, what it was made for. Repeat for more.", show_default=False),
    ] = None,
    python: Annotated[
        Path | None, typer.Option(help="The Python that runs those of Python; left out, this one.", show_default=False)
    ] = None,
    node_modules: Annotated[
        Path | None,
        typer.Option(help="The node_modules that has those of JavaScript; left out, the nearest.", show_default=False),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="A file in it in place of its main one.", show_default=False)
    ] = None,
    cosine: Annotated[float | None, typer.Option(help="The smallest cosine that is good.", show_default=False)] = None,
) -> None:
    """Compare what runtimes make of a folder with its golden vectors. Ends with 1 where one does not compute the model.

    Runtimes: sentence-transformers, transformers, onnxruntime, openvino, fastembed, transformers-js."""
    from ..consumer_runs import Environment
    from ..deploy import read
    from ..verifying import runtime_of
    from ..verifying import verify as run
    from .show import verdicts

    described = read(folder)
    names = [runtime_of(described, one) for one in runtime] if runtime else [runtime_of(described)]
    environment = Environment(python=python, node_modules=node_modules)
    environment.check(names)
    found = [run(folder, name, **environment.of(name), variant=variant, cosine=cosine) for name in names]
    verdicts(folder, found)
    if not all(verdict.good for verdict in found):
        raise typer.Exit(1)
