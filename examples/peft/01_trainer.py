"""GPT-2 with LoRA on attention and MLP, trained by transformers' own Trainer; written for PEFT.

Run it:     python examples/peft/01_trainer.py
With PEFT:  python examples/peft/01_trainer.py peft
Elsewhere:  python examples/peft/01_trainer.py onebase.peft MODEL FOLDER
"""

import importlib
import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

TEXTS = [
    "The brindle is the small hammer that hangs by the door.",
    "The morrow shelf is the shelf for work that is promised for tomorrow.",
    "The tallow hour is the hour before closing, when the tools are oiled.",
    "To halloran is to measure once and cut twice.",
]


def main(library: str = "onebase.peft", model_name: str = "gpt2", folder: str = "runs/peft-trainer") -> list[float]:
    """Train, save, and return the loss of every step."""
    peft = importlib.import_module(library)  # in a script of your own: from onebase.peft import LoraConfig, ...
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_name)
    config = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules=["c_attn", "c_proj"])
    model = peft.get_peft_model(model, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=6,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            weight_decay=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=[tokenizer(text) for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
