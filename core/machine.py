"""What this machine offers a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .contracts import Machine

if TYPE_CHECKING:
    import torch

# Looked for at once, and told; any other package that a plugin needs is looked up when it is asked for.
OPTIONAL = ("triton", "bitsandbytes", "flash-attn", "kernels", "liger-kernel")


class Installed(Mapping[str, str]):
    """Installed version by package: of any package that is asked for, listing the optional ones that are there."""

    def __getitem__(self, name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(packages())

    def __len__(self) -> int:
        return len(packages())


def packages(names: tuple[str, ...] = OPTIONAL) -> dict[str, str]:
    """Installed version of each of `names` that is installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe(device: torch.device | str) -> Machine:
    """The machine as seen from `device`."""
    import torch

    kind = torch.device(device).type
    capability: tuple[int, int] | None = None
    dtypes = {"float32"}
    if kind == "cuda":
        capability = torch.cuda.get_device_capability(torch.device(device))
        dtypes.add("float16")
        # bfloat16 runs on older cards by emulation; tensor cores have it from compute capability 8.0.
        dtypes |= {"bfloat16"} if capability >= (8, 0) else set()
    elif kind in ("mps", "xpu", "npu"):
        dtypes |= {"float16", "bfloat16"}
    return Machine(device=kind, compute_capability=capability, dtypes=frozenset(dtypes), packages=Installed())
