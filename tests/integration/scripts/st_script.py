"""A Sentence Transformers training script as people write them. Usage: st_script.py MODEL PAIRS.jsonl OUTPUT

The tests run it as it is, and again with the one import from `sentence_transformers` itself changed.
"""

import json
import sys
from pathlib import Path

from datasets import load_dataset  # type: ignore[import-untyped]
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerModelCardData,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

base, data, output = sys.argv[1:]

model = SentenceTransformer(
    base,
    device="cpu",
    prompts={"query": "query: ", "document": "document: "},
    model_card_data=SentenceTransformerModelCardData(language="en", license="apache-2.0", model_name="Places"),
)
model.max_seq_length = 48

dataset = load_dataset("json", data_files=data, split="train", cache_dir=str(Path(output) / "cache"))
split = dataset.train_test_split(test_size=16, seed=12)

queries = {str(n): row["anchor"] for n, row in enumerate(split["test"])}
corpus = {str(n): row["positive"] for n, row in enumerate(split["test"])}
evaluator = InformationRetrievalEvaluator(queries, corpus, {key: {key} for key in queries}, name="dev")
before = evaluator(model)

loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), matryoshka_dims=[32, 16])
args = SentenceTransformerTrainingArguments(
    output_dir=str(Path(output) / "checkpoints"),
    num_train_epochs=4,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=8,
    learning_rate=5e-3,
    warmup_steps=2,
    batch_sampler=BatchSamplers.NO_DUPLICATES,
    prompts={"anchor": "query: ", "positive": "document: "},
    eval_strategy="steps",
    eval_steps=6,
    save_strategy="steps",
    save_steps=6,
    save_total_limit=2,
    logging_steps=2,
    load_best_model_at_end=True,
    metric_for_best_model="eval_dev_cosine_ndcg@10",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    seed=7,
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=args,
    train_dataset=split["train"],
    eval_dataset=split["test"],
    loss=loss,
    evaluator=evaluator,
)
trainer.train()

after = evaluator(model)
model.save_pretrained(str(Path(output) / "final"))
again = SentenceTransformer(str(Path(output) / "final"), device="cpu")
similarity = again.similarity(again.encode_query(list(queries.values())), again.encode_document(list(corpus.values())))
results = {
    "before": before["dev_cosine_ndcg@10"],
    "after": after["dev_cosine_ndcg@10"],
    "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    "best": trainer.state.best_model_checkpoint,
    "similarity": similarity.tolist(),
}
(Path(output) / "results.json").write_text(json.dumps(results))
