"""`burnish verify`: a saved folder as another runtime reads it, or as a running server answers for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtimes import CHECKED, RUNTIMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..endpoint_calls import Endpoint
    from ..tei import StaticCheck
    from ..verifying import Verdict

_TOKEN = "BURNISH_URL_TOKEN"


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that Burnish saved or exported.")],
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What reads it: {', '.join([*RUNTIMES, *CHECKED])}. Left out, what it was made for. Repeat for more.",
            show_default=False,
        ),
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
    url: Annotated[
        str | None, typer.Option(help="Address of a running server to ask, in place of a runtime.", show_default=False)
    ] = None,
    api: Annotated[
        str | None, typer.Option(help="What it speaks: openai, tei, ollama, cohere or vllm.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Its name for the model; left out, the only one it has.", show_default=False)
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar=_TOKEN, help=f"Its token; better in {_TOKEN}.", show_default=False, show_envvar=False),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds for one of its answers; left out, 60.", show_default=False)
    ] = None,
    cosine: Annotated[
        float | None, typer.Option(help="The smallest cosine of an embedding that is good.", show_default=False)
    ] = None,
    difference: Annotated[
        float | None, typer.Option(help="The largest difference of a score that is good.", show_default=False)
    ] = None,
) -> None:
    """Compare what runtimes, or a running server, make of a folder with its golden vectors.

    The exit code is 1 where one does not compute the model. Of tei only the files that it reads are checked.

    Example: `burnish verify saved --url http://127.0.0.1:8080 --api tei`
    """
    from ..verifying import verify_url
    from .show import checks, verdicts

    one = {"--python": python, "--node-modules": node_modules, "--variant": variant}
    other = {"--api": api, "--model": model, "--timeout": timeout}
    bounds = {"cosine": cosine, "difference": difference}
    _check_bounds(folder, cosine, difference)
    if url is not None:
        _refuse({"--runtime": runtime, **one}, "goes with runtimes, and --url names a server")
        found, read = [verify_url(folder, _endpoint(url, api, model, token, timeout), **bounds)], []
    else:
        _refuse(other, "goes with a server, and no --url names one")
        read = _read(folder, runtime or ())
        if read and len(read) == len(runtime or ()):
            _refuse(
                {**one, "--cosine": cosine, "--difference": difference}, "goes with what is run, and this is only read"
            )
            found = []
        else:
            found = _run(folder, runtime or (), python, node_modules, variant=variant, **bounds)
    if found:
        verdicts(folder, found)
    if read:
        checks(folder, read)
    if not all(verdict.good for verdict in found) or not all(check.good for check in read):
        raise typer.Exit(1)


def _check_bounds(folder: Path, cosine: float | None, difference: float | None) -> None:
    from ..deploy import read

    if read(folder)["kind"] == "scores":
        _refuse({"--cosine": cosine}, "scores have none", "Pass --difference")
    else:
        _refuse({"--difference": difference}, "embeddings are compared by their cosines", "Pass --cosine")


def _read(folder: Path, asked: Sequence[str]) -> list[StaticCheck]:
    from ..tei import check

    return [check(folder) for name in asked if name in CHECKED]


def _run(
    folder: Path, asked: Sequence[str], python: Path | None, node_modules: Path | None, **more: Any
) -> list[Verdict]:
    from ..consumer_runs import Environment
    from ..deploy import read
    from ..verifying import runtime_of
    from ..verifying import verify as run

    described = read(folder)
    names = [runtime_of(described, name) for name in asked if name not in CHECKED] or [runtime_of(described)]
    environment = Environment(python=python, node_modules=node_modules)
    environment.check(names)
    owns = [(name, environment.of(name)) for name in names]
    return [run(folder, name, python=own.python, node_modules=own.node_modules, **more) for name, own in owns]


def _endpoint(url: str, api: str | None, model: str | None, token: str | None, timeout: float | None) -> Endpoint:
    from ..endpoint_calls import SECONDS, Endpoint
    from ..endpoints import APIS
    from ..errors import ConfigError

    if api is None:
        fix = f"Pass --api with one of {', '.join(APIS)}"
        raise ConfigError("what the server speaks is not said", where=f"--url {url}", fix=fix)
    seconds = SECONDS if timeout is None else timeout
    return Endpoint(url=url, api=api, model=model, token=token, seconds=seconds)


def _refuse(flags: dict[str, Any], why: str, fix: str = "Leave one of them out") -> None:
    from ..errors import ConfigError

    for flag, value in flags.items():
        if value is not None and value != []:
            raise ConfigError(why, where=flag, fix=fix)
