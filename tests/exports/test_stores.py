"""LangChain and vector stores: the golden vectors through each, and all snippets of its page run where it is installed.

A page is run from top to bottom, in a folder that has what it names: the model "saved", the reranker "reranker" and
"documents.txt". What it prints is compared with what Sentence Transformers gives here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import SimilarityFunction

from burnish import FastCrossEncoder, FastSentenceTransformer
from burnish.core import consumers, golden, runtimes
from burnish.core.errors import ModelError
from burnish.core.testing.subject import enliven, quietly
from burnish.core.verifying import Verdict, verify

from ..pages import blocks
from .conftest import FAMILIES
from .heads import HEADS, save

pytestmark = [pytest.mark.exports, pytest.mark.timeout(900)]
Python = Callable[[str], Path]
Note = Callable[..., None]
PAGES = Path(__file__).parents[2] / "docs" / "serving"
SCRIPTS = Path(consumers.__file__).parent
STORES = ("faiss", "pgvector", "qdrant", "weaviate")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
PROMPTS = {"query": "find this: ", "document": ""}
QUERY = "How long does a refund take?"
# What the snippets print: a score and a text.
LINE = re.compile(r"^(-?\d+\.\d{4})  (.+)$", re.M)
# Of four decimals.
ROUNDED = 6e-5
TIE = 2e-5
_RUN = """
import contextlib, io, json, os, sys
sys.path[:0] = sys.argv[4:]
jobs, said, name = json.load(open(sys.argv[1])), [], sys.argv[3]
for folder, blocks in jobs:
    os.chdir(folder)
    with contextlib.ExitStack() as stack:
        if name == "pgvector":
            import postgres
            os.environ["PGHOST"] = stack.enter_context(postgres.server())
        if name == "weaviate":
            import weaviate_stand_in
            stack.enter_context(weaviate_stand_in.standing_in())
        names, heard = {"__name__": "__main__"}, []
        for block in blocks:
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                exec(compile(block, name, "exec"), names)
            heard.append(text.getvalue())
        if "connection" in names:
            names["connection"].close()
        said.append(heard)
json.dump(said, open(sys.argv[2], "w"))
"""


class Shelf(NamedTuple):
    """A folder as the pages name its files, and what Sentence Transformers finds there: a score by each text."""

    folder: Path
    found: Mapping[str, float]


def sentences() -> list[str]:
    """300 texts about a shop, no two the same."""
    who = ("A refund", "Your order", "The invoice", "A gift card", "The replacement", "A damaged parcel")
    what = ("reaches your card", "is sent out", "can be changed", "is checked by hand", "has to be reported")
    when = ("within five working days", "on the same day", "before Friday", "after two weeks", "at night",
            "in the first month", "without a receipt", "for members", "in our shops", "by e-mail")  # fmt: skip
    return [f"{' '.join(parts)}." for parts in product(who, what, when)]


@pytest.fixture(scope="module")
def models(minilm: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The real MiniLM, a tiny BERT for each similarity whose vectors are not of length 1, and a tiny reranker."""
    place = tmp_path_factory.mktemp("models")
    with quietly():
        real = FastSentenceTransformer.from_pretrained(str(minilm), full_finetuning=True, device="cpu", prompts=PROMPTS)
        real.save_pretrained(str(place / "minilm"))
        trunk = Transformer(str(tiny_bert), max_seq_length=64)
        enliven(trunk.model)
        SentenceTransformer(modules=[trunk, Pooling(32, pooling_mode="mean")], device="cpu", prompts=PROMPTS).save(
            str(place / "stock")
        )
        model = FastSentenceTransformer.from_pretrained(str(place / "stock"), full_finetuning=True, device="cpu")
        for similarity in SIMILARITIES:
            model.similarity_fn_name = SimilarityFunction(similarity)
            model.save_pretrained(str(place / similarity))
        ranker = FastCrossEncoder.from_pretrained(str(tiny_bert), full_finetuning=True, device="cpu")
        enliven(ranker)
        ranker.save_pretrained(str(place / "reranker"))
    return {name: place / name for name in ("minilm", *SIMILARITIES, "reranker")}


@pytest.fixture(scope="module")
def shelves(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shelf]:
    """A folder for the pages with the real MiniLM, and one with vectors not of length 1; both of the cosine."""
    found = {}
    for name in ("minilm", "cosine"):
        folder = tmp_path_factory.mktemp(name)
        (folder / "saved").symlink_to(models[name])
        (folder / "reranker").symlink_to(models["reranker"])
        (folder / "documents.txt").write_text("\n".join(sentences()))
        model = SentenceTransformer(str(models[name]), device="cpu")
        query, documents = model.encode_query(QUERY), model.encode_document(sentences())
        scores = model.similarity(query, documents)[0].tolist()
        found[name] = Shelf(folder, dict(zip(sentences(), scores, strict=True)))
    return found


