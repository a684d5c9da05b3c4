"""What the tests of burnish-watchful run in an interpreter of its own: who is chosen, training, and a spoiled weight.

Usage: watched.py FOLDER. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SPOILED = "0.model.encoder.layer.1.intermediate.dense"


def chosen(folder: str, **options: Any) -> dict[str, Any]:
    """The backend and the kernel that a model gets."""
    from burnish import FastSentenceTransformer

    model = FastSentenceTransformer.from_pretrained(folder, device="cpu", **options)
    assert model.burnish is not None and model.burnish.decision.attention is not None
    decision = model.burnish.decision
    assert decision.attention is not None
    vectors = model.encode(["one text", "and a second one that is longer"]).tolist()
    return {"backend": decision.backend.spec.name, "kernel": decision.attention.spec.name, "vectors": vectors}


def trained(folder: str, *, spoiled: bool) -> dict[str, Any]:
    """A training step by the backend `watchful`: its loss, or the error."""
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from burnish import BurnishError, FastSentenceTransformer, Trainer, TrainingArguments

    model: Any = FastSentenceTransformer.from_pretrained(folder, device="cpu", backend="watchful", full_finetuning=True)
    if spoiled:
        with torch.no_grad():
            model.get_submodule(SPOILED).weight[0, 0] = float("nan")
    texts = ["a short text", "one that is quite a bit longer", "third", "and the last one"]
    pairs = Dataset.from_dict({"anchor": texts, "positive": [text[::-1] for text in texts]})
    arguments = TrainingArguments(
        output_dir="runs", max_steps=1, per_device_train_batch_size=4, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args=arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))
    try:
        return {"loss": float(trainer.train().training_loss)}
    except BurnishError as error:
        left = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        return {"error": str(error), "code": error.exit_code, "hooks left": left}


def main(folder: str) -> dict[str, Any]:
    """Everything."""
    return {
        "by itself": chosen(folder),
        "asked for": chosen(folder, backend="watchful"),
        "named": chosen(folder, plugins=["burnish-watchful"]),
        "healthy": trained(folder, spoiled=False),
        "spoiled": trained(folder, spoiled=True),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
