"""The benchmarks' own arithmetic: cells, comparisons, floors, failures. Nothing trains here."""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def line(system: str, rate: float | None, **other: Any) -> dict[str, Any]:
    """A line of results; without a rate, of a failure."""
    made = {
        "system": system, "model": "bge-large-en-v1.5", "mode": "lora16", "seq": 512, "batch": 32, "lengths": "fixed",
        "checkpointing": False, "dropout": "config", "run": "one", "device": "NVIDIA H100 80GB HBM3",
    }  # fmt: skip
    return {**made, **({"error": "no result"} if rate is None else {"pairs_per_s": rate, "peak_gib": rate}), **other}


def test_the_scripts_folder_is_not_left_on_the_path(bench: dict[str, ModuleType]) -> None:
    # transformers would import kernels.py there for the package `kernels`
    sys.path.insert(0, str(FOLDER))
    importlib.reload(bench["cell"])
    assert not [place for place in sys.path if Path(place or ".").resolve() == FOLDER.resolve()]


def test_texts_have_the_lengths_that_are_said(bench: dict[str, ModuleType]) -> None:
    class Tokenizer:
        @staticmethod
        def get_vocab() -> dict[str, int]:
            return {"word": 0, "other": 1, "##piece": 2, "it": 3}

    columns, lengths = bench["workload"].pairs(Tokenizer(), "natural", 50, 64)
    texts = [*columns["anchor"], *columns["positive"]]
    assert [len(text.split()) + 2 for text in texts] == lengths
    assert set(" ".join(texts).split()) == {"word", "other"}
    assert 8 <= min(lengths) < max(lengths) <= 64
    assert bench["workload"].lengths("fixed", 3, 64, 0) == [64, 64, 64]


def test_natural_lengths_are_a_third_of_the_window(bench: dict[str, ModuleType]) -> None:
    drawn = bench["workload"].lengths("natural", 20_000, 512, 0)
    assert sum(drawn) / len(drawn) / 512 == pytest.approx(0.35, abs=0.01)


def test_the_floor_of_bge_large_is_the_design_s(bench: dict[str, ModuleType]) -> None:
    """design.md: 57 ms for 64 texts of 512 tokens at 784 TFLOP/s; full takes 6P where LoRA takes 4P."""
    flops, config = bench["measuring"].training_flops, bench["shapes"].SHAPES["bge-large-en-v1.5"].config()
    lora, full = flops(config, [512] * 64, False), flops(config, [512] * 64, True)
    assert lora / 784e12 * 1e3 == pytest.approx(57, abs=1.5)
    matrices = 24 * (4 * 1024**2 + 2 * 1024 * 4096)
    assert full - lora == 2 * matrices * 512 * 64
    assert lora - 4 * matrices * 512 * 64 == 12 * 24 * 1024 * 512 * 512 * 64


def test_windows_and_causal_attention_make_the_floor_lower(bench: dict[str, ModuleType]) -> None:
    shapes, flops = bench["shapes"].SHAPES, bench["measuring"].training_flops

    def attention(name: str, length: int) -> float:
        """What is not proportional to the tokens."""
        config = shapes[name].config()
        return float(flops(config, [length], False) - length * flops(config, [1] * 1000, False) / 1000)

    full = 12 * 22 * 768 * 1024 * 1024
    assert attention("ModernBERT-base", 1024) < 0.5 * full
    # half of the keys in each of 28 layers of 16 heads of 128
    assert attention("Qwen3-Embedding-0.6B", 1024) == pytest.approx(12 * 28 * 2048 * 1024**2 / 2, rel=0.01)


def test_steady_steps_come_after_the_last_new_shape(bench: dict[str, ModuleType]) -> None:
    clock = bench["clock"]
    assert clock.last_change([3, 3, 3]) == 0
    assert clock.last_change([3, 4, 4, 5, 5]) == 3
    found = clock.step_times([90.0, 80.0, 10.0, 12.0], 2)
    assert (found["steady_steps"], found["steady_ms_median"], found["step_ms_max"]) == (2, 11.0, 90.0)
    assert clock.step_times([90.0], 1)["steady_ms_mean"] is None


