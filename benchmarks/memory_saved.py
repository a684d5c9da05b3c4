"""What one layer keeps for the backward, bytes for each token and hidden unit: Sentence Transformers, and Burnish.

    python benchmarks/memory_saved.py --out benchmarks/results/saved-DATE-DEVICE.jsonl
    python benchmarks/memory_saved.py --cpu --systems st-sdpa,burnish --models bge-large-en-v1.5

Random weights of the published widths in two and in three layers, LoRA r=32 over bfloat16 under bfloat16 autocast,
dropout as the config has it. The figure is what a third layer adds, and of that what more tokens add: neither weights
nor what is outside the layers is in it.

On a GPU what torch has allocated after the forward is compared: checkpoints are in it, and what went to the host is
not. On a CPU tensors that autograd saves are counted, storage by storage, without the weights'; transformers'
checkpoints hide from that, so that Sentence Transformers is counted without them. `--compiled` counts Burnish's
compiled layers there; else a CPU has its reference backend.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks import arms, grid, measuring, shapes, workload
else:
    sys.path.insert(0, str(HERE))
    import arms
    import measuring
    import shapes
    import workload

    # isort: split
    import grid  # takes this folder off the path

MODELS = ("bge-large-en-v1.5", "ModernBERT-base", "Qwen3-Embedding-0.6B", "embeddinggemma-300m")
OPTIONS: dict[bool, tuple[bool | str, ...]] = {True: (False, "selective", True, "offload"), False: (False, True)}
"""What layers may keep, for Burnish and for the others."""
LAYERS = (2, 3)


def bytes_kept(kept: dict[tuple[int, int], int], hidden: int) -> float:
    """Bytes for each token and hidden unit of one layer, from {(layers, tokens): bytes} of two of each."""
    (few, many), (short, long) = (sorted({key[place] for key in kept}) for place in (0, 1))
    more = [kept[many, tokens] - kept[few, tokens] for tokens in (short, long)]
    return (more[1] - more[0]) / (many - few) / (long - short) / hidden


@contextmanager
def counted(model: Any, found: list[int]) -> Iterator[None]:
    """Append the bytes that autograd saves in the block, each storage once, none that is the model's own."""
    import torch

    own = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    seen: dict[int, Any] = {}

    def pack(value: Any) -> Any:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield
    found.append(sum(storage.nbytes() for storage in seen.values()))


def kept_by(model: Any, texts: list[str], device: str, layers: AbstractContextManager[None]) -> int:
    """Bytes that are kept after a forward of `texts`."""
    import torch

    features = {
        name: value.to(device) if torch.is_tensor(value) else value for name, value in model.preprocess(texts).items()
    }
    found: list[int] = []
    gc.collect()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    counting = nullcontext() if device == "cuda" else counted(model, found)
    with layers, torch.autocast(device, torch.bfloat16), counting:
        out = model(features)["sentence_embedding"].float().sum()
    if device == "cuda":
        torch.cuda.synchronize()
        found.append(torch.cuda.memory_allocated() - before)
    out.backward()  # and so free of references between layers and what they keep
    model.zero_grad(set_to_none=True)
    return found[0]


def compiled(model: Any, option: bool | str) -> Any:
    """Burnish's compiled layers of a model, keeping what the option says."""
    from burnish.backends.activations import Activations
    from burnish.backends.regions import Regions, repeated_layers

    return Regions(model, Activations(len(repeated_layers(model)), option))


def measured(given: argparse.Namespace, option: bool | str, folder: Path) -> dict[str, Any]:
    """The figure of one system, model and option."""
    shape = shapes.SHAPES[given.model]
    config: Any = shape.config()
    words = [str(word) for word in given.words]
    kept: dict[tuple[int, int], int] = {}
    with_layers = arms.ours(given.system) and (given.device == "cuda" or given.compiled)
    for layers in LAYERS:
        path = folder / f"{given.model}-{layers}" / "model"
        if not path.exists():
            path.parent.mkdir()
            shapes.modules(shape, config, given.tokenizer, 2048, path, layers=layers, positions=2048)
        given.checkpointing = option
        model = arms.load(path, given).model
        model.train()
        regions = compiled(model, option) if with_layers else None
        for count in given.texts:
            texts = [" ".join((words[place:] + words)[: given.seq - workload.ENDS]) for place in range(count)]
            for _ in range(2 if with_layers else 1):  # the first compiles
                around = nullcontext() if regions is None else regions.active()
                kept[layers, count * given.seq] = kept_by(model, texts, given.device, around)
    return {"bytes": round(bytes_kept(kept, int(config.hidden_size)), 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every model, system and option; what fails is a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the file of JSON lines, which grows")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--systems", default="st-fa2,burnish")
    parser.add_argument("--texts", default="4,16", help="how many texts, the fewer and the more")
    parser.add_argument("--seq", type=int, default=512, help="tokens of each text")
    parser.add_argument("--cpu", action="store_true", help="count on the CPU whatever there is")
    parser.add_argument("--compiled", action="store_true", help="Burnish's compiled layers on a CPU too")
    own = parser.parse_args(arguments)
    systems = own.systems.split(",")
    for system in systems:
        arms.prepare(system)
    import torch
    from transformers import AutoTokenizer

    device = "cuda" if torch.cuda.is_available() and not own.cpu else "cpu"
    about = {**measuring.machine(device), "versions": measuring.versions(), "burnish": measuring.commit()}
    tokenizer = shapes.default_tokenizer()
    run = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    words = workload.words(AutoTokenizer.from_pretrained(tokenizer))[:1000]
    with tempfile.TemporaryDirectory(prefix="burnish-saved-") as folder:
        for model in own.models.split(","):
            for system in systems:
                for option in OPTIONS[arms.ours(system)]:
                    given = argparse.Namespace(
                        system=system, model=model, mode="lora16", seq=own.seq, backend="auto", device=device,
                        activation_budget_gb=None, embedding_storage=None, compiled=own.compiled, words=words,
                        tokenizer=tokenizer, dtype=torch.bfloat16, texts=[int(count) for count in own.texts.split(",")],
                    )  # fmt: skip
                    if device == "cpu" and (option == "offload" or (option and not _countable(given))):
                        continue
                    line: dict[str, Any] = {"bench": "saved", "run": run, "system": system, "model": model}
                    line["checkpointing"] = option
                    try:
                        line |= measured(given, option, Path(folder))
                    except Exception as error:  # the others are measured all the same
                        line["error"] = f"{type(error).__name__}: {error}"[:300]
                    line |= {"seq": own.seq, "how": "allocated" if device == "cuda" else "saved tensors", **about}
                    shown = ("model", "system", "checkpointing", "bytes", "error")
                    print(json.dumps({key: line[key] for key in shown if key in line}), flush=True)
                    if own.out:
                        grid.append(own.out, line)


def _countable(given: argparse.Namespace) -> bool:
    """Whether a CPU sees what this system keeps of layers that are computed again."""
    return bool(given.compiled and arms.ours(given.system))


if __name__ == "__main__":
    main()
