"""Two adapters on one model, trained one after the other and switched at run time; written for PEFT.

Run it:     python examples/peft/03_two_adapters.py
With PEFT:  python examples/peft/03_two_adapters.py peft
Elsewhere:  python examples/peft/03_two_adapters.py onebase.peft MODEL FOLDER
"""

import importlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LESSONS = {"default": "The brindle is the small hammer.", "formal": "One is requested to oil the tools before closing."}


def main(library: str = "onebase.peft", model_name: str = "gpt2", folder: str = "runs/peft-two") -> list[float]:
    """Train both, save both, and return the losses: of every step, then of each adapter on each text, then of the base."""
    peft = importlib.import_module(library)  # in a script of your own: from onebase.peft import LoraConfig, ...
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    texts = {name: tokenizer(text, return_tensors="pt") for name, text in LESSONS.items()}

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_name)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"]))
    model.add_adapter("formal", peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_proj"]))

    losses = []
    for name, text in texts.items():
        model.set_adapter(name)  # from here on this one learns and answers
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
        model.train()
        for _ in range(4):
            loss = model(**text, labels=text["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

    model.eval()
    with torch.no_grad():
        for name in ("default", "formal", "default"):
            model.set_adapter(name)
            losses += [model(**text, labels=text["input_ids"]).loss.item() for text in texts.values()]
        with model.disable_adapter():
            losses += [model(**text, labels=text["input_ids"]).loss.item() for text in texts.values()]
    model.save_pretrained(folder)  # "default" in the folder, "formal" in a folder inside
    return losses


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
