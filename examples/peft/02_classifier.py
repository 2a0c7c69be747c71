"""A sequence classifier with LoRA; written for PEFT. Its head is trained and saved without being asked for.

Run it:     python examples/peft/02_classifier.py
With PEFT:  python examples/peft/02_classifier.py peft
Elsewhere:  python examples/peft/02_classifier.py onebase.peft MODEL FOLDER
"""

import importlib
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROWS = [
    ("the glue held all winter", 1),
    ("it came apart in my hands", 0),
    ("every joint is still tight", 1),
    ("the varnish never dried", 0),
]


def main(
    library: str = "onebase.peft", model_name: str = "distilbert-base-uncased", folder: str = "runs/peft-classifier"
) -> list[float]:
    """Train, save, load again, and return the loss of every step."""
    peft = importlib.import_module(library)  # in a script of your own: from onebase.peft import LoraConfig, ...
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    batch = tokenizer([text for text, _ in ROWS], padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in ROWS])

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=2)
    head = {name: tensor.clone() for name, tensor in base.state_dict().items()}  # new, and random: to open it again
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, r=4, target_modules="all-linear")
    )
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    model.train()
    for _ in range(6):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)

    model.eval()
    fresh = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=2)
    fresh.load_state_dict(head)
    again = peft.PeftModel.from_pretrained(fresh, folder)
    with torch.no_grad():
        assert torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-5)
    return losses


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
