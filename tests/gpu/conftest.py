"""Tests on a GPU train with the fused backend: what torch's compiler warns of is no error here."""

from __future__ import annotations

import pytest

FILTERS = (
    "ignore:.*torch.jit.script.* is deprecated",
    "ignore:.*should not be instantiated",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore::DeprecationWarning:torch",
    "ignore:TensorFloat32 tensor cores",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the filters to this folder's tests, which alone have the marker."""
    for item in items:
        if item.get_closest_marker("gpu"):
            for one in FILTERS:
                item.add_marker(pytest.mark.filterwarnings(one))
