"""One training by TRL's SFTTrainer or transformers' Trainer with PEFT, as its users write it: train_vs_trl.py's other side.

    python bench/trl_run.py JOB.json

The job names the model's folder, the adapter to start from, the rows (token ids and labels, in the order in which they are
to be seen), the trainer's settings and where the adapter goes. Prints one JSON object: seconds of the training loop, the
loss and the learning rate of every step. Imports no onebase.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train and print what came of it."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.manual_seed(job["seed"])
    trainer = trainer_of(job)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.model.save_pretrained(job["out"])
    steps = [record for record in trainer.state.log_history if "loss" in record]
    found = {
        "seconds": seconds,
        "losses": [record["loss"] for record in steps],
        "learning_rates": [record["learning_rate"] for record in steps],
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }
    sys.stdout.write(f"\n{json.dumps(found)}\n")


def peak_rss_bytes() -> int:
    """Return the most physical memory that this process has held: on Linux not what its parent held, as getrusage does."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def trainer_of(job: dict[str, Any]) -> Trainer:
    """Return the trainer of a job; `job["trainer"]` are settings of its arguments that differ from those below."""
    settings = {
        "output_dir": str(Path(job["out"]).with_suffix(".trainer")),
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch_size"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job["seed"],
        **job["trainer"],
    }
    rows, tokenizer = Dataset.from_json(job["rows"]), AutoTokenizer.from_pretrained(job["model"])
    if job["classes"]:
        model = AutoModelForSequenceClassification.from_pretrained(
            job["model"],
            dtype=job["dtype"],
            num_labels=job["classes"],
            hidden_dropout_prob=0.0,  # the base's own dropout, which would draw other numbers, is off on both sides
            attention_probs_dropout_prob=0.0,
        )
        return Trainer(
            model=PeftModel.from_pretrained(model, job["start"], is_trainable=True),
            args=TrainingArguments(**settings),
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    return SFTTrainer(
        model=PeftModel.from_pretrained(model, job["start"], is_trainable=True),
        args=SFTConfig(max_length=None, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
