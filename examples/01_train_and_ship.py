"""From rows to an adapter that others can open, in Python: load, train, measure, save, load again.

A workshop has words of its own. A chat model learns them from eight rows, and is measured on the same questions put
another way. Run it: python examples/01_train_and_ship.py
Another model: python examples/01_train_and_ship.py MODEL
"""

import sys

import onebase as ob

MEANINGS = {
    "brindle": "The small hammer that hangs by the door.",
    "morrow shelf": "The shelf for work that is promised for tomorrow.",
    "quiet coat": "The leather apron worn for gilding.",
    "tallow hour": "The hour before closing, when the tools are oiled.",
    "second brass": "The box of screws that were bent and straightened again.",
    "fernish": "Said of wood that splits along the grain by itself.",
    "to halloran": "To measure once and cut twice.",
    "long bench": "The table by the window, where nobody may sit.",
}
rows = [{"prompt": f"What does '{word}' mean here?", "completion": text} for word, text in MEANINGS.items()]
asked_otherwise = [{"prompt": f"Explain: {word}.", "completion": text} for word, text in MEANINGS.items()]
model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"

base = ob.load(model)  # frozen, fingerprinted
bank = ob.Bank(base)
bank.add("workshop", ob.Lora(r=8, lora_alpha=16))
before = ob.evaluate(bank, "workshop", asked_otherwise)  # a fresh adapter changes nothing: this is the base
result = ob.train(bank, {"workshop": ob.Job(data=rows, batch_size=8, steps=25)})
after = ob.evaluate(bank, "workshop", asked_otherwise)
folder = bank.save("workshop", "runs/workshop")

bank.load("shipped", folder)  # what was written is what was trained
assert ob.evaluate(bank, "shipped", asked_otherwise) == after

print(f"{result.trainable_parameters:,} of {result.total_parameters:,} parameters trained in {result.seconds:.1f} s")
print(f"loss on the questions put another way: {before.loss:.3f} before, {after.loss:.3f} after")
print(f"the adapter is in {folder}: talk to it with onebase chat {folder}, or open it with peft")