def test_tokenising_ahead_is_charged(bench: dict[str, ModuleType]) -> None:
    given = bench["cell"].given_cell(["--batch", "4", "--tokenizer", "-", "--steps", "2", "--warmup", "2"])
    found = bench["cell"].rates([500.0, 500.0], given, 2.0, [10] * 32)  # 16 pairs, 8 of them timed: 1 of 2 s
    assert (found["pairs_per_s"], found["pairs_per_s_warm_store"], found["tokens_per_s"]) == (4.0, 8.0, 80)


def test_a_backend_and_its_system_are_one_thing(bench: dict[str, ModuleType]) -> None:
    given = bench["cell"].given_cell(["--system", "burnish-compiled", "--tokenizer", "-"])
    assert given.backend == "compiled"
    given = bench["cell"].given_cell(["--backend", "reference", "--tokenizer", "-"])
    assert given.system == "burnish-reference"


def test_only_lines_of_one_run_and_device_are_compared(bench: dict[str, ModuleType]) -> None:
    compare = bench["lines"].compare
    apart = [line("st-fa2", 100.0), line("burnish", 300.0, run="two"), line("burnish", 300.0, device="NVIDIA H200")]
    assert compare(apart, "burnish", "st-fa2", "pairs_per_s") == []
    together = compare([*apart, line("burnish", 250.0)], "burnish", "st-fa2", "pairs_per_s")
    assert [one.ratio for one in together] == [2.5]
    assert compare([line("st-fa2", 8.0), line("burnish", 4.0)], "burnish", "st-fa2", "peak_gib")[0].ratio == 2.0


def test_of_several_runs_the_last_that_has_a_ratio_counts(bench: dict[str, ModuleType]) -> None:
    found = [line("st-fa2", 100.0), line("burnish", 300.0)]
    found += [line("st-fa2", 100.0, run="two"), line("burnish", 150.0, run="two")]
    compare = bench["lines"].compare
    assert [one.ratio for one in compare(found, "burnish", "st-fa2", "pairs_per_s")] == [1.5]
    found += [line("st-fa2", None, run="three"), line("burnish", 150.0, run="three")]
    assert [one.run for one in compare(found, "burnish", "st-fa2", "pairs_per_s")] == ["two"]


def test_the_table_counts_a_failure_of_ours_as_missed(bench: dict[str, ModuleType]) -> None:
    table = bench["table"]
    goal = table.Goal(goal="g", system="burnish", peer="st-fa2", figure="pairs_per_s", at_least=2.0)
    found = [line("st-fa2", 100.0), line("burnish", 300.0)]
    found += [line("st-fa2", 100.0, seq=128), line("burnish", None, seq=128)]
    found += [line("st-fa2", None, seq=64), line("burnish", 1.0, seq=64)]
    found += [line("st-fa2", 100.0, seq=32), line("burnish", 150.0, seq=32, dropout="zero")]
    [row] = table.rows(found, [goal])
    assert row[5] == "1 of 2, 1 failed, 1 without a result of the peer"
    assert row[6].startswith("3.00× (bge-large-en-v1.5, 512 × 32") and row[7] == "3.00×"
    assert table.rows([], [goal])[0][5] == "not measured"
    with pytest.raises(ValueError, match="no figure 'speed'"):
        table.Goal(goal="g", system="burnish", peer="st-fa2", figure="speed")


def test_the_committed_goals_and_results_can_be_read(bench: dict[str, ModuleType]) -> None:
    table = bench["table"]
    assert len(table.goals()) > 3
    assert table.results_table().count("\n") >= len(table.goals()) + 1