def snippets(page: str) -> list[str]:
    return [block.text for block in blocks((PAGES / f"{page}.md").read_text()) if block.kind == "python"]


def run_page(name: str, python: Python, jobs: Sequence[tuple[Path, Sequence[str]]], place: Path) -> list[list[str]]:
    """What each block of each job prints, run in one process of the page's own environment."""
    (place / "jobs").write_text(json.dumps([(str(folder), list(texts)) for folder, texts in jobs]))
    files = [str(place / "jobs"), str(place / "said")]
    command = [str(python(name)), "-c", _RUN, *files, name, str(SCRIPTS), str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[str]] = json.loads((place / "said").read_text())
    return found


def right(said: str, wanted: Mapping[str, float], count: int = 5) -> bool:
    """Whether a block prints the `count` best of what is wanted, in order, with their scores."""
    lines = [(text, float(score)) for score, text in LINE.findall(said)]
    if len(lines) != count or any(abs(wanted[text] - score) > ROUNDED for text, score in lines):
        return False
    last = sorted(wanted.values(), reverse=True)[count - 1]
    ordered = all(wanted[one] >= wanted[other] - TIE for (one, _), (other, _) in pairwise(lines))
    return ordered and len(dict(lines)) == count and wanted[lines[-1][0]] >= last - TIE


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the scripts that `verify` runs. Weaviate's finds what stands in for a server."""
    folder = tmp_path / "scripts"
    shutil.copytree(SCRIPTS, folder)
    shutil.copy(Path(__file__).with_name("weaviate_stand_in.py"), folder)
    script, start = folder / "with_weaviate.py", "    main()\n"
    assert script.read_text().endswith(start)
    standing = "    from weaviate_stand_in import standing_in\n\n    with standing_in():\n        main()\n"
    script.write_text(script.read_text().removesuffix(start) + standing)
    monkeypatch.setattr(runtimes, "_SCRIPTS", folder)
    return folder


@pytest.mark.parametrize("name", ["minilm", *SIMILARITIES])
@pytest.mark.parametrize("store", STORES)
def test_a_store_finds_the_golden_neighbours(
    store: str, name: str, models: dict[str, Path], python: Python, note: Note, scripts: Path
) -> None:
    verdict = verify(models[name], store, python=python(store))
    assert verdict.good and verdict.rank == 1.0 and verdict.cosine and verdict.cosine > 1 - 1e-6, verdict
    assert page_names(store, verdict)
    what = name if name == "minilm" else f"{name}, not of length 1"
    if store == "weaviate":  # no server of its own ran
        note(store, "bert", "static", version=verdict.versions[store], what=what)
    else:
        note(store, "bert", verdict, what=what)


def test_an_index_of_cosines_leaves_zeros_out(models: dict[str, Path], python: Python, tmp_path: Path) -> None:
    shutil.copytree(models["cosine"], tmp_path / "model")
    file = tmp_path / "model" / "golden.json"
    found = json.loads(file.read_text())
    found["outputs"][1] = [0.0] * len(found["outputs"][1])
    file.write_text(json.dumps(found))
    with pytest.raises(ModelError, match=r"the index with vector_cosine_ops finds (\d+) of"):
        verify(tmp_path / "model", "pgvector", python=python("pgvector"))


def test_without_a_server_weaviate_says_so(models: dict[str, Path], python: Python) -> None:
    with pytest.raises(ModelError, match="no server of Weaviate answers on this machine"):
        verify(models["minilm"], "weaviate", python=python("weaviate"))


@pytest.fixture(scope="module")
def by_langchain(
    models: dict[str, Path],
    saved: dict[str, Path],
    minilm: Path,
    tmp_path_factory: pytest.TempPathFactory,
    read_all: Callable[..., dict[str, Verdict | str]],
) -> dict[str, Verdict | str]:
    """What LangChain makes of models of all families, and of one with line ends of its own, by one process."""
    place = tmp_path_factory.mktemp("langchain")
    folders = {name: models[name] for name in ("minilm", "cosine", "reranker")}
    folders |= {f"{name} merged": saved[f"{name} merged"] for name in FAMILIES}
    for name in (name for name in HEADS if name.endswith("ranker")):
        folders[f"{name} merged"] = save(name, minilm, place / name.split()[0])[f"{name} merged"]
    folders["line ends"] = with_line_ends(place)
    folders["no line ends"] = place / "without"
    shutil.copytree(folders["line ends"], folders["no line ends"])
    file = folders["no line ends"] / "golden.json"
    found = json.loads(file.read_text())
    places = [place for place, text in enumerate(found["texts"]) if "\n" not in text]
    lists = {key: [value[place] for place in places] for key, value in found.items() if isinstance(value, list)}
    file.write_text(json.dumps({**found, **lists}))
    return read_all("langchain", "langchain", folders)


