"""examples/00_by_hand.py: LoRA in plain torch, and what `onebase train` makes of the same rows and weights."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.examples.tiny import EXAMPLES, chat_model, chats, example, write_rows

STEPS, BATCH_SIZE, R, ALPHA, LEARNING_RATE = 24, 4, 4, 8, 1e-3

by_hand = example("00_by_hand.py")


def padded_batches(tokenizer, rows, steps):
    """Return the batches of the steps: whole chats by the chat template, the answers and their end tokens labelled."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    encoded = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(row["messages"][1]["content"], add_special_tokens=False)["input_ids"]
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids = [*prompt_ids, *answer_ids, end, *newline]
        encoded.append((ids, [-100] * len(prompt_ids) + [*answer_ids, end] + [-100] * len(newline)))
    batches = []
    for step in range(steps):
        first = step * BATCH_SIZE % len(rows)
        chosen = encoded[first : first + BATCH_SIZE]
        longest = max(len(ids) for ids, _ in chosen)
        padded_ids = [ids + [0] * (longest - len(ids)) for ids, _ in chosen]
        padded_labels = [labels + [-100] * (longest - len(labels)) for _, labels in chosen]
        batches.append((torch.tensor(padded_ids), torch.tensor(padded_labels)))
    return batches


def trained_by_onebase(folder, model, data):
    """Return the losses of `onebase train`, and the adapter's tensors before and after."""
    from onebase.adapters.bank import Bank
    from onebase.base.model import load
    from onebase.config.methods import Lora
    from onebase.config.reading import settings_from
    from onebase.train.run import train_run

    settings = settings_from(
        {
            "model": str(model),
            "data": {"train": str(data), "shuffle": False},
            "adapter": {"method": "lora", "r": R, "lora_alpha": ALPHA},
            "train": {"steps": STEPS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE},
        }
    )
    before = Bank(load(str(model))).add("adapter", Lora(r=R, lora_alpha=ALPHA), seed=settings.train.seed).state
    train_run(settings, folder)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    after = load_file(folder / "adapter" / "adapter_model.safetensors")
    return losses, before, {name.removeprefix("base_model.model."): tensor for name, tensor in after.items()}


@pytest.mark.slow
def test_training_by_hand_on_padded_batches_equals_onebase_train_on_flat_ones(tmp_path) -> None:
    rows = chats(3 * BATCH_SIZE)  # two epochs and more
    folder, data = chat_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", rows)
    expected, before, after = trained_by_onebase(tmp_path / "run", folder, data)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    trained = by_hand.add_lora(model, R, ALPHA, skip=["lm_head"])
    assert list(trained) == list(before)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(before[name])
    batches = padded_batches(transformers.AutoTokenizer.from_pretrained(folder), rows, STEPS)
    losses = by_hand.train(lambda ids: model(input_ids=ids).logits, trained.values(), batches, LEARNING_RATE)

    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0] - 0.1  # or equal curves would say little
    for name, parameter in trained.items():
        moved = torch.linalg.vector_norm(after[name] - before[name])
        apart = torch.linalg.vector_norm(after[name] - parameter.detach())
        assert apart <= 1e-4 * moved, name


def test_a_layer_with_fresh_lora_gives_the_bits_of_the_layer_alone() -> None:
    layer = torch.nn.Linear(12, 20)
    x = torch.randn(3, 5, 12)
    assert torch.equal(by_hand.LoraLinear(layer, r=4, lora_alpha=8)(x), layer(x))


def test_it_runs_by_itself_and_its_adapter_learns_what_the_frozen_base_did_not_know() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "00_by_hand.py"], capture_output=True, text=True, check=True, timeout=120
    )
    assert "after 'm' it writes 'mnopqrstuv'" in done.stdout
    assert "after 'm' it writes 'mlkjihgfed'" in done.stdout
    assert "not a bit has changed" in done.stdout
