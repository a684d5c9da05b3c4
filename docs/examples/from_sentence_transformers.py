"""A training script for Sentence Transformers, moved to Burnish by one changed import.

python docs/examples/from_sentence_transformers.py --steps 2
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from sentence_transformers.sentence_transformer.evaluation import TripletEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

# The one line that changes. It read: from sentence_transformers import SentenceTransformer, …
from burnish import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

TRIPLETS = [
    ("How long does a refund take?", "Refunds reach your card in five working days.", "We ship to all of Europe."),
    ("Can I change my address?", "Yes, until the parcel has left.", "Invoices are in your account."),
    ("Do you ship abroad?", "We ship to all of Europe.", "Refunds reach your card in five working days."),
    ("Where is my invoice?", "Invoices are in your account.", "Yes, until the parcel has left."),
    ("Is there a warranty?", "Two years on everything we sell.", "We are open from nine to five."),
    ("When can I call you?", "We are open from nine to five.", "Two years on everything we sell."),
    ("Can I pay by invoice?", "Business customers can.", "The parcel is left with a neighbour."),
    ("What if nobody is home?", "The parcel is left with a neighbour.", "Business customers can."),
]


def main() -> None:
    """Train on six triplets, evaluate on two, save."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or Hub id")
    options.add_argument("--steps", type=int, default=-1, help="stop after so many optimizer steps")
    options.add_argument("--output", default="from-sentence-transformers", help="folder for the model")
    given = options.parse_args()

    anchors, positives, negatives = zip(*TRIPLETS, strict=True)
    data = Dataset.from_dict({"anchor": anchors, "positive": positives, "negative": negatives})
    model = SentenceTransformer(given.model)
    evaluator = TripletEvaluator(anchors[6:], positives[6:], negatives[6:], name="held-out")
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=f"{given.output}-checkpoints",
            num_train_epochs=1,
            max_steps=given.steps,
            per_device_train_batch_size=3,
            learning_rate=2e-5,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=model.device.type == "cuda",
        ),
        train_dataset=data.select(range(6)),
        loss=MultipleNegativesRankingLoss(model),
        evaluator=evaluator,
    )
    trainer.train()
    model.save_pretrained(given.output)
    print(f"held-out accuracy {evaluator(model)['held-out_cosine_accuracy']:.2f}, saved to {given.output}")


if __name__ == "__main__":
    main()
