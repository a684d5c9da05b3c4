"""Times of single kernels beside what they would replace, on one GPU: a JSON line for each arm.

    PYTHONPATH=.dev python benchmarks/kernels.py attention biased nf4
    PYTHONPATH=.dev python benchmarks/kernels.py biased --sweep    launch settings, each kernel apart

Each arm is captured in a CUDA graph and replayed, as the fused backend runs it, so that no launch from Python is timed:
`ms` is the median of 20 replays, `first_s` what the first call took, compilation included. `nf4` takes turns over so
many weights that none is found in the cache, times each arm launched from Python too (`launched_ms`), since Unsloth's
kernel cannot be captured, and sets the rate beside that of copying.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Call = Callable[[], Any]


def measure(call: Call, replays: int = 20) -> dict[str, Any]:
    """{"ms", "first_s"} of a call that is captured and replayed, or {"error"}."""
    try:
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(aside):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()
        times = []
        for _ in range(replays + 3):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            events[0].record()
            graph.replay()
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
        del kept
        return {"ms": round(statistics.median(times[3:]), 4), "first_s": round(first, 1)}
    except Exception as error:  # out of memory, or a launch setting that does not fit: a line of the report
        torch.cuda.synchronize()
        return {"error": str(error).splitlines()[0][:200]}


def report(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def machine() -> None:
    import triton  # type: ignore[import-untyped]

    report(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)


def texts(count: int, length: int, heads: int, size: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """([query, key, value], bias, bounds, gradient) in bfloat16, all texts of one length."""
    tokens = count * length
    states = [torch.randn(tokens, heads, size, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    bounds = torch.arange(0, tokens + 1, length, device="cuda", dtype=torch.int32)
    bias = torch.randn(heads, 2 * length - 1, device="cuda").requires_grad_()
    return [state.requires_grad_() for state in states[:3]], bias, bounds, states[3]


ATTENTION = ((64, 512), (16, 2048), (128, 128))


def biased() -> None:
    """MPNet's attention, 12 heads of 64 with a bias by distance: ours and the plain version."""
    from burnish.kernels.attention import packed_attention
    from burnish.kernels.biased_attention import biased_attention

    for (count, length), dropout in itertools.product(ATTENTION, (0.0, 0.1)):
        states, bias, bounds, grad = texts(count, length, 12, 64)
        arms: dict[str, Callable[..., Tensor]] = {"ours": biased_attention, "plain": packed_attention}
        for name, operation in arms.items():
            for kind, table in {"trained": bias, "frozen": bias.detach()}.items():
                forward = partial(operation, *states, bounds, length, bias=table, dropout=dropout)
                leaves = [*states, bias] if table is bias else states
                shape = {"bench": "biased", "texts": count, "length": length, "dropout": dropout, "arm": name}
                report(**shape, bias=kind, **_timed(forward, leaves, grad))


HEADS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "bge-large": (16, 16, 64, {"dropout": 0.1}),
    "bge-large, no dropout": (16, 16, 64, {}),
    "MiniLM": (12, 12, 32, {"dropout": 0.1}),
    "ModernBERT": (12, 12, 64, {}),
    "ModernBERT, window": (12, 12, 64, {"window": 65}),
    "EmbeddingGemma": (3, 1, 256, {}),
    "EmbeddingGemma, window": (3, 1, 256, {"window": 257}),
    "Qwen3-0.6B": (16, 8, 128, {"causal": True}),
}
"""Query heads, key heads, their size, and what else attention is told."""


def attention() -> None:
    """The families' attention without a bias: FlashAttention-2, ours, and cuDNN where all texts have one length."""
    from burnish.kernels import attention as module
    from burnish.kernels.biased_attention import biased_attention

    draw = torch.Generator().manual_seed(0)
    for (name, (heads, groups, size, options)), (count, length) in itertools.product(HEADS.items(), ATTENTION):
        natural = (torch.randn(count, generator=draw).mul(0.6).exp() * 0.3 * length).clamp(4, length).long()
        for kind, lengths in {"natural": natural, "fixed": torch.full((count,), length)}.items():
            tokens = int(lengths.sum())
            bounds = functional.pad(lengths.cumsum(0), (1, 0)).int().cuda()
            query, key, value, grad = (
                torch.randn(tokens, many, size, device="cuda", dtype=torch.bfloat16)
                for many in (heads, groups, groups, heads)
            )
            states = [state.requires_grad_() for state in (query, key, value)]
            told: dict[str, Any] = {"scale": None, "dropout": 0.0, "causal": False, "window": None, **options}
            arms: dict[str, Call] = {
                "FlashAttention-2": partial(module._flash_attention, query, key, value, bounds, length, **told),
                "ours": partial(biased_attention, query, key, value, bounds, length, **told),
            }
            if kind == "fixed" and told["window"] is None:
                dense = (length, None, told["dropout"], told["causal"])
                arms["cuDNN"] = partial(module._dense_attention, query, key, value, *dense)
            shape = {"bench": "attention", "model": name, "length": length, "texts": count, "tokens": tokens}
            for arm, forward in arms.items():
                report(**shape, kind=kind, arm=arm, **_timed(forward, states, grad))


