"""The commands and their help. Each does one thing and hands over to a module of core."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from .flags import config_command
from .plan import plan
from .plugins import plugins
from .push import push
from .verify import verify

# Click's base of all usage errors, whether click is installed or typer brings its own copy of it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

ABOUT = """Fine-tune embedding models: fast, small, and with plugins for any encoder.

**Start here:** `burnish quickstart` trains a real model on real data in two minutes on a CPU.

**Your own data:** `burnish train --model sentence-transformers/all-MiniLM-L6-v2 --train pairs.jsonl`

**Will it work?** `burnish doctor MODEL` says what a model would get and why, without loading weights."""

CODES = (
    "Exit codes: 0 done · 1 failed · 2 wrong use · 3 bad data · 4 model · 5 plugin · 130 interrupted. "
    "BURNISH_PLUGINS=a,b allows those plugins only."
)

TRAIN = """Fine-tune a model on your data: `burnish train config.yaml`, or flags, or both (flags win).

Columns are found by name as Sentence Transformers does (anchor/positive/negative, query/document,
sentence1/sentence2 + score, text + label), and every row is checked before a weight is loaded.

Results land in RUNS/NAME: adapter, merged model, metrics.json, report.html.

Example: `burnish train --model BAAI/bge-small-en-v1.5 --train pairs.csv --columns anchor=question
--columns positive=answer`"""

Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; left out, the best there is.", show_default=False)]
Model = Annotated[str, typer.Argument(help="Folder or Hub id.")]

app = typer.Typer(
    name="burnish",
    help=ABOUT,
    epilog=CODES,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


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
    if context.invoked_subcommand is None:
        context.get_help()  # typer prints it
        raise typer.Exit


@app.command(short_help="The main job on shipped data: two minutes on a CPU.")
def quickstart(
    runs: Annotated[str, typer.Option(help="Folder that holds the runs.")] = "runs",
    name: Annotated[str, typer.Option(help="Name of the run; an earlier one of this name is replaced.")] = "quickstart",
    device: Device = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Stop after so many steps (for a quick look).", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order, dropout and adapter.")] = 42,
) -> None:
    """Fine-tune a real model on real data, end to end, and see what it gained in a report."""
    from ..quickstart import quickstart as job
    from .quiet import quiet
    from .show import outcome

    quiet()
    outcome(job(runs=runs, name=name, device=device, max_steps=max_steps, seed=seed))


def _train(**values: Any) -> None:
    from ..config import make_config, read_config

    file: Path | None = values.pop("config")
    dry = values.pop("show_config")
    given = {key: value for key, value in values.items() if value is not None}
    config = read_config(file, given) if file else make_config(given, "the command line")
    if dry:
        from dataclasses import asdict

        import yaml

        print(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True), end="")
        return
    from ..runs import run
    from .quiet import quiet
    from .show import outcome

    quiet()
    outcome(run(config))


app.command(name="train", short_help="Fine-tune a model on your data.", help=TRAIN)(config_command(_train))


@app.command("eval", short_help="Measure a model on held-out retrieval.")
def evaluate(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(help="Folder: queries, corpus, qrels/SPLIT.tsv; or corpus, SPLIT.jsonl (docs/data.md)."),
    ],
    split: Annotated[str, typer.Option(help="Which qrels, or candidates.")] = "test",
    max_seq_length: Annotated[
        int | None, typer.Option(help="Longest text in tokens; left out, the model's own.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch.", min=1)] = 64,
    device: Device = None,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """nDCG@10, recall@10 and MRR@10 with 95% intervals, from stock modules (nothing patched).

    A folder with candidates (docs/data.md) is for rerankers: nDCG@10 and MRR@10 of their order.
    """
    from ..evaluate import evaluate_retrieval
    from ..files import write_json
    from ..reranking import is_reranking
    from ..retrieval_data import load_retrieval

    if is_reranking(data, split):
        _evaluate_reranker(model, data, split, max_seq_length, batch_size, device, output)
        return
    held_out = load_retrieval(data, split)
    from ..fast import FastSentenceTransformer
    from .quiet import quiet
    from .show import scores

    quiet()
    loaded = FastSentenceTransformer.from_pretrained(
        model, for_inference=True, max_seq_length=max_seq_length, device=device
    )
    result = evaluate_retrieval(loaded, held_out.queries, held_out.corpus, held_out.relevant, batch_size=batch_size)
    scores(f"{model} on {data} ({split}: {result.queries} queries, {result.documents} documents)", result)
    if output is not None:
        write_json(output, result.as_json())


def _evaluate_reranker(
    model: str, data: Path, split: str, longest: int | None, batch_size: int, device: str | None, output: Path | None
) -> None:
    from ..files import write_json
    from ..reranking import evaluate_reranking, load_reranker, load_reranking

    held_out = load_reranking(data, split)
    from .quiet import quiet
    from .show import scores

    quiet()
    loaded = load_reranker(model, for_inference=True, max_seq_length=longest, device=device)
    result = evaluate_reranking(loaded, held_out, batch_size=batch_size)
    scores(f"{model} on {data} ({split}: {len(result.per_query)} queries, {result.pairs} candidates)", result)
    print(f"nDCG@{result.k} as the candidates came {result.first:.4f}, in their best order {result.best:.4f}")
    if output is not None:
        write_json(output, result.as_json())


@app.command(short_help="Turn a saved model into another form.")
def export(
    source: Annotated[Path, typer.Argument(help="A folder that was saved before: an adapter, or a full model.")],
    to: Annotated[Path, typer.Option(help="Folder to write; it appears whole or not at all.")],
    target: Annotated[str, typer.Option(help="What to make; `burnish plugins` lists the targets.")] = "merged",
    option: Annotated[
        list[str] | None, typer.Option(help="A target's own option, as key=value; repeat for more.", show_default=False)
    ] = None,
) -> None:
    """Export through the target's plugin. `merged` folds an adapter into its base (option dtype=16bit or 32bit)."""
    from ..exporting import export_folder
    from ..run_folder import disk_errors
    from .quiet import quiet

    quiet()
    with disk_errors(to):
        written = export_folder(source, to, target, option or [])
    for path in written:
        print(path)


