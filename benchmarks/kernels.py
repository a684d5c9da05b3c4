"""Times of single kernels beside what they would replace, on one GPU: a JSON line for each arm.

    PYTHONPATH=.dev python benchmarks/kernels.py attention lora fused
    PYTHONPATH=.dev python benchmarks/kernels.py attention lora --sweep    launch settings, each kernel apart

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
from importlib import import_module
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


LORA = ((1024, 1024), (1024, 4096), (4096, 1024), (768, 3072), (1024, 3072))
LORA_ROWS = 32768


def lora_states(width: int, out: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, dy, x A^T, A and B in bfloat16."""
    shapes = ((LORA_ROWS, width), (LORA_ROWS, out), (LORA_ROWS, rank), (rank, width), (out, rank))
    x, dy, seen, down, up = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    return x, dy, seen, down, up


def lora() -> None:
    """dA, dB and dy B of one layer: our passes against products of PyTorch, x A^T made again or kept."""
    from burnish.kernels.lora_grad import lora_gradients, tall_product

    for (width, out), rank in itertools.product(LORA, (16, 32, 64)):
        x, dy, seen, down, up = lora_states(width, out, rank)

        def three(seen: Tensor = seen, x: Tensor = x, dy: Tensor = dy, up: Tensor = up) -> Any:
            back = dy @ up
            return back, back.t() @ x, dy.t() @ seen

        def four(x: Tensor = x, down: Tensor = down, three: Any = three) -> Any:
            return three(x @ down.t())

        arms: dict[str, Call] = {
            "four products": four,
            "three products, x A^T kept": three,
            "ours, x A^T kept": partial(lora_gradients, x, dy, seen, up, 1.0),
            "dA alone, product": partial(torch.matmul, seen.t(), x),
            "dA alone, ours": partial(tall_product, seen, x),
            "dB alone, product": partial(torch.matmul, dy.t(), seen),
            "dB alone, ours": partial(tall_product, seen, dy, True),
        }
        for name, call in arms.items():
            shape = {"bench": "lora", "rows": LORA_ROWS, "in": width, "out": out, "rank": rank, "arm": name}
            report(**shape, **measure(call))


def lora_sweep() -> None:
    """Launch settings of both kernels at 1024 features."""
    from burnish.kernels import lora_grad as module

    for rank in (16, 32, 64):
        x, dy, seen, _, up = lora_states(1024, 1024, rank)
        for setting in itertools.product((128, 256), (32, 64), (4, 8), (3, 4)):
            module.TALL = setting
            found = measure(partial(module.tall_product, seen, x))
            report(bench="sweep", kernel="tall", rank=rank, setting=setting, **found)
        for setting in itertools.product((256, 512), (32, 64), (8,), (2, 3)):
            if rank > 32:
                break
            module.JOINT = {16: setting, 32: setting}
            found = measure(partial(torch.ops.burnish.lora_joint_pass, dy, seen, up, 1.0))
            report(bench="sweep", kernel="joint", rank=rank, setting=setting, **found)


ROWS = 32768


def cases() -> dict[str, tuple[str, str, str, tuple[tuple[int, ...], ...], dict[str, Any]]]:
    """Of each fused operation: its file, its name, what it works on, the inputs' shapes and its other arguments."""
    third = ((ROWS, 768), (768,), (768,), (ROWS, 768))
    large = ((ROWS, 1024), (1024,), (1024,), (ROWS, 1024))
    rms: dict[str, Any] = {"eps": 1e-6, "centred": False, "offset": 1.0}
    return {
        "layer norm, residual": ("norm", "add_norm", "1024", large, {"eps": 1e-12}),
        "layer norm, residual, dropout": ("norm", "add_norm", "768", third, {"eps": 1e-12, "dropout": 0.1}),
        "Gemma's RMS norm": ("norm", "add_norm", "768", third[:2], rms),
        "GELU": ("activation", "activation", "4096", ((ROWS, 4096),), {"name": "gelu"}),
        "GeGLU": ("activation", "gated_activation", "1152", ((ROWS, 2304),), {"name": "gelu_tanh"}),
        "rotary": ("rotary", "rotary", "12 heads of 64", ((ROWS, 36, 64),), {"turned": 24}),
        "mean to unit length": ("pooling", "packed_pool", "64 of 512", ((ROWS, 768),), {"normalize": True}),
        "embedding": ("embedding", "embedding", "30522", ((30522, 768),), {}),
    }


def fused() -> None:
    """Forward and backward of the fused operations: ours, their plain versions under inductor, and eager."""
    dynamo: Any = torch._dynamo
    for name, (file, function, size, shapes, options) in cases().items():
        dynamo.reset()  # else a second case of one function would be compiled for any shape, and many a one not at all
        module = import_module(f"burnish.kernels.{file}")
        leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
        angles = torch.rand(ROWS, 32, device="cuda")
        before: tuple[Any, ...] = ()
        beside: tuple[Any, ...] = ()
        if file == "norm":
            beside = (None,) * (2 - len(leaves))
        elif file == "rotary":
            beside = angles.cos(), angles.sin()
        elif file == "pooling":
            beside = torch.arange(0, ROWS + 1, 512, device="cuda", dtype=torch.int32), "mean"
        elif file == "embedding":
            # Ten tokens stand at every tenth place, as frequent words do.
            ids = torch.randint(0, 30522, (ROWS,), device="cuda")
            before = (torch.where(torch.rand(ROWS, device="cuda") < 0.1, ids % 10, ids),)
        ours, plain = getattr(module, function), getattr(module, f"plain_{function}")
        for arm, operation in {"ours": ours, "inductor": torch.compile(plain), "eager": plain}.items():
            forward = partial(operation, *before, *leaves, *beside, **options)
            report(bench="fused", case=name, size=size, arm=arm, **measure(partial(_step, forward, leaves)))


def _step(forward: Call, leaves: list[Tensor]) -> Any:
    found = forward()
    # Of a norm's two results the sum is the residual of the next: both have gradients.
    found = [each for each in (found if isinstance(found, tuple) else (found,)) if not each.is_leaf]
    return torch.autograd.grad(found, leaves, [torch.ones_like(each) for each in found])


BENCHES: dict[str, Callable[[], None]] = {"attention": attention, "lora": lora, "fused": fused}
SWEEPS: dict[str, Callable[[], None]] = {"attention": attention_sweep, "lora": lora_sweep}


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