def test_a_cell_is_skipped_only_if_one_run_has_every_system(bench: dict[str, ModuleType]) -> None:
    grid = bench["grid"]
    wanted = grid.group("st-fa2,burnish bge-large-en-v1.5 lora16 512 32 fixed --each 9", 150)
    assert wanted.each == 9 and wanted.systems == ("st-fa2", "burnish") and "--each" not in wanted.options
    assert grid.left_to_run(wanted, [], "new") == ("st-fa2", "burnish")
    torn = [line("st-fa2", 1.0), line("burnish", 1.0, run="two")]
    assert grid.left_to_run(wanted, torn, "new") == ("st-fa2", "burnish")
    assert grid.left_to_run(wanted, torn, "two") == ("st-fa2",)
    assert grid.left_to_run(wanted, [*torn, line("st-fa2", None, run="two")], "new") == ()
    other = grid.group("st-fa2,burnish bge-large-en-v1.5 lora16 512 32 fixed", 150, ["--dropout", "zero"])
    assert grid.left_to_run(other, [*torn, line("st-fa2", None, run="two")], "new") == ("st-fa2", "burnish")
    with pytest.raises(SystemExit, match="not a cell"):
        grid.group("st-fa2 bge-large-en-v1.5", 150)


STAND_IN = """
import sys, time
print("GATE", flush=True)
if "hang" in sys.argv: time.sleep(60)
if "fail" in sys.argv: raise ValueError("no such model")
print('RESULT {"pairs_per_s": 5.0}', flush=True)
time.sleep(60)
"""


ON_A_LANE = """
import json, os, sys
print("GATE", flush=True)
line = {name: 1 for name in ("seq", "batch", "pairs_per_s", "step_ms_median", "steps", "peak_gib", "first_step_s")}
line |= {"system": sys.argv[2], "model": "", "mode": "", "lengths": "", "cache": "cold", "compile_s": 1.0}
line |= {"steady_ms_median": None, "steady_steps": 0, "told": sys.argv, "card": os.environ.get("CUDA_VISIBLE_DEVICES")}
print("RESULT " + json.dumps(line), flush=True)
"""


