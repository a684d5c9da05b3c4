"""The progress of a run: pairs, speed, time left, resuming, pauses, and no bar beside ours."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as StockProgressCallback

from burnish.core.progress import ProgressCallback, install_progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Run:
    """Calls a callback as transformers' training loop does, with a clock that stands still in between."""

    def __init__(
        self, tmp_path: Path, file: io.StringIO, *, rows: int | None = None, steps: int = 0, **args: Any
    ) -> None:
        self.args = TrainingArguments(str(tmp_path), use_cpu=True, **{"disable_tqdm": False, **args})
        self.state, self.control, self.clock = TrainerState(max_steps=steps), TrainerControl(), Clock()
        self.loader: Any = None if rows is None else DataLoader(range(rows))  # type: ignore[arg-type]
        self.file, self.callback = file, ProgressCallback(file, self.clock)

    def begin(self) -> None:
        self.callback.on_train_begin(self.args, self.state, self.control, train_dataloader=self.loader)

    def step(self, seconds: float = 1.0) -> None:
        self.clock.now += seconds
        self.state.global_step += 1
        self.callback.on_step_end(self.args, self.state, self.control)

    def log(self, **logs: float) -> None:
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.callback.on_log(self.args, self.state, self.control, logs=logs)

    def evaluate(self, seconds: float) -> None:
        self.clock.now += seconds
        self.callback.on_evaluate(self.args, self.state, self.control)

    def end(self) -> None:
        self.callback.on_train_end(self.args, self.state, self.control)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


@pytest.fixture(autouse=True)
def no_log_handler_is_lost() -> Iterator[None]:
    root, library = logging.getLogger(), logging.getLogger("transformers")
    before = (list(root.handlers), list(library.handlers))
    yield
    assert (list(root.handlers), list(library.handlers)) == before


def test_pairs_are_batch_times_accumulation(tmp_path: Path) -> None:
    run = Run(
        tmp_path, io.StringIO(), steps=5, max_steps=5, per_device_train_batch_size=8, gradient_accumulation_steps=3
    )
    run.begin()
    assert run.lines == ["Training on 120 pairs in 5 steps"]


def test_a_short_last_batch_is_not_counted_in_full(tmp_path: Path) -> None:
    run = Run(tmp_path, io.StringIO(), rows=37, steps=5, num_train_epochs=1, per_device_train_batch_size=8)
    run.begin()
    for _ in range(5):
        run.step()
    run.end()
    assert run.lines[0] == "Training on 37 pairs in 5 steps"
    assert run.lines[-1] == "Trained on 37 pairs in 00:05, 7.4 pairs/s"


def test_history_and_speed_leave_pauses_out(tmp_path: Path) -> None:
    run = Run(tmp_path, io.StringIO(), steps=4, max_steps=4, per_device_train_batch_size=10)
    run.begin()
    run.step()
    run.log(loss=2.0, learning_rate=0.1)
    run.step()
    run.evaluate(50.0)
    run.step(3.0)
    run.log(loss=1.0, learning_rate=0.05, grad_norm=3.0)
    assert run.callback.history == [
        {"step": 1, "loss": 2.0, "learning_rate": 0.1, "pairs_per_second": 10.0, "seconds": 1.0},
        {"step": 3, "loss": 1.0, "learning_rate": 0.05, "pairs_per_second": 5.0, "seconds": 5.0},
    ]


def test_lines_are_few_and_say_where_the_run_is(tmp_path: Path) -> None:
    run = Run(tmp_path, io.StringIO(), steps=1000, max_steps=1000, per_device_train_batch_size=2)
    run.begin()
    for _ in range(1000):
        run.step(0.125)
        if run.state.global_step % 10 == 0:
            run.log(loss=1 / run.state.global_step, learning_rate=0.1)
    run.end()
    assert "\r" not in run.file.getvalue()
    assert len(run.lines) == 11, "the start, nine tenths, the end"
    assert run.lines[5] == " 50%  1,000/2,000 pairs, 16.0 pairs/s, 01:02 left, loss 0.0020"
    assert run.lines[-1] == "Trained on 2,000 pairs in 02:05, 16.0 pairs/s, last loss 0.0010"


@pytest.mark.parametrize(("seconds", "lines"), [(0.001, 2), (100.0, 1001)])
def test_lines_keep_their_distance(tmp_path: Path, seconds: float, lines: int) -> None:
    """A run of one second gets no line in between; one of a day gets a sign of life at each step."""
    run = Run(tmp_path, io.StringIO(), steps=1000, max_steps=1000)
    run.begin()
    for _ in range(1000):
        run.step(seconds)
    run.end()
    assert len(run.lines) == lines


def test_resume_counts_from_where_it_stopped(tmp_path: Path) -> None:
    run = Run(tmp_path, io.StringIO(), steps=10, max_steps=10, per_device_train_batch_size=4)
    run.state.global_step = 6
    run.state.log_history = [{"step": 5, "loss": 3.0, "learning_rate": 0.2}, {"step": 5, "eval_loss": 9.0}]
    run.begin()
    run.step(2.0)
    run.log(loss=1.0, learning_rate=0.1)
    for _ in range(3):
        run.step(2.0)
    run.end()
    assert run.lines == [
        "Training on 40 pairs in 10 steps, from step 6",
        " 70%  28/40 pairs, 2.0 pairs/s, 00:06 left",
        " 80%  32/40 pairs, 2.0 pairs/s, 00:04 left, loss 1.0000",
        " 90%  36/40 pairs, 2.0 pairs/s, 00:02 left, loss 1.0000",
        "Trained on 16 pairs in 00:08, 2.0 pairs/s, last loss 1.0000",
    ]
    assert [(row["step"], row["pairs_per_second"]) for row in run.callback.history] == [(5, None), (7, 2.0)]