app.command(short_help="Upload a saved model to the Hugging Face Hub.")(push)
app.command(short_help="Run what serves a saved model, and compare.")(verify)


@app.command(short_help="What a model would get, and why, without loading weights.")
def doctor(
    model: Model,
    device: Device = None,
    backend: Annotated[str, typer.Option(help="Backend to ask for.")] = "auto",
    full_finetuning: Annotated[bool, typer.Option(help="Explain full fine-tuning instead of adapters.")] = False,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Name a plugin, as plugins=[…] would; repeat for more.", show_default=False)
    ] = None,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Use no plugins but Burnish's own.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the repository's own Python run.")] = False,
) -> None:
    """Explain family, dtype, pooling, backend, kernels, patches and LoRA targets for a model."""
    from ..doctor import explain
    from ..errors import ConfigError
    from .quiet import quiet
    from .show import sections

    if no_plugins and plugin:
        raise ConfigError("both are given", where="--plugin, --no-plugins", fix="Pass one of them")
    quiet()
    sections(
        explain(
            model,
            device=device,
            backend=backend,
            full_finetuning=full_finetuning,
            plugins=() if no_plugins else plugin or None,
            trust_remote_code=trust_remote_code,
        )
    )


app.command(short_help="What training takes in memory, and what fits, by the config alone.")(plan)
app.add_typer(plugins, name="plugins", short_help="Families, backends and kernels: from where, in what health.")


INTERRUPTED = 130
COMMANDS = ("quickstart", "train", "eval", "export", "verify", "push", "doctor", "plan", "plugins")
# Said of one plugin, as in `burnish plugin new NAME`, it is the same group.
ALIASES = {"plugin": "plugins"}


def dispatch(arguments: list[str]) -> int:
    """Run one command; a name that is not ours may be a plugin's. Wrong use comes out in one line, exit code 2."""
    arguments = [*(ALIASES.get(name, name) for name in arguments[:1]), *arguments[1:]]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        return _plugin_command(arguments)
    app.info.epilog = _epilog() if not arguments or arguments[0] == "--help" else CODES
    try:
        code = int(app(arguments, prog_name="burnish", standalone_mode=False) or 0)
    except typer.Abort as interruption:
        raise KeyboardInterrupt from interruption
    except _UsageError as error:
        asked = " ".join(["burnish", *_asked(arguments), "--help"])
        print(f"error: {_message(error)} Try `{asked}`", file=sys.stderr)
        return 2
    if code == INTERRUPTED:  # newer versions of typer make this of the interrupt
        raise KeyboardInterrupt
    return code


def _asked(arguments: list[str]) -> list[str]:
    """The command that was meant, and of a group the command in it."""
    group = [command.name or getattr(command.callback, "__name__", "") for command in plugins.registered_commands]
    first = [name for name in arguments[:1] if name in COMMANDS]
    return [*first, *(name for name in arguments[1:2] if first == ["plugins"] and name in group)]


def _epilog() -> str:
    """The exit codes, and the commands that plugins bring, by their metadata."""
    from ..errors import BurnishError
    from ..exporting import plugin_commands

    try:
        offers = ", ".join(f"{name} ({distribution})" for name, distribution in plugin_commands())
    except BurnishError as error:  # the help must open whatever is wrong with a setting
        offers = f"cannot be listed: {error}"
    return f"{CODES}\n\nCommands of plugins: {offers}" if offers else CODES


def _message(error: Exception) -> str:
    words = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
    return words if words.endswith((".", ")", "?")) else f"{words}."


def _plugin_command(arguments: list[str]) -> int:
    from ..errors import ConfigError
    from ..exporting import plugin_command

    command = plugin_command(arguments[0])
    if command is not None:
        return int(command(arguments[1:]))
    near = get_close_matches(arguments[0], COMMANDS, 1)
    fix = f"Did you mean `burnish {near[0]}`?" if near else f"Commands: {', '.join(COMMANDS)}"
    raise ConfigError(f"there is no command {arguments[0]!r}, nor a plugin's", fix=fix)
