"""What a card says of results, cost and runtimes, from facts that are made up here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from burnish.core import card_serving
from burnish.core.card_facts import CardFacts, Cost, _processor_limit
from burnish.core.card_serving import _gguf, _only_here, obstacles, state
from burnish.core.class_metrics import measure
from burnish.core.contracts import Exports
from burnish.core.errors import ConfigError
from burnish.core.evaluate import Metric, RetrievalResult
from burnish.core.model_card import cost, results
from burnish.core.reranking import RerankingResult

ONE = Metric(mean=0.5, low=0.25, high=0.75)


def spent(**changed: Any) -> Cost:
    known: dict[str, Any] = {
        "seconds": 7200.0,
        "first": 0,
        "last": 1500,
        "hardware": "cuda (a card)",
        "devices": 2,
        "watts": 350.0,
        "measured": False,
    }
    return Cost(**(known | changed))


def test_energy_is_the_limit_for_the_time() -> None:
    assert spent().kilowatt_hours == pytest.approx(350 * 2 * 2 / 1000)
    assert "at most 1.4 kWh, an estimate: the time at the device's limit of 350 W for each of 2" in cost(spent())
    assert "| Time | 2 h 0 min for 1,500 steps |" in cost(spent()) and "2 × cuda (a card)" in cost(spent())
    small = cost(spent(seconds=1.0, devices=1, first=10, last=12, watts=50.0))
    assert "at most 0.000014 kWh" in small and "1 s for steps 10 to 12" in small
    assert "not estimated: the device's power limit cannot be read" in cost(spent(watts=None))
    measured = cost(spent(measured=True))
    assert "CodeCarbon" in measured and "estimate" not in measured
    assert cost(None) == ""


def test_a_processors_limit(tmp_path: Path) -> None:
    assert _processor_limit(tmp_path) is None
    for at, watts in enumerate((150, 165)):
        zone = tmp_path / f"intel-rapl:{at}"
        zone.mkdir()
        (zone / "constraint_0_power_limit_uw").write_text(f"{watts}000000\n")
    assert _processor_limit(tmp_path) == 315
    (tmp_path / "intel-rapl:0" / "constraint_0_power_limit_uw").write_text("?")
    assert _processor_limit(tmp_path) is None


def test_results_of_each_kind() -> None:
    facts = CardFacts()
    assert results(facts) == ""
    per_query = {"q": (0.5, 0.5)}
    reranked = RerankingResult(k=5, ndcg=ONE, mrr=ONE, first=0.1, best=1.0, per_query=per_query, seconds=1.0, pairs=9)
    facts.add_result("candidates", reranked, reranked)
    found = results(facts)
    assert "On candidates, held out: 1 queries." in found and "| Change |" not in found
    assert "| nDCG@5 | 0.500 (0.250 to 0.750) | **0.500 (0.250 to 0.750)** |" in found
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    one, two = (measure(np.array([0, 1, 1]), table, ["a", "b"], resamples=10) for table in (scores, 1 - scores))
    facts.add_result("texts", one, two)
    assert "held out: 3 texts" in results(facts) and "| Macro F1 |" in results(facts) and "| Change |" in results(facts)
    facts.add_result("texts", two)
    assert results(facts).count("On texts") == 1, "two results of one data set"


def test_results_that_are_none() -> None:
    facts = CardFacts()
    with pytest.raises(ConfigError, match=r"^add_result: a dict has no figures with intervals\. Pass what evaluate_"):
        facts.add_result("x", {"ndcg": 0.5})
    retrieved = RetrievalResult(k=10, ndcg=ONE, recall=ONE, mrr=ONE, per_query={}, seconds=0.0, queries=0, documents=0)
    reranked = RerankingResult(k=5, ndcg=ONE, mrr=ONE, first=0.1, best=1.0, per_query={}, seconds=1.0, pairs=9)
    with pytest.raises(ConfigError, match=r"^before, after: the two results have other figures"):
        facts.add_result("x", retrieved, reranked)
    assert not facts.results


def run(state: str, *versions: str, reasons: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"state": state, "versions": list(versions), "date": "2026-11-26", "reasons": list(reasons)}


def test_states_are_what_was_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"schema": 2, "runs": {
        "vllm": {"bert embeddings": run("verified", "0.32.0"), "bert scores": run("verified", "0.32.0", reasons=("a",)),
                 "mpnet embeddings": run("refused", "0.32.0", reasons=("it has no MPNet",))},
        "tei": {"bert scores": run("static", "1.9")},
        "transformers": {"bert embeddings": run("verified", "4.48.3", "4.57.6", "5.23.0")},
        "faiss": {"bert embeddings": run("verified", "1.15.1")},
    }}  # fmt: skip
    (tmp_path / "table.json").write_text(json.dumps(table))
    monkeypatch.setattr(card_serving, "VERIFIED", tmp_path / "table.json")
    assert state("vllm", "bert", "embeddings") == "verified with 0.32.0, 2026-11-26"
    assert state("vllm", "bert", "scores") == "verified with 0.32.0, 2026-11-26 (a)"
    assert state("tei", "bert", "scores") == "statically checked against 1.9, 2026-11-26"
    assert state("transformers", "bert", "embeddings") == "verified with 4.48.3, 4.57.6 and 5.23.0, 2026-11-26"
    assert state("vllm", "qwen3", "scores") == state("vllm", "qwen3", "embeddings") == "untested"
    # A store is given vectors: which family computed them is nothing to it.
    assert state("faiss", "qwen3", "embeddings") == "verified with 1.15.1, 2026-11-26"
    assert state("faiss", "qwen3", "scores") == "untested"
    known = Exports(gguf=None)
    embeddings: dict[str, Any] = {"kind": "embeddings", "dense": [], "include_prompt": True}
    found = obstacles(embeddings, "mpnet", known, pooling="mean", code="x", classes=False)
    assert found["vllm"] == "it has no MPNet" and "llama.cpp" in found and "tei" not in found


def test_who_does_not_compute_a_model() -> None:
    def of(kind: str = "embeddings", dense: int = 0, classes: bool = False, pooling: str = "mean") -> set[str]:
        found: dict[str, Any] = {"kind": kind, "dense": [{}] * dense, "include_prompt": True}
        code = "code" if pooling == "mean" else ""
        return set(obstacles(found, "none", Exports(gguf="bert"), pooling=pooling, code=code, classes=classes))

    assert of() == set()
    assert of(dense=1) == {"transformers", "tei", "fastembed"}
    assert of(pooling="weightedmean") == {"transformers", "tei", "llama.cpp", "ollama", "fastembed"}
    assert of(kind="scores") == {"ollama"}
    assert of(kind="scores", classes=True) == {"langchain", "llama.cpp", "ollama", "fastembed"}


def test_the_table_that_is_shipped_is_one() -> None:
    table = json.loads(card_serving.VERIFIED.read_text(encoding="utf-8"))
    assert table["schema"] == 2
    for consumer, families in table["runs"].items():
        assert consumer in card_serving.CONSUMERS
        for name, known in families.items():
            assert name.rpartition(" ")[2] in ("embeddings", "scores")
            assert known["state"] in ("verified", "static", "refused") and known["date"]
            assert known["versions"] or known["state"] == "refused"
            assert known["reasons"] or known["state"] != "refused"


def test_what_llama_cpp_computes_and_what_not() -> None:
    embeddings, scores = ({"kind": kind} for kind in ("embeddings", "scores"))
    known = Exports(gguf="bert", refused={"gguf-reranker": "it drops the pooler"})
    assert _gguf(known, embeddings) is True and _gguf(known, scores) == "it drops the pooler"
    assert _gguf(Exports(gguf=None, refused={"gguf": "no bias"}), embeddings) == "no bias"
    assert _gguf(None, embeddings) == _gguf(Exports(), scores) == "llama.cpp's converter has no architecture for it"


def test_what_only_sentence_transformers_computes() -> None:
    assert _only_here({"kind": "scores", "modules": ["Transformer", "LogitScore"], "pooling": None}) == (
        "its scores come from LogitScore of Sentence Transformers"
    )
    assert _only_here({"kind": "scores", "modules": ["Transformer"], "pooling": None}) is None
    assert _only_here({"kind": "embeddings", "modules": ["Transformer"], "pooling": None}) is not None


@pytest.mark.parametrize("kind", ["embeddings", "scores"])
@pytest.mark.parametrize("change", [
    {}, {"normalize": False}, {"similarity": "manhattan"}, {"prompts": {"passage": "p: "}},
    {"dense": [{"in": 8, "out": 4, "bias": True, "activation": None}]},
    {"pooling": ["cls", "mean"]}, {"include_prompt": False, "prompts": {"query": "q: "}}, {"max_seq_length": None},
    {"adapter_of": "org/base"}, {"labels": ["a", "b"]}, {"modules": ["StaticEmbedding"], "pooling": None},
])  # fmt: skip
def test_the_template_takes_every_model(
    kind: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts: dict[str, Any] = {
        "kind": kind,
        "modules": ["Transformer"],
        "pooling": "mean" if kind == "embeddings" else None,
        "include_prompt": True,
        "normalize": True,
        "similarity": "cosine" if kind == "embeddings" else None,
        "dimensions": 8,
        "truncate_dim": None,
        "dense": [],
        "activation": "torch.nn.Sigmoid",
        "labels": ["x"],
        "prompts": {},
        "max_seq_length": 64,
        "dtype": "float32",
        "adapter_of": None,
    }
    monkeypatch.setattr("burnish.core.deploy.describe", lambda *_: facts | change)
    data = SimpleNamespace(model_id=None)
    served: Any = SimpleNamespace(config=None, model_card_data=data, _model_card_model_id_placeholder="an_id")
    model: Any = SimpleNamespace(burnish=None)
    for used in (True, False):
        text = card_serving.section(model, served, tmp_path, used=used)
        assert (
            text.startswith("## Serving it")
            and "None" not in text.replace("[..., None]", "").replace("query[None]", "")
            and "Undefined" not in text
        )
        assert "{{" not in text and "{%" not in text and "\n\n\n" not in text
        assert text.count("```") % 2 == 0 and text.count("<details>") == text.count("</details>")
