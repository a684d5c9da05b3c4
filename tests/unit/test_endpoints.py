"""Running servers are compared with the golden vectors, whatever API they speak; what goes wrong is one line."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from burnish import FastClassifier, FastCrossEncoder, FastSentenceTransformer
from burnish.core import deploy
from burnish.core.cli import verify as command
from burnish.core.endpoint_calls import Endpoint
from burnish.core.endpoints import APIS
from burnish.core.errors import ConfigError, ModelError
from burnish.core.testing.subject import quietly
from burnish.core.verifying import verify_url

from ..loopback_models import Served, embedder, scorer, serving

Cli = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
PROMPTS = {"query": "find this: "}


@pytest.fixture(scope="session")
def folder(tiny_bert_st: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A normalising model of embeddings, with a prompt."""
    place = tmp_path_factory.mktemp("served") / "model"
    with quietly():
        model = FastSentenceTransformer.from_pretrained(
            str(tiny_bert_st), full_finetuning=True, device="cpu", prompts=PROMPTS
        )
    model.save_pretrained(str(place))
    return place


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="session")
def ranker(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranker") / "model"
    with quietly():
        model = FastCrossEncoder.from_pretrained(str(tiny_bert), full_finetuning=True, device="cpu", num_labels=1)
    model.max_seq_length = 64
    inner: Any = model[0]
    with torch.no_grad():
        inner.model.classifier.weight.mul_(30)
    model.save_pretrained(str(place))
    return place


@pytest.fixture(scope="session")
def classifier(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("classes") / "model"
    with quietly():
        model = FastClassifier.from_pretrained(
            str(tiny_bert), labels=["no", "may be", "yes"], full_finetuning=True, device="cpu"
        )
    model.max_seq_length = 64
    model.save_pretrained(str(place))
    return place


@pytest.fixture
def served(model: Any) -> Iterator[Served]:
    with serving(Served(embed=embedder(model))) as found:
        yield found


def ask(folder: Path, served: Served, api: str = "openai", **more: Any) -> Any:
    return verify_url(folder, Endpoint(url=served.url, api=api, **more))


def sigmoid(rows: Any) -> Any:
    return 1 / (1 + np.exp(-rows))


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def softmax(rows: Any) -> Any:
    return np.exp(rows) / np.exp(rows).sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("api", "versions"),
    [("openai", {}), ("tei", {"tei": "1.9.0"}), ("ollama", {"ollama": "0.12.0"}), ("vllm", {"vllm": "0.32.0"})],
)
def test_embeddings(api: str, versions: dict[str, str], folder: Path, served: Served) -> None:
    verdict = ask(folder, served, api)
    assert verdict.good and verdict.runtime == api and verdict.versions == versions and verdict.notes == (), verdict
    assert verdict.cosine > 0.999999 and verdict.difference < 1e-6 and verdict.rank == 1 and verdict.tokens is None
    posted = [body for _, body, _ in served.asked if body is not None]
    texts = [text for body in posted for text in body.get("input", body.get("inputs"))]
    assert sorted(texts) == sorted(json.loads((folder / "golden.json").read_text())["texts"])
    assert any(text.startswith("find this: ") for text in texts) and len(posted) > 2
    groups = [body.get("input", body.get("inputs")) for body in posted]
    assert all(len(group) == 1 for group in groups if "" in group or " " in group), "what may be refused goes alone"


@pytest.mark.parametrize("api", ["tei", "cohere", "vllm"])
def test_scores(api: str, ranker: Path) -> None:
    with serving(Served(score=scorer(CrossEncoder(str(ranker), device="cpu")), activated=sigmoid)) as served:
        verdict = ask(ranker, served, api)
    assert verdict.good and verdict.cosine is None and verdict.inputs == 17 and verdict.difference < 1e-4, verdict
    assert any("sigmoids" in note for note in verdict.notes) == (api == "cohere")


@pytest.mark.parametrize("api", ["tei", "vllm"])
def test_classes(api: str, classifier: Path) -> None:
    labels = deploy.read(classifier)["labels"]
    inner = scorer(CrossEncoder(str(classifier), device="cpu"))
    pairs = any(isinstance(one, list) for one in json.loads((classifier / "golden.json").read_text())["inputs"])
    with serving(Served(score=inner, labels=labels)) as served:
        if pairs and api == "vllm":
            with pytest.raises(ConfigError, match="classifies single texts"):
                ask(classifier, served, api)
            return
        verdict = ask(classifier, served, api)
        assert verdict.good and verdict.difference < 1e-5, verdict
        served.labels = ["no", "yes", "may be"]
        other = ask(classifier, served, api)
        assert api == "vllm" or not other.good, "labels that are mixed up"


@pytest.mark.parametrize(("squash", "word"), [(softmax, "softmaxes"), (sigmoid, "sigmoids")])
def test_probabilities_are_taken_back_to_logits(squash: Any, word: str, classifier: Path) -> None:
    inner = scorer(CrossEncoder(str(classifier), device="cpu"))
    # As of a server that gives them whatever it is asked for.
    given = Served(score=lambda inputs: squash(np.asarray(inner(inputs))), labels=deploy.read(classifier)["labels"])
    with serving(given) as served:
        verdict = ask(classifier, served, "tei")
        assert verdict.good and verdict.notes == (f"its scores are the {word} of logits: those are compared",), verdict
        served.score = lambda inputs: squash(np.asarray(inner(inputs)) + np.eye(3)[0] / 10)
        assert not ask(classifier, served, "tei").good


def test_another_pooling_is_found(folder: Path, tiny_bert: Path) -> None:
    trunk = Transformer(str(folder), max_seq_length=64)
    other = SentenceTransformer(modules=[trunk, Pooling(32, pooling_mode="cls")], device="cpu")
    with serving(Served(embed=embedder(other))) as served:
        for api in ("openai", "tei", "ollama", "vllm"):
            verdict = ask(folder, served, api)
            assert not verdict.good and verdict.cosine < 0.99, verdict
        lengths = [
            fault for fault in ask(folder, served, "openai").faults if "and the model's are of length 1" in fault
        ]
        assert lengths, "and it does not normalise"


def test_lost_prompts_are_found(folder: Path, served: Served) -> None:
    served.heard = lambda text: text.removeprefix("find this: ")
    verdict = ask(folder, served)
    assert not verdict.good and verdict.cosine < 0.999 and ', of "find this: ' in verdict.faults[0], verdict
    # As a server does that was told of a default prompt.
    served.heard = lambda text: f"find this: {text}"
    assert not ask(folder, served).good


def test_another_order_is_found_or_mended(folder: Path, served: Served) -> None:
    served.given = lambda items: items[::-1]
    assert ask(folder, served, "openai").good, "each says which it is"
    assert not ask(folder, served, "tei").good and not ask(folder, served, "ollama").good


def test_a_model_that_is_not_normalised(tiny_bert: Path, tmp_path: Path) -> None:
    trunk = Transformer(str(tiny_bert), max_seq_length=64)
    plain = SentenceTransformer(modules=[trunk, Pooling(32, pooling_mode="mean")], device="cpu")
    plain.save_pretrained(str(tmp_path / "plain"))
    with quietly():
        model = FastSentenceTransformer.from_pretrained(str(tmp_path / "plain"), full_finetuning=True, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    with serving(Served(embed=embedder(model))) as served:
        exact, directions = ask(tmp_path / "saved", served, "tei"), ask(tmp_path / "saved", served, "ollama")
    assert exact.good and exact.notes == () and exact.difference < 1e-6
    assert directions.good and directions.difference < 1e-6
    assert directions.notes == ("it gives vectors of length 1, which the model does not: directions are compared",)


def test_refused_inputs_are_told_and_left_out(folder: Path, served: Served) -> None:
    served.refuse = lambda text: not text.strip() or len(text) > 300
    verdict = ask(folder, served, "tei")
    assert verdict.good and verdict.inputs == 16
    assert [note.partition(":")[0] for note in verdict.notes] == [
        "it refuses what is empty, 2 of 19 inputs, which are not compared",
        "it refuses what is too long, 1 of 19 inputs, which are not compared",
    ]
    served.refusal = 500  # as llama.cpp's server says it
    assert ask(folder, served, "tei").good
    served.refusal = 429
    with pytest.raises(ModelError, match="takes no more requests for now"):
        ask(folder, served, "tei")
    served.refusal = 422
    served.refuse = lambda text: True
    with pytest.raises(ModelError, match=r"refuses the request \(422\): `inputs` cannot be served"):
        ask(folder, served, "tei")


def test_inputs_that_are_known_to_become_other_tokens(folder: Path, served: Served, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    deploy.write_description(copy, deploy.read(copy) | {"other_tokens": [6]})
    text = json.loads((copy / "golden.json").read_text())["texts"][6]
    served.heard = lambda heard: heard[::-1] if heard == text else heard
    assert not ask(folder, served).good
    served.asked.clear()
    verdict = ask(copy, served)
    assert verdict.good and verdict.inputs == 18 and text not in str([body for _, body, _ in served.asked])
    assert verdict.notes == ("1 of 19 inputs become other tokens there, as deploy.json says, and are not compared",)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"raw": b"[]"}, r"its answer has no 'data'\. Pass the --api"),
        ({"raw": b'{"data": 3}'}, "its answer is no list"),
        ({"raw": b'{"data": []}'}, "it answers 0 results to 8 inputs"),
        ({"given": lambda items: items[1:]}, "it answers 7 results to 8 inputs"),
        ({"given": lambda items: [{**one, "index": 0} for one in items]}, r"numbered \[0, 0, .*not from 0 to 7"),
        ({"given": lambda items: [{"index": one["index"]} for one in items]}, "its answer has no 'embedding'"),
        ({"given": lambda items: [{**one, "embedding": [None]} for one in items]}, r"it gives \[None\] where numbers"),
        ({"given": lambda items: [{**one, "embedding": []} for one in items]}, r"it gives \[\] where numbers"),
        ({"given": lambda items: [{**one, "embedding": [float("nan")]} for one in items]}, r"it gives \[nan\] where"),
        (
            {"given": lambda items: [{**one, "embedding": [1.0] * (1 + one["index"])} for one in items]},
            r"it gives rows of \[1, 2, 3, 4, 5, 6, 7, 8\] numbers",
        ),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_one_line(changed: dict[str, Any], line: str, folder: Path, served: Served) -> None:
    for key, value in changed.items():
        setattr(served, key, value)
    with pytest.raises(ModelError, match=line) as caught:
        ask(folder, served, "openai", model="tiny")
    assert str(caught.value).startswith(f"{served.url}/v1/embeddings: ") and "\n" not in str(caught.value)


def test_another_number_of_dimensions(folder: Path, served: Served) -> None:
    served.given = lambda items: [{**one, "embedding": [*one["embedding"], 0.0]} for one in items]
    assert any("19 x 33 numbers, not 19 x 32" in fault for fault in ask(folder, served).faults)


def test_the_token_goes_to_the_server_and_nowhere_else(
    folder: Path, served: Served, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.token = "a secret"
    monkeypatch.setenv("HF_TOKEN", "another secret")
    code, _, err = cli("verify", folder, "--url", served.url, "--api", "tei")
    assert code == 4 and "wants a token" in err and {token for _, _, token in served.asked} == {None}
    monkeypatch.setenv("BURNISH_URL_TOKEN", "a secret")
    code, out, err = cli("verify", folder, "--url", served.url, "--api", "tei")
    assert code == 0 and "secret" not in out + err and served.asked[-1][2] == "Bearer a secret"
    monkeypatch.delenv("BURNISH_URL_TOKEN")
    assert cli("verify", folder, "--url", served.url, "--api", "tei", "--token", "a secret")[0] == 0
    assert "secret" not in repr(Endpoint(url=served.url, api="tei", token="a secret"))


def test_the_command(folder: Path, served: Served, cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("verify", folder, "--url", f"{served.url}/v1", "--api", "openai")
    assert code == 0 and "1.000000" in out and "not told" in out and "yes" in out
    served.heard = lambda text: text.upper().lower()[:20]
    code, out, _ = cli("verify", folder, "--url", served.url, "--api", "vllm")
    assert code == 1 and "vllm: the smallest cosine is" in out
    for flags, said in {
        ("--url", served.url): "what the server speaks is not said. Pass --api with one of openai, tei, ollama",
        ("--url", served.url, "--api", "smtp"): "--api: 'smtp' is unknown. Known: openai, tei, ollama, cohere, vllm",
        ("--url", served.url, "--api", "cohere"): "--api cohere: has no endpoint for embeddings. Those that do: openai",
        ("--url", "localhost:80", "--api", "tei"): "--url localhost:80: is no address of a server",
        ("--url", "file:///etc/passwd", "--api", "tei"): "is no address of a server",
        ("--url", "http://me:pass@h/", "--api", "tei"): "--url http://h: has more than an address. Leave out user",
        ("--url", served.url, "--api", "tei", "--timeout", "0"): "--timeout: 0.0 is no time",
        ("--url", served.url, "--api", "tei", "--variant", "x"): "--variant: goes with runtimes, and --url names a",
        ("--url", served.url, "--api", "tei", "--difference", "1"): "--difference: embeddings are compared by their",
        ("--api", "tei"): "--api: goes with a server, and no --url names one",
        ("--url", served.url, "--api", "openai", "--model", "other"): "knows no such path or model (404)",
    }.items():
        code, _, err = cli("verify", folder, *flags)
        assert code in (2, 4) and said in err, (flags, err)
        assert "pass@" not in err


def test_help_names_every_api() -> None:
    hints = get_type_hints(command.verify, include_extras=True)
    helped = hints["api"].__metadata__[0].help
    assert all(name in helped for name in APIS)


def test_the_only_model_that_is_served(folder: Path, served: Served) -> None:
    assert ask(folder, served, "openai").good
    served.answer = lambda path, body: {"data": [{"id": "a"}, {"id": "b"}]}  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"^--model: http://\S+ serves a, b\. Name the one to ask for"):
        ask(folder, served, "openai")


def test_probabilities_of_a_wrong_model_are_wrong(ranker: Path) -> None:
    inner = scorer(CrossEncoder(str(ranker), device="cpu"))
    off = Served(score=lambda pairs: np.asarray(inner(pairs)) + 0.2, activated=sigmoid)
    with serving(off) as served:
        for api in ("tei", "cohere", "vllm"):
            verdict = ask(ranker, served, api)
            assert not verdict.good and verdict.difference == pytest.approx(0.2, abs=0.01), verdict


def test_bounds_of_ones_own(ranker: Path, folder: Path, served: Served, cli: Cli) -> None:
    inner = scorer(CrossEncoder(str(ranker), device="cpu"))
    with serving(Served(score=lambda pairs: np.asarray(inner(pairs)) + 0.02)) as off:
        flags = ("verify", ranker, "--url", off.url, "--api", "vllm")
        assert cli(*flags)[0] == 1 and cli(*flags, "--difference", "0.03")[0] == 0
        assert "--cosine: scores have none. Pass --difference" in cli(*flags, "--cosine", "0.9")[2]
        assert cli(*flags, "--difference", "0.01")[0] == 1
    served.given = lambda rows: unit(np.asarray(rows) + 0.01 * (-1.0) ** np.arange(32)).tolist()
    flags = ("verify", folder, "--url", served.url, "--api", "tei")
    assert cli(*flags)[0] == 1 and cli(*flags, "--cosine", "0.99")[0] == 0


def test_fewer_dimensions_are_told(folder: Path, served: Served) -> None:
    served.given = lambda rows: [row[:16] for row in rows]
    verdict = ask(folder, served, "tei")
    assert verdict.good and verdict.notes == ("it gives the first 16 of 32 dimensions",)


def test_a_folder_that_has_changed_is_told(folder: Path, served: Served, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "config.json").write_text("{}")
    assert ask(copy, served, "tei").faults == ("config.json has changed",)


@pytest.fixture(scope="session")
def pages() -> Any:
    """What is shared with other tests of pages."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "tests" / "pages.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(pages: Any, page: str, kind: str, url: str) -> list[str]:
    """The blocks of one kind that a page has run, with the address of a server put in."""
    text = (ROOT / "docs" / "serving" / page).read_text(encoding="utf-8")
    found = [one.text for one in pages.blocks(text) if one.kind == kind and not one.skipped]
    return [one.replace("http://127.0.0.1:8080", url) for one in found]


def figures(text: str) -> str:
    """An output with its smallest number left out, and its white space."""
    return " ".join(re.sub(r"\d\.\de-\d\d", "small", text).split())


@pytest.mark.parametrize("page", ["endpoints.md", "tei.md"])
def test_the_pages_commands(
    page: str, folder: Path, served: Served, pages: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved").symlink_to(folder, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in blocks(pages, page, "console", served.url):
        for line, wanted in pages.commands(block):
            code, out, _ = cli(*line.split()[1:])
            assert code == 0 and figures(out) == figures(wanted), out
            ran += 1
    assert ran == 1


def test_the_pages_requests(folder: Path, ranker: Path, served: Served, pages: Any) -> None:
    served.prompts, served.score = PROMPTS, scorer(CrossEncoder(str(ranker), device="cpu"))
    first, second = blocks(pages, "tei.md", "python", served.url)
    embeddings, scores = dict[str, Any](), dict[str, Any]()
    exec(first, embeddings)
    wanted = json.loads((folder / "golden.json").read_text())
    place = wanted["texts"].index("find this: Which planet is known as the Red Planet?")
    assert np.abs(np.asarray(embeddings["vectors"][0]) - wanted["outputs"][place]).max() < 1e-6
    exec(second, scores)
    pairs = [("Which planet is known as the Red Planet?", text) for text in scores["documents"]]
    assert scores["best"] == scores["documents"][int(np.argmax(served.score(pairs)))]
