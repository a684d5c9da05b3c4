"""What GGUF exports refuse before they compute, how they find libraries and files, and what their errors say."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.core import exportable
from burnish.core.contracts import ExportRequest, Exports, Family
from burnish.core.errors import BurnishError, ConfigError, ModelError
from burnish.core.exporters import gguf

GOOD: dict[str, Any] = {
    "kind": "embeddings", "labels": None, "pooling": "mean", "include_prompt": True, "prompts": {"query": "q: "},
}  # fmt: skip


def checked(monkeypatch: pytest.MonkeyPatch, exports: Exports, **facts: Any) -> None:
    monkeypatch.setattr("burnish.core.deploy.describe", lambda model, source: GOOD | facts)
    gguf.check_model(object(), Family(name="x", exports=exports), Path("saved"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("exports", "facts", "reason"),
    [
        (Exports(gguf="bert", refused={"gguf-reranker": "drops"}), {"kind": "scores", "labels": ["a"]}, "drops"),
        (Exports(gguf=None, refused={"gguf": "no bias by distance"}), {}, "no bias by distance"),
        (Exports(gguf=None), {}, "llama.cpp has no architecture for the family x"),
        (Exports(gguf="bert"), {"kind": "scores", "labels": ["a", "b"]}, "llama.cpp's server tells one score"),
        (Exports(gguf="bert"), {"kind": "scores", "labels": None}, "llama.cpp's server tells one score"),
        (Exports(gguf="bert"), {"pooling": "max"}, "llama.cpp pools by mean, cls, lasttoken, and the model by max"),
        (Exports(gguf="bert"), {"pooling": ["cls", "mean"]}, "llama.cpp pools by"),
        (Exports(gguf="bert"), {"pooling": None}, "llama.cpp pools by"),
        (Exports(gguf="bert"), {"include_prompt": False}, "llama.cpp pools over a prompt's tokens too"),
    ],
)
def test_what_is_known_to_come_out_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, exports: Exports, facts: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError) as caught:
        checked(monkeypatch, exports, **facts)
    assert caught.value.what.startswith(reason) and caught.value.where == "--target gguf, model saved"


def test_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    checked(monkeypatch, Exports(gguf="bert", refused={"gguf-reranker": "drops", "onnx": "wrong"}))
    checked(monkeypatch, Exports(gguf="bert"), kind="scores", labels=["LABEL_0"], pooling=None)
    checked(monkeypatch, Exports(gguf="bert"), include_prompt=False, prompts={"document": ""})
    checked(monkeypatch, Exports(gguf="qwen3"), pooling="lasttoken")


def test_the_library_is_found_by_name_in_a_folder_or_in_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"
    deep.mkdir(parents=True)
    for name in ("libllama.v0.5.0.so", "libllama-common.so", "libggml.v0.5.0.so"):
        (deep / name).touch()
    assert gguf.find_library(str(tmp_path / "node_modules")) == deep / "libllama.v0.5.0.so"
    assert gguf.find_library(str(deep / "libggml.v0.5.0.so")) == deep / "libggml.v0.5.0.so", "what is named is taken"
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        with pytest.raises(ConfigError, match=r"there is no libllama in it\. pip install llama-cpp-python, or npm"):
            gguf.find_library(str(tmp_path / place))
    with pytest.raises(ConfigError, match=r"^--option dtype: weights in 4 to 6 bits are made by llama\.cpp's library"):
        gguf.find_library(None)
    package = tmp_path / "site" / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "lib" / "libllama.so").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert gguf.find_library(None) == package / "lib" / "libllama.so"


@pytest.mark.parametrize(
    ("script", "said", "kind", "message"),
    [
        ("gguf_convert.py", "WARNING\nNotImplementedError: BPE pre-tokenizer was not recognized - update\n", ModelError,
         "llama.cpp's converter does not know this tokenizer"),
        ("gguf_convert.py", "ModuleNotFoundError: No module named 'conversion'", ConfigError, "burnish[gguf]"),
        ("gguf_convert.py", "trace\nKeyError: 'x'\n\n", ModelError, "llama.cpp's converter stopped: KeyError: 'x'"),
        ("gguf_quantise.py", "", ModelError, "llama.cpp's library stopped: it said nothing"),
    ],
)  # fmt: skip
def test_what_stops_a_script_is_one_line(
    monkeypatch: pytest.MonkeyPatch, script: str, said: str, kind: type[BurnishError], message: str
) -> None:
    done = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr("subprocess.run", lambda *given, **more: done)
    with pytest.raises(kind) as caught:
        gguf._run(script, "a")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_modelfile_names_the_file_beside_it() -> None:
    assert gguf.modelfile(gguf.file_of("q8_0"), 256) == "FROM ./model-Q8_0.gguf\nPARAMETER num_ctx 256\n"
    assert gguf.modelfile(gguf.file_of("f16"), None) == "FROM ./model-F16.gguf\n"


@pytest.mark.parametrize("options", [{"dtype": "q3_k"}, {"dtype": "f16,int8"}, {"quality": "1"}])
def test_options_are_known(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is unknown"):
        gguf.gguf(ExportRequest(source=tmp_path, output=tmp_path, options=options))


def test_every_dtype_has_its_bounds() -> None:
    assert set(gguf.SCORES_OFF) == set(gguf.OPTIONS["dtype"] or ()) == {"f32", *gguf.WORST}


# From the live model.


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
    """(target, options) of what was to be exported; none of it is."""
    asked: list[tuple[str, dict[str, str]]] = []
    monkeypatch.setattr(exportable, "_merged", lambda model, tokenizer: None)
    monkeypatch.setattr(
        exportable, "_export", lambda model, merged, path, target, options: asked.append((target, dict(options)))
    )
    return asked


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({}, "q8_0"),
        ({"quantization_method": "q4_k_m"}, "q4_k_m"),
        ({"quantization_method": ["not_quantized", "fast_quantized", "quantized"]}, "f16,q8_0,q4_k_m"),
        ({"quantization_method": ("f16", "q6_k")}, "f16,q6_k"),
    ],
)
def test_unsloths_names_are_understood(
    exports: list[tuple[str, dict[str, str]]], given: dict[str, Any], dtype: str
) -> None:
    save: Callable[..., None] = exportable.Exportable.save_pretrained_gguf
    save(None, "folder", **given)
    save(None, "folder", None, libllama="lib", pre_tokenizer="qwen2")
    more = {"dtype": "q8_0", "libllama": "lib", "pre_tokenizer": "qwen2"}
    assert exports == [("gguf", {"dtype": dtype}), ("gguf", more)]


def test_onnx_takes_a_list_too(exports: list[tuple[str, dict[str, str]]]) -> None:
    save: Callable[..., None] = exportable.Exportable.save_pretrained_onnx
    save(None, "folder", dtype=["fp32", "int8"])
    assert exports == [("onnx", {"dtype": "fp32,int8", "exporter": "dynamo"})]


@pytest.mark.parametrize("given", [[], "", [""], [1]])
def test_what_is_no_name_is_refused(exports: list[tuple[str, dict[str, str]]], given: Any) -> None:
    save: Callable[..., None] = exportable.Exportable.save_pretrained_gguf
    with pytest.raises(ConfigError, match=r"^quantization_method: .* is no name and no list of names"):
        save(None, "folder", quantization_method=given)
