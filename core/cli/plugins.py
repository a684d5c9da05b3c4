"""`burnish plugins`: what is installed and in what health, and what the authors of plugins need."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

plugins = typer.Typer(
    help="List plugins, switch them on and off, start one, check one, time one.", rich_markup_mode="markdown"
)


@plugins.callback(invoke_without_command=True)
def list_plugins(
    context: typer.Context,
    check: Annotated[bool, typer.Option(help="Import every plugin and report its health; without, none is.")] = False,
) -> None:
    """Every family, backend, kernel and export target, with distribution, version, contract version and health."""
    if context.invoked_subcommand is not None:
        return
    from ..doctor import plugin_rows
    from .quiet import hush_bitsandbytes
    from .show import table

    hush_bitsandbytes()
    headings = ("plugin", "provides", "distribution", "version", "contract", "health")
    rows, broken = plugin_rows(check=check)
    table("Plugins" if check else "Plugins (from their metadata; --check imports them)", headings, rows)
    if broken:
        raise typer.Exit(5)


Distribution = Annotated[str, typer.Argument(help="An installed plugin or distribution.")]


@plugins.command(short_help="Start a plugin for a model family: a whole distribution.")
def new(
    name: Annotated[str, typer.Argument(help="What it is called; the distribution is burnish-NAME.")],
    like: Annotated[str, typer.Option(help="The family to start from, built in or installed.")],
    model_type: Annotated[
        str | None,
        typer.Option(help="`model_type` in the config of its models; left out, NAME.", show_default=False),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the folder burnish-NAME is made.")] = Path("."),
) -> None:
    """Write a complete plugin for one model family: packaging, family module, tests, README, CI.

    Where transformers knows the model type, what the family says is fitted to it on a tiny random model. Where it does
    not, the plugin brings an encoder of its own, a copy to put yours in place of. Its tests pass as they are.

    Example: `burnish plugin new electra --like bert`
    """
    from ..scaffold import check_name, free_folder, plan_plugin
    from .quiet import hush_bitsandbytes
    from .show import table

    hush_bitsandbytes()
    check_name(name)
    free_folder(folder, f"burnish-{name}")
    scaffold = plan_plugin(name, like, model_type)
    table(f"{scaffold.folder}, like {like}", ("what", "found"), scaffold.found)
    print()
    for path in scaffold.write(folder):
        print(path)
    place = shlex.quote(str(folder / scaffold.folder))
    print(f"\nNext: cd {place} && pip install -e '.[test]' && pytest")


@plugins.command("check", short_help="Run the conformance suite on an installed plugin.")
def check_conformance(
    dist: Distribution,
    backend: Annotated[str, typer.Option(help="Backend to ask for.")] = "auto",
    only: Annotated[
        list[str] | None, typer.Option(help="A check's name; repeat for more. Left out, all.", show_default=False)
    ] = None,
) -> None:
    """Examine what an installed plugin offers, families on tiny random models: the conformance suite, as a table.

    The exit code is 5 if a check fails. It needs `pip install 'burnish[testing]'`.

    Example: `burnish plugins check burnish-electra`
    """
    from ..registry import registry
    from ..testing import report
    from .quiet import quiet
    from .show import table

    registry().named(dist)  # before the libraries are loaded, which takes seconds
    quiet()
    import torch

    torch.set_num_threads(1)  # on models as small as these a second one triples the time that is spent
    rows = report.check_distribution(dist, backend=backend, only=only or ())
    table(f"Conformance of {dist}", ("what", "check", "result", "measured"), rows)
    if report.failed(rows):
        raise typer.Exit(5)


@plugins.command(short_help="Time an installed plugin against unpatched transformers.")
def bench(
    dist: Distribution,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id; left out, random weights.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps; left out, the best there is.", show_default=False)
    ] = None,
    size: Annotated[Literal["tiny", "base"], typer.Option(help="Size of the random model.")] = "base",
    lora: Annotated[int, typer.Option(help="Rank of the adapter; 0 trains every weight.", min=0)] = 16,
    batch: Annotated[int, typer.Option(help="Pairs in a batch.", min=1)] = 32,
    length: Annotated[int, typer.Option(help="Longest text in tokens.", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="Steps of each arm that are timed, after two that are not.", min=1)] = 10,
    packed: Annotated[bool, typer.Option(help="Packed input where the family has it.")] = True,
) -> None:
    """Time an installed plugin's families against unpatched transformers, step by step in turn.

    A step is forward and backward of a batch of pairs, tokenising included.

    Example: `burnish plugins bench burnish-electra --size base --batch 16`
    """
    from ..registry import registry
    from .quiet import quiet
    from .show import table

    registry().named(dist)
    quiet()
    from ..testing.bench import bench_distribution

    headings, rows = bench_distribution(
        dist,
        model=model,
        device=device,
        size=size,
        lora=lora,
        batch=batch,
        length=length,
        steps=steps,
        packed=packed,
    )
    table(f"{dist} against unpatched transformers", headings, rows)


@plugins.command()
def disable(name: Annotated[str, typer.Argument(help="A plugin or a distribution.")]) -> None:
    """Switch a plugin off for good; `burnish plugins enable NAME` takes it back."""
    from ..doctor import switch

    print(switch(name, on=False))


@plugins.command()
def enable(name: Annotated[str, typer.Argument(help="A plugin or a distribution.")]) -> None:
    """Switch a disabled plugin on again."""
    from ..doctor import switch

    print(switch(name, on=True))
