"""The cells of an Unsloth embedding notebook, one after the other. Usage: unsloth_notebook.py MODEL PAIRS.jsonl OUTPUT

The tests run it with `unsloth` written as `burnish` and nothing else changed. What reaches the network is local here.
"""

# ruff: noqa: E402 - imports stand in the cells that need them
import sys

from unsloth import FastSentenceTransformer  # type: ignore[import-not-found]

MODEL, PAIRS, OUTPUT = sys.argv[1:]

model = FastSentenceTransformer.from_pretrained(
    model_name=MODEL,
    max_seq_length=64,
    full_finetuning=False,
)

model = FastSentenceTransformer.get_peft_model(
    model,
    r=64,
    target_modules=["query", "key", "value", "dense"],
    lora_alpha=128,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing=False,
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
    task_type="FEATURE_EXTRACTION",
)

# --- data

from datasets import load_dataset  # type: ignore[import-untyped]

dataset = load_dataset("json", data_files=PAIRS, split="train", cache_dir=OUTPUT + "/cache")

# --- train

from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from unsloth import is_bf16_supported

loss = losses.MultipleNegativesRankingLoss(model)

trainer = SentenceTransformerTrainer(
    model=model,
    train_dataset=dataset,
    loss=loss,
    args=SentenceTransformerTrainingArguments(
        output_dir=OUTPUT + "/output",
        max_steps=16,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        fp16=not is_bf16_supported(),
        bf16=is_bf16_supported(),
        logging_steps=1,
        warmup_steps=0.03,
        report_to="none",
        lr_scheduler_type="constant_with_warmup",
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        disable_tqdm=True,
    ),
)

trainer_stats = trainer.train()
print(f"{trainer_stats.metrics['train_runtime']} seconds used for training.")

# --- inference

query = "what is in old a?"
candidates = ["in old a there is room for number 0", "in far h there is much room for number 23"]
query_emb = model.encode(query, convert_to_tensor=True)
candidate_embs = model.encode(candidates, convert_to_tensor=True)
similarities = model.similarity(query_emb, candidate_embs)
ranking = similarities.argsort(descending=True)[0]
for idx in ranking.tolist():
    print(f"{similarities[0][idx].item():.4f} | {candidates[idx]}")

# --- save

model.save_pretrained(OUTPUT + "/lora_model")
model.tokenizer.save_pretrained(OUTPUT + "/lora_model")
model.save_pretrained_merged(OUTPUT + "/merged", tokenizer=model.tokenizer, save_method="merged_16bit")

reloaded = FastSentenceTransformer.from_pretrained(OUTPUT + "/lora_model", for_inference=True)
again = reloaded.encode(candidates)
