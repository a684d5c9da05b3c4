"""Triton's kernels compiled for GPUs that are not here: does the compiler take them, and do they fit?

Triton brings its own assembler, so that this needs no GPU. What is checked is what no interpreter sees: types and
layouts in the compiler, and shared memory against the 99 KB that a block may take on the smallest card (8.6).
"""

from __future__ import annotations

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


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype, capability", [(torch.bfloat16, 90), (torch.float32, 80)])
def test_rounded_adamw_compiles(dtype: torch.dtype, capability: int, aligned: bool) -> None:
    """Aligned addresses are loaded 16 bytes at a time."""
    from burnish.kernels import adamw_tiles as tiles

    numbers = ("rate", "keep", "gain1", "beta2", "gain2", "epsilon", "correction2")
    kinds = {"table": "*i64", "owners": "*i32", **dict.fromkeys(numbers, "fp32")}
    constants = {
        "GRADIENT": tiles.NUMBERS[dtype], "MOMENT": tiles.NUMBERS[dtype], "ROUND": dtype == torch.bfloat16,
        "ALIGNED": aligned, "FIELDS": tiles.FIELDS, "BLOCK": tiles.BLOCK,
    }  # fmt: skip
    found = compiled(tiles.step_kernel, kinds, constants, capability, 4, 1)
    fits(found)
    assert ("ld.global.v4" in found.asm["ptx"]) == aligned


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "eight, whole, rank", [(False, True, 32), (False, False, 40), (True, True, 8), (False, True, 0)]
)
def test_weights_out_of_few_bits_compile_and_fit(eight: bool, whole: bool, rank: int, capability: int) -> None:
    from burnish.kernels import nf4_tiles as tiles

    floats = ("table", "coarse_table", "coarse", "offset", "up", "down")
    kinds = {name: "*fp32" for name in floats} | {"out": "*bf16", "factor": "fp32"}
    kinds |= {"data": "*i8", "scales": "*fp32"} if eight else {"data": "*u8", "scales": "*u8"}
    constants = {
        "EIGHT": eight, "NESTED": not eight, "WHOLE": whole, "BLOCK": 64, "COARSE": 256, "RANK": rank,
        "ROWS": tiles.ROWS, "COLUMNS": tiles.COLUMNS, "RANKS": tiles.RANKS,
        "PRECISION": "tf32",
    }  # fmt: skip
    fits(compiled(tiles.write_kernel, kinds, constants, capability, tiles.WARPS, 3))
