"""Which arguments of the optimizers cannot be, and the one line that says so, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import TrainingArguments
from burnish.core import optimizer_checks
from burnish.core.errors import ConfigError

FREE = {"optimizer_in_backward": True, "max_grad_norm": 0.0}

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no bool": ({"sparse_embeddings": "yes"}, "^sparse_embeddings: 'yes' is neither"),
    "accumulation": ({**FREE, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2.*Pass gradient_acc"),
    "clipping": ({"optimizer_in_backward": True}, r"^optimizer_in_backward: .*norm=1\.0.*Pass max_grad_norm=0"),
    "another": ({**FREE, "optim": "adafactor"}, "^optimizer_in_backward: is not for optim='adafactor'"),
    "8 bits": ({"stochastic_rounding": True, "optim": "adamw_8bit"}, "^stochastic_rounding: is not for .*8bit'"),
    "paged": ({"optim": "paged_adamw_8bit"}, "^optim='paged_adamw_8bit': moves .* is a cpu. Pass optim='adamw_8bit'"),
    "paged 32": ({"optim": "paged_adamw_32bit"}, "^optim='paged_adamw_32bit': .* Pass optim='adamw_torch'"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_cannot_be(tmp_path: Path, case: str) -> None:
    settings, message = ARGUMENTS[case]
    with pytest.raises(ConfigError, match=message) as caught:
        TrainingArguments(str(tmp_path), use_cpu=True, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", optimizer_checks.FLAGS)
def test_scaled_gradients_are_refused(tmp_path: Path, flag: str) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    arguments.fp16 = True  # on a CPU transformers refuses it before
    setattr(arguments, flag, True)
    with pytest.raises(ConfigError, match=rf"^{flag}: cannot be combined with fp16=True"):
        optimizer_checks.check_arguments(arguments)


@pytest.mark.parametrize("flag", optimizer_checks.FLAGS)
def test_engines_that_step_for_themselves_are_refused(tmp_path: Path, flag: str) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    arguments.deepspeed = "zero.json"
    setattr(arguments, flag, True)
    with pytest.raises(ConfigError, match=rf"^{flag}: is not for deepspeed"):
        optimizer_checks.check_arguments(arguments)


def test_bitsandbytes_optimizers_are_known() -> None:
    """Those that this version of transformers takes from bitsandbytes."""
    module = pytest.importorskip("transformers.trainer_optimizer")
    handlers, bitsandbytes = module._OPTIMIZER_HANDLERS, module._get_bitsandbytes_optimizer
    theirs = {str(getattr(name, "value", name)) for name, make in handlers.items() if make is bitsandbytes}
    assert theirs <= {*optimizer_checks.BITSANDBYTES, *optimizer_checks.BITSANDBYTES_OTHERS}
    assert "adamw_8bit" in optimizer_checks.BITSANDBYTES and len(theirs) > 10


@pytest.mark.parametrize("flag", optimizer_checks.FLAGS)
def test_several_devices(tmp_path: Path, flag: str) -> None:
    """Processes that hold the same weights round them alike; the others work in one."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_grad_norm=0)
    setattr(arguments, flag, True)
    arguments._n_gpu = 2
    if flag == "stochastic_rounding":
        optimizer_checks.check_arguments(arguments)
        return
    with pytest.raises(ConfigError, match=rf"^{flag}: works in one process with one device, not 2"):
        optimizer_checks.check_arguments(arguments)


def test_without_bitsandbytes_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"^optim='adamw_8bit': needs bitsandbytes. Run `pip install -U bitsandbytes`"
    ):
        TrainingArguments(str(tmp_path), use_cpu=True, optim="adamw_8bit")


def test_a_device_that_bitsandbytes_has_no_kernel_for() -> None:
    with pytest.raises(ConfigError, match=r"^optim='adamw_8bit': bitsandbytes .* cannot step on a vulkan"):
        optimizer_checks.check_bitsandbytes("adamw_8bit", torch.device("vulkan"))
