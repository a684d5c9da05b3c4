"""Rows of stored tables against the dense table: 8 bits within half a step, 4 bits and the host's bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from burnish.core.stored_table import BLOCK, encode
from burnish.kernels.rows import gather_rows, triton_gather_rows

IDS = torch.tensor([0, 5, 5, 199, 17, 0, 1])


def weights(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """200 rows, the first of zeros as a padding token's, one number of row 5 far from the others."""
    made = torch.randn(200, width, generator=torch.Generator().manual_seed(width)) * 0.05
    made[0] = 0
    made[5, 3] = 2.0
    return made.to(dtype)


def rows(kind: Any, dense: Tensor, ids: Tensor = IDS) -> Tensor:
    stored = encode(dense, kind)
    return gather_rows(ids, stored.data, stored.scales, stored.code, dtype=dense.dtype, block=BLOCK)


@pytest.mark.parametrize("width", [32, 96, 384, 768])
def test_8_bits_are_within_half_a_step(width: int) -> None:
    dense = weights(width)
    found, expected = rows("8bit", dense), dense[IDS]
    scales = encode(dense, "8bit").scales
    assert scales is not None and scales.shape == (200, -(-width // BLOCK))
    steps = scales[IDS].repeat_interleave(BLOCK, dim=1)[:, :width]
    error = (found - expected).abs()
    assert (error <= steps * (0.5 + 1e-5)).all()  # dividing and multiplying round in float32
    assert error.max() > 0.3 * steps[error.amax(1).argmax()].max(), "no error to speak of: nothing would be proved"
    assert torch.equal(found[0], torch.zeros(width)) and found[1, 3] == 2.0
    # A scale for each 64 numbers keeps one that is far from the others from coarsening all of its row.
    whole = expected.abs().amax(1, keepdim=True) / 127
    coarse = (torch.round(expected / whole.clamp(min=1e-9)) * whole - expected).norm()
    assert width < 384 or error.norm() < 0.8 * coarse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 384, 768])
def test_4_bits_are_bitsandbytes_bit_for_bit(width: int, dtype: torch.dtype) -> None:
    library = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes has no wheel for this system")
    dense = weights(width, dtype)
    data, state = library.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    stored = encode(dense, "4bit")
    assert stored.scales is not None and stored.code is not None
    assert torch.equal(stored.code, state.code) and torch.equal(stored.scales.flatten(), state.absmax)
    assert torch.equal(stored.data.flatten(), data.flatten())
    expected = library.dequantize_4bit(data, state)[IDS]
    assert torch.equal(rows("4bit", dense), expected)
    far = IDS != 5  # the number far from the others coarsens its block
    lost, whole = (expected - dense[IDS])[far].float().norm(), dense[IDS][far].float().norm()
    assert 0.05 < lost / whole < 0.15


def test_a_last_block_that_is_shorter_is_bitsandbytes_too() -> None:
    library = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes has no wheel for this system")
    dense = weights(96)
    expected = [library.dequantize_4bit(*library.quantize_4bit(row, blocksize=64, quant_type="nf4")) for row in dense]
    assert torch.equal(rows("4bit", dense), torch.stack(expected).view(200, 96)[IDS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_s_rows_are_the_table_s(dtype: torch.dtype) -> None:
    dense = weights(96, dtype)
    assert torch.equal(rows("host", dense), functional.embedding(IDS, dense))


@pytest.mark.parametrize("kind", ["8bit", "4bit", "host"])
def test_a_number_that_is_no_row_s_is_an_error(kind: Any) -> None:
    for number in (200, -201):
        with pytest.raises((IndexError, RuntimeError)):
            rows(kind, weights(64), torch.tensor([number]))


@pytest.mark.parametrize("kind", ["8bit", "4bit", "host"])
def test_rows_under_the_compiler(kind: Any) -> None:
    """No break in the graph, no shape that depends on numbers, for the plain version and for the registered kernel."""
    stored = encode(weights(96), kind)
    for operation in (gather_rows, triton_gather_rows):

        def read(ids: Tensor, operation: Any = operation) -> Tensor:
            found: Tensor = operation(ids, stored.data, stored.scales, stored.code, dtype=torch.float32, block=BLOCK)
            return found * 2

        compiled = torch.compile(read, fullgraph=True, backend="aot_eager", dynamic=True)
        for ids in (IDS, IDS[:3]):
            assert torch.equal(compiled(ids), read(ids)) and read(ids).any()
        torch._dynamo.reset()


def test_the_registered_kernel_keeps_its_promises() -> None:
    """Shapes and dtypes as `torch.library` was told, nothing written to, no result that is an argument."""
    from burnish.kernels import rows as module

    kinds: tuple[Any, ...] = ("8bit", "4bit", "host")
    for kind in kinds:
        stored = encode(weights(96), kind)
        arguments = (IDS, stored.data, stored.scales, stored.code, torch.bfloat16, BLOCK)
        torch.library.opcheck(module._gather, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind, bits", [("*fp32", 0), ("*bf16", 0), ("*i8", 8), ("*u8", 4)])
def test_the_kernel_compiles_for_gpus_that_are_not_here(
    kind: str, bits: int, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Triton brings its own assembler. A GPU rounds to bfloat16, where the interpreter cuts off."""
    triton: Any = pytest.importorskip("triton", reason="Triton has no wheel for this system")
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-untyped]

    from burnish.kernels.rows_tiles import gather_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns that a later version will not
    constants = {"WIDTH": 768, "BLOCK": BLOCK, "BITS": bits, "COLUMNS": 1024}
    kinds = {"out": "*bf16", "ids": "*i64", "table": kind, "scales": "*fp32", "code": "*fp32", "height": "i32"}
    absent = {"scales": None} if bits == 0 else {}
    absent |= {"code": None} if bits != 4 else {}
    fixed = {**constants, **absent}
    kernel: Any = gather_kernel
    signature = {name: "constexpr" if name in fixed else kinds[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(found.asm["cubin"]) > 1000 and found.metadata.shared <= 4096
    assert ("cvt.rn.bf16" in found.asm["ptx"]) == (kind != "*bf16")
