"""What plugin authors test with: the conformance suite, as pytest classes and as a table.

    class TestElectra(FamilyConformance):
        model_type = "electra"

runs every check of a family. `BackendConformance` and `KernelConformance` do the same for backends and operations. It
needs the packages of `pip install 'burnish[testing]'`; `burnish plugins check NAME` runs it without a test file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conformance import BackendConformance as BackendConformance
    from .conformance import FamilyConformance as FamilyConformance
    from .conformance import KernelConformance as KernelConformance

# Loaded on first use: the pytest plugin beside it must set its environment before anything heavy is imported.
__all__ = ["BackendConformance", "FamilyConformance", "KernelConformance"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".conformance", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
