"""What a model that is ready to train can be handed on as beside Sentence Transformers' folders: export targets."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import saving
from .errors import ConfigError, ModelError
from .exporting import export_folder
from .hub import push_model
from .prepared import Prepared

_DTYPE = {"gguf": "quantization_method", "onnx": "dtype"}
# Unsloth's names for the methods that it recommends.
METHODS = {"not_quantized": "f16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}


class Exportable(Prepared):
    """A prepared model with the methods that write what `burnish export` writes, from the live model."""

    def save_pretrained_gguf(
        self,
        path: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] = "fast_quantized",
        libllama: str | None = None,
        pre_tokenizer: str | None = None,
    ) -> None:
        """Save for llama.cpp and Ollama, the adapter folded in; needs `burnish[gguf]`.

        Each file is run by llama.cpp and compared with the model before the folder appears: docs/serving/llama-cpp.md.

        Args:
            path: The folder; it appears whole or not at all.
            tokenizer: Saved in place of the model's own if given.
            quantization_method: "f32", "f16" ("not_quantized"), "bf16", "q8_0" ("fast_quantized"), "q6_k", "q5_k_m" or
                "q4_k_m" ("quantized"), or several, the first of which is the one that `Modelfile` names.
            libllama: llama.cpp's library, or a folder that has it, for the last three; left out, llama-cpp-python's.
            pre_tokenizer: llama.cpp's name for the published tokenizer that this one is made like, if it asks for one.

        Raises:
            ConfigError: For an unknown method, or where a package is missing.
            ModelError: If llama.cpp does not compute the model.
        """
        options = _gguf_options(quantization_method, libllama, pre_tokenizer)
        _export(self, _merged(self, tokenizer), Path(path), "gguf", options)

    def save_pretrained_onnx(
        self,
        path: str | Path,
        tokenizer: Any = None,
        dtype: str | Sequence[str] = "fp32",
        exporter: str = "dynamo",
    ) -> None:
        """Save for ONNX Runtime, the adapter folded in; needs `burnish[onnx]`.

        Each graph is run and compared with the model before the folder appears: docs/serving.md.

        Args:
            path: The folder; it appears whole or not at all.
            tokenizer: Saved in place of the model's own if given.
            dtype: "fp32", "fp16" or "int8", or several, the first of which is the folder's main one.
            exporter: "dynamo", or PyTorch's former "torchscript".

        Raises:
            ConfigError: For an unknown option, or where a package is missing.
            ModelError: If a graph does not compute the model.
        """
        options = {"dtype": _listed(dtype, "dtype"), "exporter": exporter}
        _export(self, _merged(self, tokenizer), Path(path), "onnx", options)

    def push_to_hub_gguf(
        self,
        repo_id: str,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] = "fast_quantized",
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        exist_ok: bool = True,
        replace_model_card: bool = False,
        libllama: str | None = None,
        pre_tokenizer: str | None = None,
    ) -> str:
        """Push what `save_pretrained_gguf` would save; returns the commit's address, or the pull request's.

        The parameters are those of `save_pretrained_gguf`, and of `push_to_hub` otherwise; docs/hub.md tells them.

        Raises:
            ConfigError: If what is asked for cannot be.
            ModelError: If llama.cpp does not compute the model.
            HubError: If the upload failed: the error names the folder with the files, and the command that goes on.
        """
        options = _gguf_options(quantization_method, libllama, pre_tokenizer)
        merged = _merged(self, tokenizer)
        return push_model(
            merged, lambda folder: _export(self, merged, folder, "gguf", options), repo_id, token=token,
            private=private, commit_message=commit_message or f"Add GGUF files: {options['dtype']}", revision=revision,
            create_pr=create_pr, exist_ok=exist_ok, replace_card=replace_model_card,
        )  # fmt: skip


def _gguf_options(methods: str | Sequence[str], libllama: str | None, pre_tokenizer: str | None) -> dict[str, str]:
    asked = _listed(methods, "quantization_method").split(",")
    options = {"dtype": ",".join(METHODS.get(method, method) for method in asked)}
    more = {"libllama": libllama, "pre_tokenizer": pre_tokenizer}
    return options | {key: value for key, value in more.items() if value is not None}


def _listed(given: str | Sequence[str], where: str) -> str:
    """One name or several, as an exporter's option takes them."""
    names = [given] if isinstance(given, str) else list(given)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{given!r} is no name and no list of names", where=where, fix="Pass one, or a list")
    return ",".join(names)


def _merged(model: Prepared, tokenizer: Any) -> Any:
    if model.transformers_model is None:
        what = "has no transformer, which is what is exported"
        raise ModelError(what, where="the model", fix="Serve it with Sentence Transformers")
    return saving.with_tokenizer(saving.merged_model(model, "merged_32bit"), tokenizer)


def _export(model: Prepared, merged: Any, path: Path, target: str, options: Mapping[str, str]) -> None:
    """Let an exporter read the merged model from a folder, as `burnish export` does."""
    with tempfile.TemporaryDirectory(prefix="burnish-export-") as place:
        source = Path(place) / path.name
        saving.write_merged(model, merged, source, "compatible")
        try:
            export_folder(source, path, target, [f"{key}={value}" for key, value in options.items()])
        except ConfigError as error:
            named = {"--option dtype": _DTYPE[target], "--option exporter": "exporter"}.get(error.where or "")
            if named is None:
                raise
            raise ConfigError(error.what, where=named, fix=error.fix) from error
