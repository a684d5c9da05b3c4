"""Times of single kernels beside what they would replace, on one GPU: a JSON line for each arm.

    PYTHONPATH=.dev python benchmarks/kernels.py attention
    PYTHONPATH=.dev python benchmarks/kernels.py attention --sweep    launch settings, each kernel apart

Each arm is captured in a CUDA graph and replayed, as the fused backend runs it, so that no launch from Python is timed:
`ms` is the median of 20 replays, `first_s` what the first call took, compilation included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

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


def attention() -> None:
    """Forward and backward of 12 heads of 64: ours, the plain version, FlashAttention without the bias."""
    from burnish.kernels.attention import flash_packed_attention, packed_attention
    from burnish.kernels.biased_attention import biased_attention

    for (count, length), dropout in itertools.product(ATTENTION, (0.0, 0.1)):
        states, bias, bounds, grad = texts(count, length, 12, 64)
        frozen = bias.detach()
        arms: dict[str, tuple[Callable[..., Tensor], Tensor | None]] = {
            "ours, bias trained": (biased_attention, bias),
            "ours, bias frozen": (biased_attention, frozen),
            "ours, no bias": (biased_attention, None),
            "FlashAttention-2, no bias": (flash_packed_attention, None),
            "plain, bias trained": (packed_attention, bias),
            "plain, bias frozen": (packed_attention, frozen),
        }
        for name, (operation, table) in arms.items():
            forward = partial(operation, *states, bounds, length, bias=table, dropout=dropout)
            leaves = [*states, bias] if table is bias else states

            def both(forward: Call = forward, leaves: list[Tensor] = leaves, grad: Tensor = grad) -> Any:
                return torch.autograd.grad(forward(), leaves, grad)

            shape = {"bench": "attention", "texts": count, "length": length, "dropout": dropout, "arm": name}
            report(**shape, forward=measure(forward), both=measure(both))


def attention_sweep() -> None:
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


BENCHES: dict[str, Callable[[], None]] = {"attention": attention}
SWEEPS: dict[str, Callable[[], None]] = {"attention": attention_sweep}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", help=f"of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--sweep", action="store_true", help="time launch settings instead")
    chosen = parser.parse_args()
    machine()
    table = SWEEPS if chosen.sweep else BENCHES
    for name in chosen.benches or table:
        table[name]()


if __name__ == "__main__":
    main()
