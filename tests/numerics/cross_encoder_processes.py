"""A few steps of both trainers in each of several processes; run by test_cross_encoder_families.py with torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers.cross_encoder import CrossEncoder as StockEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer as StockTrainer
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as StockArguments
from sentence_transformers.cross_encoder import losses
from torch.nn.parallel import DistributedDataParallel

from burnish.core.arguments import CrossEncoderTrainingArguments
from burnish.core.cross_encoder import CrossEncoder
from burnish.core.cross_encoder_trainer import CrossEncoderTrainer
from burnish.core.pair_tokens import PairRecipe


def main(folder: Path) -> None:
    """Write each loss of each trainer's run, beside the model, by the first process."""
    found: dict[str, list[float]] = {}
    made: list[bool] = []
    own = PairRecipe.features

    def features(*given: Any) -> Any:
        batch = own(*given)
        made.append(batch is not None)
        return batch

    setattr(PairRecipe, "features", features)  # noqa: B010 - for as long as this process lives
    data = Dataset.from_json(str(folder / "rows.json"))
    for name, model_kind, kind, arguments in (
        ("theirs", StockEncoder, StockTrainer, StockArguments),
        ("ours", CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments),
    ):
        model: Any = model_kind(str(folder / "model"), device="cpu")
        given: Any = arguments(
            str(folder / name), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to="none",
            use_cpu=True, save_strategy="no", learning_rate=1e-2, disable_tqdm=True, ddp_find_unused_parameters=False,
        )  # fmt: skip
        trainer: Any = kind(model, given, train_dataset=data, loss=losses.ListNetLoss(model))
        trainer.train()
        assert isinstance(trainer.model_wrapped, DistributedDataParallel) and given.world_size == 2
        found[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert made == [True] * 3, made
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
