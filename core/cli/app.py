"""The commands and their help. Each does one thing and hands over to a module of core."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .flags import config_command

app = typer.Typer(
    name="burnish", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Fine-tune embedding models: fast, small, and with plugins for any encoder.\n\n"
    "**Start here:** `burnish quickstart` trains a real model on real data in two minutes on a CPU.\n\n"
    "**Your own data:** `burnish train --model sentence-transformers/all-MiniLM-L6-v2 --train pairs.jsonl`\n\n"
    "**Will it work?** `burnish doctor MODEL` says what a model would get and why, without loading weights.",
    epilog="Exit codes: 0 done · 1 failed · 2 wrong use · 3 bad data · 4 model · 5 plugin · 130 interrupted. "
    "BURNISH_PLUGINS=a,b allows those plugins only.",
)  # fmt: skip


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Only the options that belong to no command."""
    if version:
        from importlib.metadata import version as installed

        print(f"burnish {installed('burnish')}")
        raise typer.Exit


@app.command(help="Fine-tune a real model on real data, end to end, and open the report it wrote.", short_help="The main job on shipped data: two minutes on a CPU.")
def quickstart(
    runs: Annotated[str, typer.Option(help="Folder that holds the runs.")] = "runs",
    name: Annotated[str, typer.Option(help="Name of the run; an earlier run of this name is replaced.")] = "quickstart",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; left out, the best there is.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps (for a quick look).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order, dropout and adapter.")] = 42,
) -> None:
    """The main job."""
    from ..quickstart import quickstart as job
    from .show import outcome

    result = job(runs=runs, name=name, device=device, max_steps=max_steps, seed=seed)
    outcome(result)


def _train(**values: Any) -> None:
    from ..config import make_config, read_config
    from ..runs import run
    from .show import outcome

    file: Path | None = values.pop("config")
    dry = values.pop("show_config")
    given = {key: value for key, value in values.items() if value is not None}
    config = read_config(file, given) if file else make_config(given, "the command line")
    if dry:
        from dataclasses import asdict

        import yaml

        print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
        return
    outcome(run(config))


app.command(
    name="train", short_help="Fine-tune a model on your data.",
    help="Fine-tune a model on your data: `burnish train config.yaml`, or flags, or both (flags win).\n\n"
    "Data columns are found by name as Sentence Transformers does (anchor/positive/negative, query/document, "
    "sentence1/sentence2 + score, text + label) and every row is checked before a weight is loaded.\n\n"
    "Results land in RUNS/NAME: adapter, merged model, metrics.json, report.html.\n\n"
    "Example: `burnish train --model BAAI/bge-small-en-v1.5 --train pairs.csv --columns anchor=question --columns positive=answer`",
)(config_command(_train))  # fmt: skip


@app.command("eval", short_help="Measure a model on held-out retrieval.")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    data: Annotated[Path, typer.Option(help="Retrieval folder: queries.jsonl, corpus.jsonl, qrels/SPLIT.tsv (each also .gz).")],
    split: Annotated[str, typer.Option(help="Which qrels.")] = "test",
    max_seq_length: Annotated[int | None, typer.Option(help="Longest text in tokens; left out, the model's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch.")] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; left out, the best there is.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """nDCG@10, recall@10 and MRR@10 with 95% intervals, from stock modules (nothing patched)."""
    from ..evaluate import evaluate_retrieval
    from ..fast import FastSentenceTransformer
    from ..files import write_json
    from ..retrieval_data import load_retrieval
    from .show import table

    held_out = load_retrieval(data, split)
    loaded = FastSentenceTransformer.from_pretrained(model, for_inference=True, max_seq_length=max_seq_length, device=device)
    result = evaluate_retrieval(loaded, held_out.queries, held_out.corpus, held_out.relevant, batch_size=batch_size)
    values = result.as_json()
    rows = [(name, f"{values[name]:.4f}", "{:.4f} to {:.4f}".format(*values["intervals"][name])) for name in result.metrics()]
    table(f"{model} on {data} ({split}: {result.queries} queries, {result.documents} documents)", ("metric", "value", "95% interval"), rows)
    if output is not None:
        write_json(output, values)


@app.command(short_help="Turn a saved model into another form.")
def export(
    source: Annotated[Path, typer.Argument(help="A folder that was saved before: an adapter, or a full model.")],
    to: Annotated[Path, typer.Option(help="Folder to write; it appears whole or not at all.")],
    target: Annotated[str, typer.Option(help="What to make; `burnish plugins` lists the targets.")] = "merged",
    option: Annotated[list[str] | None, typer.Option(help="A target's own option, as key=value; repeat for more.")] = None,
) -> None:
    """Export through the target's plugin. `merged` folds an adapter into its base model (option dtype=16bit or 32bit)."""
    from ..exporting import export_folder

    for path in export_folder(source, to, target, option or []):
        print(path)


@app.command(short_help="What a model would get, and why, without loading weights.")
def doctor(
    model: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; left out, the best there is.")] = None,
    backend: Annotated[str, typer.Option(help="Backend to ask for.")] = "auto",
    full_finetuning: Annotated[bool, typer.Option(help="Explain full fine-tuning instead of adapters.")] = False,
    plugin: Annotated[list[str] | None, typer.Option(help="Name a plugin, as plugins=[…] would; repeat for more.")] = None,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Use no plugins but Burnish's own.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the repository's own Python run.")] = False,
) -> None:
    """Explain family, dtype, pooling, backend, kernels, patches and LoRA targets for a model."""
    from ..doctor import explain
    from ..errors import ConfigError
    from .show import sections

    if no_plugins and plugin:
        raise ConfigError("both are given", where="--plugin, --no-plugins", fix="Pass one of them")
    named = () if no_plugins else tuple(plugin) if plugin else None
    sections(explain(model, device=device, backend=backend, full_finetuning=full_finetuning, plugins=named, trust_remote_code=trust_remote_code))


plugins = typer.Typer(invoke_without_command=True, help="List plugins and switch them on and off.", rich_markup_mode="markdown")
app.add_typer(plugins, name="plugins", short_help="Families, backends and kernels: from where, in what health.")


@plugins.callback(invoke_without_command=True)
def list_plugins(
    context: typer.Context,
    check: Annotated[bool, typer.Option(help="Import every plugin and report its health; otherwise nothing is imported.")] = False,
) -> None:
    """Every family, backend, kernel and export target, with distribution, version, contract version and health."""
    if context.invoked_subcommand is not None:
        return
    from ..doctor import plugin_rows
    from .show import table

    headings = ("plugin", "provides", "distribution", "version", "contract", "health")
    rows, broken = plugin_rows(check=check)
    table("Plugins" if check else "Plugins (from their metadata; --check imports them)", headings, rows)
    if broken:
        raise typer.Exit(5)


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


def dispatch(arguments: list[str]) -> int:
    """Run one command; a name that is not ours may be a plugin's."""
    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands} | {"plugins"}
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        from ..exporting import plugin_command

        command = plugin_command(arguments[0])
        if command is not None:
            return int(command(arguments[1:]))
    try:
        app(arguments, prog_name="burnish")
    except SystemExit as end:
        return int(end.code or 0) if not isinstance(end.code, str) else _say(end.code)
    return 0


def _say(text: str) -> int:
    print(text, file=sys.stderr)
    return 1
