"""A training script of sentence-transformers that moved here: what it set, and where it is now.

python examples/from_sentence_transformers.py [MODEL [KEY=VALUE ...]]
"""

import sys

from datasets import Dataset
from sentence_transformers import SentenceTransformer

from gist_train import load_config, train

name, overrides = (sys.argv[1:2] or ["sentence-transformers/all-MiniLM-L6-v2"])[0], sys.argv[2:]
anchors = [f"what is {a} times {b}" for a in range(2, 12) for b in range(2, 12)]
positives = [f"{a} times {b} is {a * b}" for a in range(2, 12) for b in range(2, 12)]
data = Dataset.from_dict({"anchor": anchors, "positive": positives})  # as before, of any columns
data.train_test_split(0.1, seed=42)["train"].to_parquet("train.parquet")
data.train_test_split(0.1, seed=42)["test"].to_parquet("test.parquet")
config = {
    "name": "moved",  # args.output_dir is runs/moved
    "model": {"name": name},  # SentenceTransformer(name)
    "guide": {"name": name},  # GISTEmbedLoss(model, guide=SentenceTransformer(name),
    "loss": {"temperature": 0.01, "margin": 0.0},  # temperature=0.01, margin=0.0)
    "data": {"train": [{"source": "parquet", "path": "train.parquet"}]},  # train_dataset
    "training": {"batch_size": 16, "epochs": 1, "seed": 42},  # per_device_train_batch_size, num_train_epochs, seed
    "optimizer": {"lr": 2e-5},  # learning_rate
    "schedule": {"type": "linear", "warmup_ratio": 0.1},  # lr_scheduler_type, warmup_ratio
    "checkpoint": {"every": 3, "keep_last": 2},  # save_steps, save_total_limit
    "tracking": {"log_every": 1},  # logging_steps
    "evaluation": {"every": 3, "tasks": [{"type": "retrieval", "name": "test", "path": "test.parquet"}]},  # evaluator, eval_steps
    "selection": {"metric": "test/ndcg@10"},  # metric_for_best_model, load_best_model_at_end
}
run = train(load_config(config, overrides))  # SentenceTransformerTrainer(...).train()
run.select()
model = SentenceTransformer(str(run.export("moved-model")), device="cpu")  # model.save_pretrained
print(model.similarity(model.encode(["what is 7 times 8"]), model.encode(["7 times 8 is 56", "the sea is blue"])))
