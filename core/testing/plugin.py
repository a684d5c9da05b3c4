"""A pytest plugin for conformance runs: `pytest_plugins = ["burnish.core.testing.plugin"]` in a conftest.py.

No network, nothing of the user's, one thread a process, fixed seeds, warnings of plugins as errors.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

# Read once, when transformers and huggingface_hub are imported; a conformance run makes its models itself.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config: pytest.Config) -> None:
    """A plugin that cannot be used, or a hook that fails, is a fault of the run."""
    config.addinivalue_line("filterwarnings", "error::burnish.core.registry.PluginWarning")


@pytest.fixture(autouse=True)
def burnish_alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty config folder in place of the user's, and the same random numbers in every test."""
    import numpy as np
    import torch

    folder = tmp_path_factory.mktemp("burnish-config")
    monkeypatch.setenv("BURNISH_CONFIG_DIR", str(folder))
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return folder
