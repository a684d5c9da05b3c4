"""How each system trains a head: a reranker on pairs with labels, a classifier on texts with classes.

As `arms` does for embeddings. Sentence Transformers has a trainer for rerankers, transformers the one that most people
use for classifiers (`transformers`, its texts tokenised before training and batched by length); Unsloth hands its
models to the latter.
"""

from __future__ import annotations

import json
import random
import time
from argparse import Namespace
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks import arms, workload
else:
    import arms
    import workload

LABELS = {"rerank": 1, "classify": 14}
"""Outputs of the head that each task trains."""


@dataclass(slots=True)
class HeadArm(arms.Arm):
    """A system, ready to train a head. `loss` makes its loss, or is None where the trainer has one."""

    loss: Any = None
    tokenizer: Any = None

    def made(self, arguments: Any, data: Any, callbacks: list[Any]) -> Any:
        """Its trainer."""
        if self.tokenizer is None:
            return self.trainer(
                model=self.model, args=arguments, train_dataset=data, loss=self.loss(self.model), callbacks=callbacks
            )
        return _transformers_trainer(self, arguments, data, callbacks)


def rows(
    task: str, tokenizer: Any, kind: str, count: int, longest: int, seed: int = 0
) -> tuple[dict[str, Any], list[int]]:
    """(`count` rows as columns with labels, the tokens of each).

    "rerank": a query of a sixteenth of the window, one for every eight rows, and a document each, of which one in eight
    is relevant; "classify": a text and one of 14 classes.
    """
    known, chance = workload.words(tokenizer), random.Random(seed)
    drawn = workload.lengths(kind, count, longest, seed + 1)

    def text(length: int) -> str:
        return " ".join(chance.choices(known, k=max(1, length)))

    if task == "classify":
        columns: dict[str, Any] = {"text": [text(length - workload.ENDS) for length in drawn]}
        return {**columns, "label": [chance.randrange(LABELS[task]) for _ in drawn]}, drawn
    queries, documents = [], []
    for place, length in enumerate(drawn):
        words = max(1, min(longest // 16, length // 2 - 2))
        if place % 8 == 0:
            query = text(longest // 16)
        queries.append(" ".join(query.split()[:words]))
        documents.append(text(length - words - workload.ENDS - 1))
    return {"query": queries, "document": documents, "label": [float(place % 8 == 0) for place in range(count)]}, drawn


def load(path: Path, given: Namespace) -> HeadArm:
    """The model at `path`, ready to train its head in the mode that is asked for."""
    if arms.ours(given.system):
        return _burnish(path, given)
    if given.system in ("transformers", "unsloth"):
        return _transformers(path, given)
    if given.task != "rerank":
        raise SystemExit(f"{given.system} has no trainer for {given.task}")
    from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    settings = {"attn_implementation": arms.PEERS[given.system], "dtype": arms.master_dtype(given)}
    model: Any = CrossEncoder(
        str(path), num_labels=None if _generates(path) else LABELS[given.task], max_length=given.seq,
        device=given.device, model_kwargs=settings,
    )  # fmt: skip
    if not given.mode.startswith("full"):
        model.add_adapter(_lora(path, given))
    return HeadArm(model, CrossEncoderTrainer, CrossEncoderTrainingArguments, None, BinaryCrossEntropyLoss)


def _generates(path: Path) -> bool:
    architectures = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"]
    return str(architectures[0]).endswith("ForCausalLM")


def _lora(path: Path, given: Namespace) -> Any:
    """Of every linear layer; the head trains in full, as PEFT has it for classification."""
    from peft import LoraConfig

    if _generates(path):
        return LoraConfig(
            r=arms.RANK, lora_alpha=arms.ALPHA, lora_dropout=0.0, target_modules=arms.targets(path),
            task_type="CAUSAL_LM",
        )  # fmt: skip
    return LoraConfig(
        r=arms.RANK, lora_alpha=arms.ALPHA, lora_dropout=0.0, target_modules=arms.targets(path), task_type="SEQ_CLS",
        modules_to_save=["classifier", *["head"] * (arms.model_type(path) == "modernbert")],
    )  # fmt: skip


def _burnish(path: Path, given: Namespace) -> HeadArm:
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    import burnish

    full = given.mode.startswith("full")
    fast: Any = burnish.FastCrossEncoder if given.task == "rerank" else burnish.FastClassifier
    model = fast.from_pretrained(
        str(path), max_seq_length=given.seq, dtype=arms.master_dtype(given), full_finetuning=full,
        backend=given.backend, device=given.device,
        **({} if _generates(path) else {"num_labels": LABELS[given.task]}),
    )  # fmt: skip
    if not full:
        model = fast.get_peft_model(
            model, r=arms.RANK, lora_alpha=arms.ALPHA, lora_dropout=0.0, target_modules=arms.targets(path)
        )
    backend = model.burnish.decision.backend.spec.name
    arguments = burnish.CrossEncoderTrainingArguments
    if given.task == "rerank":
        return HeadArm(model, burnish.CrossEncoderTrainer, arguments, backend, BinaryCrossEntropyLoss)
    return HeadArm(model, burnish.ClassifierTrainer, arguments, backend, lambda model: None)


def _transformers(path: Path, given: Namespace) -> HeadArm:
    """AutoModelForSequenceClassification and transformers' Trainer, by itself or loaded by Unsloth."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    kind: Any = AutoModelForSequenceClassification
    if given.task != "classify":
        raise SystemExit(f"{given.system} has no trainer for {given.task}")
    full = given.mode.startswith("full")
    if given.system == "unsloth":
        fast = import_module("unsloth").FastModel
        again = "unsloth" if given.checkpointing == "offload" else given.checkpointing  # else it checkpoints unasked
        model, tokenizer = fast.from_pretrained(
            str(path), auto_model=kind, max_seq_length=given.seq, dtype=arms.master_dtype(given),
            num_labels=LABELS[given.task], full_finetuning=full, load_in_4bit=False,
            use_gradient_checkpointing=again,
        )  # fmt: skip
        if not full:
            model = fast.get_peft_model(
                model, r=arms.RANK, lora_alpha=arms.ALPHA, lora_dropout=0, bias="none",
                target_modules=arms.targets(path), task_type="SEQ_CLS", use_gradient_checkpointing=again,
            )  # fmt: skip
    else:
        model = kind.from_pretrained(
            path, num_labels=LABELS[given.task], dtype=arms.master_dtype(given),
            attn_implementation="flash_attention_2" if given.device == "cuda" else "sdpa",
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(path)
        if not full:
            model = import_module("peft").get_peft_model(model, _lora(path, given))
        model = model.to(given.device)
    tokenizer.model_max_length = given.seq
    return HeadArm(model, Trainer, TrainingArguments, None, None, tokenizer)


def _transformers_trainer(arm: HeadArm, arguments: Any, data: Any, callbacks: list[Any]) -> Any:
    from transformers import DataCollatorWithPadding

    arguments.train_sampling_strategy = "group_by_length"
    began = time.perf_counter()
    tokens = arm.tokenizer(data["text"][:], truncation=True)
    seconds = time.perf_counter() - began
    tokenised = import_module("datasets").Dataset.from_dict({**tokens, "label": data["label"][:]})
    trainer = arm.trainer(
        model=arm.model, args=arguments, train_dataset=tokenised, data_collator=DataCollatorWithPadding(arm.tokenizer),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.tokenise_seconds = seconds
    return trainer
