"""GGUF: what the exporter writes, read by llama.cpp's server and by node; each known trap; and the pages' snippets."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.core import consumers, deploy
from burnish.core.errors import ModelError
from burnish.core.exporters import gguf
from burnish.core.verifying import COSINE, Verdict, verify

from ..pages import blocks
from .conftest import ROOT, adapted, tiny
from .gguf_models import PROMPTS, bare, reranker, saved

pytestmark = [pytest.mark.exports, pytest.mark.long, pytest.mark.timeout(1800)]
Python = Callable[[str], Path]
Note = Callable[..., None]
PAGE = ROOT / "docs" / "serving" / "llama-cpp.md"
# What the converter calls the tokenizers of tests, which it has never seen.
LIKE = {"modernbert": "qwen2", "qwen3": "qwen2"}
_RUN = "from burnish.core.cli import main; main()"
# Without the refusals by what is known: then only running the file can find that it is wrong.
_UNCHECKED = "from burnish.core.exporters import gguf; gguf.check_model = lambda *_: None; " + _RUN
_KEYS = """
import json, sys
import gguf
fields = gguf.GGUFReader(sys.argv[1]).fields
json.dump({name: field.contents() for name, field in fields.items() if "token" not in name}, sys.stdout)
"""


def run(python: Path, script: str, *arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    # Not in the checkout, whose folders would stand before libraries of the same names.
    return subprocess.run(
        [str(python), "-c", script, *map(str, arguments)], cwd=more.pop("cwd", python.parent), capture_output=True,
        text=True, timeout=1200, check=False, **more,
    )  # fmt: skip


def export(python: Python, source: Path, folder: Path, *options: str, script: str = _RUN) -> str:
    """The last line that the command says where it fails, an empty one where it does not."""
    given = [part for option in options for part in ("--option", option)]
    done = run(python("gguf"), script, "export", source, "--to", folder, "--target", "gguf", *given)
    assert done.returncode in (0, 2, 4), done.stderr[-2000:]
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def read_by(python: Python, runtime: str, folder: Path, variant: str | None = None) -> Verdict:
    """What a runtime of an environment of its own makes of a folder."""
    place = {"python": python("llama-cpp")} if runtime == "llama-cpp" else {"node_modules": python(runtime)}
    return verify(folder, runtime, variant=variant, **place)  # type: ignore[arg-type]


def keys(python: Python, file: Path) -> Mapping[str, Any]:
    """What a file says of itself."""
    done = run(python("gguf"), _KEYS, file)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def adapter(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MiniLM under an adapter that acts, saved as "adapter" and as "merged"."""
    place = tmp_path_factory.mktemp("minilm")
    model = adapted(minilm)
    model.save_pretrained(str(place / "adapter"))
    model.save_pretrained_merged(place / "merged")
    return place / "adapter"


