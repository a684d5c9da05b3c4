"""The cards of trained models: what they say is true of their folder, and their snippets compute the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from burnish import FastClassifier, FastCrossEncoder, FastSentenceTransformer, Trainer, TrainingArguments
from burnish.core.config import RunConfig
from burnish.core.evaluate import evaluate_retrieval
from burnish.core.model_card import SECTIONS
from burnish.core.runs import run

Make = Callable[..., Any]
QUESTION, ANSWER = "How long does a refund take?", "Refunds reach your card within five working days."


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def part(folder: Path, name: str) -> str:
    """A section of a card."""
    (found,) = re.findall(rf"<!-- burnish: {name} -->\n(.*?)<!-- burnish: end of {name} -->", card(folder), re.DOTALL)
    return str(found)


def snippet(folder: Path, title: str) -> str:
    """The Python under a runtime's title, for this folder."""
    block = re.search(rf"<summary>{title}: [^\n]*\n+```python\n(.*?)```", part(folder, "serving"), re.DOTALL)
    assert block is not None, f"no snippet for {title}"
    return re.sub(r"(sentence_transformers|cross_encoder)_model_id", folder.as_posix(), block[1])


def run_snippet(folder: Path, title: str = "transformers") -> dict[str, Any]:
    namespace: dict[str, Any] = {"print": lambda *_: None}
    exec(compile(snippet(folder, title), title, "exec"), namespace)
    return namespace


def check(folder: Path, *named: str) -> None:
    """What every card has to keep to."""
    text = card(folder)
    data: Any = ModelCard(text, ignore_metadata_errors=False).data
    assert data.library_name == "sentence-transformers" and data.pipeline_tag and data.tags
    for name in (*named, "serving", "limits", "training provenance"):
        assert part(folder, name).strip(), name
    assert [text.count(f"<!-- burnish: {name} -->") for name in SECTIONS] == [1] * len(SECTIONS)
    assert (
        str(folder.parent) not in text
        and "{{" not in text
        and "{%" not in text
        and "None" not in part(folder, "serving").replace("[..., None]", "").replace("query[None]", "")
    )
    assert "\n\n\n" not in text and text.count("```") % 2 == 0 and text.count("<details>") == text.count("</details>")