def test_results_of_an_evaluation_get_a_line(tmp_path: Path) -> None:
    run = Run(tmp_path, io.StringIO(), steps=10, max_steps=10)
    run.begin()
    run.step()
    run.log(eval_loss=0.51234, eval_ndcg=0.75, eval_runtime=3.0, eval_samples_per_second=8.0, epoch=1.0)
    run.log(train_runtime=3.0, train_loss=0.2)
    assert run.lines[1:] == ["step 1: eval_loss 0.5123, eval_ndcg 0.75"]


def test_other_processes_are_silent(tmp_path: Path) -> None:
    for file in (io.StringIO(), Terminal()):
        run = Run(tmp_path, file, steps=2, max_steps=2)
        run.state.is_world_process_zero = False
        run.begin()
        run.step(99.0)
        run.log(loss=1.0, eval_loss=2.0)
        run.step(99.0)
        run.end()
        assert file.getvalue() == ""
        assert len(run.callback.history) == 1


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    run = Run(tmp_path, Terminal(), steps=10, max_steps=10, per_device_train_batch_size=4)
    run.state.global_step = 5
    run.begin()
    for _ in range(5):
        run.step()
        run.log(loss=0.25, learning_rate=0.1)
    run.end()
    frames = run.file.getvalue().split("\r")
    assert frames[1].startswith("Training  50%|") and "20/40 pairs" in frames[1]
    assert re.match(r"Training 100%\|.*\| 40/40 pairs, +\S+ pairs/s, 00:00 left, loss 0.2500\n", frames[-1])


def test_bar_gives_way_to_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of the log starts on a line of its own, the bar wiped away before it and drawn anew after it."""
    run = Run(tmp_path, Terminal(), steps=10, max_steps=10)
    monkeypatch.setattr("sys.stderr", run.file)
    logger = logging.getLogger("burnish.test")
    handler = logging.StreamHandler(run.file)
    logger.addHandler(handler)
    try:
        run.begin()
        run.step()
        logger.warning("something to say")
        run.log(eval_loss=0.5)
        run.step()
        run.end()
        assert logger.handlers == [handler], "the handler is back"
    finally:
        logger.removeHandler(handler)
    for line in ("something to say\n", "step 1: eval_loss 0.5\n"):
        before, after = run.file.getvalue().split(line)
        assert before.endswith("\r") and not before.split("\r")[-2].strip(), "the bar was wiped"
        assert after.startswith("\rTraining"), "the bar is back"


def test_close_after_an_exception_gives_handlers_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, Terminal(), steps=10, max_steps=10)
    monkeypatch.setattr("sys.stderr", run.file)
    logger = logging.getLogger("burnish.test")
    handler = logging.StreamHandler(run.file)
    logger.addHandler(handler)
    try:
        run.begin()
        assert logger.handlers != [handler]
        run.callback.close()
        run.callback.close()
        assert logger.handlers == [handler]
    finally:
        logger.removeHandler(handler)


def test_evaluation_bar(tmp_path: Path) -> None:
    run = Run(tmp_path, Terminal(), steps=10, max_steps=10)
    run.begin()
    for _ in range(3):
        run.callback.on_prediction_step(run.args, run.state, run.control, eval_dataloader=range(3))
    assert "Evaluating" in run.file.getvalue()
    run.evaluate(1.0)
    run.step()
    run.end()
    assert run.file.getvalue().rstrip("\n").split("\r")[-1].startswith("Training")


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((3,), float(index)), "labels": torch.tensor(float(index))}


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.mse_loss(self.layer(x)[:, 0], labels)}


def tiny_trainer(tmp_path: Path, **args: Any) -> Trainer:
    options: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **args,
    }
    return Trainer(Line(), TrainingArguments(str(tmp_path), **options), train_dataset=Rows(), eval_dataset=Rows())


def kinds(trainer: Trainer, *classes: type) -> Sequence[object]:
    return [one for one in trainer.callback_handler.callbacks if isinstance(one, classes)]


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_real_run_shows_only_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str], disable_tqdm: bool) -> None:
    trainer = tiny_trainer(tmp_path, disable_tqdm=disable_tqdm, eval_strategy="epoch")
    assert kinds(trainer, StockProgressCallback, PrinterCallback), "transformers shows nothing of its own any more"
    callback = install_progress(trainer)
    assert install_progress(trainer) is callback
    assert not kinds(trainer, StockProgressCallback, PrinterCallback)
    assert kinds(trainer, ProgressCallback) == [callback]
    trainer.train()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "Training on 44 pairs in 12 steps"
    assert [line.split(":")[0] for line in lines[1:3]] == ["step 6", "step 12"]
    assert re.fullmatch(r"Trained on 44 pairs in \S+, \S+ pairs/s, last loss \S+", lines[-1]) and len(lines) == 4
    assert [row["step"] for row in callback.history] == [3, 6, 9, 12]
    for row, logged in zip(callback.history, [row for row in trainer.state.log_history if "loss" in row], strict=True):
        assert (row["loss"], row["learning_rate"]) == (logged["loss"], logged["learning_rate"])
        assert row["pairs_per_second"] and row["seconds"]


def test_a_real_run_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6}
    first = tiny_trainer(tmp_path, **options)
    install_progress(first)
    first.train()
    capsys.readouterr()
    second = tiny_trainer(tmp_path, **options)
    callback = install_progress(second)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Training on 44 pairs in 12 steps, from step 6"
    assert lines[-1].startswith("Trained on 22 pairs in ")
    assert [row["step"] for row in callback.history] == [3, 6, 9, 12]
    assert [row["seconds"] is None for row in callback.history] == [True, True, False, False]
