"""Conformance as pytest classes: an author subclasses one and names what is to be examined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from . import backends, operations, suite
from .find import sample_config
from .subject import NotApplicable, Subject

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class FamilyConformance:
    """Every check of a family, one test each.

    Attributes:
        model_type: The `config.model_type` whose family is examined, with its `FamilySpec.sample("tiny")` for a config.
        tolerance: Largest error, as a share of the largest value, in float64; float32 gets ten times that.
        backend: Execution backend, or "auto".
        plugins: Plugins to name, as `FastSentenceTransformer` takes them; needed where a built-in has the model type.
        devices: For which machines the family is asked for patches: "cpu", "cuda". Take "cuda" out where those are
            Triton kernels, which a CPU cannot run, and test them on a GPU.
        device: Where everything runs.
    """

    model_type: ClassVar[str] = ""
    tolerance: ClassVar[float] = 1e-5
    backend: ClassVar[str] = "auto"
    plugins: ClassVar[tuple[str, ...] | None] = None
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    device: ClassVar[str] = "cpu"

    def config(self) -> PretrainedConfig:
        """The config for random weights; override it for one that the plugin's sample does not show."""
        return sample_config(self.model_type, self.plugins)

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, tmp_path_factory: pytest.TempPathFactory) -> Subject:
        """The architecture under test, made once for the class."""
        return Subject(
            config=cls().config(), folder=tmp_path_factory.mktemp("conformance"), tolerance=cls.tolerance,
            backend=cls.backend, plugins=cls.plugins, devices=cls.devices, device=cls.device,
        )  # fmt: skip

    @pytest.mark.parametrize("check", suite.CHECKS)
    def test_family(self, subject: Subject, check: str) -> None:
        """One check of the suite."""
        try:
            suite.CHECKS[check](subject)
        except NotApplicable as reason:
            pytest.skip(f"not applicable: {reason}")


class BackendConformance:
    """A backend's step against Sentence Transformers' own, on a tiny model of each built-in family.

    Attributes:
        backend: Its name.
        model_types: Which families; empty means all that Burnish brings.
        plugins: Plugins to name.
        tolerance: As for families.
    """

    backend: ClassVar[str] = ""
    model_types: ClassVar[tuple[str, ...]] = ()
    plugins: ClassVar[tuple[str, ...] | None] = None
    tolerance: ClassVar[float] = 1e-5

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """A test for each model type."""
        if "model_type" in metafunc.fixturenames:
            metafunc.parametrize("model_type", self.model_types or backends.model_types())

    def test_step(self, model_type: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Four training steps have the losses and the weights of plain Sentence Transformers."""
        folder = tmp_path_factory.mktemp("backend")
        backends.check_step(self.backend, model_type, folder, plugins=self.plugins, tolerance=self.tolerance)


class KernelConformance:
    """An implementation of an operation against the plain one: outputs and gradients, for ragged and odd shapes.

    Attributes:
        operation: The operation, such as "packed_attention".
        kernel: The implementation's name.
        dtype: In which dtype it is compared; an implementation without float64 says float32.
        device: Where.
        tolerance: Largest error, as a share of the largest value.
        plugins: Plugins to name.
    """

    operation: ClassVar[str] = ""
    kernel: ClassVar[str] = ""
    dtype: ClassVar[torch.dtype] = torch.float64
    device: ClassVar[str] = "cpu"
    tolerance: ClassVar[float] = 1e-5
    plugins: ClassVar[tuple[str, ...] | None] = None

    def test_operation(self) -> None:
        """It equals the reference."""
        settings: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "tolerance": self.tolerance}
        operations.check_operation(self.operation, self.kernel, plugins=self.plugins, **settings)