@pytest.fixture(scope="module")
def trained(load: Make, tiny_bert_st: Path, pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder with `adapter` and `merged`, the trained model, what it scored before and after)."""
    folder = tmp_path_factory.mktemp("cards")
    model = FastSentenceTransformer.get_peft_model(load(tiny_bert_st), r=4)
    model.prompts = {"query": 'query of "me": ', "document": "text: "}
    queries = {f"q{at}": text for at, text in enumerate(pairs["anchor"])}
    corpus = {f"d{at}": text for at, text in enumerate(pairs["positive"])}
    relevant = {f"q{at}": {f"d{at}"} for at in range(len(queries))}
    before = evaluate_retrieval(model, queries, corpus, relevant, resamples=50)
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=3, per_device_train_batch_size=8, learning_rate=1e-2,
        report_to="none", save_strategy="no", use_cpu=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model)).train()
    after = evaluate_retrieval(model, queries, corpus, relevant, resamples=50)
    model.card.add_result("64 | places", after, before)
    model.save_pretrained(str(folder / "adapter"))
    model.save_pretrained_merged(folder / "merged")
    return folder, model, before, after


def test_it_says_what_is_true(trained: Any) -> None:
    folder, _, before, after = trained
    for name in ("adapter", "merged"):
        check(folder / name, "results", "cost")
    text = card(folder / "merged")
    found = part(folder / "merged", "results")
    assert "On 64 \\| places, held out: 64 queries over 64 documents." in found
    was, now = (f"{one.ndcg.mean:.3f} ({one.ndcg.low:.3f} to {one.ndcg.high:.3f})" for one in (before, after))
    assert was != now and f"| nDCG@10 | {was} | **{now}** | " in found
    assert "64 rows, columns <code>anchor</code>, <code>positive</code>. Loss: <code>MultipleNegativesRanking" in text
    assert "| <code>anchor</code> | what is in old a? |" in text and "- `learning_rate`: 0.01" in text
    assert re.search(r"\| Time \| \d+ s for 3 steps \|", part(folder / "merged", "cost"))
    limits = part(folder / "merged", "limits")
    assert "64 \\| places" in limits and "first 64 tokens" in limits
    # Parts stand in the order in which a reader asks for them.
    titles = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert titles == ["How good it is", "How to use it", "Serving it", "Limits", "Training", "Training provenance",
                      "The model", "Citation"]  # fmt: skip
    assert "adapter of `tiny-bert-st`" in part(folder / "adapter", "serving")
    assert "merged into the weights" in text and "merged into" not in card(folder / "adapter")


def test_its_snippets_compute_the_model(trained: Any) -> None:
    folder, model, *_ = trained
    made = run_snippet(folder / "merged")
    wanted = np.stack([model.encode_query(QUESTION), model.encode_document(ANSWER)])
    assert abs(made["vectors"].numpy() - wanted).max() <= 1e-5
    assert abs(wanted - model.encode([QUESTION, ANSWER])).max() > 1e-3, "the prompts do nothing here"
    usage = card(folder / "merged").split("## How to use it")[1].split("```python")[1].split("```")[0]
    namespace: dict[str, Any] = {"print": lambda *_: None}
    exec(usage.replace("sentence_transformers_model_id", str(folder / "merged")), namespace)
    assert namespace["similarities"].shape == (1, 2)
    # What cannot be run here holds the model's own prompts and lengths all the same.
    serving = part(folder / "merged", "serving")
    assert "--max-model-len 64" in serving and "--embeddings -c 64 -b 64 -ub 64" in serving
    bodies = [json.loads(line.split(" -d ")[1].strip("'")) for line in serving.splitlines() if line.startswith("curl")]
    inputs = [body.get("inputs", body.get("input")) for body in bodies]
    assert [one[0] if isinstance(one, list) else one for one in inputs] == [f'query of "me": {QUESTION}'] * 4
    prompted = json.dumps(f'query of "me": {QUESTION}')
    assert serving.count(prompted) == 9, "those four, and in transformers and the four that take a graph"
    assert 'encode_kwargs={"prompt_name": "document"}' in serving
    assert 'query_encode_kwargs={"prompt_name": "query"}' in serving
    for title in ("FAISS", "pgvector", "Qdrant", "Weaviate"):
        compile(snippet(folder / "merged", title), title, "exec")


@pytest.mark.parametrize("mode", ["cls", "max", "lasttoken", "weightedmean", "mean"])
def test_each_pooling(mode: str, tiny_bert: Path, load: Make, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    trunk = Transformer(str(tiny_bert), max_seq_length=32)
    SentenceTransformer(modules=[trunk, Pooling(32, pooling_mode=mode)], device="cpu").save_pretrained(
        str(tmp_path / "st")
    )
    model = load(tmp_path / "st", full_finetuning=True)
    model._model_card_text = None
    model.save_pretrained(str(tmp_path / "saved"))
    if mode == "weightedmean":
        assert "Alone it does not pool like this (weightedmean)" in part(tmp_path / "saved", "serving")
        assert "It has no pooling weightedmean" in part(tmp_path / "saved", "serving")
        return
    vectors = run_snippet(tmp_path / "saved")["vectors"].numpy()
    assert abs(vectors - model.encode([QUESTION, ANSWER])).max() <= 1e-5
    assert "and no normalisation" in part(tmp_path / "saved", "serving")


def test_a_rerankers_card(tiny_bert: Path, tmp_path: Path) -> None:
    model = FastCrossEncoder.from_pretrained(str(tiny_bert), num_labels=1, device="cpu")
    FastCrossEncoder.get_peft_model(model, r=2).save_pretrained_merged(tmp_path / "merged")
    check(tmp_path / "merged")
    wanted = CrossEncoder(str(tmp_path / "merged"), device="cpu").predict([(QUESTION, ANSWER)])
    logits = run_snippet(tmp_path / "merged")["logits"]
    assert abs(logits.sigmoid().numpy().ravel() - wanted).max() <= 1e-6
    serving = part(tmp_path / "merged", "serving")
    assert "print(logits.sigmoid())" in serving and "/rerank" in serving
    assert "The converter drops the pooler" in serving, "what is known to come out wrong is offered"
    assert "A [Sentence Transformers](https://www.sbert.net) cross-encoder that gives one score" in card(
        tmp_path / "merged"
    )


def test_a_classifiers_card(tiny_bert: Path, tmp_path: Path) -> None:
    from datasets import Dataset  # type: ignore[import-untyped]

    model = FastClassifier.from_pretrained(str(tiny_bert), labels=["no", "yes"], device="cpu", full_finetuning=True)
    data = Dataset.from_dict({"text": [f"{word} it is" for word in ("so", "not") * 8], "label": ["yes", "no"] * 8})
    model.card.add_result("16 texts", model.measure(data, resamples=20))
    model.save_pretrained(str(tmp_path / "full"))
    check(tmp_path / "full", "results")
    assert "## Training\n" not in card(tmp_path / "full"), "a heading of nothing"
    made = run_snippet(tmp_path / "full")
    assert abs(made["logits"].softmax(1).numpy() - model.predict_proba([ANSWER])).max() <= 1e-6
    serving = part(tmp_path / "full", "serving")
    assert "Classes: no, yes." in serving and "print(logits.softmax(dim=1))" in serving and "/classify" in serving
    assert "It has no interface for classifiers" in serving
    assert "held out: 16 texts." in part(tmp_path / "full", "results") and "| Accuracy | **" in card(tmp_path / "full")
    usage = card(tmp_path / "full").split("## How to use it")[1].split("```python")[1].split("```")[0]
    shown: list[dict[str, float]] = []
    exec(usage.replace("cross_encoder_model_id", str(tmp_path / "full")), {"print": shown.append})
    assert list(shown[0]) == ["no", "yes"]
    assert abs(np.array(list(shown[0].values())) - made["logits"].numpy()[0]).max() <= 1e-6
    model.temperature = 2.0
    model.save_pretrained(str(tmp_path / "calibrated"))
    assert "calibrated by a temperature that only Burnish reads" in part(tmp_path / "calibrated", "limits")


def test_what_is_saved_again_keeps_what_it_cannot_know(trained: Any, load: Make, tmp_path: Path) -> None:
    folder, *_ = trained
    again = load(folder / "adapter", for_inference=True)
    again.save_pretrained_merged(tmp_path / "merged")
    for name in ("results", "cost", "training provenance"):
        old = part(folder / ("merged" if name == "training provenance" else "adapter"), name)
        assert part(tmp_path / "merged", name) == old
    assert part(tmp_path / "merged", "serving") == part(folder / "merged", "serving")
    assert "64 rows" in card(tmp_path / "merged")


def test_another_ones_card_keeps_its_words(
    trained: Any, load: Make, step: Make, tiny_bert_st: Path, tmp_path: Path
) -> None:
    words = "---\nlicense: mit\n---\n\n# Mine\n\nWritten by hand.\n\n\n\n\nWith blanks.\n"
    import shutil

    shutil.copytree(tiny_bert_st, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(words)
    model = FastSentenceTransformer.get_peft_model(load(tmp_path / "base"), r=2)
    model.save_pretrained_merged(tmp_path / "merged")
    assert card(tmp_path / "merged").startswith(words)
    assert "<summary>Sentence Transformers: " in part(tmp_path / "merged", "serving")
    assert abs(run_snippet(tmp_path / "merged")["vectors"].numpy() - model.encode([QUESTION, ANSWER])).max() <= 1e-5
    # And a template of the user's own stays.
    own = tmp_path / "own.md"
    own.write_text("---\n{{ card_data }}\n---\nMy own.\n")
    model = load(tiny_bert_st, full_finetuning=True)
    model._model_card_text = None
    model.model_card_data.template_path = own
    model.save_pretrained(str(tmp_path / "own"))
    assert "My own." in card(tmp_path / "own") and "## How to use it" not in card(tmp_path / "own")


def test_a_runs_card_has_its_figures(tiny_bert_st: Path, small_retrieval: Path, tmp_path: Path) -> None:
    config = RunConfig(
        model=str(tiny_bert_st), train=str(small_retrieval), eval=str(small_retrieval), runs=str(tmp_path), name="r",
        max_steps=2, batch_size=8, device="cpu",
    )  # fmt: skip
    result = run(config, called="org/tiny")
    figures = result.metrics
    for name in ("adapter", "merged"):
        text = card(result.folder / name)
        check(result.folder / name, "results", "cost")
        assert "# tiny, fine-tuned on small" in text and "**small**: 96 rows" in text
        low, high = figures["after"]["intervals"]["ndcg@10"]
        after = f"**{figures['after']['ndcg@10']:.3f} ({low:.3f} to {high:.3f})**"
        low, high = figures["gain"]["intervals"]["ndcg@10"]
        gain = f"{figures['gain']['ndcg@10']:+.3f} ({low:+.3f} to {high:+.3f})"
        assert f"{after} | {gain} |" in part(result.folder / name, "results")
        assert "On small (test), held out: 24 queries over" in text


def test_a_checkpoint_has_a_card_too(trained: Any) -> None:
    """The state of the card's facts goes with a copy, and through pickle, as the model's other parts do."""
    import copy
    import pickle

    _, model, *_ = trained
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.card.results[0].data == "64 | places" and other.card.cost.last == 3
    assert torch.is_inference_mode_enabled() is False
