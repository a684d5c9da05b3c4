"""Triton's kernels compiled for GPUs that are not here: does the compiler take them, and do they fit?

Triton brings its own assembler, so that this needs no GPU. What is checked is what no interpreter sees: types and
layouts in the compiler, and shared memory against the 99 KB that a block may take on the smallest card (8.6).
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no wheel for this system")
compiler = pytest.importorskip("triton.compiler")
targets = pytest.importorskip("triton.backends.compiler")

SMALLEST = 99 * 1024
PARTS = ("forward", "query_gradient", "key_gradient", "bias_gradient")
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def compiled(
    kernel: Any, kinds: dict[str, str], constants: dict[str, Any], capability: int, warps: int, stages: int
) -> Any:
    """A kernel for `capability`: `kinds` gives the types of the arguments that are neither constants nor int32."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    aligned = [place for place, name in enumerate(names) if signature[name].startswith("*")]
    source = compiler.ASTSource(
        fn=kernel, signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )  # fmt: skip
    target = targets.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def fits(found: Any) -> None:
    assert len(found.asm["ptx"]) > 1000 and len(found.asm["cubin"]) > 1000
    assert found.metadata.shared <= SMALLEST, f"{found.metadata.shared} bytes of shared memory"


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No kernel from an earlier run's cache, and nothing left in the user's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    # Triton 3.9 warns that a later version will not fuse products and sums unless told to.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def test_what_does_not_fit_is_found() -> None:
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        fits(attention("bias_gradient", torch.float32, 256, 90, (32, 32, 4, 1)))


def attention(part: str, dtype: torch.dtype, size: int, capability: int, blocks: tuple[int, int, int, int]) -> Any:
    """A kernel of `biased_attention` with bias and dropout."""
    from burnish.kernels import biased_attention_tiles as tiles

    floats = ("query", "key", "value", "out", "grad", "grad_query", "grad_key", "grad_value")
    kinds = {name: POINTERS[dtype] for name in floats}
    kinds |= {"bounds": "*i32", "numbers": "*i32", "log_sum": "*fp32", "delta": "*fp32", "sums": "*fp32"}
    kinds |= {"bias": "*fp32" if dtype == torch.float32 else "*fp16", "scale": "fp32", "inflation": "fp32"}
    constants: dict[str, Any] = {
        "HEADS": 12, "SHARE": 1, "SIZE": size, "PADDED": size, "BIASED": True, "CAUSAL": False, "WINDOWED": False,
        "THRESHOLD": round(0.1 * 2**32), "PRECISION": "ieee",
    }  # fmt: skip
    rows, columns, warps, stages = blocks
    constants |= {"BLOCK": rows} if part == "bias_gradient" else {"ROWS": rows, "COLUMNS": columns}
    return compiled(getattr(tiles, part), kinds, constants, capability, warps, stages)


@pytest.mark.parametrize("place, part", list(enumerate(PARTS)))
@pytest.mark.parametrize("dtype, size, capability", [(torch.bfloat16, 64, 90), (torch.float16, 128, 80)])
def test_attention_compiles_and_fits(place: int, part: str, dtype: torch.dtype, size: int, capability: int) -> None:
    from burnish.kernels.biased_attention import launch

    fits(attention(part, dtype, size, capability, launch(size, dtype)[place]))


@pytest.mark.parametrize("rank", [16, 32, 64])
def test_lora_gradients_compile_and_fit(rank: int) -> None:
    from burnish.kernels import lora_grad

    kinds = {name: "*bf16" for name in ("left", "right", "grad", "seen", "up")}
    kinds |= {name: "*fp32" for name in ("parts", "back_parts", "up_parts")}
    wide, rows, warps, stages = lora_grad.TALL
    constants: dict[str, Any] = {"RANK": rank, "WIDE": wide, "ROWS": rows}
    for turned in (False, True):
        more = {"TURNED": turned, "PRECISION": "ieee"}
        fits(compiled(lora_grad.tall_tile, kinds, constants | more, 90, warps, stages))
    if rank in lora_grad.JOINT:
        wide, rows, warps, stages = lora_grad.JOINT[rank]
        constants = {"RANK": rank, "WIDE": wide, "ROWS": rows}
        fits(compiled(lora_grad.joint_tile, kinds, constants, 90, warps, stages))


FUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "norm": ("norm", "norm_rows", {"BIASED": True, "ADDED": True}),
    "norm gradient": ("norm", "norm_gradient", {"SUMMED": True, "PASSED": True}),
    "gate": ("activation", "activate", {"KIND": 0, "GATED": True, "BLOCK": 1024}),
    "gate's gradient": ("activation", "activate_gradient", {"KIND": 1, "GATED": True, "BLOCK": 1024}),
    "rotary": ("rotary", "rotate", {"HEADS": 12, "HALF": 32, "BACK": True, "ROWS": 64, "WIDE": 32}),
    "pool": ("pooling", "pool", {"MODE": 0, "NORMALIZE": True, "ROWS": 8, "WIDE": 1024}),
    "pool's gradient": ("pooling", "pool_gradient", {"MODE": 0, "NORMALIZE": True, "ROWS": 8, "WIDE": 1024}),
    "embedding's gradient": ("embedding", "add_up", {"ROWS": 16, "WIDE": 256}),
}
SINGLES = ("eps", "offset", "inflation", "shortest")
FLOATS = ("means", "scales", "weight_parts", "bias_parts", "lengths", "pooled")
INTEGERS = {"bounds": "*i32", "drawn": "*i32", "ids": "*i64", "order": "*i64"}
HALVES = (
    "states", "weight", "bias", "residual", "out", "total", "grad", "grad_total", "grad_states", "grad_residual",
)  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused_operations_compile_and_fit(name: str) -> None:
    file, function, constants = FUSED[name]
    module = importlib.import_module(f"burnish.kernels.{file}")
    kinds = {each: "*bf16" for each in HALVES} | {each: "*fp32" for each in FLOATS} | INTEGERS
    kinds |= {each: "fp32" for each in SINGLES} | {"cos": "*fp32", "sin": "*fp32"}
    if file == "norm":
        shared = {"WEIGHTED": True, "THRESHOLD": 1 << 29, "CENTRED": True, "ROWS": 2, "WIDE": 1024}
        constants = constants | shared
    fits(compiled(getattr(module, function), kinds, constants, 80, 8, 3))
