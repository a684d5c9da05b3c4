"""Fine-tune a reranker on BM25's candidates and measure how much better than BM25 it orders them.

    python docs/examples/rerank.py                                                    about 20 minutes on one CPU core
    python docs/examples/rerank.py --steps 2 --train-queries 16 --test-queries 4      a look at how it goes

The data: what an intruder did, and for each such sentence 30 techniques of MITRE ATT&CK as BM25 ranks them, split by
actor. (c) The MITRE Corporation. This work is reproduced and distributed with the permission of The MITRE Corporation;
see NOTICE.txt beside it. Put your own in its place: a folder with corpus.jsonl and train.jsonl (docs/rerankers.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

from burnish import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments, FastCrossEncoder
from burnish.core.hard_negatives import with_hard_negatives
from burnish.core.reranking import evaluate_reranking, load_reranking

DATA = Path(__file__).parent / "data" / "attack_rerank"


def main() -> None:
    """Train, measure, save, and rank with what was saved."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or Hub id")
    options.add_argument("--data", type=Path, default=DATA, help="a reranking folder")
    options.add_argument("--train-queries", type=int, default=4000, help="use so many training queries")
    options.add_argument("--test-queries", type=int, default=300, help="measure on so many test queries")
    options.add_argument("--negatives", type=int, default=4, help="of a training query, drawn from its candidates")
    options.add_argument("--epochs", type=float, default=1, help="passes over the training pairs")
    options.add_argument("--rate", type=float, default=2e-4, help="peak learning rate")
    options.add_argument("--length", type=int, default=64, help="longest pair in tokens")
    options.add_argument("--steps", type=int, default=-1, help="stop after so many optimizer steps")
    options.add_argument("--seed", type=int, default=42, help="of the head, the negatives and the order of the data")
    options.add_argument("--output", default="reranker", help="folder for the model")
    given = options.parse_args()

    train = load_reranking(given.data, "train", max_queries=given.train_queries)
    test = load_reranking(given.data, "test", max_queries=given.test_queries)
    pairs = with_hard_negatives(train, num_negatives=given.negatives, sampling_strategy="random", seed=given.seed)

    # An embedding model has no head to score pairs with: a fresh one is drawn, and everything trains.
    model = FastCrossEncoder.from_pretrained(
        given.model, full_finetuning=True, num_labels=1, max_seq_length=given.length, random_state=given.seed
    )
    trainer = CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(
            output_dir=f"{given.output}-checkpoints",
            num_train_epochs=given.epochs,
            max_steps=given.steps,
            per_device_train_batch_size=32,
            learning_rate=given.rate,
            warmup_steps=0.1,
            logging_steps=10,
            seed=given.seed,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=model.device.type == "cuda",
        ),
        train_dataset=pairs,
        loss=BinaryCrossEntropyLoss(model),
    )
    trainer.train()
    model.save_pretrained_merged(given.output)
    print(f"trained on {len(pairs):,} pairs of {len(train.queries):,} queries; saved to {given.output}")
    print(evaluate_reranking(model, test))

    query = next(iter(test.queries))
    documents = [test.corpus[one] for one in test.candidates[query]]
    print(f"\n{test.queries[query]}")
    for hit in CrossEncoder(given.output).rank(test.queries[query], documents, top_k=3):
        print(f"{hit['score']:.3f}  {documents[hit['corpus_id']][:80]}")


if __name__ == "__main__":
    main()
