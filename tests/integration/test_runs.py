from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from burnish.core import run_results, training
from burnish.core.cli import run as program
from burnish.core.config import RunConfig
from burnish.core.errors import BurnishError, ModelError
from burnish.core.evaluate import evaluate_retrieval
from burnish.core.retrieval_data import load_retrieval, training_pairs
from burnish.core.runs import RunResult, run

Cli = Callable[..., tuple[int, str, str]]
TEXTS = ["how do I open an account", "the branch closes at five", "a card that was stolen"]


@pytest.fixture(autouse=True)
def bars_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program switches other libraries' bars off for its whole process, which here is ours."""
    import datasets  # type: ignore[import-untyped]
    from sentence_transformers.base import model_card
    from transformers.utils import logging

    monkeypatch.setitem(vars(model_card), "tqdm", vars(model_card)["tqdm"])
    yield
    logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.enable_progress_bars()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the program in this process: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = program([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def settings(tmp_path: Path, tiny_bert_st: Path, small_retrieval: Path) -> dict[str, Any]:
    """A run of six steps on a model of two layers."""
    return {
        "model": str(tiny_bert_st),
        "train": str(small_retrieval),
        "eval": str(small_retrieval),
        "runs": str(tmp_path / "runs"),
        "name": "one",
        "batch_size": 16,
        "max_seq_length": 32,
        "device": "cpu",
        "log_steps": 2,
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def embed(folder: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Embeddings by plain Sentence Transformers."""
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)


def in_folder(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_lora_run_leaves_all_that_it_promises(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    result = run(RunConfig(**settings), notes=("Where the weights came from.",), called="someone/tiny")
    folder = Path(settings["runs"]) / "one"
    assert result.folder == folder
    assert in_folder(folder) == ["adapter", "merged", "metrics.json", "report.html", "settings.json"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    for when in ("before", "after"):
        assert {"ndcg@10", "recall@10", "mrr@10", "intervals"} <= set(metrics[when])
    facts = metrics["training"]
    assert (facts["rows"], facts["steps"], facts["pairs"], facts["skipped_rows"]) == (96, 6, 96, 0)
    assert facts["loss"] == "MultipleNegativesRankingLoss"
    assert [row["step"] for row in metrics["history"]] == [2, 4, 6]
    assert facts["final_loss"] == metrics["history"][-1]["loss"]
    assert (metrics["model"], metrics["config"]["model"]) == ("someone/tiny", settings["model"])
    assert list(metrics["seconds"]) == [
        "check data",
        "load model",
        "evaluate before",
        "train",
        "evaluate after",
        "save",
    ]
    report = (folder / "report.html").read_text()
    assert "Where the weights came from." in report and "someone/tiny" in report
    assert not any(line in report for line in ("three GEMMs", "one would do")), "family notes in the report"
    assert "before training: ndcg@10" in capsys.readouterr().err


def test_adapter_merged_and_live_model_agree(settings: dict[str, Any]) -> None:
    result = run(RunConfig(**settings, learning_rate=1e-2))
    live = result.model.encode(TEXTS)
    merged, adapter = embed(result.folder / "merged"), embed(result.folder / "adapter")
    assert np.abs(live - merged).max() < 1e-5 and np.abs(live - adapter).max() < 1e-5
    assert np.abs(live - embed(Path(settings["model"]))).max() > 1e-3, "the training changed nothing"


def test_a_full_run_trains_every_weight(settings: dict[str, Any]) -> None:
    result = run(RunConfig(**settings, method="full", learning_rate=1e-3))
    assert in_folder(result.folder) == ["metrics.json", "model", "report.html", "settings.json"]
    before, after = weights(Path(settings["model"])), weights(result.folder / "model")
    assert before.keys() == after.keys()
    assert result.metrics["training"]["trained_parameters"] == sum(value.numel() for value in before.values())
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert all(name.startswith("pooler.") for name in same), same
    assert np.abs(embed(result.folder / "model") - result.model.encode(TEXTS)).max() < 1e-6


class _Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    settings |= {"method": method, "save_steps": 2, "log_steps": 1, "epochs": 1.5, "lora_dropout": 0.1}
    whole = run(RunConfig(**{**settings, "name": "whole"}))
    assert in_folder(whole.folder / "checkpoints") == ["checkpoint-8", "checkpoint-9"], "the last two are kept"
    broken = RunConfig(**settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "_rotation", lambda folder: _Interrupt(5))
        run(broken)
    assert in_folder(broken.folder) == ["checkpoints", "settings.json"]
    half = broken.folder / "checkpoints" / "checkpoint-4"
    (half / "trainer_state.json").unlink()  # as if killed while this one was being written
    with pytest.raises(BurnishError, match="holds an earlier run"):
        run(RunConfig(**settings))
    resumed = run(RunConfig(**settings, resume=True))
    name = "merged" if method == "lora" else "model"
    one, other = weights(whole.folder / name), weights(resumed.folder / name)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert [row["loss"] for row in resumed.metrics["history"]] == [row["loss"] for row in whole.metrics["history"]]
    assert resumed.metrics["history"][0]["seconds"] is None, "not taken over from the checkpoint"
    assert resumed.metrics["after"] == whole.metrics["after"] and resumed.metrics["training"]["steps"] == 9


def test_an_earlier_run_is_replaced_only_when_asked(settings: dict[str, Any], cli: Cli) -> None:
    folder = run(RunConfig(**settings, method="full")).folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    code, _, err = cli("train", *flags)
    assert code == 2 and err.endswith("one: holds an earlier run. Pass another --name, or --overwrite to replace it\n")
    code, _, err = cli("train", *flags, "--overwrite", "--model", "no-one/nothing")
    assert code == 4, err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}, "touched by a refusal"
    code, out, _ = cli("train", *flags, "--overwrite")
    assert code == 0 and in_folder(folder) == ["adapter", "merged", "metrics.json", "report.html", "settings.json"]
    assert f"model    {folder / 'merged'}" in out and f"adapter  {folder / 'adapter'}" in out
    assert "Held-out retrieval, 24 queries" in out and "trained 96 pairs in " in out


def pairs(folder: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = training_pairs(folder).to_list()
    return rows


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """The rows as a file or folder of that kind."""
    import datasets
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    path = folder / f"rows.{kind}"
    if kind.startswith("jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "folder":
        datasets.DatasetDict({"dev": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet", "folder", "retrieval"])
def test_every_form_of_data_trains_the_same_model(
    settings: dict[str, Any], small_retrieval: Path, tmp_path: Path, cli: Cli, kind: str
) -> None:
    rows = [{"my_q": row["anchor"], "my_doc": row["positive"]} for row in pairs(small_retrieval)]
    arguments: list[object] = ["--max-steps", 2, "--batch-size", 16, "--max-seq-length", 32, "--device", "cpu"]
    if kind == "retrieval":
        arguments += ["--train", small_retrieval]
    else:
        arguments += ["--train", write(tmp_path, kind, rows)]
        arguments += ["--columns", "anchor=my_q", "--columns", "positive=my_doc"]
    arguments += ["--split", "dev"] if kind == "folder" else []
    code, out, err = cli("train", "--model", settings["model"], "--runs", settings["runs"], "--name", "one", *arguments)
    assert code == 0, err
    folder = Path(settings["runs"]) / "one"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["training"]["rows"], metrics["training"]["pairs"]) == (96, 32) and "after" not in metrics
    assert "trained 32 pairs in " in out and "nothing was held out" in (folder / "report.html").read_text()
    reference = run(RunConfig(**{**settings, "name": "reference", "eval": None, "max_steps": 2})).folder
    one, other = weights(folder / "merged"), weights(reference / "merged")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("extra", "loss"),
    [
        ({"score": lambda at: at / 200}, "CoSENTLoss"),
        ({"label": lambda at: at % 2}, "OnlineContrastiveLoss"),
        ({"positive": None, "label": lambda at: at % 4}, "BatchAllTripletLoss"),
        ({"negative": lambda at: f"something else {at}"}, "MultipleNegativesRankingLoss"),
    ],
)
def test_the_columns_choose_the_loss(
    settings: dict[str, Any], small_retrieval: Path, tmp_path: Path, extra: dict[str, Any], loss: str
) -> None:
    rows = []
    for at, row in enumerate(pairs(small_retrieval)):
        row = {**row, **{name: make(at) if make else None for name, make in extra.items()}}  # type: ignore[misc]
        rows.append({name: value for name, value in row.items() if value is not None})
    path = write(tmp_path, "jsonl", rows)
    result = run(RunConfig(**{**settings, "train": str(path), "eval": None, "max_steps": 2}))
    assert result.metrics["training"]["loss"] == loss
    assert (
        f"<dd>{loss}</dd>" in (result.folder / "report.html").read_text()
        or loss in (result.folder / "report.html").read_text()
    )


def test_skipped_rows_are_told_everywhere(
    settings: dict[str, Any], small_retrieval: Path, tmp_path: Path, cli: Cli
) -> None:
    rows: list[dict[str, Any]] = [*pairs(small_retrieval)]
    rows[3]["positive"] = ""
    rows[5]["anchor"] = rows[7]["anchor"] = None
    path = write(tmp_path, "jsonl", rows)
    flags = ["--model", settings["model"], "--train", path, "--runs", settings["runs"], "--name", "one"]
    flags += ["--max-steps", "1", "--device", "cpu", "--max-seq-length", "32"]
    code, _, err = cli("train", *flags)
    assert code == 3 and "row 4, column positive: cell is empty" in err
    code, out, err = cli("train", *flags, "--on-bad-row=skip")
    assert code == 0, err
    folder = Path(settings["runs"]) / "one"
    reasons = {"cell is empty (anchor)": 2, "cell is empty (positive)": 1}
    assert "rows skipped: 3 (2 × cell is empty (anchor), 1 × cell is empty (positive))" in err
    assert "(3 bad rows skipped)" in out
    training_facts = json.loads((folder / "metrics.json").read_text())["training"]
    assert (training_facts["rows"], training_facts["skipped_rows"]) == (93, 3)
    assert training_facts["skipped_reasons"] == reasons
    assert (
        "3 bad rows were skipped: 2 × cell is empty (anchor), 1 × cell is empty (positive)"
        in (folder / "report.html").read_text()
    )


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown loss": ({"loss": "Nope"}, "loss: Sentence Transformers has no loss 'Nope'."),
    "loss without label": ({"loss": "CoSENTLoss"}, "loss: CoSENTLoss needs two texts and a score"),
    "loss with a guide": ({"loss": "GISTEmbedLoss"}, "loss: GISTEmbedLoss also needs `guide`."),
    "too few rows": ({"batch_size": 97}, "96 rows do not fill one batch of 97. Pass --batch-size 48 or smaller"),
    "no such split": ({"split": "tran"}, "there are no judgements of split 'tran'. Splits here: test, train"),
    "columns of a folder": ({"columns": {"anchor": "a"}}, "columns: is for data in rows and columns"),
    "skipping in a folder": ({"on_bad_row": "skip", "max_rows": 5}, "max_rows, on_bad_row: is for data in rows"),
    "no evaluation folder": ({"eval": "nowhere"}, "nowhere: there is no such folder."),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_can_be_known_is_refused_before_the_model_is_touched(settings: dict[str, Any], case: str) -> None:
    values, message = REFUSALS[case]
    with pytest.raises(BurnishError) as caught:
        run(RunConfig(**{**settings, "model": "no-one/nothing", **values}))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not Path(settings["runs"]).exists()


def test_a_run_that_diverged_saves_nothing(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"training: the training diverged: .* is no longer finite\. Lower"):
        run(RunConfig(**{**settings, "eval": None, "learning_rate": 1e38, "method": "full"}))
    assert in_folder(Path(settings["runs"]) / "one") == ["settings.json"]


def test_without_the_packages_for_it_there_is_no_report_and_that_is_said(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_results, "find_spec", lambda name: None if name == "matplotlib" else object())
    result = run(RunConfig(**{**settings, "eval": None, "max_steps": 1}))
    assert in_folder(result.folder) == ["adapter", "merged", "metrics.json", "settings.json"]
    assert "No report.html will be drawn: it needs `pip install 'burnish[report]'`" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(minilm: Path, small_retrieval: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Two steps of LoRA on the real MiniLM. Shared by the module: read it only."""
    runs = tmp_path_factory.mktemp("runs")
    values = {"model": str(minilm), "train": str(small_retrieval), "runs": str(runs), "max_steps": 2}
    return run(RunConfig(**values, max_seq_length=64, batch_size=16, device="cpu"))  # type: ignore[arg-type]


def test_the_name_of_a_run_comes_from_model_and_data(trained: RunResult) -> None:
    assert trained.folder.name == "model-small"


def test_eval_prints_what_evaluate_retrieval_returns(
    trained: RunResult, small_retrieval: Path, tmp_path: Path, cli: Cli
) -> None:
    output = tmp_path / "deep" / "figures.json"
    code, out, err = cli("eval", trained.folder / "merged", "--data", small_retrieval, "--output", output)
    assert code == 0, err
    held_out = load_retrieval(small_retrieval, "test")
    plain = sentence_transformers.SentenceTransformer(str(trained.folder / "merged"), device="cpu")
    expected = evaluate_retrieval(plain, held_out.queries, held_out.corpus, held_out.relevant)
    assert json.loads(output.read_text()) == json.loads(json.dumps(expected.as_json()))
    for name, value in expected.metrics().items():
        low, high = expected.as_json()["intervals"][name]
        assert any(
            line.split() == [name, f"{value:.4f}", f"{low:.4f}", "to", f"{high:.4f}"] for line in out.splitlines()
        )
    assert f"{small_retrieval} (test: 24 queries, " in out


@pytest.mark.parametrize(("option", "dtype"), [(None, "F32"), ("dtype=16bit", "F16"), ("dtype=32bit", "F32")])
def test_export_merges_an_adapter(trained: RunResult, tmp_path: Path, cli: Cli, option: str | None, dtype: str) -> None:
    from safetensors import safe_open

    to = tmp_path / "out"
    code, out, err = cli("export", trained.folder / "adapter", "--to", to, *(["--option", option] if option else []))
    assert code == 0, err
    assert sorted(out.split()) == sorted(str(path) for path in to.rglob("*") if path.is_file())
    assert in_folder(tmp_path) == ["out"], "staging was left behind"
    with safe_open(str(to / "model.safetensors"), "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {dtype}  # noqa: SIM118
    difference = np.abs(embed(to).astype(np.float32) - trained.model.encode(TEXTS)).max()
    assert difference < (1e-5 if dtype == "F32" else 5e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("adapter", "--target", "mergd"), 2, "--target: no enabled plugin exports to 'mergd'. Did you mean 'merged'?"),
        (
            ("adapter", "--target", "zzz"),
            2,
            "--target: no enabled plugin exports to 'zzz'. Known: fastembed, gguf, int8, matryoshka, merged, onnx,",
        ),
        (("adapter", "--option", "dtype=8bit"), 2, "--option: dtype=8bit is not understood. The target merged takes"),
        (("adapter", "--option", "quality=1"), 2, "--option: quality=1 is not understood."),
        (("merged",), 4, "merged: holds no adapter to merge. Pass an adapter folder"),
    ],
)
def test_exports_that_cannot_be(
    trained: RunResult, tmp_path: Path, cli: Cli, arguments: tuple[str, ...], code: int, message: str
) -> None:
    answer = cli("export", trained.folder / arguments[0], "--to", tmp_path / "out", *arguments[1:])
    assert answer[0] == code and message in answer[2], answer
    assert in_folder(tmp_path) == []


def test_doctor_reads_no_weight_of_a_known_family(minilm: Path, tmp_path: Path, cli: Cli) -> None:
    bare = tmp_path / "minilm"
    shutil.copytree(minilm, bare, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    code, out, err = cli("doctor", bare)
    assert (code, err) == (0, "")
    assert re.search(r"model type +bert\b", out)
    assert "as modules.json says, exactly" in out and "packed: no padding is computed" in out
    assert "36 linear layers: dense, key, query, value" in out
    assert "pooler.dense: nothing reads its output" in out
    assert cli("doctor", minilm)[1].replace(str(minilm), "").split() == out.replace(str(bare), "").split()


def test_doctor_explains_an_architecture_that_no_family_claims(tmp_path: Path, cli: Cli) -> None:
    from transformers import RoFormerConfig

    folder = tmp_path / "strange"
    RoFormerConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64).save_pretrained(
        folder
    )
    assert in_folder(folder) == ["config.json"]
    code, out, err = cli("doctor", folder)
    assert (code, err) == (0, "")
    assert "roformer" in out and "generic of generic (burnish" in out
    assert "bare transformer (no modules.json)" in out and "padded: family generic does not say" in out
    assert "linear layers" in out
    code, out, _ = cli("doctor", folder, "--full-finetuning")
    assert code == 0 and "full" in out