def _timed(forward: Call, leaves: list[Tensor], grad: Tensor) -> dict[str, Any]:
    """The forward alone, and with its backward."""
    return {
        "forward": measure(forward),
        "both": measure(lambda: torch.autograd.grad(forward(), leaves, grad)),
    }


def biased_sweep() -> None:
    """Launch settings of each kernel at heads of 64, the others as they are."""
    from burnish.kernels import biased_attention as module

    usual_launch = module.launch
    usual = usual_launch(64, torch.bfloat16)
    tried = {
        "forward": ((128, 64), (128, 128), (64, 64), (128, 32)),
        "query": ((64, 64), (128, 64), (64, 32)),
        "key": ((64, 64), (64, 128), (32, 128)),
        "bias": ((64, 64), (32, 32)),
    }
    for place, (kernel, blocks) in enumerate(tried.items()):
        for (queries, keys), warps, stages in itertools.product(blocks, (4, 8), (2, 3)):
            setting = (*usual[:place], (queries, keys, warps, stages), *usual[place + 1 :])
            module.launch = partial(_fixed, setting)
            # Autograd runs a backward on its forward's stream: captured together, or not at all.
            found = measure(partial(_both, module.biased_attention, *ATTENTION[0]), 10)
            report(bench="sweep", kernel=kernel, setting=setting[place], timed="forward and backward", **found)
    module.launch = usual_launch


def _fixed(setting: Any, size: int, dtype: torch.dtype) -> Any:
    return setting


@cache
def _inputs(count: int, length: int) -> Any:
    return texts(count, length, 12, 64)


def _both(operation: Callable[..., Tensor], count: int, length: int) -> Any:
    states, bias, bounds, grad = _inputs(count, length)
    out = operation(*states, bounds, length, bias=bias, dropout=0.1)
    return torch.autograd.grad(out, [*states, bias], grad)


NF4 = ((4096, 1024), (1024, 4096), (9728, 2560))
"""Output and input features: bge-large's and Qwen3-Embedding-4B's MLPs."""
RANK, SCALE = 32, 2.0
TURNED = 512 * 2**20
"""Bytes of 16-bit weights that an arm makes before it comes to the first again; an H200's cache has 50 MB."""


def nf4_layer(rows: int, columns: int, device: str) -> tuple[Any, Tensor, Tensor]:
    """A linear layer of bitsandbytes in NF4 with double quantisation, and an adapter's A (R, I) and B (O, R)."""
    kind: Any = import_module("bitsandbytes.nn").Linear4bit
    made = kind(
        columns, rows, bias=False, compress_statistics=True, quant_type="nf4", compute_dtype=torch.bfloat16,
        device=device,
    )  # fmt: skip
    made.weight.data.copy_(torch.randn(rows, columns, device=device) * 0.02)
    made = made.to(device)  # quantises
    return made, torch.randn(RANK, columns, device=device), torch.randn(rows, RANK, device=device) * 0.01


def nf4_arms(layer: Any, down: Tensor, up: Tensor) -> dict[str, Call]:
    """What makes the 16-bit weight, and the weight with its update, by each implementation.

    bitsandbytes' is then added to in bfloat16, as PyTorch would.
    """
    from bitsandbytes.functional import dequantize_4bit

    from burnish.kernels import nf4

    state = layer.weight.quant_state
    state.dtype = torch.bfloat16
    held = nf4.stored(layer)
    assert held is not None, "kernels.nf4.stored does not know bitsandbytes' Linear4bit"
    left, right = up.bfloat16(), down.bfloat16()

    def added() -> Tensor:
        return torch.addmm(dequantize_4bit(layer.weight.data, state), left, right, alpha=SCALE)

    return {
        "bitsandbytes": lambda: dequantize_4bit(layer.weight.data, state),
        "ours": lambda: nf4.effective_weight(held, None, None, 1.0, torch.bfloat16),
        "bitsandbytes, then addmm": added,
        "ours, with the update": lambda: nf4.effective_weight(held, down, up, SCALE, torch.bfloat16),
    }


