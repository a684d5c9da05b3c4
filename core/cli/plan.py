"""`burnish plan`: what fine-tuning a model takes in memory, and what fits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ..planning import Fit, Plan

GB = 1e9


def plan(
    model: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    gpu_memory: Annotated[str, typer.Option(help="The device's memory: 16GB, 24GiB.")],
    seq: Annotated[int, typer.Option(help="Tokens of a text.", min=1)] = 512,
    method: Annotated[Literal["lora", "full"], typer.Option(help="Train an adapter, or every weight.")] = "lora",
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="The frozen base in 4 bits.")] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="The frozen base in 8 bits.")] = False,
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 16,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Pairs in a batch; left out, as many as fit, from 32 to 256.", min=2, show_default=False),
    ] = None,
    checkpointing: Annotated[
        Literal["off", "on", "selective", "offload"] | None,
        typer.Option(help="Gradient checkpointing; left out, what is needed.", show_default=False),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, paged_adamw_8bit, adafactor, …")] = "adamw",
    embedding_storage: Annotated[
        Literal["8bit", "4bit", "host"] | None,
        typer.Option(help="Where the frozen embedding tables lie; left out, on the device.", show_default=False),
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the repository's own Python run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Predict a run's peak memory from the model's config, show what fits, and propose batch, mode and checkpointing.

    It reads no weights and needs no GPU. The exit code is 1 if nothing fits.

    Example: `burnish plan BAAI/bge-m3 --gpu-memory 16GB --seq 512`
    """
    from .quiet import quiet

    quiet()
    from ..options import CHECKPOINTING_WORDS
    from ..planning import plan as make

    made = make(
        model, gpu_memory=gpu_memory, seq=seq, method=method, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit,
        rank=rank, batch_size=batch_size, optimizer=optimizer,
        use_gradient_checkpointing=None if checkpointing is None else CHECKPOINTING_WORDS[checkpointing],
        embedding_storage=embedding_storage, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        print(json.dumps(made.as_json(), indent=2))
    else:
        _show(made)
    if made.chosen is None:
        raise typer.Exit(1)


def _show(made: Plan) -> None:
    from .show import sections, table

    headings = ("trains", "checkpointing", "stays, GB", "KB a token", "tokens at once", f"pairs of {made.seq}")
    table(f"What fits in {made.memory / GB:.1f} GB", headings, [_row(fit) for fit in made.fits])
    print()
    tokens = made.seq if made.chosen is None else made.budget or 2 * made.batch * made.seq
    title = f"What a step of {tokens:,} tokens holds"
    table(title, ("what", "GB"), _breakdown(made))
    print()
    sections([("Proposal", _proposal(made))])


def _row(fit: Fit) -> tuple[str, ...]:
    return (
        _trains(fit), _way(fit.setup.checkpointing), f"{fit.held / GB:.2f}", f"{fit.token_bytes / 1e3:.0f}",
        f"{fit.tokens:,}" if fit.tokens else "none", f"{fit.pairs:,}" if fit.tokens else "none",
    )  # fmt: skip


def _trains(fit: Fit) -> str:
    if fit.setup.method == "full":
        return "every weight"
    bits = {None: "16-bit", "8bit": "8-bit", "4bit": "4-bit"}[fit.setup.storage]
    return f"LoRA, {bits} base"


def _way(checkpointing: bool | str) -> str:
    return checkpointing if isinstance(checkpointing, str) else "on" if checkpointing else "off"


def _breakdown(made: Plan) -> list[tuple[str, str]]:
    parts, layers = made.parts, made.shapes.layers
    rows = [
        ("weights", parts.weights),
        ("adapter", parts.adapter),
        ("gradients", parts.gradients),
        ("optimizer states", parts.optimizer),
        ("weights as the products read them", parts.products),
        (f"activations, each of {layers} layers", parts.activations / layers),
        ("activations, all layers", parts.activations),
        ("embeddings, pooling, one layer's backward", parts.outside),
        ("a trained table's new gradient", parts.table_gradient),
        ("loss", parts.loss),
        ("workspace", parts.workspace),
        ("peak of what torch allocates", parts.total),
        ("needed on the device", made.needs),
    ]
    return [(what, f"{size / GB:.3f}") for what, size in rows if size]


def _proposal(made: Plan) -> list[tuple[str, str]]:
    if made.chosen is None:
        return [("-", f"nothing fits: one text of {made.seq} tokens needs {made.needs / GB:.1f} GB")]
    setup = made.chosen
    loading = {"full": "full_finetuning=True", "lora": "an adapter"}[setup.method]
    loading += {None: "", "8bit": ", load_in_8bit=True", "4bit": ", load_in_4bit=True"}[setup.storage]
    rows = [
        ("train", loading),
        ("use_gradient_checkpointing", repr(setup.checkpointing)),
        ("per_device_train_batch_size", f"{made.batch} pairs"),
    ]
    if made.budget is None:
        return [*rows, ("forwards", "one a batch")]
    cut = f"of at most {made.budget:,} tokens: auto_batch=True, or mini_batch_num_tokens={made.budget} of a cached loss"
    return [*rows, ("forwards", cut)]
