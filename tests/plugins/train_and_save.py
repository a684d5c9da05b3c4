"""Trains a model for one step in an interpreter that has a plugin, and saves it in every way that there is.

Usage: train_and_save.py MODEL FOLDER. Makes `adapter`, `merged` and `checkpoint-1` in the folder, and `live.npy`, the
trained model's embeddings of the texts in `texts.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: str, folder: Path) -> None:
    """Load, adapt, train and save."""
    import numpy as np
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from burnish import FastSentenceTransformer, Trainer, TrainingArguments

    torch.set_num_threads(1)
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    model = FastSentenceTransformer.from_pretrained(source, device="cpu")
    FastSentenceTransformer.get_peft_model(model, r=4)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, save_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
        use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    pairs = Dataset.from_dict({"anchor": texts, "positive": [text[::-1] for text in texts]})
    Trainer(model, args=arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model)).train()
    model.save_pretrained(str(folder / "adapter"))
    model.save_pretrained_merged(folder / "merged")
    np.save(folder / "live.npy", model.encode(texts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