def test_langchain_reads_every_family(by_langchain: dict[str, Verdict | str], note: Note) -> None:
    found = {name: verdict for name, verdict in by_langchain.items() if not name.endswith("line ends")}
    assert len(found) == 17
    for name, verdict in found.items():
        assert isinstance(verdict, Verdict) and verdict.good and verdict.difference <= 1e-5, (name, verdict)
        assert page_names("langchain", verdict)
        note("langchain", name.split()[0] if " " in name else "bert", verdict, what=name)


def test_what_langchain_does_to_line_ends_is_found(by_langchain: dict[str, Verdict | str]) -> None:
    odd, even = by_langchain["line ends"], by_langchain["no line ends"]
    assert isinstance(odd, Verdict) and odd.cosine and odd.cosine < 0.999 and "below 0.9999" in odd.faults[0], odd
    assert isinstance(even, Verdict) and even.faults == ("golden.json has changed",), even


def with_line_ends(place: Path) -> Path:
    """A model whose tokenizer has a token of its own for the end of a line, as no BERT's has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(golden.TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    kind: Any = PreTrainedTokenizerFast
    whole = kind(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64
    )
    config = BertConfig(
        vocab_size=len(whole), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = BertModel(config)
    enliven(model)
    model.save_pretrained(place / "base")
    whole.save_pretrained(place / "base")
    with quietly():
        tuned = FastSentenceTransformer.from_pretrained(str(place / "base"), full_finetuning=True, device="cpu")
    tuned.save_pretrained(str(place / "saved"))
    return place / "saved"


def page_names(consumer: str, verdict: Verdict) -> bool:
    """Whether the page says the version that was verified."""
    return f" {verdict.versions[consumer]}" in (PAGES / f"{consumer}.md").read_text().partition("\n## How it is ")[2]


BROKEN = {
    "faiss, another metric": ("dot", '"dot": "METRIC_INNER_PRODUCT"', '"dot": "METRIC_L2"'),
    "faiss, not normalised": ("cosine", 'if similarity == "cosine":', "if False:"),
    "faiss, squares": ("euclidean", 'if similarity == "euclidean":', "if False:"),
    "pgvector, another operator": ("dot", '("<#>", "vector_ip_ops")', '("<=>", "vector_cosine_ops")'),
    "pgvector, another class": ("dot", '("<#>", "vector_ip_ops")', '("<#>", "vector_cosine_ops")'),
    "qdrant, another distance": ("dot", "Distance.DOT", "Distance.COSINE"),
    "qdrant, another sign": ("manhattan", "sign = -1", "sign = 1"),
    "weaviate, another distance": ("dot", "VectorDistances.DOT", "VectorDistances.COSINE"),
    "weaviate, squares": ("euclidean", "-(max(distance, 0) ** 0.5)", "-distance"),
    "langchain, the document's prompt": ("minilm", "query_encode_kwargs=options,", ""),
    "langchain, after the activation": ("reranker", ', "activation_fn": torch.nn.Identity()', ""),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_set_up_wrong_is_found(what: str, models: dict[str, Path], python: Python, scripts: Path) -> None:
    consumer = what.partition(",")[0]
    name, was, instead = BROKEN[what]
    script = scripts / f"with_{consumer}.py"
    assert script.read_text().count(was) == 1
    script.write_text(script.read_text().replace(was, instead))
    if what == "pgvector, another class":
        with pytest.raises(ModelError, match="makes no use of an index with vector_cosine_ops for <#>"):
            verify(models[name], consumer, python=python(consumer))
        return
    verdict = verify(models[name], consumer, python=python(consumer))
    assert verdict.faults, verdict


def test_stores_do_not_keep_scores(models: dict[str, Path], python: Python) -> None:
    with pytest.raises(ModelError, match="a store keeps vectors, and this model gives scores"):
        verify(models["reranker"], "faiss", python=python("faiss"))


@pytest.mark.parametrize("consumer", STORES)
def test_the_page_and_the_script_have_one_table(consumer: str) -> None:
    page, script = (PAGES / f"{consumer}.md").read_text(), (SCRIPTS / f"with_{consumer}.py").read_text()
    for similarity in SIMILARITIES:
        (cells,) = re.findall(rf"^\| `{similarity}` \|(.*)\|$", page, re.M)
        (said,) = re.findall(rf'^    "{similarity}": (.*),$', script, re.M)
        named = [name for name in re.findall(r"`([^`]+)`", cells) if name != "normalize_L2"]
        assert named and all(name in said for name in named), (similarity, named, said)


@pytest.mark.parametrize("consumer", ["faiss", "qdrant", "weaviate"])
def test_pages_of_stores(consumer: str, shelves: dict[str, Shelf], python: Python, tmp_path: Path) -> None:
    texts = snippets(consumer)
    jobs = [*((shelf.folder, texts) for shelf in shelves.values()), (shelves["minilm"].folder, without_prompt(texts))]
    *said, lost = run_page(consumer, python, jobs, tmp_path)
    for shelf, outputs in zip(shelves.values(), said, strict=True):
        assert outputs and all(right(output, shelf.found) for output in outputs), outputs
    assert not right(lost[0], shelves["minilm"].found), "a lost prompt makes no difference"


def without_prompt(texts: Sequence[str]) -> list[str]:
    """Snippets that embed the query as a document."""
    lost = [text.replace("model.encode_query(", "model.encode(") for text in texts]
    assert lost != list(texts)
    return lost


# Of the ten nearest to each text, how many an index finds.
_RECALL = """
ways = {
    "table": "embedding <=> %s",
    "vector": "embedding <=> %s",
    "halfvec": f"embedding::halfvec({width}) <=> %s::halfvec({width})",
}
nearest = {}
for way, order in ways.items():
    connection.execute(f"SET enable_indexscan = {'off' if way == 'table' else 'on'}")
    asked = f"SELECT id FROM documents ORDER BY {order} LIMIT 10"
    plan = str(connection.execute("EXPLAIN " + asked, (vectors[0],)).fetchall())
    assert ("Index Scan" in plan) == (way != "table"), plan
    nearest[way] = [{place for (place,) in connection.execute(asked, (vector,))} for vector in vectors]