def nf4_unsloth(layer: Any) -> Call | None:
    """Unsloth's dequantisation; None where it is not installed. Importing it changes transformers: last."""
    try:
        from unsloth.kernels.utils import fast_dequantize  # type: ignore[import-not-found]
    except ImportError as error:
        report(bench="nf4", arm="unsloth", error=str(error)[:200])
        return None
    return lambda: fast_dequantize(layer.weight.data, layer.weight.quant_state)


def nf4() -> None:
    """Weights of NF4 made into bfloat16, alone and with s B A: bitsandbytes', ours, Unsloth's."""
    buffers = [torch.empty(TURNED, device="cuda", dtype=torch.uint8) for _ in range(2)]
    rate = 2 * TURNED / (measure(lambda: buffers[0].copy_(buffers[1]))["ms"] * 1e-3) / 1e9
    report(bench="nf4", arm="copy", gb_per_s=round(rate, 1))
    buffers.clear()
    late: list[tuple[dict[str, Any], list[Any], float]] = []
    for rows, columns in NF4:
        many = -(-TURNED // (rows * columns * 2))
        layers = [nf4_layer(rows, columns, "cuda") for _ in range(many)]
        moved = rows * columns * (0.5 + 1 / 64 + 2)  # bits and scales read, 16-bit numbers written
        shape = {"bench": "nf4", "rows": rows, "columns": columns, "rank": RANK, "weights": many}
        arms = [nf4_arms(*layer) for layer in layers]
        exact = torch.equal(arms[0]["ours"](), arms[0]["bitsandbytes"]())
        off = (arms[0]["ours, with the update"]() - arms[0]["bitsandbytes, then addmm"]()).abs().max()
        report(**shape, same_bits_as_bitsandbytes=exact, updates_differ_by=float(off))
        for arm in arms[0]:
            _nf4_line({**shape, "arm": arm}, [one[arm] for one in arms], moved, rate)
        late.append(({**shape, "arm": "unsloth"}, [layer for layer, _, _ in layers], moved))
    for shape, held, moved in late:
        calls = [call for call in map(nf4_unsloth, held) if call is not None]
        if not calls:
            break
        same = torch.equal(calls[0](), nf4_arms(held[0], *_no_adapter(held[0]))["bitsandbytes"]())
        report(**shape, same_bits_as_bitsandbytes=same)
        _nf4_line(shape, calls, moved, rate, captured=False)


def _no_adapter(layer: Any) -> tuple[Tensor, Tensor]:
    rows, columns = layer.weight.quant_state.shape
    return torch.zeros(RANK, columns, device="cuda"), torch.zeros(rows, RANK, device="cuda")


def _nf4_line(shape: dict[str, Any], calls: list[Call], moved: float, rate: float, *, captured: bool = True) -> None:
    """Times of one weight, from a turn over all of them; results are dropped at once, as in a step."""

    def turn() -> None:
        for call in calls:
            call()

    found = measure(turn) if captured else {}
    line = {"launched_ms": round(launched(turn) / len(calls), 5)}
    if "ms" in found:
        found["ms"] = round(found["ms"] / len(calls), 5)
        line["gb_per_s"] = round(moved / (found["ms"] * 1e-3) / 1e9, 1)
        line["of_copy"] = round(line["gb_per_s"] / rate, 3)
    report(**shape, **found, **line)


def launched(call: Call, repeats: int = 10) -> float:
    """Milliseconds of a call launched from Python: the median of `repeats`, after three."""
    times: list[float] = []
    for _ in range(repeats + 3):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        events[0].record()
        call()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return statistics.median(times[3:])


BENCHES: dict[str, Callable[[], None]] = {"attention": attention, "biased": biased, "nf4": nf4}
SWEEPS: dict[str, Callable[[], None]] = {"biased": biased_sweep}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", help=f"of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--sweep", action="store_true", help="time launch settings instead")
    chosen = parser.parse_args()
    machine()
    table = SWEEPS if chosen.sweep else BENCHES
    for name in chosen.benches or table:
        try:
            table[name]()
        except Exception as error:  # the others are run all the same
            traceback.print_exc()
            report(bench=name, error=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    # transformers looks for a package `kernels`, and would import this file for it.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
    main()