@pytest.fixture(scope="module")
def served(adapter: Path, python: Python, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file of the merged one."""
    folder = tmp_path_factory.mktemp("served") / "served"
    dtypes = ",".join(["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "f32", "bf16"])
    said = export(
        python, adapter.with_name("merged"), folder, f"dtype={dtypes}", f"libllama={python('node-llama-cpp')}"
    )
    assert not said, said
    return folder


@pytest.fixture(scope="module")
def exported(python: Python, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The export of a tiny model of a family, or of a reranker, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            place = tmp_path_factory.mktemp("tiny")
            family = name.removesuffix(" ranker")
            if name.endswith(" ranker"):
                source = reranker(bare(family, place / "base"), place / "model")
            elif family in ("bert", "distilbert"):
                source = saved(tiny(family, minilm, place / "base"), place / "model")
            else:
                source = saved(bare(family, place / "base"), place / "model")
            like = [f"pre_tokenizer={LIKE[family]}"] if family in LIKE else []
            said = export(python, source, place / "served", "dtype=f16,f32", *like)
            assert not said, said
            made[name] = place / "served"
        return made[name]

    return make


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


@pytest.mark.parametrize("name", ["distilbert", "modernbert", "qwen3", "xlm_roberta", "xlm_roberta ranker"])
def test_families(name: str, exported: Callable[[str], Path], python: Python, note: Note) -> None:
    verdict = read_by(python, "llama-cpp", exported(name))
    assert verdict.good and verdict.tokens, verdict
    family = name.removesuffix(" ranker")
    note("llama.cpp", family, verdict, version=version(verdict), what=f"{name} f16", reason=told(exported(name)))


@pytest.mark.parametrize("name", ["distilbert", "modernbert", "qwen3", "xlm_roberta"])
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
    path.write_text(text.replace("[...before, ...bare, ...after]", "[...before, ...bare]"))
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


# From the live model, and to the Hub.

_LIVE = """
import json, sys
from burnish import FastSentenceTransformer
model = FastSentenceTransformer.from_pretrained(sys.argv[1], for_inference=True, device="cpu")
for name, arguments, options in json.loads(sys.argv[2]):
    said = getattr(model, name)(*arguments, **options)
    print("said", said)
"""


def call(python: Path, source: Path, *calls: Sequence[Any], **environment: str) -> subprocess.CompletedProcess[str]:
    """Methods of a live model, one after the other: (name, arguments, options)."""
    return run(python, _LIVE, source, json.dumps(calls), env={**os.environ, **environment})


def test_saved_from_the_live_model(adapter: Path, served: Path, python: Python, tmp_path: Path) -> None:
    done = call(
        python("gguf"), adapter, ("save_pretrained_gguf", [str(tmp_path / "live")], {
            "quantization_method": ["fast_quantized", "quantized"], "libllama": str(python("node-llama-cpp")),
        }),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["precision"]: row for row in deploy.read(tmp_path / "live")["quality"]}
    assert list(rows) == ["q8_0", "q4_k_m"] and "merged" not in (tmp_path / "live" / "Modelfile").read_text()
    wanted = {row["precision"]: row["cosine_min"] for row in deploy.read(served)["quality"]}
    assert all(row["cosine_min"] == pytest.approx(wanted[name], abs=2e-3) for name, row in rows.items())
    assert read_by(python, "llama-cpp", tmp_path / "live").good


def test_onnx_from_the_live_model(adapter: Path, python: Python, tmp_path: Path) -> None:
    options = {"dtype": ["fp32", "int8"], "exporter": "torchscript"}
    done = call(python("exporter"), adapter, ("save_pretrained_onnx", [str(tmp_path / "live")], options))
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["precision"] for row in deploy.read(tmp_path / "live")["quality"]] == ["fp32", "int8"]
    assert verify(tmp_path / "live", python=python("onnxruntime")).good


def test_pushed_to_a_hub(adapter: Path, python: Python, tmp_path: Path) -> None:
    from .. import loopback_hub as server

    with server.running() as hub:
        place = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": server.TOKEN, "HF_HUB_DISABLE_XET": "1"}
        method = {"quantization_method": "f16", "private": True}
        done = call(
            python("gguf"), adapter, ("push_to_hub_gguf", ["me/refunds-GGUF"], method),
            ("push_to_hub_gguf", ["me/refunds-GGUF"], {**method, "commit_message": "For review", "create_pr": True,
                                                       "quantization_method": "q8_0"}),
            ("push_to_hub_gguf", ["me/refunds-GGUF"], {**method, "revision": "v2"}),
            **place, BURNISH_CACHE=str(tmp_path / "cache"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        repository = hub.repositories["me/refunds-GGUF"]
        files = repository.files()
        beside = {"Modelfile", "README.md", "deploy.json", "golden.json", "tokenizer.json"}
        assert repository.private and set(files) == {".gitattributes", "model-F16.gguf", *beside}
        assert b"me/refunds-GGUF" in files["README.md"] and b"model_id" not in files["README.md"]
        assert repository.messages[repository.refs["main"]][0] == "Add GGUF files: f16"
        first, second, third = re.findall(r"^said (\S+)$", done.stdout, re.M)
        assert first.endswith(repository.refs["main"]) and "/discussions/" in second
        assert third.endswith(repository.refs["v2"]) and "model-F16.gguf" in repository.files("v2")
    for name, content in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    verdict = read_by(python, "llama-cpp", tmp_path / "pulled")
    assert verdict.good, verdict


# The pages.


def snippets(kind: str) -> list[str]:
    return [block.text for block in blocks(PAGE.read_text(encoding="utf-8")) if block.kind == kind]


@pytest.fixture
def place(served: Path, exported: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder that has what the page names."""
    (tmp_path / "served").symlink_to(served)
    (tmp_path / "reranker").symlink_to(exported("xlm_roberta ranker"))
    return tmp_path


QUERY, ANSWER = "find this: How long does a refund take?", "Within five working days."


def wanted(adapter: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(adapter.with_name("merged")), device="cpu").encode([QUERY, ANSWER])


def near(found: Any, right: Any) -> bool:
    return bool(np.abs(np.subtract(found, right)).max() < 1e-3)


def test_the_pages_python(place: Path, adapter: Path, python: Python) -> None:
    first, second = snippets("python")
    done = run(python("llama-cpp"), first + "\nimport json; print(json.dumps(vectors))", cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    assert near(json.loads(done.stdout), wanted(adapter))
    done = run(python("llama-cpp"), second + "\nimport json; print(json.dumps(scores))", cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    assert near(list(json.loads(done.stdout).values()), ranked(json.loads(done.stdout), place / "reranker"))


def ranked(scores: Mapping[str, float], folder: Path) -> list[float]:
    from sentence_transformers import CrossEncoder
    from torch import nn

    model = CrossEncoder(str(folder.resolve().with_name("model")), device="cpu")
    pairs = [("Which planet is red?", text) for text in scores]
    return [float(score) for score in model.predict(pairs, activation_fn=nn.Identity())]


def test_the_pages_javascript(place: Path, adapter: Path, python: Python) -> None:
    (script,) = snippets("js")
    (place / "node_modules").symlink_to(python("node-llama-cpp"))
    (place / "embed.mjs").write_text(f"{script}\nconsole.log(JSON.stringify(vectors));\nawait llama.dispose();\n")
    done = subprocess.run(["node", "embed.mjs"], cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert near(json.loads(done.stdout.strip().splitlines()[-1]), wanted(adapter))


@contextmanager
def llama_server(python: Python, place: Path, command: str) -> Iterator[str]:
    """The address of a server that a page's command starts."""
    (binary,) = python("llama-server").parents[1].glob("lib/python*/site-packages/*/bin/llama-server")
    binary.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = re.sub(r"--port \d+", "", command).split()
    assert words.pop(0) == "llama-server"
    started = subprocess.Popen(
        [str(binary), *words, "--port", str(port), "-t", "1"], cwd=place, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "LD_LIBRARY_PATH": str(binary.parent)},
    )  # fmt: skip
    try:
        for _ in range(240):
            with_error = None
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except (urllib.error.URLError, OSError) as error:
                with_error = error
            time.sleep(0.25)
        assert with_error is None, with_error
        yield f"http://127.0.0.1:{port}"
    finally:
        started.terminate()
        started.wait(30)


def post(address: str, **body: Any) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_the_pages_server(place: Path, adapter: Path, python: Python) -> None:
    (command,) = re.findall(r"^\$ (llama-server .*)$", PAGE.read_text(encoding="utf-8"), re.M)
    with llama_server(python, place, command) as address:
        found = [row["embedding"] for row in post(f"{address}/v1/embeddings", input=[QUERY, ANSWER])["data"]]
        assert near(found, wanted(adapter))
        with pytest.raises(urllib.error.HTTPError):  # what the page says of longer texts
            post(f"{address}/v1/embeddings", input="planet " * 300)


def test_the_pages_ranking_server(place: Path, python: Python) -> None:
    (command,) = re.findall(r"`(llama-server [^`]* --reranking)`", PAGE.read_text(encoding="utf-8"))
    documents = ["Mars is called the Red Planet.", "Venus is called Earth's twin."]
    with llama_server(python, place, command) as address:
        rows = post(f"{address}/v1/rerank", query="Which planet is red?", documents=documents)["results"]
    scores = {documents[row["index"]]: row["relevance_score"] for row in rows}
    assert near(list(scores.values()), ranked(scores, place / "reranker"))


def test_ollamas_modelfile(served: Path, exported: Callable[[str], Path], python: Python, note: Note) -> None:
    for folder, family in ((served, "minilm"), (exported("qwen3"), "qwen3"), (exported("modernbert"), "modernbert")):
        lines = (folder / "Modelfile").read_text(encoding="utf-8").splitlines()
        said = dict(line.split(maxsplit=1) for line in lines)
        assert set(said) == {"FROM", "PARAMETER"} and len(lines) == 2
        file, (name, value) = folder / said["FROM"], said["PARAMETER"].split()
        assert said["FROM"].startswith("./") and file.name == deploy.read(folder)["runtime_file"]
        found = keys(python, file)
        architecture = found["general.architecture"]
        assert name == "num_ctx" and int(value) == deploy.read(folder)["max_seq_length"]
        assert int(value) <= found[f"{architecture}.context_length"]
        assert found[f"{architecture}.pooling_type"] in (1, 2, 3)
        note("ollama", family, "static", version="a Modelfile over the verified GGUF", what=f"{family} f16")
    page = (ROOT / "docs" / "serving" / "ollama.md").read_text(encoding="utf-8")
    (shown,) = [block.text for block in blocks(page) if block.kind == "text"]
    assert shown == (served / "Modelfile").read_text(encoding="utf-8").strip()
