"""Fine-tune an embedding model with LoRA and measure what it gained, in Python.

    python docs/examples/finetune_lora.py              the whole epoch, about a minute and a half on two CPU cores
    python docs/examples/finetune_lora.py --steps 2    a look at how it goes

The data is the quickstart's: 1,401 pairs to train on, 400 held-out queries. Put your own in its place: any
`datasets.Dataset` with an `anchor` and a `positive` column.
"""

from __future__ import annotations

import argparse

from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from burnish import FastSentenceTransformer, SentenceTransformer, Trainer, TrainingArguments, losses
from burnish.core.quickstart import DATA
from burnish.core.retrieval_data import load_retrieval, training_pairs


def main() -> None:
    """Train, measure, save."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or Hub id")
    options.add_argument("--steps", type=int, default=-1, help="stop after so many optimizer steps")
    options.add_argument("--queries", type=int, default=400, help="held-out queries to measure on")
    options.add_argument("--output", default="finetuned", help="folder for the merged model")
    given = options.parse_args()

    model = FastSentenceTransformer.from_pretrained(given.model, max_seq_length=96)
    model = FastSentenceTransformer.get_peft_model(model, r=16, lora_alpha=32)

    before = score(model, given.queries)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{given.output}-checkpoints",
            num_train_epochs=1,
            max_steps=given.steps,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            seed=42,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=model.device.type == "cuda",
        ),
        train_dataset=training_pairs(DATA),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    after = score(model, given.queries)

    model.save_pretrained_merged(given.output)
    print(f"nDCG@10 on {given.queries} held-out queries: {before:.4f} before, {after:.4f} after")
    print(f"saved to {given.output}: load it with sentence_transformers.SentenceTransformer")


def score(model: SentenceTransformer, queries: int) -> float:
    """nDCG@10 on the first held-out queries."""
    held_out = load_retrieval(DATA, "test")
    chosen = dict(list(held_out.queries.items())[:queries])
    evaluator = InformationRetrievalEvaluator(chosen, held_out.corpus, held_out.relevant, name="test")
    return float(evaluator(model)["test_cosine_ndcg@10"])


if __name__ == "__main__":
    main()
