"""`burnish plan` and `burnish.core.planning.plan` on real folders: what they print, read and refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.core.errors import ConfigError, ModelError
from burnish.core.planning import plan

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def without_weights(minilm: Path, tmp_path: Path) -> Path:
    """The real model's folder with no weights in it: whatever reads them fails."""
    return Path(shutil.copytree(minilm, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "*.bin")))


def test_a_plan_reads_no_weights(cli: Cli, without_weights: Path) -> None:
    code, out, err = cli("plan", without_weights, "--gpu-memory", "16GB", "--seq", 256)
    assert (code, err) == (0, "")
    assert "What fits in 16.0 GB" in out and "activations, each of 6 layers" in out
    assert "peak of what torch allocates" in out and "per_device_train_batch_size" in out
    assert "one a batch" in out


def test_a_batch_that_does_not_fit_is_cut(cli: Cli, minilm: Path) -> None:
    code, out, _ = cli("plan", minilm, "--gpu-memory", "2GB", "--seq", 256, "--batch-size", 512)
    assert code == 0 and "512 pairs" in out and "mini_batch_num_tokens=" in out and "auto_batch=True" in out


def test_nothing_fits(cli: Cli, minilm: Path) -> None:
    code, out, err = cli("plan", minilm, "--gpu-memory", "1GB", "--method", "full")
    assert (code, err) == (1, "") and "nothing fits: one text of 512 tokens needs" in out


def test_as_json(cli: Cli, minilm: Path) -> None:
    code, out, _ = cli(
        "plan", minilm, "--gpu-memory", "16GB", "--seq", 128, "--load-in-4bit", "--rank", 8, "--checkpointing", "on",
        "--batch-size", 64, "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0 and found["memory"] == 16 * 10**9
    assert found["chosen"] | {"storage": "4bit", "rank": 8, "checkpointing": True} == found["chosen"]
    assert [fit["checkpointing"] for fit in found["fits"]] == [True]
    made = plan(
        str(minilm), gpu_memory="16GB", seq=128, load_in_4bit=True, rank=8, use_gradient_checkpointing=True,
        batch_size=64,
    )  # fmt: skip
    assert made.as_json() == found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu-memory", "lots"], "gpu_memory: 'lots' is no size of memory"),
        (["--gpu-memory", "8GB", "--seq", "5000"], "5000 is not between 1 and the 512 positions"),
        (["--gpu-memory", "8GB", "--method", "full", "--load-in-4bit"], "method: quantised weights cannot be trained"),
        (["--gpu-memory", "8GB", "--load-in-8bit", "--load-in-4bit"], "load_in_4bit, load_in_8bit: more than one"),
        (["--gpu-memory", "8GB", "--optimizer", "magic"], "optimizer: 'magic' is not one that a plan knows"),
    ],
)
def test_wrong_use_is_one_line(cli: Cli, minilm: Path, arguments: list[str], said: str) -> None:
    code, out, err = cli("plan", minilm, *arguments)
    assert (code, out) == (2, "") and said in err and len(err.strip().splitlines()) == 1


def test_python_refuses_the_same(minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size: 1 is less than 2"):
        plan(str(minilm), gpu_memory=8, seq=128, batch_size=1)
    with pytest.raises(ConfigError, match="use_gradient_checkpointing: 'often' is unknown"):
        wrong: Any = "often"
        plan(str(minilm), gpu_memory=8, seq=128, use_gradient_checkpointing=wrong)
    with pytest.raises(ModelError, match=r"no usable config\.json"):
        plan(str(tmp_path), gpu_memory=8, seq=128)


def test_a_checkpoint_in_4_bits_is_planned_as_one(without_weights: Path) -> None:
    config = json.loads((without_weights / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (without_weights / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    made = plan(str(without_weights), gpu_memory=8, seq=128)
    assert {fit.setup.storage for fit in made.fits} == {"4bit"}
    with pytest.raises(ConfigError):
        plan(str(without_weights), gpu_memory=8, seq=128, method="full")


def test_dense_layers_are_counted(minilm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(minilm, tmp_path / "dense", ignore=shutil.ignore_patterns("*.safetensors")))
    modules = json.loads((folder / "modules.json").read_text())
    kind = "sentence_transformers.models.Dense"
    modules.append({"idx": len(modules), "name": "dense", "path": "9_Dense", "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "9_Dense").mkdir()
    (folder / "9_Dense" / "config.json").write_text(json.dumps({"in_features": 384, "out_features": 7, "bias": True}))
    without, found = (plan(str(place), gpu_memory=8, seq=128).shapes.after for place in (minilm, folder))
    assert (without, found) == (0, 385 * 7)


def test_tables_on_the_host_are_not_counted(cli: Cli, minilm: Path) -> None:
    held = []
    for more in ((), ("--embedding-storage", "host")):
        code, out, _ = cli("plan", minilm, "--gpu-memory", "16GB", "--json", *more)
        assert code == 0
        held.append(json.loads(out)["parts"]["weights"])
    assert held[0] - held[1] == pytest.approx(2 * 30522 * 384, rel=0.02)  # positions are counted as tables too