@pytest.mark.parametrize(
    ("word", "said"),
    [("ok", None), ("hang", "no result beyond the gate in 1 s"), ("fail", "exit code 1: ValueError: no such model")],
)
def test_a_cell_s_process_ends_as_a_line(
    word: str, said: str | None, bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = bench["grid"]
    alone = grid.Lane(0, 1)
    (tmp_path / "cell.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(grid, "__file__", str(tmp_path / "grid.py"))
    each = 1.0 if word == "hang" else 30.0
    child = grid.Child(grid.Group(("burnish",), (), each, line("", 1.0)), "burnish", [word], alone)
    started = time.monotonic()
    found = child.finish(started + 45)
    assert time.monotonic() - started < 40  # what hangs after its line is not waited for
    assert found is not None and found.get("error") == said
    assert found["system" if said else "pairs_per_s"] == ("burnish" if said else 5.0)
    cut = grid.Child(grid.Group(("burnish",), (), 30.0, line("", 1.0)), "burnish", ["hang"], alone)
    assert cut.finish(time.monotonic() + 0.5) is None  # the budget's end is no failure
    cut.end()


def test_lanes_share_the_cells_and_keep_a_cell_s_systems_together(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = bench["grid"]
    (tmp_path / "cell.py").write_text(ON_A_LANE, encoding="utf-8")
    monkeypatch.setattr(grid, "__file__", str(tmp_path / "grid.py"))
    monkeypatch.setattr(grid.cells, "HOME", tmp_path)
    groups = [
        (grid.Group(("st-fa2", "burnish"), (), 30.0, line("", 1.0, seq=seq)), ("st-fa2", "burnish")) for seq in range(3)
    ]
    out = tmp_path / "lines.jsonl"
    stamp = {"device": "NVIDIA", "run": "one"}
    assert grid.run_all(groups, out, time.monotonic() + 50, stamp, [], 2) == []
    found = bench["lines"].read([out])
    assert len(found) == 6 and {one["lane"] for one in found} == {0, 1} and {one["lanes"] for one in found} == {2}
    assert all(one["card"] == str(one["lane"]) for one in found), "a cell ran on another lane's card"
    assert all(str(tmp_path / f"gate-{one['lane']}") in one["told"] for one in found)
    assert grid.run_all(groups, out, time.monotonic() + 1, stamp, [], 2) != [], "no budget, yet nothing left out"
    done = [(groups[0][0], ()), groups[1]]
    assert grid.run_all(done, out, time.monotonic() + 50, stamp, [], 1) == []
    assert len(bench["lines"].read([out])) == 8, "a cell that was done before kept the next from its turn"


def test_sentence_transformers_best_is_whichever_attention_a_model_has(bench: dict[str, ModuleType]) -> None:
    lines = [
        line("burnish", 6.0), line("st-fa2", 2.0), line("st-eager", 1.0),
        line("burnish", 6.0, seq=128), line("st-eager", 1.0, seq=128),
        line("burnish", 6.0, seq=64), line("st-fa2", None, seq=64), line("st-sdpa", 1.0, seq=32),
    ]  # fmt: skip
    found = {one["seq"]: one for one in bench["lines"].compare(lines, "burnish", "st", "pairs_per_s")}
    assert {seq: one.ratio for seq, one in found.items()} == {512: 3.0, 128: 6.0, 64: None}
    assert found[64].lacking == "st-fa2"


def test_a_torn_line_does_not_spoil_the_next(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    out.write_text('{"half', encoding="utf-8")
    bench["grid"].append(out, {"whole": 1})
    assert out.read_text(encoding="utf-8").splitlines() == ['{"half', '{"whole": 1}']
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1"):
        bench["lines"].read([out])


def test_heatmaps_are_drawn_and_say_what_is_missing(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chance = random.Random(0)
    found = [
        line(system, None if (system, seq) == ("st-fa2", 64) else chance.uniform(1, 9), model=model, seq=seq)
        for model in ("all-MiniLM-L6-v2", "bge-m3")
        for seq in (64, 128, 512)
        for system in ("st-fa2", "burnish")
        if (model, seq) != ("bge-m3", 512)
    ]
    results = tmp_path / "r.jsonl"
    results.write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
    [path] = bench["heatmap"].draw_all(bench["lines"].read([results]), tmp_path, "burnish", ["st-fa2"], "pairs_per_s")
    drawn = path.read_text(encoding="utf-8")
    assert path.name == "nvidia-h100-80gb-hbm3-lora16-st-fa2-fixed-pairs-per-s.svg"
    assert "no result" in drawn and "not run" in drawn and "of 3 cells" in drawn
    assert path.with_suffix(".png").stat().st_size > 5_000
    bench["heatmap"].draw_all(bench["lines"].read([results]), tmp_path, "burnish", ["st-fa2"], "pairs_per_s")
    assert path.read_text(encoding="utf-8") == drawn


def test_each_system_is_compared_at_its_own_best_setting(bench: dict[str, ModuleType]) -> None:
    compare = bench["lines"].compare
    plain = [line("st-fa2", 8.0), line("burnish", 4.0)]
    ours = line("burnish", 1.0, checkpointing="offload", embedding_storage="host")
    assert [one.ratio for one in compare([*plain, ours], "burnish", "st", "peak_gib")] == [2.0]
    # The peer was not tried with checkpointing: then ours does not count either.
    assert [one.ratio for one in compare([*plain, ours], "burnish", "st", "peak_gib", settings="best")] == [2.0]
    theirs = line("st-fa2", 3.0, checkpointing=True)
    [one] = compare([*plain, ours, theirs], "burnish", "st", "peak_gib", settings="best")
    assert one.ratio == 3.0 and one.lines == (ours, theirs)
    assert bench["lines"].setting(ours) == "checkpointing offload, embeddings on the host"
    assert bench["lines"].setting(theirs) == "checkpointing" and bench["lines"].setting(plain[0]) == "plain"
    # Checkpointing is slower: for speed the plain lines are the best.
    assert [one.ratio for one in compare([*plain, ours, theirs], "burnish", "st", "pairs_per_s", settings="best")] == [
        0.5
    ]
    # A setting that failed does not hide one that did not.
    failed = line("burnish", None, checkpointing="selective")
    assert compare([*plain, ours, theirs, failed], "burnish", "st", "peak_gib", settings="best")[0].ratio == 3.0


def test_of_one_setting_in_one_run_the_last_line_counts(bench: dict[str, ModuleType]) -> None:
    found = [line("st-fa2", 100.0), line("burnish", 400.0), line("burnish", 300.0)]
    assert [one.ratio for one in bench["lines"].compare(found, "burnish", "st", "pairs_per_s")] == [3.0]


def test_lines_from_before_the_settings_are_of_plain_ones(bench: dict[str, ModuleType]) -> None:
    lines, grid = bench["lines"], bench["grid"]
    old = line("burnish", 1.0)
    assert "embedding_storage" not in old and lines.is_plain(old)
    wanted = grid.group("burnish bge-large-en-v1.5 lora16 512 32 fixed", 150)
    assert grid.left_to_run(wanted, [old], "new") == ()
    other = grid.group("burnish bge-large-en-v1.5 lora16 512 32 fixed --embedding-storage host", 150)
    assert other.where["embedding_storage"] == "host"
    assert grid.left_to_run(other, [old], "new") == ("burnish",)


def test_four_bits_are_compared_with_our_own_sixteen(bench: dict[str, ModuleType]) -> None:
    table = bench["table"]
    goal = table.Goal(goal="g", system="burnish", peer="burnish", peer_mode="lora16", figure="pairs_per_s",
                      at_least=0.9, where={"mode": "qlora4", "seq": [128, 512]})  # fmt: skip
    found = [line("burnish", 100.0), line("burnish", 95.0, mode="qlora4")]
    found += [line("burnish", 100.0, seq=128), line("burnish", 50.0, seq=128, mode="qlora4")]
    found += [line("burnish", None, seq=2048), line("burnish", 50.0, seq=2048, mode="qlora4")]
    [row] = table.rows(found, [goal])
    assert row[2] == "burnish, lora16" and row[5] == "1 of 2" and row[6].startswith("0.50× (bge-large-en-v1.5, 128")
    lacking = bench["lines"].compare(found[-2:], "burnish", "burnish", "pairs_per_s", peer_mode="lora16")
    assert [one.lacking for one in lacking] == ["burnish, lora16"]
    with pytest.raises(ValueError, match="settings are plain or best"):
        table.Goal(goal="g", system="burnish", peer="st", figure="peak_gib", settings="worst")


def test_limits_are_in_gb_and_take_the_least_of_each_system(bench: dict[str, ModuleType]) -> None:
    table = bench["table"]
    limit = table.Limit(goal="g", system="burnish", at_most=2.0, moonshot=1.0, where={"mode": "lora16"})
    gib = 1e9 / 2**30
    found = [
        line("st-fa2", 6 * gib), line("st-fa2", 3 * gib, checkpointing=True, process_gib=4 * gib),
        line("burnish", 3 * gib), line("burnish", 1.5 * gib, checkpointing="offload", process_gib=2 * gib),
        line("unsloth", None),
    ]  # fmt: skip
    rows = {row[2]: row[3:] for row in table.limit_rows(found, [limit])}
    assert rows["st-fa2"] == ("3.00", "4.00", "checkpointing", "–", "6.00", "", "")
    assert rows["burnish"] == ("1.50", "2.00", "checkpointing offload", "–", "3.00", "2, moonshot 1", "yes")
    assert rows["unsloth"][2] == "no result"
    assert table.limit_rows([], [limit])[0][-1] == "not measured"
    less = [*found, line("burnish", 0.9 * gib, checkpointing="selective")]
    assert table.limit_rows(less, [limit])[-1][-1] == "the moonshot"
    assert table.limit_rows(found[:3], [limit])[-1][-1] == "no"
    later = [line("unsloth", 2 * gib, run="two", step_ms_median=1234.5), line("burnish", None, run="two")]
    rows = {row[2]: row[3:] for row in table.limit_rows([*found, *later], [limit])}
    assert rows["unsloth"][3] == "1,234" and rows["burnish"][4] == "3.00"  # a setting's last line that has a result
    assert len(table.limits()) == 3


def test_a_later_run_takes_the_place_of_one_that_tried_no_more_of_the_peer(bench: dict[str, ModuleType]) -> None:
    lines = bench["lines"]
    first = [line("burnish", 1.0), line("st-fa2", 4.0), line("st-fa2", 2.0, checkpointing=True)]
    later = [line("burnish", 1.0, run="two"), line("st-fa2", 4.0, run="two")]
    [least] = lines.compare([*first, *later], "burnish", "st", "peak_gib", settings="best")
    assert (least.run, least.ratio) == ("one", 2.0)
    [plain] = lines.compare([*first, *later], "burnish", "st", "peak_gib")
    assert plain.run == "two"


def test_a_second_file_of_a_day_comes_after_the_first(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").mkdir()
    names = ["heads-2026-11-26-h100-x1.jsonl", "heads-2026-11-26-h100.jsonl", "heads-2026-11-25-h100.jsonl"]
    for name in names:
        (tmp_path / "results" / name).touch()
    monkeypatch.setattr(bench["table"], "HERE", tmp_path)
    assert [path.name for path in bench["table"].committed("heads")] == names[::-1]


def test_peers_refuse_settings_that_they_do_not_have(bench: dict[str, ModuleType]) -> None:
    given_cell = bench["cell"].given_cell
    for options, said in (
        (["--checkpointing", "selective"], "st-fa2 has no --checkpointing selective"),
        (["--embedding-storage", "8bit"], "st-fa2 has no --embedding-storage"),
        (["--activation-budget", "2"], "st-fa2 has no --activation-budget"),
    ):
        with pytest.raises(SystemExit, match=said):
            given_cell(["--system", "st-fa2", "--tokenizer", "-", *options])
        given_cell(["--system", "burnish", "--tokenizer", "-", *options])
    written: tuple[list[str], ...] = (
        [],
        ["--checkpointing"],
        ["--checkpointing", "--cpu"],
        ["--checkpointing", "offload"],
    )
    found = [given_cell(["--tokenizer", "-", *options]).checkpointing for options in written]
    assert found == [False, True, True, "offload"]
    with pytest.raises(SystemExit, match="unsloth has no"):
        bench["grid"].group("burnish,unsloth bge-m3 qlora4 512 32 fixed --embedding-storage host", 150)


@pytest.mark.parametrize("name", ["cells.txt", "cells-4bit.txt", "cells-memory.txt"])
def test_the_lists_of_cells_can_be_read(name: str, bench: dict[str, ModuleType]) -> None:
    texts = [text for text in (FOLDER / name).read_text(encoding="utf-8").splitlines() if text[:1] not in ("", "#")]
    groups = [bench["grid"].group(text, 150) for text in texts]
    keys = [group.key(system) for group in groups for system in group.systems]
    assert len(keys) > 40 and len(set(keys)) == len(keys), "a cell stands there twice"


def test_the_list_of_contexts_can_be_read(bench: dict[str, ModuleType]) -> None:
    texts = (FOLDER / "cells-context.txt").read_text(encoding="utf-8").splitlines()
    given = [bench["context"].given_cell(text, "--tokenizer", "-") for text in texts if not text.startswith("#")]
    assert {one.model for one in given} == {"bge-m3", "ModernBERT-large", "Qwen3-Embedding-0.6B"}
    assert all(one.dropout == "zero" and one.batch == 2 and one.mode == "lora16" for one in given)
