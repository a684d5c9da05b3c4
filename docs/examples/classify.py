"""Fine-tune a classifier, calibrate its probabilities, and say how good it is on held-out sentences.

    python docs/examples/classify.py                          all of it, a quarter of an hour of one CPU core
    python docs/examples/classify.py --steps 6 --texts 96     a look at how it goes

The data: 13,594 sentences on what an intruder did, each with one of 14 tactics of MITRE ATT&CK, split by actor. (c) The
MITRE Corporation. This work is reproduced and distributed with the permission of The MITRE Corporation; see NOTICE.txt
beside it. Put your own in its place: any file with a text and a label in each row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import pipeline

from burnish import ClassifierTrainer, CrossEncoderTrainingArguments, FastClassifier
from burnish.core.class_data import load_classes
from burnish.core.class_evaluator import ClassificationEvaluator

DATA = Path(__file__).parent / "data" / "attack_tactics"


def main() -> None:
    """Train, calibrate, measure, save."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or Hub id")
    options.add_argument("--epochs", type=float, default=4, help="passes over the training sentences")
    options.add_argument("--rate", type=float, default=2e-4, help="peak learning rate")
    options.add_argument("--steps", type=int, default=-1, help="stop after so many optimizer steps")
    options.add_argument("--texts", type=int, default=None, help="use so many dev and test sentences, not all")
    options.add_argument("--lora", action="store_true", help="train an adapter and the head, not every weight")
    options.add_argument("--output", default="classifier", help="folder for the model and its report")
    given = options.parse_args()

    train = load_classes(DATA / "train.jsonl.gz")
    classes = train.features["label"].names
    dev, test = (load_classes(DATA / f"{part}.jsonl.gz", labels=classes) for part in ("dev", "test"))
    if given.texts is not None:
        dev, test = (part.select(range(given.texts)) for part in (dev, test))

    model = FastClassifier.from_pretrained(
        given.model, labels=classes, max_seq_length=96, full_finetuning=not given.lora
    )  # fmt: skip
    if given.lora:
        model = FastClassifier.get_peft_model(model, r=16, lora_alpha=32)

    trainer = ClassifierTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(
            output_dir=f"{given.output}-checkpoints",
            num_train_epochs=given.epochs,
            max_steps=given.steps,
            per_device_train_batch_size=32,
            learning_rate=given.rate,
            warmup_steps=0.1,
            eval_strategy="epoch",
            logging_steps=10,
            seed=42,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=model.device.type == "cuda",
        ),
        train_dataset=train,
        evaluator=ClassificationEvaluator(dev, name="dev"),
    )
    trainer.train()

    calibration = model.calibrate(dev, fold=True)
    model.save_pretrained_merged(given.output)
    result = model.report(
        test,
        given.output,
        title="Which tactic is it?",
        data="test.jsonl.gz",
        history=trainer.state.log_history,
        settings={"epochs": given.epochs, "learning rate": given.rate, "method": "LoRA" if given.lora else "full"},
        notes=["(c) The MITRE Corporation. Sentences are distributed with its permission; split by actor."],
    )
    print(calibration)
    print(result)

    plain = pipeline("text-classification", model=given.output)
    print(plain("The malware lists the names of all running processes."))
    print(f"saved to {given.output}: the model, metrics.json and report.html")


if __name__ == "__main__":
    main()