for way in ("vector", "halfvec"):
    both = zip(nearest["table"], nearest[way])
    print(f"{sum(len(one & other) for one, other in both) / (10 * len(vectors)):.4f}  {way}")
"""


def test_page_of_pgvector(shelves: dict[str, Shelf], python: Python, tmp_path: Path) -> None:
    texts = snippets("pgvector")
    jobs = [(shelf.folder, [*texts, _RECALL]) for shelf in shelves.values()]
    lost = without_prompt(texts[:1])
    # An index of another class: the plan says so, and nothing else does.
    other = [texts[0], texts[1].replace("vector_cosine_ops", "vector_l2_ops")]
    minilm = shelves["minilm"]
    *said, lost, other = run_page("pgvector", python, [*jobs, (minilm.folder, lost), (minilm.folder, other)], tmp_path)
    for shelf, (exact, *indexed, recall) in zip(shelves.values(), said, strict=True):
        assert right(exact, shelf.found), exact
        for output in indexed:
            assert "Index Scan using documents_" in output, output
        assert right(indexed[0], shelf.found) and right(indexed[1], shelf.found), indexed
        found = {way: float(share) for share, way in LINE.findall(recall)}
        assert set(found) == {"vector", "halfvec"} and min(found.values()) >= 0.95, found
    assert right(said[0][3], minilm.found), "the first quarter of MiniLM finds the five nearest"
    assert not right(lost[0], minilm.found), "a lost prompt makes no difference"
    assert "Index Scan" not in other[1] and right(other[1], minilm.found)


def test_page_of_langchain(shelves: dict[str, Shelf], python: Python, tmp_path: Path) -> None:
    texts = snippets("langchain")
    line = '    query_encode_kwargs={"prompt_name": "query"},\n'
    assert texts[0].count(line) == 1
    jobs = [(shelf.folder, texts) for shelf in shelves.values()]
    minilm = shelves["minilm"]
    *said, lost = run_page("langchain", python, [*jobs, (minilm.folder, [texts[0].replace(line, "")])], tmp_path)
    for shelf, (embedded, reranked) in zip(shelves.values(), said, strict=True):
        assert right(embedded, shelf.found), embedded
        best = sorted(shelf.found, key=lambda text: -shelf.found[text])[:20]
        scores = CrossEncoder(str(shelf.folder / "reranker"), device="cpu").predict([(QUERY, text) for text in best])
        assert right(reranked, dict(zip(best, scores.tolist(), strict=True))), reranked
    assert not right(lost[0], minilm.found), "a lost prompt makes no difference"
