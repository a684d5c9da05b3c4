"""What a machine offers a training step, and what a plugin cannot do without. Part of the contract, free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Literal, TypeAlias

from .checks import check_members, check_tuples, check_types

DType: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""A dtype that weights may be in, by torch's name."""
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a step may use: the device and what is installed.

    Args:
        device: "cpu", "cuda", "mps", … without an index.
        compute_capability: CUDA's, such as (9, 0) for an H100; None elsewhere.
        dtypes: What the device computes in at speed.
        packages: Installed version of any package that is asked for. Listed are triton, bitsandbytes, flash-attn,
            kernels and liger-kernel, where they are there.
    """

    device: str
    compute_capability: tuple[int, int] | None = None
    dtypes: frozenset[str] = frozenset({"float32"})
    packages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a backend, kernel or exporter cannot do without. Empty means anything will do.

    Args:
        devices: It runs on one of these only, such as ("cuda",).
        compute_capability: The least that a CUDA device must have.
        dtypes: What the device must compute in at speed, all of them.
        packages: What must be installed, all of them.
    """

    devices: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    dtypes: tuple[DType, ...] = ()
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_tuples(self, "devices", "dtypes", "packages")
        check_members(self, "dtypes", self.dtypes, DTYPES)
        check_types(self, compute_capability=(tuple, NoneType))

    def missing(self, machine: Machine) -> str | None:
        """Say in a few words why `machine` will not do, or None if it will."""
        if self.devices and machine.device not in self.devices:
            return f"needs {' or '.join(self.devices)}, this is {machine.device}"
        if self.compute_capability and (machine.compute_capability or (0, 0)) < self.compute_capability:
            return f"needs compute capability {'.'.join(map(str, self.compute_capability))}"
        if absent := [name for name in self.dtypes if name not in machine.dtypes]:
            return f"needs {', '.join(absent)}, which {machine.device} lacks"
        if lacking := [name for name in self.packages if name not in machine.packages]:
            return f"needs the package {', '.join(lacking)}"
        return None


ANYTHING = Needs()
