"""Trained with a plugin that is really installed, loaded in a Python that has never heard of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish import FastSentenceTransformer
from burnish.core.registry import PluginWarning

# Once: what is recorded comes from metadata, which test_electra.py sees in each way of installing.
pytestmark = pytest.mark.parametrize("electra", ["wheel"], indirect=True)
TEXTS = ["a short text", "one that is quite a bit longer than all of the others", "third", "and the last one"]
FOLDERS = ["adapter", "merged", "checkpoint-1"]


@pytest.fixture(scope="module")
def trained(electra: Any, tiny_electra: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `train_and_save.py` filled, in the Python with the plugin."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    command = [electra.python, Path(__file__).parent / "train_and_save.py", tiny_electra, folder]
    path = {**os.environ, "PYTHONPATH": str(electra.folder)}
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, env=path)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_the_plugin_is_recorded(trained: Path) -> None:
    for name in FOLDERS:
        record = json.loads((trained / name / "burnish.json").read_text(encoding="utf-8"))
        assert record["family"] == {
            "name": "electra", "plugin": "electra", "distribution": "burnish-electra", "version": "0.1.0"
        }  # fmt: skip
        assert record["backend"]["distribution"] == "burnish" and record["input"]["layout"] == "packed"
        card = (trained / name / "README.md").read_text(encoding="utf-8")
        assert re.search(r"^\| Plugins \| burnish-electra 0\.1\.0, burnish \S+ \|$", card, re.MULTILINE)


@pytest.mark.parametrize("name", FOLDERS)
def test_without_it_the_model_loads_and_says_what_to_install(trained: Path, name: str) -> None:
    with pytest.raises(PackageNotFoundError):
        version("burnish-electra")
    own, live = version("burnish"), np.load(trained / "live.npy")
    with pytest.warns(PluginWarning) as caught:
        model = FastSentenceTransformer.from_pretrained(str(trained / name), device="cpu")
    assert [str(item.message) for item in caught] == [
        f"model {trained / name}: trained with family electra of electra (burnish-electra 0.1.0), and burnish-electra "
        f"is not installed; instead it gets family generic of generic (burnish {own}). Run `pip install burnish-electra"
        "==0.1.0`"
    ]
    assert model.burnish is not None and model.burnish.decision.family.family.name == "generic"
    assert np.abs(model.encode(TEXTS) - live).max() <= 1e-5


@pytest.mark.parametrize("name", FOLDERS)
def test_for_inference_nothing_is_missing(trained: Path, name: str) -> None:
    model = FastSentenceTransformer.from_pretrained(str(trained / name), device="cpu", for_inference=True)
    assert np.abs(model.encode(TEXTS) - np.load(trained / "live.npy")).max() <= 1e-5
    assert model.trained_with is not None and "burnish-electra 0.1.0" in str(model.trained_with)


@pytest.mark.parametrize("name", FOLDERS)
def test_plain_sentence_transformers_loads_it(trained: Path, name: str) -> None:
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(trained / name), device="cpu")
    assert np.abs(plain.encode(TEXTS) - np.load(trained / "live.npy")).max() <= 1e-5
