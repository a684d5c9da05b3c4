"""GGUF: what the exporter writes, read by llama.cpp's server and by node, and each known trap."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.core import consumers, deploy
from burnish.core.errors import ModelError
from burnish.core.exporters import gguf
from burnish.core.verifying import COSINE, Verdict

from ..conftest import tiny
from .conftest import RUN, Python, export, keys, read_by, run
from .models import PROMPTS, bare, reranker, saved

pytestmark = [pytest.mark.exports, pytest.mark.long, pytest.mark.timeout(1800)]
Note = Callable[..., None]
# Without the refusals by what is known: then only running the file can find that it is wrong.
_UNCHECKED = "from burnish.core.exporters import gguf; gguf.check_model = lambda *_: None; " + RUN


# The round trip.


def test_an_adapter_comes_back_out_of_llama_cpp(adapter: Path, served: Path, python: Python, note: Note) -> None:
    verdict = read_by(python, "llama-cpp", served)
    assert verdict.good and verdict.cosine is not None and verdict.cosine >= COSINE, verdict
    ours, theirs = (json.loads((folder / "golden.json").read_text()) for folder in (adapter, served))
    assert ours["texts"] == theirs["texts"] and np.abs(np.subtract(ours["outputs"], theirs["outputs"])).max() < 1e-5
    assert deploy.read(served)["runtime_file"] == "model-F16.gguf" and deploy.read(served)["prompts"] == PROMPTS
    note("llama.cpp", "minilm", verdict, version=version(verdict), what="minilm f16", reason=told(served))


def test_every_kind_of_file_is_measured_and_found_again(served: Path, python: Python, note: Note) -> None:
    described = deploy.read(served)
    quality = {row["precision"]: row for row in described["quality"]}
    assert list(quality) == ["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "f32", "bf16"]
    sizes = [quality[name]["bytes"] for name in ("q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16", "f32")]
    assert sizes == sorted(sizes) and sizes[-2] < 0.52 * sizes[-1] and sizes[0] < 0.25 * sizes[-1]
    assert quality["f32"]["cosine_min"] > 0.99999 and quality["f16"]["cosine_min"] > COSINE
    assert quality["q8_0"]["cosine_min"] > 0.998 and 0.95 < quality["q4_k_m"]["cosine_min"] < 0.99
    for name in ("q8_0", "q4_k_m"):
        verdict = read_by(python, "llama-cpp", served, quality[name]["file"])
        assert verdict.good and verdict.cosine == pytest.approx(quality[name]["cosine_min"], abs=2e-3), verdict
        note("llama.cpp", "minilm", verdict, version=version(verdict), what=f"minilm {name}", rounded=True)


@pytest.mark.parametrize("name", ["distilbert", "gemma", "modernbert", "qwen3", "xlm_roberta", "xlm_roberta ranker"])
def test_families(name: str, exported: Callable[[str], Path], python: Python, note: Note) -> None:
    verdict = read_by(python, "llama-cpp", exported(name))
    assert verdict.good and verdict.tokens, verdict
    family = name.removesuffix(" ranker")
    note("llama.cpp", family, verdict, version=version(verdict), what=f"{name} f16", reason=told(exported(name)))


@pytest.mark.parametrize("name", ["distilbert", "gemma", "modernbert", "qwen3", "xlm_roberta"])
def test_node_reads_the_same(name: str, exported: Callable[[str], Path], python: Python) -> None:
    verdict = read_by(python, "node-llama-cpp", exported(name))
    assert verdict.good and verdict.tokens, verdict


def test_node_reads_minilm(served: Path, python: Python) -> None:
    verdict = read_by(python, "node-llama-cpp", served)
    assert verdict.good and verdict.cosine is not None and verdict.cosine >= COSINE, verdict


def test_node_does_not_rank(exported: Callable[[str], Path], python: Python) -> None:
    with pytest.raises(ModelError, match="drops the blank before a query, and takes two empty texts for 0"):
        read_by(python, "node-llama-cpp", exported("xlm_roberta ranker"))


def version(verdict: Verdict) -> str:
    return f"xllamacpp {verdict.versions['xllamacpp']}"


def told(folder: Path) -> str:
    """What a table says of texts that become other tokens."""
    other = deploy.read(folder)["other_tokens"]
    return f"{len(other)} golden inputs become other tokens" if other else ""


# What goes wrong, and is found.


def test_trap_1_a_bert_cross_encoder_loses_its_pooler(minilm: Path, python: Python, tmp_path: Path, note: Note) -> None:
    source = reranker(tiny("bert", minilm, tmp_path / "base"), tmp_path / "model")
    reason = "the converter drops the pooler before the classifier"
    assert reason in export(python, source, tmp_path / "no")
    note("llama.cpp", "bert", "refused", kind="scores", reason=reason)
    said = export(python, source, tmp_path / "wrong", script=_UNCHECKED)
    assert "llama.cpp does not compute the model with weights in f32: a score is off by" in said
    assert not (tmp_path / "no").exists() and not (tmp_path / "wrong").exists()


def test_trap_2_behind_a_score_lies_stray_memory(exported: Callable[[str], Path], python: Python) -> None:
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import with_llama_cpp as script\n"
        "server = script.LlamaServer(sys.argv[2], 64, scores=True)\n"
        "ids = json.load(open(sys.argv[3]))['token_ids'][1]\n"
        "print(json.dumps(server.post('/v1/embeddings', input=ids, embd_normalize=-1)['data'][0]['embedding']))"
    )
    folder = exported("xlm_roberta ranker")
    place = Path(consumers.__file__).parent
    done = run(python("llama-cpp"), script, place, folder / "model-F32.gguf", folder / "golden.json")
    assert done.returncode == 0, done.stderr[-2000:]
    vector, score = json.loads(done.stdout), json.loads((folder / "golden.json").read_text())["outputs"][1]
    assert len(vector) > 1 and abs(vector[0] - score) < 1e-3
    assert max(abs(number - score) for number in vector[1:]) > 1e-2, "then all of it is the score"


def test_trap_3_the_transformers_folder_alone_has_no_pooling(
    adapter: Path, served: Path, python: Python, tmp_path: Path
) -> None:
    assert keys(python, served / "model-F16.gguf")["bert.pooling_type"] == 1
    inner, broken = tmp_path / "inner", tmp_path / "broken"
    shutil.copytree(adapter.with_name("merged"), inner, ignore=shutil.ignore_patterns("modules.json", "*_*"))
    shutil.copytree(served, broken, ignore=shutil.ignore_patterns("*.gguf"))
    convert(python, inner, broken / "model-F16.gguf")
    assert "bert.pooling_type" not in keys(python, broken / "model-F16.gguf")
    with pytest.raises(ModelError, match="llama-cpp does not read it"):
        read_by(python, "llama-cpp", broken)


def test_another_pooling_is_found(adapter: Path, served: Path, python: Python, tmp_path: Path) -> None:
    other, broken = tmp_path / "other", tmp_path / "broken"
    shutil.copytree(adapter.with_name("merged"), other)
    path = other / "1_Pooling" / "config.json"
    pooling = json.loads(path.read_text())
    path.write_text(json.dumps(pooling | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))
    shutil.copytree(served, broken, ignore=shutil.ignore_patterns("*.gguf"))
    convert(python, other, broken / "model-F16.gguf")
    verdict = read_by(python, "llama-cpp", broken)
    assert not verdict.good and verdict.cosine is not None and verdict.cosine < 0.9, verdict


def convert(python: Python, source: Path, file: Path) -> None:
    """A file as the converter makes it of a folder, compared with nothing."""
    script = Path(gguf.__file__).with_name("gguf_convert.py")
    command = [str(python("gguf")), "-P", str(script), str(source), str(file), "f16", "name"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_trap_4_node_leaves_the_closing_token_away(
    exported: Callable[[str], Path], python: Python, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from burnish.core import runtimes

    scripts = tmp_path / "scripts"
    shutil.copytree(Path(consumers.__file__).parent, scripts, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = scripts / "with_node_llama_cpp.mjs"
    text = path.read_text()
    assert text.count("[...before, ...bare, ...after]") == 1
    # An empty text alone keeps it: of no tokens at all node gives no vector.
    path.write_text(text.replace("...after]", "...(bare.length ? [] : after)]"))
    monkeypatch.setattr(runtimes, "_SCRIPTS", scripts)
    verdict = read_by(python, "node-llama-cpp", exported("qwen3"))
    assert verdict.cosine is not None and verdict.cosine < 0.99 and not verdict.tokens, verdict


def test_trap_5_a_tokenizer_that_nobody_published(python: Python, tmp_path: Path) -> None:
    source = saved(bare("qwen3", tmp_path / "base"), tmp_path / "model")
    said = export(python, source, tmp_path / "no")
    assert "does not know this tokenizer" in said and "--option pre_tokenizer=qwen2" in said
    said = export(python, source, tmp_path / "no", "pre_tokenizer=nonsense")
    assert "llama-cpp does not read it" in said
    assert "become other tokens in llama.cpp" in export(python, source, tmp_path / "no", "pre_tokenizer=tekken")


def test_what_llama_cpp_has_no_place_for(minilm: Path, python: Python, tmp_path: Path, note: Note) -> None:
    from torch import nn

    from burnish import FastSentenceTransformer

    source = saved(tiny("mpnet", minilm, tmp_path / "mpnet-base"), tmp_path / "mpnet")
    reason = "llama.cpp has no MPNet"
    assert reason in export(python, source, tmp_path / "no")
    note("llama.cpp", "mpnet", "refused", reason=reason)
    from sentence_transformers.base.modules import Dense

    source = saved(tiny("bert", minilm, tmp_path / "bert-base"), tmp_path / "bert")
    model = FastSentenceTransformer.from_pretrained(str(source), full_finetuning=True, device="cpu")
    width: Any = model.get_embedding_dimension()
    model.append(Dense(width, width, activation_function=nn.Identity()))
    model.save_pretrained(str(tmp_path / "dense"))
    said = export(python, tmp_path / "dense", tmp_path / "no")
    assert "llama.cpp does not compute the model with weights in f32: the smallest cosine is" in said


def test_text_of_other_tokens_is_known_and_no_other_passes(served: Path, python: Python, tmp_path: Path) -> None:
    """Devanagari, and a word of 162 letters, in BERT's tokenizer."""
    described = deploy.read(served)
    texts = json.loads((served / "golden.json").read_text())["texts"]
    assert [texts[place][:9] for place in described["other_tokens"]] == ["मंगल को ल", "Donaudamp"]
    assert read_by(python, "llama-cpp", served).versions["as tokens:"] == f"2 of {len(texts)} inputs"
    strict = tmp_path / "strict"
    shutil.copytree(served, strict)
    deploy.write_description(strict, described | {"other_tokens": []})
    verdict = read_by(python, "llama-cpp", strict)
    assert "2 of 19 inputs became other tokens" in verdict.faults and not verdict.good, verdict
